"""The checks of gpu_acceptance.py: the table, and the checks that a CPU can pass, too.

On a CPU, the reference layers replace the other device. A tiny setting has small models and few steps.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from drawn_images import drawn_image
from fault_campaign.runs import Run, ended_with, kill, numbers, same_weights, wait_for
from gpu_findings import Check, Findings, Setting, distance
from gpu_speed import against_reference, compiling, heartbeat, kernels, speed, whole_graph
from portable_decoding import other_threads, variant
from seeded_models import small_1b, spread_nano
from torch import Tensor, nn

from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.container import unpack
from hpcm_scale.compute.hardware import peak_flops
from hpcm_scale.config.compose import compose, compose_model
from hpcm_scale.config.schema import Config, ModelConfig, Precision, RateConfig
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.distributed.processes import world_size
from hpcm_scale.distributed.watchdog import Watchdog
from hpcm_scale.errors import STOPPED, UserError, is_first_process
from hpcm_scale.model.arithmetic import Kernels, memory_format_of, use_kernels
from hpcm_scale.model.context import WindowFusion
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.model.ladder import compose_sized, sized
from hpcm_scale.model.layers import Block, Pointwise, set_arithmetic
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.training.checkpoints import Checkpoint, Checkpoints
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.run import run
from hpcm_scale.training.state_shards import StateShard, load, open_state
from hpcm_scale.training.task import Task, image_levels, image_noise, task_of

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets, and that training without one sets itself."""


# Images, models and training runs


def crops(number: int) -> Tensor:
    """A batch of drawn images (number, 3, 256, 256), fp32 in [0, 1], on the CPU."""
    pixels = np.stack([drawn_image(seed, 256, 256) for seed in range(number)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def models() -> dict[str, ModelConfig]:
    """Small models that together contain every kind of layer."""
    return {
        "nano": compose_model("nano"),
        "tiny 1b": small_1b(),
        "swin": sized(ModelConfig(family="swin", size="300k")),
        "convnext": sized(ModelConfig(family="convnext", size="300k")),
        "variable rate": replace(compose_model("nano"), rate=RateConfig(levels=6)),
    }


def one_step(
    model: ModelConfig, device: torch.device, precision: Precision = Precision.fp32, *, reference: bool = False
) -> tuple[HPCM, float]:
    """A model after one backward pass on a batch of two, and its loss; weights, images and noise are always the same.

    `reference`: NCHW, with torch's own layers.
    """
    config = replace(compose([f"engine.precision={precision.value}"]), model=model)
    torch.manual_seed(0)
    task = task_of(config, None, {})
    codec, batch, indices = task.codec, crops(2), torch.arange(2)
    noise = Noise(*(values.to(device) for values in image_noise(codec, batch, indices, seed=0)))
    level = image_levels(model.rate.levels, indices, 0).to(device) if model.rate.levels > 1 else None
    images = batch.to(device, memory_format=torch.contiguous_format if reference else torch.channels_last)
    set_arithmetic(precision)
    codec.to(device)
    with use_kernels(Kernels.reference) if reference else nullcontext():
        loss = task.objective(images, codec(images, noise, level), level).loss.mean()
        loss.backward()
    return codec, loss.item()


def trained(setting: Setting, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Train `nano` in the processes of this check, each of which calls it; the journal."""
    folder = setting.folder / name
    run(compose_sized([*keys(setting), *overrides, f"run.dir={folder}"]))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def keys(setting: Setting) -> list[str]:
    """Overrides of all runs."""
    common = ["model=nano", "schedule.learning_rate=1e-3", "log.wandb=disabled", "data.workers=0"]
    return [*common, f"data.shards={setting.shards}", f"train.batch_size={setting.pick(4, setting.processes)}"]


def losses(journal: Sequence[dict[str, Any]], name: str = "train/loss") -> list[float]:
    """One metric of the journal, from the lines that have it."""
    return [line[name] for line in journal if name in line]


def engine_keys(engine: str) -> list[str]:
    """Overrides that choose an engine; stage 3 also shards the small tensors of `nano`."""
    kept = "+engine.options.zero_optimization.stage3_param_persistence_threshold=0"
    return [f"engine={engine}", *([kept] if engine.startswith("zero3") else [])]


# Checks 1 to 3: one step


def start(setting: Setting, found: Findings) -> None:
    """Imports, device, and the output of training."""
    name = torch.cuda.get_device_name(setting.device) if setting.cuda else "cpu"
    peaks = {str(precision.value): peak_flops(setting.device, precision == Precision.bf16) for precision in Precision}
    found.note("device", name)
    found.note("peak", peaks)
    found.note("cuda", torch.version.cuda)
    found.note("cudnn", torch.backends.cudnn.version())
    if setting.cuda:
        free, total = torch.cuda.mem_get_info(setting.device)
        found.note("memory_gb", {"free": free / 1e9, "all": total / 1e9})
        found.note("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    found.expect(all(peaks.values()), f"the peak rate of {name} is unknown (hpcm_scale/compute/hardware.py)")
    for engine in ("zero2", "accelerate"):
        folder = setting.folder / engine
        command = [sys.executable, "-m", "hpcm_scale.cli", "train", *keys(setting), *engine_keys(engine)]
        began = time.monotonic()
        done = subprocess.run(
            [*command, "train.steps=1", f"run.dir={folder}"], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        found.note(f"{engine}_seconds", time.monotonic() - began)
        ours = re.compile(rf"{re.escape(str(folder))}: nano, |{engine}: step |finished at step 1: ")
        unexpected = [line for line in (done.stdout + done.stderr).splitlines() if not ours.match(line)]
        found.expect(done.returncode == 0, f"training with engine={engine} exited with code {done.returncode}")
        found.expect(not unexpected, f"with engine={engine} there is unexpected output: {' | '.join(unexpected[:10])}")


def same_numbers(setting: Setting, found: Findings) -> None:
    """Loss and gradients in fp32, compared with the reference layers on the CPU."""
    for name, config in models().items():
        expected, expected_loss = one_step(config, torch.device("cpu"), reference=True)
        model, loss = one_step(config, setting.device)
        gradients = {key: parameter.grad.cpu() for key, parameter in expected.named_parameters()}
        largest = max(gradient.abs().max() for gradient in gradients.values())
        off = {}
        for key, parameter in model.named_parameters():
            scale = gradients[key].abs().max() + 1e-4 * largest  # some gradients are zero up to rounding
            off[key] = ((parameter.grad.cpu() - gradients[key]).abs().max() / scale).item()
        worst = max(off, key=off.get)
        of_loss = distance([loss], [expected_loss])
        found.note(name, {"loss": of_loss, "gradient": off[worst], "of": worst})
        found.expect(of_loss <= 1e-4, f"{name}: the loss differs by {of_loss:.2g}")
        found.expect(off[worst] <= 1e-3, f"{name}: the gradient of {worst} differs by {off[worst]:.2g}")


def reduced(setting: Setting, found: Findings) -> None:
    """bf16: fp32 where required, bf16 elsewhere, channels-last at every block, and about the same loss."""
    for name, config in models().items():
        _, expected = one_step(config, setting.device)
        wrong, tensors, kinds = [], count(), set()
        real = HPCM.forward

        def watched(model: HPCM, *inputs: Any, real=real, wrong=wrong, tensors=tensors, kinds=kinds) -> Any:
            for module in model.modules():
                module.register_forward_hook(partial(check_tensors, model, wrong, tensors, kinds))
            return real(model, *inputs)

        with patch.object(HPCM, "forward", watched):
            model, loss = one_step(config, setting.device, Precision.bf16)
        gradients = {parameter.grad.dtype for parameter in model.parameters()}
        found.note(name, {"tensors": next(tensors), "loss": distance([loss], [expected])})
        found.expect(not wrong, f"{name}: {', '.join(dict.fromkeys(wrong))}")
        found.expect(kinds == {torch.bfloat16}, f"{name}: convolutions give {kinds}")
        found.expect(gradients == {torch.float32}, f"{name}: gradients are {gradients}")
        found.expect(distance([loss], [expected]) <= 0.01, f"{name}: the loss is {loss:.5g}, in fp32 {expected:.5g}")


def check_tensors(
    model: HPCM, wrong: list[str], tensors: Any, kinds: set, module: nn.Module, inputs: Any, output: Any
) -> None:
    """Forward hook: record tensors with a wrong dtype or memory format."""
    outputs = output if isinstance(output, tuple) else (output,)
    present = [tensor for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor)]
    kind = type(module).__name__
    if module in (model.g_a, model.h_a, model.h_s, model.g_s, model.rate, model.hyper_prior):
        next(tensors)
        wrong += [f"{tensor.dtype} at {kind}" for tensor in present if tensor.dtype != torch.float32]
    if isinstance(module, (Block, WindowFusion, Pointwise)):
        next(tensors)
        contiguous = [tensor for tensor in present if memory_format_of(tensor) != torch.channels_last]
        wrong += [f"NCHW at {kind}"] * len(contiguous)
    if type(module) is nn.Conv2d:
        kinds.add(output.dtype)


# Checks 4 to 8: training runs


def engines(setting: Setting, found: Findings) -> None:
    """The same losses with every engine, with and without overlapped communication."""
    common = [f"train.steps={setting.pick(20, 3)}", "engine.deterministic=true"]
    found_losses = {}
    for engine in ("accelerate", "zero0", "zero1", "zero2", "zero3", "zero3_offload"):
        found_losses[engine] = losses(trained(setting, engine, *common, *engine_keys(engine)))
        off = distance(found_losses[engine], found_losses["accelerate"])
        found.note(engine, off)
        found.expect(off <= 1e-5, f"the losses of {engine} differ from those of accelerate by {off:.2g}")
    for engine in ("zero1", "zero2", "zero3"):
        overlap = "+engine.options.zero_optimization.overlap_comm=false"
        without = losses(trained(setting, f"{engine}_off", *common, *engine_keys(engine), overlap))
        off = distance(without, found_losses[engine])
        found.note(f"{engine}_overlap_off", off)
        found.expect(without == found_losses[engine], f"{engine}: the losses without overlap_comm differ by {off:.2g}")


def resumed(setting: Setting, found: Findings) -> None:
    """Training with a stop half-way, compared with an uninterrupted run."""
    steps = setting.pick(20, 4)
    for deterministic in ("true", "false"):  # cuBLAS reads its environment once; only the first needs it
        for engine in ("zero2", "zero3") if deterministic == "true" or not setting.tiny else ("zero2",):
            name = f"{engine}{'_deterministic' * (deterministic == 'true')}"
            common = [f"train.steps={steps}", f"engine.deterministic={deterministic}", *engine_keys(engine)]
            whole = trained(setting, name, *common)
            trained(setting, f"{name}_halves", *common, f"train.stop_after={steps // 2}")
            halves = trained(setting, f"{name}_halves", *common)
            files = [setting.folder / folder / "weights.safetensors" for folder in (name, f"{name}_halves")]
            same = numbers(halves) == numbers(whole) and same_weights(*files)
            found.note(name, "same digits" if same else distance(losses(halves), losses(whole)))
            found.expect(same or deterministic == "false", f"{name}: the digits of the resumed run differ")


def evaluated(setting: Setting, found: Findings) -> None:
    """Evaluations do not change the training losses; stage 3 resumes from a checkpoint of stage 2."""
    steps = setting.pick(12, 4)
    common = [f"train.steps={steps}", "engine.deterministic=true"]
    looking = [f"eval.images={setting.images}", f"eval.every={steps // 4}", "train.ema=[0.1]"]
    alone = trained(setting, "alone", *common, *engine_keys("zero2"))
    whole = trained(setting, "evaluated", *common, *looking, *engine_keys("zero2"))
    off = distance(losses(whole), losses(alone))
    found.note("with_evaluation", off)
    found.expect(off <= 1e-5, f"with evaluations the training losses differ by {off:.2g}")
    half = f"train.stop_after={steps // 2}"
    trained(setting, "moved", *common, *looking, *engine_keys("zero2"), half)
    checkpoint = Checkpoints(setting.folder / "moved" / "checkpoints").of(steps // 2)
    config = compose([*keys(setting), *common, *engine_keys("zero3")])
    found.expect(exact_under(config, checkpoint), "stage 3 does not have the weights of stage 2's checkpoint")
    moved = trained(setting, "moved", *common, *looking, *engine_keys("zero3"))
    for name in ("train/loss", "eval/loss", "eval_ema_0.1/loss"):
        off = distance(losses(moved, name), losses(whole, name))
        found.note(f"stage_2_to_3 {name}", off)
        found.expect(off <= 1e-5, f"from stage 2 to 3, {name} differs by {off:.2g}")


def exact_under(config: Config, checkpoint: Checkpoint) -> bool:
    """Whether an engine returns the weights of a loaded checkpoint to the bit; every process calls it."""
    engine = create_engine(config.engine, config.train, config.optimizer, RunSpec.of(config, world_size()))
    engine.prepare(HPCM(config.model))
    names, state = checkpoint.read()
    files = [checkpoint.folder / name for name in names]
    load(files, engine.state_shards())
    engine.load_master_weights(state["updates"])
    weights = engine.weights()
    engine.close()
    with open_state(files) as stored:
        for name, weight in (weights or {}).items():
            shard = StateShard("weight", name, 0, torch.empty(weight.numel()))
            stored(shard)
            if not torch.equal(shard.values, weight.flatten()):
                return False
    return True


def checkpoints(setting: Setting, found: Findings) -> None:
    """The pause of training for a checkpoint; SIGTERM, kill -9, and resuming."""
    model = setting.pick("68m", "nano")
    common = [f"model={model}", "engine.precision=bf16", "schedule.learning_rate=1e-4", "train.steps=12"]
    frequent = ["train.checkpoint_every=4", "train.keep_checkpoints=1"]
    journal = trained(setting, "pauses", *common, *frequent, *engine_keys("zero2"))
    if not is_first_process():
        return
    times, steps = losses(journal, "time"), losses(journal, "perf/step_seconds")
    pauses = [times[step] - times[step - 1] - steps[step] for step in (4, 8)]
    found.note("pauses", pauses)
    found.note("step_seconds", {"quiet": statistics.median(steps[2:4]), "while_written": [steps[4], steps[8]]})
    found.note("checkpoint_gb", 12 * parameter_count(on_meta(compose_model(model))) / setting.processes / 1e9)
    if setting.cuda:
        found.note("pinned_gb", torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 1e9)
    found.expect(pauses[1] < 0.5 or not setting.cuda, f"the second checkpoint paused training for {pauses[1]:.2f} s")
    for name in LAUNCHER:
        os.environ.pop(name, None)  # set for this process only
    survive(setting, found)


def survive(setting: Setting, found: Findings) -> None:
    """A run that is stopped, killed, and finished."""
    limit = setting.pick(60, 600)
    frequent = ["train.steps=100000", "train.checkpoint_every=5"]
    training = Run(setting.folder / "run", [*keys(setting), *frequent, *engine_keys("zero2")], setting.processes)

    def stepped(number: int) -> None:
        wait_for(lambda: training.step() >= number or training.poll() is not None, limit, f"step {number}")

    def ended() -> int:
        wait_for(lambda: training.poll() is not None, limit, "the end")
        training.wait_until_gone()
        return training.poll()

    with ended_with(training):
        training.start()
        stepped(2)
        os.kill(training.ranks()[0].pid, signal.SIGTERM)
        code = ended()
        found.note("after_sigterm", code)
        found.expect(code == STOPPED, f"after SIGTERM, training exited with code {code}")
        reached = training.newest()
        training.start()
        stepped(reached + 6)
        kill(training.ranks()[-1:])
        found.note("after_kill", ended())
        training.overrides.append(f"train.stop_after={training.newest() + 3}")
        code = training.finish(limit=limit)
        found.note("after_resume", code)
        found.expect(code == 0, f"the resumed run exited with code {code}")
        written = [record["step"] for record in training.records()]
        found.expect(written == list(range(1, len(written) + 1)), "the journal does not have one line per step")
        output = training.log.read_text(encoding="utf-8", errors="replace")
        found.expect("Traceback" not in output, "training printed a traceback")


FAULTS = {
    "memory": (1, "hpcm: .*memory.*"),
    "nan": (2, "hpcm: the run stopped at step 3: .*"),
    "stall": (1, "hpcm: no step for .* minutes after step 2 .*; stack traces: .*"),
}
"""Exit code and last line of runs whose third step fails."""


def faults(setting: Setting, found: Findings) -> None:
    """Out of memory, a NaN loss, a blocked main thread: three runs at once."""
    program = "import sys; from gpu_checks import train_with_fault; train_with_fault(sys.argv.pop(1))"
    options = ["train.steps=100", "train.on_divergence=stop", "train.watchdog_timeout=30", "engine=zero2"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = {}
    for kind in FAULTS:
        overrides = [*keys(setting), *options, f"run.dir={setting.folder / kind}"]
        with (setting.folder / f"{kind}.log").open("w", encoding="utf-8") as log:
            started[kind] = subprocess.Popen(
                [sys.executable, "-c", program, kind, *overrides],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    for kind, (code, last) in FAULTS.items():
        ended = started[kind].wait()
        lines = (setting.folder / f"{kind}.log").read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        found.note(kind, [ended, lines[-1]])
        found.expect(ended == code, f"{kind}: training exited with code {ended}")
        found.expect(re.fullmatch(last, lines[-1]) is not None, f"{kind}: the last line is: {lines[-1]}")
        found.expect(not any(line.startswith("Traceback") for line in lines), f"{kind}: there is a traceback")
    stacks = list((setting.folder / "stall").glob("stacks/*.txt"))
    found.expect(bool(stacks) and all(file.stat().st_size for file in stacks), "the stall left no stack traces")


def train_with_fault(kind: str) -> None:
    """`hpcm train` with the arguments of this process; its third step fails by one of FAULTS."""
    from hpcm_scale.train import main

    real, steps = Task.loss, count(1)
    enter, watches = Watchdog.__enter__, []

    def entered(watch: Watchdog) -> Watchdog:
        watches.append(watch)
        return enter(watch)

    def failing(task: Task, module: nn.Module, batch: Any, device: torch.device) -> Any:
        result = real(task, module, batch, device)
        if next(steps) < 3:
            return result
        if kind == "memory":
            exhaust(device)
        if kind == "stall":
            watches[0]._stall_seconds = 6.0  # only now: the start takes longer
            time.sleep(86_400)
        return result._replace(loss=result.loss * torch.nan)

    Task.loss, Watchdog.__enter__ = failing, entered
    main()


def exhaust(device: torch.device) -> None:
    """Allocate more memory than any device has; on a CPU, raise the error directly."""
    if device.type == "cuda":
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError("out of memory")


def decoding(setting: Setting, found: Findings) -> None:
    """Files decode on another device than they were encoded on; on a CPU, with other threads and memory format."""
    codec = Codec(spread_nano(0))
    other = variant(codec, lambda model: model.to(setting.device, memory_format=torch.channels_last))
    sizes = ((256, 256), (300, 200), (77, 411))
    identical, most = 0, 0
    for seed, size in enumerate(sizes):
        pixels = torch.from_numpy(drawn_image(seed, *size)).permute(2, 0, 1).contiguous()
        ours = codec.compress(pixels)
        with other_threads():
            theirs = other.compress(pixels)
        identical += unpack(ours).symbols_checksum == unpack(theirs).symbols_checksum
        for encoder, data in (("the CPU", ours), (setting.device.type, theirs)):
            try:
                here = codec.decompress(data)
                with other_threads():
                    there = other.decompress(data)
            except UserError as error:
                found.expect(False, f"a file encoded on {encoder}: {error}")
                continue
            most = max(most, (here.int() - there.int()).abs().max().item())
    found.note("files", 2 * len(sizes))
    found.note("images_with_the_same_symbols", identical)
    found.note("largest_pixel_difference", most)
    found.expect(most <= 1, f"decoded pixels differ by up to {most}")


CHECKS = (
    Check(1, "start: device, peak rate, output", 15, "a", start, needs_gpu=True),
    Check(2, "fp32 against the reference on the CPU", 20, "a", same_numbers),
    Check(3, "bf16: dtypes, channels-last, loss", 15, "a", reduced),
    Check(4, "engines, with and without overlap", 48, "a", engines, together=True),
    Check(9, "a thread beside a full launch queue", 42, "a", heartbeat, needs_gpu=True),
    Check(5, "stopped half-way and resumed", 42, "b", resumed, together=True),
    Check(6, "evaluation, averages, ZeRO 2 to 3", 25, "b", evaluated, together=True),
    Check(7, "checkpoint, SIGTERM, kill -9", 28, "b", checkpoints, together=True),
    Check(8, "out of memory, NaN, stall", 20, "b", faults),
    Check(13, "files across devices", 12, "b", decoding),
    Check(14, "a step of nano as one CUDA graph", 13, "b", whole_graph, needs_gpu=True),
    Check(10, "compilation of 68m", 65, "c", compiling, needs_gpu=True),
    Check(11, "utilisation, launches, memory", 47, "c", speed, needs_gpu=True),
    Check(12, "kernels by shape", 12, "c", kernels, needs_gpu=True),
    Check(15, "bf16 against the fp32 reference", 18, "c", against_reference),
)
PART_SECONDS = 150
