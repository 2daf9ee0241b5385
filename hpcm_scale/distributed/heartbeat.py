"""Heartbeats of the ranks through the store, and stack traces of a run that stalls."""

from __future__ import annotations

import faulthandler
import json
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import Store

from hpcm_scale.distributed.processes import format_ranks

BEAT_SECONDS = 1.0
_NO_EVENT = "-"

Answer = TypeVar("Answer")


class Heartbeat:
    """A thread that beats once a second and does all requests to the store, so that no other thread can hang in one.

    The ranks form a ring: each rank counts up its own beats and reads those of the rank before it, and the event of
    the run if there is one. That is three requests per rank and second.
    """

    def __init__(self, store: Store, name: str, rank: int, world_size: int) -> None:
        self.event: dict[str, Any] | None = None
        """What has happened to the run, the same on all ranks that are connected; it ends the run if it has a code."""
        self.broken = False
        """Whether the store is lost."""
        self.reset_timers()
        self._store, self._name, self._rank = store, name, rank
        self._previous = (rank - 1) % world_size if world_size > 1 else None
        self._previous_beats = 0
        self._requests: queue.SimpleQueue[tuple[Callable[[Store], Any], queue.SimpleQueue] | None] = queue.SimpleQueue()
        """Actions, each with the queue for its result; None ends the thread."""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def reset_timers(self) -> None:
        """Count the silence of the store and of the previous rank from now on."""
        self.last_answer = self.last_beat = time.monotonic()

    def request(self, action: Callable[[Store], Answer], seconds: float = 5.0) -> Answer | None:
        """The result of `action` on the store; None if it takes longer than `seconds` or the store is lost."""
        if self.broken:
            return None
        result: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._requests.put((action, result))
        with suppress(queue.Empty):
            return result.get(timeout=seconds)
        return None

    def post(self, event: dict[str, Any], replaces: dict[str, Any] | None = None) -> None:
        """Set the event of the run, for all ranks, unless another one than `replaces` was set before."""
        expected = json.dumps(replaces) if replaces else _NO_EVENT

        def set_event(store: Store) -> None:
            self._receive(store.compare_set(self._key("event"), expected, json.dumps(event)))

        self.request(set_event)
        if self.event == replaces:
            self.event = event  # the store is lost: only this rank acts on it

    def count(self, name: str, increment: int) -> int | None:
        """Add to a counter shared by all ranks; its value, None if the store is lost."""
        return self.request(lambda store: store.add(self._key(name), increment))

    def put(self, name: str, text: str) -> None:
        """Store a text for other ranks."""
        self.request(lambda store: store.set(self._key(name), text))

    def get(self, name: str) -> str | None:
        """The text that a rank stored, None if there is none."""
        key = self._key(name)
        return self.request(lambda store: store.get(key).decode() if store.check([key]) else None)

    def close(self) -> None:
        """End the thread."""
        self._requests.put(None)
        self._thread.join(BEAT_SECONDS)

    def _key(self, name: str) -> str:
        return f"{self._name}/{name}"

    def _run(self) -> None:
        try:
            self._store.compare_set(self._key("event"), "", _NO_EVENT)
            self._serve()
        except RuntimeError:  # the base class of the store's errors
            self.broken = True
        while not self._requests.empty():
            if (request := self._requests.get()) is not None:
                request[1].put(None)

    def _serve(self) -> None:
        due = time.monotonic()
        while not self.broken:
            try:
                request = self._requests.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                due = time.monotonic() + BEAT_SECONDS
                if self.event is None or "code" not in self.event:
                    self._beat()
                continue
            if request is None:
                return
            action, result = request
            answer = None
            try:
                answer = action(self._store)
            finally:
                result.put(answer)

    def _beat(self) -> None:
        self._store.add(self._key(f"beat/{self._rank}"), 1)
        self._receive(self._store.get(self._key("event")))
        if self._previous is not None:
            beats = self._store.add(self._key(f"beat/{self._previous}"), 0)
            if beats != self._previous_beats:
                self._previous_beats, self.last_beat = beats, time.monotonic()
        self.last_answer = time.monotonic()

    def _receive(self, event: bytes) -> None:
        if event.decode() != _NO_EVENT:
            self.event = json.loads(event)


_FRAMES = 4
_READ = re.compile(r"\.(_cuda_)?(tolist|item|cpu|synchronize)\(")
"""Calls that wait for the device, and under NCCL so for other ranks. They are C functions without frames."""
_WAITING = re.compile(r"[^<]* at \.|.*\(distributed_c10d\.py:")
"""Location of a rank that waits for others."""


def write_stacks(folder: Path, rank: int) -> None:
    """Write the stack traces of all threads of this process to `folder`/rank_00000.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank_{rank:05d}.txt").open("w", encoding="utf-8") as handle:
        faulthandler.dump_traceback(file=handle, all_threads=True)


def main_thread_location() -> str:
    """The innermost frames of the main thread (`location`)."""
    return location(traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0)))


def location(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frames of a stack: `name (file:line) < name (file:line) < …`.

    If the innermost line reads a value off the device, its frame is `name (file:line) at .tolist()`.
    """
    frames = [f"{entry.name} ({Path(entry.filename).name}:{entry.lineno})" for entry in stack[: -_FRAMES - 1 : -1]]
    if read := _READ.search(stack[-1].line or ""):
        frames[0] += f" at {read[0]})"
    return " < ".join(frames)


def summarize(locations: Mapping[int, str]) -> str:
    """Innermost frames by ranks; without the ranks that wait for others, unless all of them do."""
    busy = {rank: text for rank, text in locations.items() if not _WAITING.match(text)} or locations
    ranks_at: dict[str, list[int]] = {}
    for rank, text in busy.items():
        ranks_at.setdefault(text.partition(" < ")[0], []).append(rank)
    return "; ".join(
        f"{format_ranks(ranks)} {'are' if len(ranks) > 1 else 'is'} in {frame}" for frame, ranks in ranks_at.items()
    )
