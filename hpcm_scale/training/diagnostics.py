"""Reports of a run: out of memory, and profiles of steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hpcm_scale.config.checks import check, micro_batch_size
from hpcm_scale.config.schema import Checkpointing, Config, EngineName
from hpcm_scale.devices import CUDA, device_kind
from hpcm_scale.errors import Fault, UserError, in_a_line
from hpcm_scale.files import whole_file, write_text

# What to do when a device runs out of memory: which key to change, and what the memory held.


FOLDER = "out_of_memory"
"""Of a run folder."""
NOTHING_LEFT = "take more devices, smaller crops (data.crop) or a smaller model"


@contextmanager
def explaining(config: Config, world_size: int, rank: int, folder: Path | None) -> Iterator[None]:
    """A torch.OutOfMemoryError in here becomes a Fault that names the keys to change.

    What the memory of the device holds is written to `folder`, if one is given: that of a run that has begun. Use it
    where the tensors of the training are still alive.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        keys = remedies(config, world_size)
        again = "the same command goes on" if folder else "type the command again"
        change = f"set {' or '.join(keys)}, and {again}" if keys else NOTHING_LEFT
        report = write_report(folder, rank, error) if folder else None
        where = f"; what the memory held is in {report}" if report else ""
        raise Fault(f"process {rank} ran out of memory ({_shortened(error)}); {change}{where}") from error


def _shortened(error: torch.OutOfMemoryError) -> str:
    """What torch says first: how much was asked for, and how much there is."""
    return ". ".join(in_a_line(error).split(". ")[:3]).removesuffix(".")


def remedies(config: Config, world_size: int) -> list[str]:
    """Settings, as typed on the command line, that need less device memory and that this run does not use yet.

    A run goes on with each of them. The cheapest comes first: smaller micro-batches cost least time, offload most.
    """
    return [text for text, changed in _settings(config, world_size) if _is_valid(changed, world_size)]


def _settings(config: Config, world_size: int) -> Iterator[tuple[str, Config]]:
    engine, images = config.engine, micro_batch_size(config, world_size)
    if images > 1:
        smaller = max(size for size in range(1, images) if images % size == 0)
        yield (
            f"train.micro_batch_size={smaller}",
            replace(config, train=replace(config.train, micro_batch_size=smaller)),
        )
    if engine.activation_checkpointing != Checkpointing.steps:
        stronger = (
            Checkpointing.blocks if engine.activation_checkpointing == Checkpointing.none else Checkpointing.steps
        )
        yield (
            f"engine.activation_checkpointing={stronger.value}",
            replace(config, engine=replace(engine, activation_checkpointing=stronger)),
        )
    deepspeed = replace(engine, name=EngineName.deepspeed)
    if world_size > 1 and engine.zero_stage < 2:
        yield "engine=zero2", replace(config, engine=replace(deepspeed, zero_stage=2))
    elif world_size > 1 and engine.zero_stage < 3:
        yield "engine=zero3", replace(config, engine=replace(deepspeed, zero_stage=3))
    elif not engine.offload:
        yield "engine=zero3_offload", replace(config, engine=replace(deepspeed, zero_stage=3, offload=True))


def _is_valid(config: Config, world_size: int) -> bool:
    with suppress(UserError):
        check(config, world_size)
        return True
    return False


def write_report(folder: Path, rank: int, error: torch.OutOfMemoryError) -> Path | None:
    """Write the error and torch's summary of the memory to `folder`/rank_00000.txt; returns that file.

    On CUDA a snapshot for https://pytorch.org/memory_viz is written beside it. Its blocks have no stack traces: to
    record them would slow down every step. None if nothing could be written.
    """
    file = folder / f"rank_{rank:05d}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        on_cuda = device_kind() == CUDA
        summary = torch.cuda.memory_summary() if on_cuda else "the memory of the CPU is not recorded"
        write_text(file, f"{error}\n\n{summary}\n")
        if on_cuda:
            torch.cuda.memory._dump_snapshot(os.fspath(file.with_suffix(".pickle")))
    except (OSError, RuntimeError):
        return None
    return file


# A trace of some training steps by torch's profiler, in the run folder.


ROWS = 30
"""Operators in the table."""
StepContext = Callable[[int], AbstractContextManager]
"""Called with the number of a step, from 1, for the context that the step runs in."""


@contextmanager
def profiling(
    steps: Sequence[int], device: torch.device, folder: Path, say: Callable[[str], None]
) -> Iterator[StepContext]:
    """Profile the steps from `steps[0]` to `steps[1]`, both included; none if `steps` is empty.

    Yields the context of a step. After the last one, or at the end if there are fewer, the trace is written to
    `folder`/steps_100-103.json.gz (Chrome's trace format; each step is a range of its name), and a table of the
    operators that took most time to the .txt file beside it; `say` tells where. If the training ends with an
    exception, nothing is written. All other steps run as they are.
    """
    if not steps:
        yield nullcontext
        return
    first, last = steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    trace = profile(activities=activities, record_shapes=True)
    done: list[int] = []
    ready = tracing = False

    def stop() -> None:
        nonlocal tracing
        trace.stop_trace()
        tracing = False
        _write(trace, folder / f"steps_{done[0]}-{done[-1]}", say)

    @contextmanager
    def step(number: int) -> Iterator[None]:
        nonlocal ready, tracing
        if not ready and first - 1 <= number <= last:
            trace.prepare_trace()  # one step early, where there is one: this takes long on CUDA
            ready = True
        if not first <= number <= last:
            yield
            return
        if not tracing:
            trace.start_trace()
            tracing = True
        with record_function(f"step {number}"):
            yield
        done.append(number)
        if number == last:
            stop()

    try:
        yield step
        if tracing:
            stop()
    finally:
        if tracing:
            trace.stop_trace()


def out_of_reach(steps: Sequence[int], done: int, last: int) -> str:
    """What to tell the user if a command that goes from step `done` to `last` profiles none of `steps`; or ""."""
    if not steps or (done < steps[1] and steps[0] <= last):
        return ""
    where = f"goes on after step {done}" if done >= steps[1] else f"ends at step {last}"
    return f"nothing is profiled: train.profile_steps={list(steps)}, and this command {where}"


def _write(trace: profile, stem: Path, say: Callable[[str], None]) -> None:
    """Write what was traced; training goes on if that fails."""
    file = stem.with_suffix(".json.gz")
    time = "self_device_time_total" if ProfilerActivity.CUDA in trace.activities else "self_cpu_time_total"
    try:
        with whole_file(file) as unfinished, TemporaryDirectory() as temporary:
            trace.export_chrome_trace(f"{temporary}/trace.json.gz")
            shutil.copyfile(f"{temporary}/trace.json.gz", unfinished)
        table = trace.key_averages().table(sort_by=time, row_limit=ROWS, max_name_column_width=80)
        write_text(stem.with_suffix(".txt"), f"{table}\n")
    except OSError as error:
        say(f"the profile {file} could not be written ({error.strerror or error}); training goes on")
        return
    say(f"profile of {stem.name.replace('_', ' ')} of process 0: {file}, its longest operators in {stem.name}.txt")
