"""The checks of gpu_acceptance.py. Each notes figures, and what it expected and did not find, in a `Findings`.

Every function runs on a CPU, too, where a CUDA graph is the work itself, a stream does not sleep, and the other device is
the plain way to compute. A tiny setting takes small models and few steps.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from fault_campaign.runs import Run, ended_with, kill, numbers, same_weights, wait_for
from PIL import Image
from portable_decoding import other_threads, variant
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from hpcm_scale.benchmark.machine import matmul_rate, products
from hpcm_scale.benchmark.paired import alternate, ratio, seconds, synchronize, timed
from hpcm_scale.benchmark.step import PLAIN, Step, Steps, Way
from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.container import unpack
from hpcm_scale.compute.hardware import peak_flops
from hpcm_scale.config.compose import compose, compose_model
from hpcm_scale.config.schema import Config, ModelConfig, Precision, RateConfig
from hpcm_scale.errors import STOPPED, UserError, in_a_line, is_first_process
from hpcm_scale.model.context import WindowFusion
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.model.ladder import sized
from hpcm_scale.model.layers import Block, Pointwise, attend, depthwise_block, set_arithmetic
from hpcm_scale.model.memory_format import memory_format_of
from hpcm_scale.model.plain import plain
from hpcm_scale.model.product import product
from hpcm_scale.model.shapes import on_meta, parameter_count
from hpcm_scale.training.checkpoints import Checkpoint, Checkpoints
from hpcm_scale.training.costs import training_flops_per_image
from hpcm_scale.training.engine import create_engine
from hpcm_scale.training.estimate import estimate
from hpcm_scale.training.noise import image_levels, image_noise
from hpcm_scale.training.pieces import Piece, fill, opened
from hpcm_scale.training.run import run
from hpcm_scale.training.task import Task, task_of

BF16 = Way(Precision.bf16)
COMPILED = Way(Precision.bf16, compiled=True)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets, and what a training without one fills in."""


@dataclass(frozen=True)
class Setting:
    """What a check runs on."""

    device: torch.device
    tiny: bool
    folder: Path
    """Of this check alone."""
    shards: Path
    images: Path
    """Folder of three pictures of different sizes."""
    processes: int = 1

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def pick(self, full: Any, tiny: Any) -> Any:
        """The one or the other."""
        return tiny if self.tiny else full


class Findings:
    """Figures and failures of a check, written to a file at once: a check that is cut short has told them."""

    def __init__(self, path: Path) -> None:
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []
        self.done = False
        self._path = path

    def note(self, name: str, value: Any) -> None:
        """A figure: a number, a text, or a list or dictionary of them."""
        self.figures[name] = rounded(value)
        self.write()

    def expect(self, condition: bool, otherwise: str) -> None:
        """`otherwise` says what is wrong unless the condition holds."""
        if not condition:
            self.failures.append(otherwise)
            self.write()

    def write(self) -> None:
        """By the first process."""
        if is_first_process():
            content = {"figures": self.figures, "failures": self.failures, "done": self.done}
            unfinished = self._path.with_suffix(".part")
            unfinished.write_text(json.dumps(content), encoding="utf-8")
            unfinished.replace(self._path)


def rounded(value: Any) -> Any:
    """Numbers of four digits, in whatever they lie."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def perform(check: Check, setting: Setting) -> None:
    """Run a check in this process; its findings go to `found.json` in the setting's folder."""
    found = Findings(setting.folder / "found.json")
    try:
        check.run(setting, found)
    except Exception as error:
        traceback.print_exc()
        found.expect(False, f"{type(error).__name__}: {in_a_line(error)}")
    found.done = True
    found.write()


# Pictures, models and trainings


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Soft patches of colour with some grain, uint8 (height, width, 3)."""
    generator = np.random.default_rng(seed)
    patches = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    soft = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return (soft + generator.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)


def crops(number: int) -> Tensor:
    """A batch of pictures (number, 3, 256, 256) fp32 in [0, 1], on the CPU."""
    pixels = np.stack([picture(seed, 256, 256) for seed in range(number)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def tiny_1b() -> ModelConfig:
    """All kinds of layers of 1b, with few channels."""
    config = compose_model("1b")
    config.channels, config.latent_channels, config.hyper_latent_channels, config.hyper_channels = [8, 8, 8], 16, 8, 8
    config.g_a_blocks = config.g_s_blocks = [1, 1, 1, 1]
    config.hyper_blocks, config.adaptor_blocks = [1, 1], [1, 1, 1]
    for prior in (config.prior_s1_s2, config.prior_s3):
        prior.before = prior.after = prior.refine = 1
    return config


def models() -> dict[str, ModelConfig]:
    """Small models that together have every kind of layer."""
    return {
        "nano": compose_model("nano"),
        "tiny 1b": tiny_1b(),
        "swin": sized(ModelConfig(family="swin", size="300k")),
        "convnext": sized(ModelConfig(family="convnext", size="300k")),
        "variable rate": replace(compose_model("nano"), rate=RateConfig(levels=6)),
    }


def one_step(
    model: ModelConfig, device: torch.device, precision: Precision = Precision.fp32, *, plainly: bool = False
) -> tuple[HPCM, float]:
    """A model after one backward pass on a batch of two, and its loss: same weights, pictures and noise everywhere.

    `plainly`: NCHW, with torch's own layers.
    """
    config = replace(compose([f"engine.precision={precision.value}"]), model=model)
    torch.manual_seed(0)
    task = task_of(config, None, {})
    codec, pictures, indices = task.codec, crops(2), torch.arange(2)
    noise = Noise(*(values.to(device) for values in image_noise(codec, pictures, indices, seed=0)))
    level = image_levels(model.rate.levels, indices, 0).to(device) if model.rate.levels > 1 else None
    images = pictures.to(device, memory_format=torch.contiguous_format if plainly else torch.channels_last)
    set_arithmetic(precision)
    codec.to(device)
    with plain() if plainly else nullcontext():
        loss = task.objective(images, codec(images, noise, level), level).loss.mean()
        loss.backward()
    return codec, loss.item()


def trained(setting: Setting, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The journal of a training of `nano` in the processes of this check; every process calls it."""
    folder = setting.folder / name
    if os.environ.get("NO_DET"):
        overrides = [o for o in overrides if "determ" not in o]
    run(compose([*keys(setting), *overrides, f"run.dir={folder}"], sized))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def keys(setting: Setting) -> list[str]:
    """Overrides of every training."""
    common = ["model=nano", "schedule.learning_rate=1e-3", "log.wandb=disabled", "data.workers=0"]
    return [*common, f"data.shards={setting.shards}", "train.batch_size=4"]


def losses(journal: Sequence[dict[str, Any]], name: str = "train/loss") -> list[float]:
    """One value of a journal's lines, where they have it."""
    return [line[name] for line in journal if name in line]


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference; infinite if the numbers are not as many or not finite."""
    if len(ours) != len(theirs) or not np.isfinite([*ours, *theirs]).all():
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def engine_keys(engine: str) -> list[str]:
    """Overrides that choose an engine; stage 3 shards every tensor, small as they are in `nano`."""
    kept = "+engine.options.zero_optimization.stage3_param_persistence_threshold=0"
    return [f"engine={engine}", *([kept] if engine.startswith("zero3") else [])]


def graphed(work: Callable[[], Any], device: torch.device, clear: Callable[[], None] = lambda: None) -> Callable:
    """`work` as one CUDA graph to replay, which returns what the captured run did; on a CPU `work` itself.

    `clear` is called before the capture: gradients that are there then are added to, others are overwritten.
    """
    if device.type != "cuda":
        return work
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def steps_of(setting: Setting, model: str, batch: int) -> Steps:
    """Steps on random images without data or engine; `nano` and two images in a tiny setting."""
    batch = setting.pick(batch, 2)
    config = compose([f"model={setting.pick(model, 'nano')}", f"train.batch_size={batch}"])
    return Steps(config, batch, setting.device)


# 1 to 3: one step


def start(setting: Setting, found: Findings) -> None:
    """Imports, device, and what a training prints."""
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
    found.expect(all(peaks.values()), f"the peak rate of {name} is not known (hpcm_scale/compute/hardware.py)")
    for engine in ("zero2", "accelerate"):
        folder = setting.folder / engine
        command = [sys.executable, "-m", "hpcm_scale.cli", "train", *keys(setting), *engine_keys(engine)]
        began = time.monotonic()
        done = subprocess.run(
            [*command, "train.steps=1", f"run.dir={folder}"], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        found.note(f"{engine}_seconds", time.monotonic() - began)
        ours = re.compile(rf"{re.escape(str(folder))}: nano, |{engine}: step |finished at step 1: ")
        strange = [line for line in (done.stdout + done.stderr).splitlines() if not ours.match(line)]
        found.expect(done.returncode == 0, f"a training with engine={engine} ended with {done.returncode}")
        found.expect(not strange, f"with engine={engine} something else printed: {' | '.join(strange[:10])}")


def same_numbers(setting: Setting, found: Findings) -> None:
    """Loss and gradients in fp32 against the plain network on the CPU."""
    for name, config in models().items():
        expected, expected_loss = one_step(config, torch.device("cpu"), plainly=True)
        model, loss = one_step(config, setting.device)
        gradients = {key: parameter.grad.cpu() for key, parameter in expected.named_parameters()}
        largest = max(gradient.abs().max() for gradient in gradients.values())
        off = {}
        for key, parameter in model.named_parameters():
            scale = gradients[key].abs().max() + 1e-4 * largest  # some gradients are zero but for rounding
            off[key] = ((parameter.grad.cpu() - gradients[key]).abs().max() / scale).item()
        worst = max(off, key=off.get)
        of_loss = distance([loss], [expected_loss])
        found.note(name, {"loss": of_loss, "gradient": off[worst], "of": worst})
        found.expect(of_loss <= 1e-4, f"{name}: the loss differs by {of_loss:.2g}")
        found.expect(off[worst] <= 1e-3, f"{name}: the gradient of {worst} differs by {off[worst]:.2g}")


def reduced(setting: Setting, found: Findings) -> None:
    """Under bf16: fp32 where it must be, bf16 elsewhere, channels-last at every block, and about the same loss."""
    for name, config in models().items():
        _, expected = one_step(config, setting.device)
        wrong, tensors, kinds = [], count(), set()
        real = HPCM.forward

        def watched(model: HPCM, *inputs: Any, real=real, wrong=wrong, tensors=tensors, kinds=kinds) -> Any:
            for module in model.modules():
                module.register_forward_hook(partial(look, model, wrong, tensors, kinds))
            return real(model, *inputs)

        with patch.object(HPCM, "forward", watched):
            model, loss = one_step(config, setting.device, Precision.bf16)
        gradients = {parameter.grad.dtype for parameter in model.parameters()}
        found.note(name, {"tensors": next(tensors), "loss": distance([loss], [expected])})
        found.expect(not wrong, f"{name}: {', '.join(dict.fromkeys(wrong))}")
        found.expect(kinds == {torch.bfloat16}, f"{name}: convolutions between fp32 places give {kinds}")
        found.expect(gradients == {torch.float32}, f"{name}: gradients are {gradients}")
        found.expect(distance([loss], [expected]) <= 0.01, f"{name}: the loss is {loss:.5g}, in fp32 {expected:.5g}")


def look(model: HPCM, wrong: list[str], tensors: Any, kinds: set, module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook: note what has not the dtype or the memory format that it must have."""
    outputs = output if isinstance(output, tuple) else (output,)
    there = [tensor for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor)]
    what = type(module).__name__
    if module in (model.g_a, model.h_a, model.h_s, model.g_s, model.rate, model.hyper_prior):
        next(tensors)
        wrong += [f"{tensor.dtype} at {what}" for tensor in there if tensor.dtype != torch.float32]
    if isinstance(module, (Block, WindowFusion, Pointwise)):
        next(tensors)
        plain_ones = [tensor for tensor in there if memory_format_of(tensor) != torch.channels_last]
        wrong += [f"NCHW at {what}"] * len(plain_ones)
    if type(module) is nn.Conv2d:
        kinds.add(output.dtype)


# 4 to 8: trainings


def engines(setting: Setting, found: Findings) -> None:
    """The same losses with every engine, with communication overlapped and not."""
    common = [f"train.steps={setting.pick(20, 4)}", "engine.deterministic=true"]
    told = {}
    for engine in ("accelerate", "zero0", "zero1", "zero2", "zero3", "zero3_offload"):
        told[engine] = losses(trained(setting, engine, *common, *engine_keys(engine)))
        off = distance(told[engine], told["accelerate"])
        found.note(engine, off)
        found.expect(off <= 1e-5, f"the losses of {engine} are {off:.2g} off those of accelerate")
    for engine in ("zero1", "zero2", "zero3"):
        overlap = "+engine.options.zero_optimization.overlap_comm=false"
        without = losses(trained(setting, f"{engine}_off", *common, *engine_keys(engine), overlap))
        off = distance(without, told[engine])
        found.note(f"{engine}_overlap_off", off)
        found.expect(without == told[engine], f"{engine}: the losses without overlap_comm are {off:.2g} off")


def resumed(setting: Setting, found: Findings) -> None:
    """A training in two halves against one in a piece."""
    steps = setting.pick(20, 4)
    for deterministic in ("true", "false"):  # cuBLAS reads its environment once, which only the first needs
        for engine in ("zero2", "zero3"):
            name = f"{engine}{'_deterministic' * (deterministic == 'true')}"
            common = [f"train.steps={steps}", f"engine.deterministic={deterministic}", *engine_keys(engine)]
            whole = trained(setting, name, *common)
            trained(setting, f"{name}_halves", *common, f"train.stop_after={steps // 2}")
            halves = trained(setting, f"{name}_halves", *common)
            files = [setting.folder / folder / "weights.safetensors" for folder in (name, f"{name}_halves")]
            same = is_first_process() and numbers(halves) == numbers(whole) and same_weights(*files)
            found.note(name, "same digits" if same else distance(losses(halves), losses(whole)))
            found.expect(same or deterministic == "false", f"{name}: the digits of 20 steps and of 10 + 10 differ")


def evaluated(setting: Setting, found: Findings) -> None:
    """Evaluations of weights and averages change no training loss; stage 3 goes on from a checkpoint of stage 2."""
    steps = setting.pick(12, 4)
    common = [f"train.steps={steps}", "engine.deterministic=true"]
    looking = [f"eval.images={setting.images}", f"eval.every={steps // 4}", "train.ema=[0.1]"]
    alone = trained(setting, "alone", *common, *engine_keys("zero2"))
    whole = trained(setting, "evaluated", *common, *looking, *engine_keys("zero2"))
    off = distance(losses(whole), losses(alone))
    found.note("with_evaluation", off)
    found.expect(off <= 1e-5, f"with evaluations the training losses are {off:.2g} off")
    half = f"train.stop_after={steps // 2}"
    trained(setting, "moved", *common, *looking, *engine_keys("zero2"), half)
    checkpoint = Checkpoints(setting.folder / "moved" / "checkpoints").of(steps // 2)
    config = compose([*keys(setting), *common, *engine_keys("zero3")])
    found.expect(exact_under(config, checkpoint), "stage 3 does not have the weights of stage 2's checkpoint")
    moved = trained(setting, "moved", *common, *looking, *engine_keys("zero3"))
    for name in ("train/loss", "eval/loss", "eval_ema_0.1/loss"):
        off = distance(losses(moved, name), losses(whole, name))
        found.note(f"stage_2_to_3 {name}", off)
        found.expect(off <= 1e-5, f"from stage 2 to 3, {name} is {off:.2g} off")


def exact_under(config: Config, checkpoint: Checkpoint) -> bool:
    """Whether an engine that has loaded a checkpoint gives its weights to the bit; every process calls it."""
    engine = create_engine(config)
    engine.prepare(HPCM(config.model))
    names, state = checkpoint.read()
    files = [checkpoint.folder / name for name in names]
    fill(files, engine.pieces())
    engine.take_over(state["updates"])
    weights = engine.weights()
    engine.close()
    with opened(files) as stored:
        for name, weight in (weights or {}).items():
            piece = Piece("weight", name, 0, torch.empty(weight.numel()))
            stored.fill(piece)
            if not torch.equal(piece.values, weight.flatten()):
                return False
    return True


def checkpoints(setting: Setting, found: Findings) -> None:
    """What a checkpoint costs training; SIGTERM, kill -9, and going on."""
    model = setting.pick("68m", "nano")
    common = [f"model={model}", "engine.precision=bf16", "train.steps=12", "train.checkpoint_every=4"]
    journal = trained(setting, "pauses", *common, "train.keep_checkpoints=1", *engine_keys("zero2"))
    if not is_first_process():
        return
    times, steps = losses(journal, "time"), losses(journal, "perf/step_seconds")
    pauses = [times[step] - times[step - 1] - steps[step] for step in (4, 8)]
    found.note("pauses", pauses)
    found.note("step_seconds", {"quiet": statistics.median(steps[2:4]), "while_written": [steps[4], steps[8]]})
    found.note("checkpoint_gb", 12 * parameter_count(on_meta(compose_model(model))) / setting.processes / 1e9)
    if setting.cuda:
        found.note("pinned_gb", torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 1e9)
    found.expect(pauses[1] < 0.5 or not setting.cuda, f"the second checkpoint held up training for {pauses[1]:.2f} s")
    for name in LAUNCHER:
        os.environ.pop(name, None)  # of this process, not of those that it starts
    survive(setting, found)


def survive(setting: Setting, found: Findings) -> None:
    """A training that is asked to stop, then killed, then finished."""
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
        found.expect(code == STOPPED, f"SIGTERM ended the training with {code}")
        reached = training.newest()
        training.start()
        stepped(reached + 6)
        kill(training.ranks()[-1:])
        found.note("after_kill", ended())
        training.overrides.append(f"train.stop_after={training.newest() + 3}")
        code = training.finish(limit=limit)
        found.note("after_resume", code)
        found.expect(code == 0, f"the resumed training ended with {code}")
        written = [record["step"] for record in training.records()]
        found.expect(written == list(range(1, len(written) + 1)), "the journal has other than one line for each step")
        said = training.log.read_text(encoding="utf-8", errors="replace")
        found.expect("Traceback" not in said, "a training printed a traceback")


FAULTS = {
    "memory": (1, "hpcm: .*memory.*"),
    "nan": (2, "hpcm: step 3 is left out and the run ends: .*"),
    "stall": (1, "hpcm: no step for .* minutes.*; stack traces: .*"),
}
"""Exit code and last line of trainings whose third step fails."""


def faults(setting: Setting, found: Findings) -> None:
    """Out of memory, a loss that is no number, a main thread that stands still: three trainings at once."""
    program = "import sys; from gpu_checks import train_with_fault; train_with_fault(sys.argv.pop(1))"
    options = ["train.steps=100", "train.on_divergence=stop", "engine=zero2"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = {}
    for kind in FAULTS:
        patience = f"train.stall_minutes={0.1 if kind == 'stall' else 30}"
        overrides = [*keys(setting), *options, patience, f"run.dir={setting.folder / kind}"]
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
        found.expect(ended == code, f"{kind}: the training ended with {ended}")
        found.expect(re.fullmatch(last, lines[-1]) is not None, f"{kind}: the last line is: {lines[-1]}")
        found.expect(not any(line.startswith("Traceback") for line in lines), f"{kind}: there is a traceback")
    stacks = list((setting.folder / "stall").glob("stacks/*.txt"))
    found.expect(bool(stacks) and all(file.stat().st_size for file in stacks), "there are no stack traces of the stall")


def train_with_fault(kind: str) -> None:
    """`hpcm train`, with the arguments of this process, whose third step fails: one of FAULTS."""
    from hpcm_scale.train import main

    real, steps = Task.loss, count(1)

    def failing(task: Task, module: nn.Module, batch: Any, device: torch.device) -> Any:
        result = real(task, module, batch, device)
        if next(steps) < 3:
            return result
        if kind == "memory":
            exhaust(device)
        if kind == "stall":
            time.sleep(86_400)
        return result._replace(loss=result.loss * torch.nan)

    Task.loss = failing
    main()


def exhaust(device: torch.device) -> None:
    """Ask for more memory than any device has; a CPU's allocator has an error of its own for it."""
    if device.type == "cuda":
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError("out of memory")


# 9 to 15: what only a GPU can show, and codecs


def heartbeat(setting: Setting, found: Findings) -> None:
    """A thread goes on while the main one waits for room in the launch queue."""
    length = setting.pick(6.0, 0.5)
    steps = steps_of(setting, "nano", 2)
    for name, way in {"eager": BF16, "compiled": COMPILED}.items():
        step = steps.of(way)
        step()  # compiles
        steps.drop_gradients()
        gap, took = longest_gap(lambda step=step: behind_a_sleeping_stream(step.gradients, setting.device, length))
        found.note(name, {"longest_gap": gap, "seconds": took})
        found.expect(took >= length, f"{name}: the launches took {took:.1f} s, and the stream slept for {length:g} s")
        found.expect(gap < 2, f"{name}: another thread stood still for {gap:.1f} s")


def longest_gap(work: Callable[[], None], tick: float = 0.1) -> tuple[float, float]:
    """The longest time between two ticks of another thread while `work` runs, and how long it ran, in seconds."""
    ticks, done = [time.monotonic()], threading.Event()

    def beat() -> None:
        while not done.wait(tick):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    began = time.monotonic()
    work()
    took = time.monotonic() - began
    ticks.append(time.monotonic())
    done.set()
    thread.join()
    return max(after - before for before, after in pairwise(ticks)), took


def behind_a_sleeping_stream(work: Callable[[], Any], device: torch.device, length: float) -> None:
    """Launch work for `length` seconds on a stream that sleeps as long; then wait for all of it."""
    if device.type == "cuda":
        cycles = 100_000_000
        per_second = cycles / timed(partial(torch.cuda._sleep, cycles), device).seconds
        torch.cuda._sleep(int(length * per_second))
    began = time.monotonic()
    while time.monotonic() < began + length:
        work()
    synchronize(device)


def compiling(setting: Setting, found: Findings) -> None:
    """engine.compile: how long it takes, that it happens once, and what becomes of the loss."""
    from torch._dynamo.utils import counters

    steps = steps_of(setting, "68m", 32)
    expected = steps.of(BF16)().item()
    step = steps.of(COMPILED)
    turn = timed(step, setting.device)
    graphs = counters["stats"]["unique_graphs"]
    again = [timed(step, setting.device) for _ in range(3)]
    recompiled = counters["stats"]["unique_graphs"] - graphs
    off = distance([turn.result.item()], [expected])
    found.note("first_step_seconds", turn.seconds)
    found.note("step_seconds", statistics.median(seconds(again)))
    found.note("graphs", graphs)
    found.note("recompiled", recompiled)
    found.note("loss", off)
    found.expect(turn.seconds < 60 or not setting.cuda, f"compiling took {turn.seconds:.0f} s")
    found.expect(recompiled == 0, f"{recompiled} regions were compiled again")
    found.expect(off <= 0.005, f"the loss is {off:.2%} off the eager one")


def speed(setting: Setting, found: Findings) -> None:
    """Training steps against the device's own matrix products; launches, idle time, and memory against `estimate`."""
    rate = device_rate(setting.device)
    found.note("bf16_tflops", rate / 1e12)
    aims = {("68m", 32): 0.30, ("1b", 32): 0.45}
    for model, batch in (("68m", 4), ("68m", 32), ("1b", 32)):
        steps = steps_of(setting, model, batch)
        name = f"{model}, {batch}"
        try:
            figures = speed_of(setting, steps, rate, graph=model == "68m", compiled=(model, batch) == ("68m", 32))
        except torch.OutOfMemoryError:
            found.note(name, "does not fit")
            continue
        found.note(name, figures)
        best = max(way["utilisation"] for way in figures["ways"].values())
        found.note(f"{name}, best", {"utilisation": best, "aim": aims.get((model, batch))})
        off = figures["peak_gb"] / figures["estimated_gb"] - 1
        found.expect(abs(off) <= 0.15 or not setting.cuda, f"{name}: peak memory is {off:+.0%} off the estimate")
        del steps
        if setting.cuda:
            torch.cuda.empty_cache()


def device_rate(device: torch.device) -> float:
    """FLOP/s of large bf16 matrix products."""
    pair = products(Precision.bf16, device)
    turns = alternate({product.name: product.run for product in pair}, 3, device)
    return statistics.median(matmul_rate([(product, turns[product.name]) for product in pair]).rates)


def speed_of(setting: Setting, steps: Steps, rate: float, *, graph: bool, compiled: bool) -> dict[str, Any]:
    """Figures of one size of model and batch."""
    config, device = steps.config, setting.device
    batch = config.train.batch_size
    flops = batch * training_flops_per_image(on_meta(config.model), config.data.crop)
    bf16 = replace(config, engine=compose(["engine=accelerate", "engine.precision=bf16"]).engine)
    eager = steps.of(BF16)
    figures: dict[str, Any] = {
        "peak_gb": peak_of_step(eager, device) / 1e9,
        "estimated_gb": estimate(bf16, 1).memory.device / 1e9,
        "ways": {},
    }

    def measure(name: str, work: Callable[[], Any]) -> None:
        second = statistics.median(seconds(alternate({name: work}, 3, device)[name]))
        utilisation = flops / second / rate
        figures["ways"][name] = {"seconds": second, "utilisation": utilisation} | launches(work, device, second)

    measure("eager", eager)
    if compiled:
        measure("compiled", steps.of(COMPILED))
    if graph:
        captured = graphed(eager.gradients, device, steps.drop_gradients)

        def replayed() -> None:
            captured()
            steps.optimize(drop=False)  # the graph writes the gradients where they are

        measure("graph", replayed)
        steps.drop_gradients()
    return figures


def peak_of_step(step: Step, device: torch.device) -> int:
    """Bytes on the device at the peak of a step, weights, gradients and moments included; 0 on a CPU."""
    step()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def launches(work: Callable[[], Any], device: torch.device, second: float) -> dict[str, float]:
    """Launches of kernels and graphs in a step that takes `second` seconds, and the part of it without a kernel."""
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    ) as trace:
        timed(work, device)
    events = list(trace.events())
    launched = sum(re.match(r"cu(da)?(LaunchKernel|GraphLaunch)", event.name) is not None for event in events)
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {"launches": launched, "kernels": len(kernels), "idle": max(0.0, 1 - busy / second)}


POINTWISE = ((96, 384, 128), (384, 96, 128), (192, 768, 64), (384, 1536, 32), (960, 1920, 16), (960, 1920, 4))
"""Inputs, outputs, side: of 68m at crops of 256²."""
DEPTHWISE = ((960, 16), (960, 8), (960, 4), (640, 16))
"""Channels, side."""
WINDOWS = ((4, 32, 64, 20), (1, 32, 16, 20))
"""Windows of an image, heads, positions, channels of a head."""
REPEATED = 20
"""Runs of a layer in one timing."""


def kernels(setting: Setting, found: Findings) -> None:
    """Ways to compute a layer, forward and backward in bf16, on the device alone: is ours the fastest?"""
    device, chosen = setting.device, setting.pick(slice(None), slice(-1, None))
    for batch in setting.pick((4, 32), (1,)):
        for inputs, outputs, side in POINTWISE[chosen]:
            ways = pointwise_ways(inputs, outputs, batch, side, device)
            contest(setting, found, f"1×1, {inputs} → {outputs}, {batch} × {side}²", ways)
        for channels, side in DEPTHWISE[chosen]:
            ways = depthwise_ways(channels, batch, side, device)
            contest(setting, found, f"depthwise, {channels}, {batch} × {side}²", ways)
        for windows, heads, positions, width in WINDOWS[chosen]:
            shape = (batch * windows, heads, positions, width)
            contest(setting, found, f"attention, {' × '.join(map(str, shape))}", attention_ways(shape, device))


Ways = dict[str, Callable[[], Any]]


def contest(setting: Setting, found: Findings, layer: str, ways: Ways) -> None:
    """Time the ways in turns; the first is ours, and those in brackets are for comparison alone."""
    ready = {}
    for name, work in ways.items():
        try:
            work()
        except RuntimeError:  # there is no such kernel for this shape
            continue
        ready[name] = graphed(partial(repeat, work, REPEATED), setting.device)
    turns = alternate(ready, setting.pick(5, 1), setting.device)
    took = {name: 1e6 * statistics.median(seconds(turns[name])) / REPEATED for name in ready}
    found.note(layer, took)
    ours, *others = (name for name in took if not name.startswith("("))
    fastest = min(others, key=took.get, default=ours)
    slower = took[ours] / took[fastest]
    found.expect(slower <= 1.15 or not setting.cuda, f"{layer}: {fastest} is {slower:.2f}× as fast as {ours}")


def repeat(work: Callable[[], Any], times: int) -> None:
    """Do it so often."""
    for _ in range(times):
        work()


def both_ways(layer: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward under autocast, and backward, of a layer at an input that wants a gradient, too."""
    x = x.detach().requires_grad_()

    def run_both() -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            result = layer(x)
        return torch.autograd.grad(result, [x, *weights], result.detach())

    return run_both


def pointwise_ways(inputs: int, outputs: int, batch: int, side: int, device: torch.device) -> Ways:
    """A 1×1 convolution."""
    x = torch.randn(batch, inputs, side, side, device=device).bfloat16().to(memory_format=torch.channels_last)
    layer = Pointwise(inputs, outputs).to(device)
    layer.reduced = True
    weight, bias = layer.weight, layer.bias

    def as_product(x: Tensor) -> Tensor:
        return product(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    ways = {"ours": layer, "convolution": lambda x: F.conv2d(x, weight, bias), "product": as_product}
    return {name: both_ways(way, x, [weight, bias]) for name, way in ways.items()}


def depthwise_ways(channels: int, batch: int, side: int, device: torch.device) -> Ways:
    """A depthwise 3×3 convolution: as the context model has it, and in the other memory format."""
    x = torch.randn(batch, channels, side, side, device=device).bfloat16()
    layer = depthwise_block(channels).spatial.to(device)
    last = x.to(memory_format=torch.channels_last)

    def converting(x: Tensor) -> Tensor:
        return layer(x.contiguous()).contiguous(memory_format=torch.channels_last)

    weights = [layer.weight, layer.bias]
    return {
        "ours": both_ways(layer, last, weights),
        "NCHW between conversions": both_ways(converting, last, weights),
        "(NCHW)": both_ways(layer, x, weights),
    }


def attention_ways(shape: tuple[int, ...], device: torch.device) -> Ways:
    """Attention in windows, with every backend that torch has for it."""
    query, key, value = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3))
    chosen = SDPBackend(torch._fused_sdp_choice(query, key, value)).name

    def within(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
        def attention(query: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return attention

    def as_products(query: Tensor) -> Tensor:
        return ((query * shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(dim=-1) @ value

    ways: dict[str, Callable[[Tensor], Tensor]] = {f"ours ({chosen})": lambda query: attend(query, key, value)}
    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    ways |= {name: within(getattr(SDPBackend, name)) for name in names}
    return {name: both_ways(way, query, [key, value]) for name, way in (ways | {"products": as_products}).items()}


def decoding(setting: Setting, found: Findings) -> None:
    """Files decode on the other device than they were made on; on a CPU, with other threads and memory format."""
    codec = Codec(spread(compose_model("nano")))
    other = variant(codec, lambda model: model.to(setting.device, memory_format=torch.channels_last))
    pictures = [
        picture(seed, height, width) for seed, (height, width) in enumerate(((256, 256), (300, 200), (77, 411)))
    ]
    identical, most = 0, 0
    for pixels in map(torch.from_numpy, pictures):
        pixels = pixels.permute(2, 0, 1).contiguous()
        ours = codec.compress(pixels)
        with other_threads():
            theirs = other.compress(pixels)
        identical += unpack(ours).symbols_checksum == unpack(theirs).symbols_checksum
        for made_by, data in (("the CPU", ours), (setting.device.type, theirs)):
            try:
                here = codec.decompress(data)
                with other_threads():
                    there = other.decompress(data)
            except UserError as error:
                found.expect(False, f"a file made on {made_by}: {error}")
                continue
            most = max(most, (here.int() - there.int()).abs().max().item())
    found.note("files", 2 * len(pictures))
    found.note("pictures_with_the_same_symbols", identical)
    found.note("largest_difference_of_a_pixel", most)
    found.expect(most <= 1, f"decoded pixels differ by up to {most}")


def spread(config: ModelConfig) -> HPCM:
    """A model whose symbols have scales from 0.05 to 50, as trained ones have."""
    torch.manual_seed(0)
    model = HPCM(config).eval()
    with torch.no_grad():
        for prior in (model.context.prior_s1_s2, model.context.prior_s3):
            last = prior.after[-1]
            half = last.out_channels // 2
            last.bias[:half] = torch.linspace(-3, 4, half).exp()
            last.weight[:half] += torch.randn_like(last.weight[:half]) * 0.5 / last.in_channels**0.5
        model.g_a[-1].weight *= 20
    return model


def whole_graph(setting: Setting, found: Findings) -> None:
    """Forward and backward of nano as one CUDA graph."""
    steps = steps_of(setting, "nano", 2)
    step = steps.of(BF16)
    expected = step.gradients().item()
    steps.drop_gradients()
    captured = graphed(step.gradients, setting.device, steps.drop_gradients)
    replayed = captured().item()

    def eager() -> None:
        steps.drop_gradients()
        step.gradients()

    turns = alternate({"eager": eager, "graph": captured}, setting.pick(10, 2), setting.device)
    found.note("loss", distance([replayed], [expected]))
    found.note("speed_up", ratio(seconds(turns["eager"]), seconds(turns["graph"])).median)
    found.note("eager_seconds", statistics.median(seconds(turns["eager"])))
    found.expect(
        distance([replayed], [expected]) <= 1e-6, f"the loss is {replayed:.6g}, without a graph {expected:.6g}"
    )


def against_plain(setting: Setting, found: Findings) -> None:
    """bf16 as it is trained against the plain NCHW fp32 step of the same network, in turns."""
    steps = steps_of(setting, "68m", 32)
    ways = {"plain": PLAIN, "eager": BF16, **({"compiled": COMPILED} if setting.cuda else {})}
    turns = alternate({name: steps.of(way) for name, way in ways.items()}, setting.pick(5, 3), setting.device)
    took = {name: statistics.median(seconds(each)) for name, each in turns.items()}
    fastest = min((name for name in took if name != "plain"), key=took.get)
    faster = ratio(seconds(turns["plain"]), seconds(turns[fastest]))
    found.note("seconds", took)
    found.note("fastest", fastest)
    found.note("times_as_fast", faster.median)
    found.expect(faster.median >= 8 or not setting.cuda, f"{fastest} is {faster.median:.1f}× as fast as plain fp32")


@dataclass(frozen=True)
class Check:
    """A line of the table."""

    number: int
    title: str
    seconds: int
    """It may take on a GPU, imports included, and longer if others of its part have left time."""
    part: str
    run: Callable[[Setting, Findings], None]
    needs_gpu: bool = False
    together: bool = False
    """Whether it is run once more with two processes, where there are two devices: part d."""


CHECKS = (
    Check(1, "start: device, peak, what is printed", 15, "a", start, needs_gpu=True),
    Check(2, "fp32 against the plain network on the CPU", 20, "a", same_numbers),
    Check(3, "bf16: dtypes, channels-last, loss", 15, "a", reduced),
    Check(4, "engines, overlap on and off", 50, "a", engines, together=True),
    Check(9, "a thread behind a full launch queue", 45, "a", heartbeat, needs_gpu=True),
    Check(5, "stopped half-way and resumed", 45, "b", resumed, together=True),
    Check(6, "evaluation, averages, ZeRO 2 to 3", 25, "b", evaluated, together=True),
    Check(7, "checkpoint, SIGTERM, kill -9", 30, "b", checkpoints, together=True),
    Check(8, "out of memory, NaN, stall", 20, "b", faults),
    Check(13, "files across devices", 15, "b", decoding),
    Check(14, "a step of nano as one CUDA graph", 15, "b", whole_graph, needs_gpu=True),
    Check(10, "compilation of 68m", 65, "c", compiling, needs_gpu=True),
    Check(11, "utilisation, launches, memory", 50, "c", speed, needs_gpu=True),
    Check(12, "kernels by shape", 15, "c", kernels, needs_gpu=True),
    Check(15, "against plain NCHW fp32", 20, "c", against_plain),
)
PART_SECONDS = 150
