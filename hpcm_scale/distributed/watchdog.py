"""Watchdog: ends all ranks of a training when one of them fails, stalls or is lost, and reports the cause last."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed

from hpcm_scale.distributed.heartbeat import Heartbeat, main_thread_location, summarize, write_stacks
from hpcm_scale.distributed.processes import RankInfo, format_ranks
from hpcm_scale.distributed.rendezvous import Group, ignore_sigterm, polling
from hpcm_scale.errors import STOPPED, Fault, UserError, print_message, printable

CHECK_SECONDS = 0.5
LOST_SECONDS = 25.0
"""A rank without a heartbeat for so long is lost."""
LONG_LOST_SECONDS = 120.0
"""The same on GPUs and with torch.compile: drivers and compilers may hold the interpreter for long."""
STUCK_SECONDS = 50.0
"""A rank with a blocked interpreter is killed this long after the time-out for stalls."""
GRACE_SECONDS = 4.0
"""How long the main thread may take to leave once the run is over."""
LEAVE_SECONDS = 12.0
"""How long the other ranks may take to end before the rank that reports the cause does so."""
EXIT_SECONDS = 2 * LEAVE_SECONDS
"""How long the reporting rank may take to end."""
COMMON_SECONDS = 10.0
"""Within so long all ranks raise an error that they have in common."""
STACKS_SECONDS = 5.0


class Watchdog:
    """Context manager around a training, on every rank.

    Without an exception, or with the SystemExit of a stopped run, leaving it waits for all ranks. A UserError that is
    not `local` is raised unchanged if all ranks raise it. Any other exception, a lost rank, or `stall_seconds` without
    a call of `progress` ends all ranks with one exit code: the rank of the cause exits last, with its exception or a
    `Fault`; the others exit by SystemExit, or by os._exit if the main thread hangs.

    A rank is lost if its process has ended, or if it sends no heartbeat for `lost_seconds`. A silent process is not
    killed, since it may wait for the driver; if its interpreter is blocked for `stall_seconds` + STUCK_SECONDS, it
    writes its stack traces to stderr and exits with code 1.

    Args:
        group: the ranks.
        stall_seconds: time-out without progress; stack traces of all ranks are written to `folder` then.
        folder: see `stall_seconds`.
        lost_seconds: time-out without a heartbeat.
        on_orphaned: called once, with a reason, from another thread, if the launcher ends before this process.
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
        Watchdog._count += 1
        self._group, self._rank = group, group.rank
        self._others = [rank for rank in group.members if rank.rank != group.rank]
        self._local = [rank for rank in self._others if rank.is_local()]
        self._stall_seconds, self._lost_seconds = stall_seconds, lost_seconds
        self._folder, self._on_orphaned = Path(folder), on_orphaned
        self._step: int | None = None
        self._last_progress = self._last_check = time.monotonic()
        store = group.store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._heartbeat = Heartbeat(store, f"watch{Watchdog._count}", group.rank, group.world_size)
        self._done = threading.Event()
        """All ranks have finished; any of them may exit."""
        self._leaving = threading.Event()
        """The main thread is leaving the context."""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._check_held()
        self._thread.start()
        return self

    def progress(self, step: int | None = None) -> None:
        """Restart the time-out for stalls; `step` is done, or without one a part of something long."""
        self._last_progress = time.monotonic()
        if step is not None:
            self._step = step

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        succeeded = error is None or (isinstance(error, SystemExit) and error.code in (0, None, STOPPED))
        if succeeded:
            common = self._await_all("end")
        elif isinstance(error, UserError) and not error.local:
            common = self._await_all(hashlib.sha256(printable(error).encode()).hexdigest(), COMMON_SECONDS)
        else:
            common = self._group.world_size == 1
        if common:
            self._close()
            return
        self._group.failed = True
        ignore_sigterm()
        if succeeded or _is_disconnection(error):
            self._await_cause()
        while (cause := self._cause) is None:  # the error replaces a stall that another rank is about to report
            text = " ".join(str(error).split()) or type(error).__name__
            self._end_run(["", "", text], self._rank, _exit_code(error), raised=True, replaces=self._heartbeat.event)
        self._leaving.set()
        self._leave(cause)
        if cause["rank"] != self._rank:
            raise SystemExit(cause["code"])
        if not cause["raised"]:
            raise Fault(*cause["error"]) from None
        if isinstance(error, UserError):
            error.local = True  # the other ranks print nothing

    @property
    def _cause(self) -> dict[str, Any] | None:
        """The event that ends the run: error, exit code, reporting rank, and whether its main thread raised it."""
        event = self._heartbeat.event
        return event if event and "code" in event else None

    def _end_run(
        self,
        error: Sequence[str],
        rank: int,
        code: int = Fault.exit_code,
        raised: bool = False,
        replaces: dict[str, Any] | None = None,
    ) -> None:
        self._heartbeat.post({"error": list(error), "code": code, "rank": rank, "raised": raised}, replaces)

    def _await_cause(self) -> None:
        """Wait for the cause of a broken connection, a lost rank, which is noticed soon."""
        for _ in polling(self._lost_seconds + GRACE_SECONDS):
            if self._cause:
                return

    def _await_all(self, place: str, seconds: float = float("inf")) -> bool:
        """Whether all ranks reach `place` within `seconds` while the run continues."""
        if not self._all_counted(place, seconds):
            return False
        self._done.set()
        self._all_counted(f"{place} seen", COMMON_SECONDS)
        return True

    def _all_counted(self, name: str, seconds: float) -> bool:
        self._heartbeat.count(name, 1)
        for _ in polling(seconds):
            if self._heartbeat.count(name, 0) == self._group.world_size:
                return True
            if self._heartbeat.broken or self._cause:
                return False
        return False

    def _close(self) -> None:
        self._done.set()
        self._leaving.set()
        self._heartbeat.close()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """The watchdog's thread; it leaves requests to the store to the heartbeat's thread, so it cannot hang."""
        orphaned = False
        while not self._done.wait(CHECK_SECONDS):
            self._check_held()
            if cause := self._cause:
                self._end(cause)
                return
            if not orphaned and self._group.launcher.is_gone():
                orphaned = True
                self._on_orphaned("its launcher has exited")
            if self._heartbeat.event:  # another rank has noticed a stall
                self._report_location()
            elif error := self._lost_rank():
                self._end_run(error.args, self._reporting_rank())
            elif time.monotonic() > self._last_progress + self._stall_seconds:
                self._report_stall()

    def _check_held(self) -> None:
        """Restart the timer that ends this process if its interpreter is blocked; it runs without the interpreter."""
        faulthandler.dump_traceback_later(self._stall_seconds + STUCK_SECONDS, exit=True)
        before, self._last_check = self._last_check, time.monotonic()
        if self._last_check > before + self._lost_seconds / 2:  # the interpreter was blocked: no heartbeat was received
            self._heartbeat.reset_timers()

    def _lost_rank(self) -> Fault | None:
        """The error of a rank, or a store, that is lost."""
        for rank in self._local:
            if rank.has_ended() and not self._done.is_set():
                self._heartbeat.broken |= self._group.hosts_store(rank.rank)
                return Fault(
                    "rank-killed",
                    "",
                    f"{rank} was killed, probably because memory ran out; the same command resumes the run",
                )
        now = time.monotonic()
        if self._heartbeat.broken or now > self._heartbeat.last_answer + self._lost_seconds:
            self._heartbeat.broken = True
            host = self._group.members[0] if self._group.hosts_store(0) else "torchrun, which hosts the store,"
            return Fault(
                "store-lost",
                "",
                f"no connection to {host}: it has ended, or its node is down; the same command resumes the run",
            )
        if self._others and now > self._heartbeat.last_beat + self._lost_seconds:
            previous = self._group.members[self._rank - 1]
            return Fault(
                "rank-silent",
                "",
                f"{previous} has sent no heartbeat for {self._lost_seconds:g} s: it hangs, or its node is down; the "
                "same command resumes the run",
            )
        return None

    def _reporting_rank(self) -> int:
        """The rank that reports what this one has found: itself, or one per node if the store is lost."""
        if not self._heartbeat.broken:
            return self._rank
        return min([self._rank, *(rank.rank for rank in self._local if not rank.has_ended())])

    def _report_stall(self) -> None:
        """End the run after collecting the locations of all ranks."""
        stall = {"stall": self._rank}
        self._heartbeat.post(stall)
        if self._heartbeat.event != stall:
            return
        self._report_location()
        locations: dict[int, str] = {}
        for _ in polling(STACKS_SECONDS):
            for rank in range(self._group.world_size):
                if rank not in locations and (location := self._heartbeat.get(f"location/{rank}")):
                    locations[rank] = location
            if len(locations) == self._group.world_size:
                break
        for location in dict.fromkeys(locations.values()):
            print_message(f"{format_ranks([rank for rank in locations if locations[rank] == location])}: {location}")
        after = "" if self._step is None else f" after step {self._step}"
        error = Fault(
            "stall",
            "train.watchdog_timeout",
            f"no step for {self._stall_seconds / 60:g} minutes{after} ({summarize(locations)}); stack traces: "
            f"{self._folder}; raise train.watchdog_timeout if a step takes that long",
        )
        self._end_run(error.args, self._rank, replaces=stall)

    def _report_location(self) -> None:
        if self._heartbeat.get(f"location/{self._rank}") is None:
            with suppress(OSError):
                write_stacks(self._folder, self._rank)
            self._heartbeat.put(f"location/{self._rank}", main_thread_location())

    def _end(self, cause: dict[str, Any]) -> None:
        """End this process once the main thread has left, or has had the time to."""
        reports = cause["rank"] == self._rank
        if not self._leaving.wait(GRACE_SECONDS):
            self._leave(cause)
            if reports:
                print_message(cause["error"][-1])
        elif self._done.wait(EXIT_SECONDS if reports else LEAVE_SECONDS):
            return
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(cause["code"])

    def _leave(self, cause: dict[str, Any]) -> None:
        """Leave in order: first most ranks, then the one that hosts the store, last the one that reports the cause."""
        if self._rank == cause["rank"]:
            self._await_end(self._others, LEAVE_SECONDS + 1, ended=True)
        elif self._group.hosts_store(self._rank):
            others = [rank for rank in self._others if rank.rank != cause["rank"]]
            self._await_end(others, LEAVE_SECONDS / 2, ended=False)
        self._heartbeat.put(f"left/{self._rank}", "1")

    def _await_end(self, ranks: Iterable[RankInfo], seconds: float, ended: bool) -> None:
        """Wait until ranks have left; local ones, if `ended`, until their processes have ended."""

        def is_there(rank: RankInfo) -> bool:
            if rank in self._local and (ended or rank.has_ended()):
                return not rank.has_ended()
            return not (self._heartbeat.get(f"left/{rank.rank}") or self._heartbeat.broken)

        left = list(ranks)
        for _ in polling(seconds):
            left = [rank for rank in left if is_there(rank)]
            if not left:
                return


def _is_disconnection(error: BaseException | None) -> bool:
    """Whether an exception only reports that another rank does not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection "))


def _exit_code(error: BaseException | None) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
