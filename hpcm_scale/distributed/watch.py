"""Processes that watch each other while they train: whatever happens to one of them, all of them end, and say why."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed

from hpcm_scale.distributed.heartbeat import StoreLine, main_thread, summary, write_stacks
from hpcm_scale.distributed.ranks import Peer, numbers
from hpcm_scale.distributed.rendezvous import POLL_SECONDS, Group, ignore_termination
from hpcm_scale.errors import STOPPED, Fault, UserError, shown

LOOK_SECONDS = 0.5
LOST_SECONDS = 25.0
"""A process that has not been heard of for so long is gone, or as good as gone."""
LONG_LOST_SECONDS = 120.0
"""The same on GPUs and with torch.compile: calls of the driver and of compilers may hold the interpreter for long."""
STUCK_SECONDS = 50.0
"""A process whose interpreter is held ends so long after a stall would have been noticed."""
GRACE_SECONDS = 4.0
"""What the main thread has to come out of what it waits for, once the run is over."""
SETTLE_SECONDS = 12.0
"""What all but one have to end, before that one speaks."""
EXIT_SECONDS = 2 * SETTLE_SECONDS
"""What that one has to end."""
ALIKE_SECONDS = 10.0
"""All processes meet a mistake that all of them make within so long."""
STACKS_SECONDS = 5.0


class Watch:
    """Guards a training from inside each of its processes; a context manager around all of it.

    Left without an exception (or by SystemExit for a run that was asked to stop), it waits for all processes to come
    so far. A UserError that is not `local` passes if all processes raise it. Anything else, a process that is gone,
    and `stall_seconds` without a call of `alive` end all processes: the one where it happened leaves after the
    others, with its exception or a `Fault` that tells what is the matter; they leave by SystemExit with the same code,
    or, where the main thread hangs, without more ado. A process is lost if it has not been heard of for `lost_seconds`.
    It is not killed, for it may be alive and wait for the driver: if its interpreter is held for `stall_seconds` +
    STUCK_SECONDS, it writes its stack traces to stderr and ends, with code 1.

    Stack traces of a stall go to `folder`. `on_orphaned` is called, once, with a reason, from another thread, when the
    launcher has been ended and this process has not.
    """

    _count = 0

    def __init__(
        self,
        group: Group,
        stall_seconds: float,
        folder: str | Path,
        lost_seconds: float = LOST_SECONDS,
        on_orphaned: Callable[[str], None] = lambda reason: None,
    ) -> None:
        Watch._count += 1
        self._group, self._rank = group, group.rank
        self._me = group.peers[group.rank]
        self._others = [peer for peer in group.peers if peer.rank != group.rank]
        self._near = [peer for peer in self._others if peer.is_visible()]
        self._stall_seconds, self._lost_seconds = stall_seconds, lost_seconds
        self._folder, self._on_orphaned = Path(folder), on_orphaned
        self._step: int | None = None
        self._alive = self._ran = time.monotonic()
        self._line = StoreLine(group.line(), f"watch{Watch._count}", group.rank, group.world_size)
        self._safe = threading.Event()
        """There is nothing to guard any more."""
        self._leaving = threading.Event()
        """The main thread is on its way out."""
        self._guard = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._runs()
        self._guard.start()
        return self

    def alive(self, step: int | None = None) -> None:
        """The training goes on: `step` is done, or, without one, a part of something that takes long."""
        self._alive = time.monotonic()
        if step is not None:
            self._step = step

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        stopped = error is None or (isinstance(error, SystemExit) and error.code in (0, None, STOPPED))
        if stopped:
            together = self._all_come("end")
        elif isinstance(error, UserError) and not error.local:
            together = self._all_come(f"mistake {hashlib.sha256(shown(error).encode()).hexdigest()}", ALIKE_SECONDS)
        else:
            together = self._group.world_size == 1
        if together:
            self._close()
            return False
        self._group.failed = True
        ignore_termination()
        if stopped or _is_disconnection(error):
            self._await_news()
        if self._cause() is None:
            self._line.post({"text": _one_line(error), "code": _exit_code(error), "rank": self._rank, "raised": True})
        cause = self._cause()
        self._leaving.set()
        self._settle(cause)
        if cause["rank"] != self._rank:
            raise SystemExit(cause["code"])
        if not cause["raised"]:
            raise Fault(cause["text"]) from None
        if isinstance(error, UserError):
            error.local = True  # the others have left without a word
        return False

    def _cause(self) -> dict[str, Any] | None:
        """What ends the run: text, exit code, the rank that tells it, and whether its main thread raised it."""
        return self._line.news if self._line.is_over() else None

    def _await_news(self) -> None:
        """A connection that was cut has a cause: that the other end is gone, which is found out soon."""
        deadline = time.monotonic() + self._lost_seconds + GRACE_SECONDS
        while self._cause() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _all_come(self, where: str, seconds: float = float("inf")) -> bool:
        """Whether all processes come here within `seconds`, and nothing else happens meanwhile."""
        if not self._counted(where, seconds):
            return False
        self._safe.set()  # from here on, any of them may end
        self._counted(f"{where} seen", ALIKE_SECONDS)
        return True

    def _counted(self, what: str, seconds: float) -> bool:
        """Count this process in; whether all are within `seconds`."""
        deadline = time.monotonic() + seconds
        count = self._line.count(what, 1)
        while count != self._group.world_size:
            if self._line.broken or self._cause() or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
            count = self._line.count(what, 0)
        return True

    def _close(self) -> None:
        self._safe.set()
        self._leaving.set()
        self._line.close()
        self._guard.join()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        """The guard's thread: never talks to the store itself, so it never hangs."""
        orphaned = False
        while not self._safe.wait(LOOK_SECONDS):
            self._runs()
            if self._cause():
                self._end()
                return
            if not orphaned and self._group.launcher.is_gone():
                orphaned = True
                self._on_orphaned("its launcher is gone")
            if self._line.news:  # a stall that another process has noticed
                self._tell_where()
            elif gone := self._gone():
                self._post(gone)
            elif silent := self._silent():
                self._post(
                    f"{silent} has not been heard of for {self._lost_seconds:g} s: it hangs, or its machine is gone"
                )
            elif time.monotonic() > self._alive + self._stall_seconds:
                self._stalled()

    def _runs(self) -> None:
        """Threads of this process run: it is not to end by its timer, which needs no interpreter, for now."""
        faulthandler.dump_traceback_later(self._stall_seconds + STUCK_SECONDS, exit=True)
        before, self._ran = self._ran, time.monotonic()
        if self._ran > before + self._lost_seconds / 2:  # they were held, and have heard nothing meanwhile
            self._line.restart_clocks()

    def _gone(self) -> str | None:
        """A process that does not live any more, in a sentence."""
        for peer in self._near:
            if peer.has_ended() and not self._safe.is_set():
                if self._group.keeps_store(peer.rank):
                    self._line.cut()
                return f"{peer} is gone: killed, or out of memory; the same command goes on"
        now = time.monotonic()
        if now > self._line.answered + self._lost_seconds:
            self._line.cut()
        if self._line.broken:
            keeper = self._group.peers[0] if self._group.keeps_store(0) else "torchrun, which keeps the store,"
            return f"{keeper} is gone, or its machine is; the same command goes on"
        return None

    def _silent(self) -> Peer | None:
        """The process before this one in the ring, if it has not been heard of for long."""
        if self._others and time.monotonic() > self._line.before_beat + self._lost_seconds:
            return self._group.peers[self._rank - 1]
        return None

    def _post(self, text: str) -> None:
        self._line.post({"text": text, "code": Fault.exit_code, "rank": self._speaker(), "raised": False})

    def _speaker(self) -> int:
        """Who tells what this process has found out: itself, if others can hear of it, else one for each machine."""
        if not self._line.broken:
            return self._rank
        return min([self._rank, *(peer.rank for peer in self._near if not peer.has_ended())])

    def _stalled(self) -> None:
        """No step for too long: ask all where they are."""
        stall = {"stall": self._rank}
        self._line.post(stall)
        if self._line.news != stall:
            return
        self._tell_where()
        places: dict[int, str] = {}
        deadline = time.monotonic() + STACKS_SECONDS
        while len(places) < self._group.world_size and time.monotonic() < deadline:
            for peer in self._group.peers:
                if peer.rank not in places and (place := self._line.get(f"place/{peer.rank}")):
                    places[peer.rank] = place
            time.sleep(POLL_SECONDS)
        for place in dict.fromkeys(places.values()):
            ranks = [rank for rank in places if places[rank] == place]
            sys.stderr.write(f"hpcm: {numbers(ranks)}: {place}\n")
        after = "" if self._step is None else f" after step {self._step}"
        text = (
            f"no step for {self._stall_seconds / 60:g} minutes{after} ({summary(places)}); stack traces: {self._folder}"
        )
        cause = {"text": text, "code": Fault.exit_code, "rank": self._rank, "raised": False}
        self._line.post(cause, instead_of=stall)

    def _tell_where(self) -> None:
        if self._line.get(f"place/{self._rank}") is None:
            with suppress(OSError):
                write_stacks(self._folder, self._rank)
            self._line.put(f"place/{self._rank}", main_thread())

    def _end(self) -> None:
        """The run is over: give the main thread time to leave in good order, then end the process."""
        cause = self._cause()
        if not self._leaving.wait(GRACE_SECONDS):
            self._settle(cause)
            if cause["rank"] == self._rank:
                sys.stderr.write(f"hpcm: {cause['text']}\n")
        elif self._safe.wait(EXIT_SECONDS if cause["rank"] == self._rank else SETTLE_SECONDS):
            return
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(cause["code"])

    def _settle(self, cause: dict[str, Any]) -> None:
        """Leave in order: who speaks waits for all, who keeps the store for all but that one, others for nobody."""
        if self._rank == cause["rank"]:
            self._await_end(self._others, marks=False)
        elif self._group.keeps_store(self._rank):
            self._await_end([peer for peer in self._others if peer.rank != cause["rank"]], marks=True)
        self._line.mark("left")

    def _await_end(self, peers: Iterable[Peer], marks: bool) -> None:
        """Wait for processes to end; of those on other machines, and of all with `marks`, to say that they do so."""
        deadline = time.monotonic() + (SETTLE_SECONDS / 2 if marks else SETTLE_SECONDS + 1)
        left = list(peers)
        while left and time.monotonic() < deadline:
            left = [peer for peer in left if not self._has_left(peer, marks)]
            time.sleep(POLL_SECONDS)

    def _has_left(self, peer: Peer, marks: bool) -> bool:
        if peer in self._near:
            return peer.has_ended() or (marks and self._line.marked("left", peer.rank))
        return self._line.marked("left", peer.rank)


def _is_disconnection(error: BaseException | None) -> bool:
    """Whether an exception only says that another process does not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection "))


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _exit_code(error: BaseException | None) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
