"""A training without a model: processes that meet, watch each other, and add numbers up, until one of them …

Arguments: `init_timeout=…`, `stall_seconds=…`, `steps=…`, `folder=…`, `times=…` (trainings one after the other), and
what process `who` does in its third step, `does=…` (see `fail`; `does=hold_for_8` with seconds), or `late=who` after
its last; or, before it joins, `refused=text`. `fact=…` is what the processes compare, `finished=` all that they do;
`lost_seconds=…`, `stuck_seconds=…` and `grace_seconds=…` take the place of the watch's own; `lock=…` takes the lock on
`folder`, waiting so many seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed

from hpcm_scale.distributed import processes, watchdog
from hpcm_scale.distributed.rendezvous import init_process_group, join, share_errors
from hpcm_scale.errors import STOPPED, UserError, entry_point
from hpcm_scale.training.run_folder import RunFolder, RunLock


@entry_point
def main() -> None:
    given = dict(argument.split("=", 1) for argument in processes.without_launcher_arguments(sys.argv[1:]))
    processes.complete_environment()
    watchdog.STUCK_SECONDS = float(given.get("stuck_seconds", watchdog.STUCK_SECONDS))
    watchdog.GRACE_SECONDS = float(given.get("grace_seconds", "1"))
    for _ in range(int(given.get("times", "1"))):
        train(given)


def train(given: dict[str, str]) -> None:
    rank = int(os.environ["RANK"])
    who = rank == int(given.get("who", "-1"))
    with share_errors():
        if "refused" in given and (who or "who" not in given):
            raise UserError("refused", "", given["refused"])
    facts = {"setting": {"train": {"steps": given.get("fact", "5")}}}
    group = join(facts, float(given.get("init_timeout", "0.5")))
    if "finished" in given:
        say(f"process {rank} has nothing to do")
        return
    folder = Path(given.get("folder", "."))
    if "lock" in given:
        group.on_rank_zero(lambda: locks.append(RunLock(RunFolder(folder), float(given["lock"]))))
    asked: list[str] = []
    stall, lost = (float(given.get(name, default)) for name, default in (("stall_seconds", 60), ("lost_seconds", 25)))
    with watchdog.Watchdog(group, stall, folder / "stacks", lost, on_orphaned=asked.append) as guard:
        init_process_group(group, 30)
        for step in range(1, int(given.get("steps", "5")) + 1):
            if step == 3 and (who or given.get("does") == "all_mistake"):
                fail(*given["does"].split("_for_"))
            total = torch.tensor([1.0, float(bool(asked))])
            torch.distributed.all_reduce(total)
            if total[1]:
                say(f"process {rank} stops at step {step}: {asked}")
                raise SystemExit(STOPPED)
            guard.progress(step)
            time.sleep(float(given.get("pause", "0.01")))
            if step == 2:
                say(f"process {rank} is at step 2, pid {os.getpid()}")
        if given.get("late") == str(rank):
            time.sleep(3)
    say(f"process {rank} is done: {total[0]:g} added up")


locks: list[RunLock] = []


def fail(how: str, seconds: str = "300") -> None:
    if how == "raise":
        raise ArithmeticError("one and one is three")
    if how == "mistake":
        error = UserError("shards-gone", "", "the shards are gone")
        error.local = True
        raise error
    if how in ("all_mistake", "one_mistake"):
        raise UserError("loss-not-finite", "", "the loss is not finite")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "sleep":
        time.sleep(100)
    if how == "hold":
        ctypes.PyDLL(None).sleep(int(seconds))  # unlike CDLL, it keeps the interpreter
    if how == "interrupt":
        raise KeyboardInterrupt


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # whole, whatever others write


if __name__ == "__main__":
    main()
