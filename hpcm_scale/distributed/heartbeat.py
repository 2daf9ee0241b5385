"""Heartbeats over the store, and stack traces of all ranks."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import Store

from hpcm_scale.distributed.ranks import numbers

# Where the processes of a run that goes on no more are.


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


# A process's line to the others: a thread that says that it lives, and hears whether others do.


BEAT_SECONDS = 1.0
_NOTHING_YET = "-"

Answer = TypeVar("Answer")


@dataclass
class _Request:
    action: Callable[[Store], Any]
    answered: threading.Event
    answer: Any = None


class StoreLine:
    """Talks to the store, so that nobody else hangs if its machine is gone.

    Once a second it counts up a number of this process, looks at the one before it (together they watch each other in a
    ring, which costs three requests a process and second) and reads what has happened, if anything.
    """

    def __init__(self, store: Store, name: str, rank: int, world_size: int) -> None:
        self.news: dict[str, Any] | None = None
        """What has happened to the run; None: nothing."""
        self.restart_clocks()
        self.broken = False
        """Whether the connection is."""
        self._store, self._name, self._rank = store, name, rank
        self._before = (rank - 1) % world_size if world_size > 1 else None
        self._before_count = 0
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store line", daemon=True)
        self._thread.start()

    def restart_clocks(self) -> None:
        """Take the store and the process before this one to have been heard of just now."""
        self.answered = self.before_beat = time.monotonic()

    def is_over(self) -> bool:
        """Whether the news are an end, whose exit code they have."""
        return self.news is not None and "code" in self.news

    def cut(self) -> None:
        """Take the store for gone: ask no more."""
        self.broken = True

    def ask(self, action: Callable[[Store], Answer], seconds: float = 5.0) -> Answer | None:
        """What `action` gives of the store, None if that takes longer than `seconds` or the store is gone."""
        if self.broken:
            return None
        request = _Request(action, threading.Event())
        self._requests.put(request)
        return request.answer if request.answered.wait(seconds) else None

    def post(self, news: dict[str, Any], instead_of: dict[str, Any] | None = None) -> None:
        """Tell all what has happened, unless something else happened before; `news` has it then, here as well."""
        expected = json.dumps(instead_of) if instead_of else _NOTHING_YET

        def tell(store: Store) -> None:
            self._hear(store.compare_set(self._key("news"), expected, json.dumps(news)))

        self.ask(tell)
        if self.news == instead_of:
            self.news = news  # nobody hears it, but this process acts on it

    def mark(self, what: str) -> None:
        """Tell all that this process is so far."""
        self.ask(lambda store: store.set(self._key(f"{what}/{self._rank}"), "1"))

    def marked(self, what: str, rank: int) -> bool:
        """Whether process `rank` is so far; also if there is no way to know any more."""
        return bool(self.ask(lambda store: store.check([self._key(f"{what}/{rank}")]))) or self.broken

    def count(self, what: str, more: int) -> int | None:
        """Add to a number that all share; the sum, None if the store is gone."""
        return self.ask(lambda store: store.add(self._key(what), more))

    def put(self, what: str, text: str) -> None:
        """Leave a text for another process."""
        self.ask(lambda store: store.set(self._key(what), text))

    def get(self, what: str) -> str | None:
        """A text that another process left, None if it has not."""
        key = self._key(what)
        return self.ask(lambda store: store.get(key).decode() if store.check([key]) else None)

    def close(self) -> None:
        """End the thread."""
        self._requests.put(None)
        self._thread.join(BEAT_SECONDS)

    def _key(self, what: str) -> str:
        return f"{self._name}/{what}"

    def _run(self) -> None:
        try:
            self._store.compare_set(self._key("news"), "", _NOTHING_YET)
            self._serve()
        except RuntimeError:  # all errors of the store are
            self.broken = True
        while not self._requests.empty():
            if (request := self._requests.get()) is not None:
                request.answered.set()

    def _serve(self) -> None:
        due = time.monotonic()
        while not self.broken:
            try:
                request = self._requests.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                due = time.monotonic() + BEAT_SECONDS
                if not self.is_over():
                    self._beat()
                continue
            if request is None:
                return
            try:
                request.answer = request.action(self._store)
            finally:
                request.answered.set()

    def _beat(self) -> None:
        self._store.add(self._key(f"beat/{self._rank}"), 1)
        self._hear(self._store.get(self._key("news")))
        if self._before is not None:
            count = self._store.add(self._key(f"beat/{self._before}"), 0)
            if count != self._before_count:
                self._before_count, self.before_beat = count, time.monotonic()
        self.answered = time.monotonic()

    def _hear(self, news: bytes) -> None:
        if news.decode() != _NOTHING_YET:
            self.news = json.loads(news)
