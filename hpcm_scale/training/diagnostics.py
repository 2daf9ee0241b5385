"""Reports of a run that is out of memory, and profiles of training steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hpcm_scale.devices import CUDA, device_kind
from hpcm_scale.errors import Fault, first_line
from hpcm_scale.files import atomic_file, write_text

LAST_RESORT = "take more devices, smaller crops (data.crop) or a smaller model"


@contextmanager
def explain_out_of_memory(remedies: Sequence[str], rank: int, folder: Path | None) -> Iterator[None]:
    """Raise Fault, which names the `remedies` (`start.memory_remedies`), instead of torch.OutOfMemoryError.

    A report on the memory is written to `folder` if one is given. Use it where the tensors of the training are alive.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        again = "the same command resumes the run" if folder else "run the command again"
        change = f"set {' or '.join(remedies)}, and {again}" if remedies else LAST_RESORT
        report = write_report(folder, rank, error) if folder else None
        where = f"; contents of the memory: {report}" if report else ""
        raise Fault(
            "out-of-memory", "", f"rank {rank} ran out of memory ({_shortened(error)}); {change}{where}"
        ) from error


def _shortened(error: torch.OutOfMemoryError) -> str:
    """The first sentences of torch's message: requested and available memory."""
    return ". ".join(first_line(error).split(". ")[:3]).removesuffix(".")


def write_report(folder: Path, rank: int, error: torch.OutOfMemoryError) -> Path | None:
    """Write the error and torch's memory summary to `folder`/rank_00000.txt; the file, None if that failed.

    On CUDA a snapshot for https://pytorch.org/memory_viz is written beside it, without stack traces, whose recording
    would slow down every step.
    """
    file = folder / f"rank_{rank:05d}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        on_cuda = device_kind() == CUDA
        summary = torch.cuda.memory_summary() if on_cuda else "there is no summary of CPU memory"
        write_text(file, f"{error}\n\n{summary}\n")
        if on_cuda:
            torch.cuda.memory._dump_snapshot(os.fspath(file.with_suffix(".pickle")))
    except (OSError, RuntimeError):
        return None
    return file


ROWS = 30
"""Operators in the table of a profile."""
StepContext = Callable[[int], AbstractContextManager]
"""Returns the context of a step, which is counted from 1."""


@contextmanager
def profiling(
    steps: Sequence[int], device: torch.device, folder: Path, log: Callable[[str], None]
) -> Iterator[StepContext]:
    """Profile steps `steps[0]` to `steps[1]`, inclusive, with torch's profiler; no steps if `steps` is empty.

    Yields the context of a step. After the last step, or at the end of training, the trace is written to
    `folder`/steps_100-103.json.gz (Chrome's trace format, one range per step) and a table of the slowest operators to
    the .txt file beside it, and `log` gets their paths. Nothing is written if training ends with an exception.
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
        _write(trace, folder / f"steps_{done[0]}-{done[-1]}", log)

    @contextmanager
    def step(number: int) -> Iterator[None]:
        nonlocal ready, tracing
        if not ready and first - 1 <= number <= last:
            trace.prepare_trace()  # one step early if possible, since this is slow on CUDA
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
    """A message if a command that trains from step `done` to `last` profiles none of `steps`; else ""."""
    if not steps or (done < steps[1] and steps[0] <= last):
        return ""
    where = f"resumes after step {done}" if done >= steps[1] else f"ends at step {last}"
    return f"no step is profiled: train.profile_steps={list(steps)}, and this command {where}"


def _write(trace: profile, stem: Path, log: Callable[[str], None]) -> None:
    """Write a trace and its table; training continues if that fails."""
    file = stem.with_suffix(".json.gz")
    time = "self_device_time_total" if ProfilerActivity.CUDA in trace.activities else "self_cpu_time_total"
    try:
        with atomic_file(file) as unfinished, TemporaryDirectory() as temporary:
            trace.export_chrome_trace(f"{temporary}/trace.json.gz")
            shutil.copyfile(f"{temporary}/trace.json.gz", unfinished)
        table = trace.key_averages().table(sort_by=time, row_limit=ROWS, max_name_column_width=80)
        write_text(stem.with_suffix(".txt"), f"{table}\n")
    except OSError as error:
        log(f"the profile {file} could not be written ({error.strerror or error}); training continues")
        return
    log(f"profile of {stem.name.replace('_', ' ')} of rank 0: {file}, its slowest operators in {stem.name}.txt")
