"""Where the processes of a run that goes on no more are."""

from __future__ import annotations

import faulthandler
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcm_scale.training.group.peers import numbers

_FRAMES = 4
_READ = re.compile(r"\.(_cuda_)?(tolist|item|cpu|synchronize)\(")
"""Calls that wait for the device, which under NCCL waits for the other processes. They are C and have no frames."""
_WAITING = re.compile(r"[^<]* at \.|.*\(distributed_c10d\.py:")
"""The place of a process that waits for others."""


def write_stacks(folder: Path, rank: int) -> Path:
    """Write the stack traces of all threads of this process to `folder`/rank_00000.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank_{rank:05d}.txt"
    with file.open("w", encoding="utf-8") as handle:
        faulthandler.dump_traceback(file=handle, all_threads=True)
    return file


def main_thread() -> str:
    """The innermost frames of the main thread, innermost first: `name (file:line) < name (file:line) < …`.

    Where its line reads a value off the device, the innermost one is `name (file:line) at .tolist()`.
    """
    return place(traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident)))


def place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frames of a stack, as `main_thread` has them."""
    frames = [f"{entry.name} ({Path(entry.filename).name}:{entry.lineno})" for entry in stack[: -_FRAMES - 1 : -1]]
    if read := _READ.search(stack[-1].line or ""):
        frames[0] += f" at {read[0]})"
    return " < ".join(frames)


def summary(places: Mapping[int, str]) -> str:
    """Who is where, in a few words: those who do not wait for others, if there are any."""
    waiting = {rank for rank, place in places.items() if _WAITING.match(place)}
    told = {rank: place for rank, place in places.items() if rank not in waiting} or dict(places)
    innermost = {rank: place.partition(" < ")[0] for rank, place in told.items()}
    groups = {place: [rank for rank in innermost if innermost[rank] == place] for place in innermost.values()}
    return "; ".join(
        f"{numbers(ranks)} {'are' if len(ranks) > 1 else 'is'} in {place}" for place, ranks in groups.items()
    )
