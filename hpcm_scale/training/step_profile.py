"""A trace of some training steps by torch's profiler, in the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hpcm_scale.files import whole_file, write_text

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
