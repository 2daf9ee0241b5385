"""Which devices there are, and how the jobs of a sweep share them."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hpcm_scale.devices import cpu_is_asked_for, device_count
from hpcm_scale.errors import UserError

PORTS = range(20000, 30000)
"""Where processes of a job meet: below the ports that systems hand out by themselves."""


@dataclass(frozen=True)
class Share:
    """What one job at a time runs on."""

    processes: int
    gpus: tuple[int, ...]
    """Empty: the CPU."""

    def arguments(self) -> list[str]:
        """What tells `deepspeed` so."""
        if self.gpus:
            return ["--include", f"localhost:{','.join(map(str, self.gpus))}"]
        return ["--num_gpus", str(self.processes)]

    def __str__(self) -> str:
        if self.gpus:
            return f"GPU {', '.join(map(str, self.gpus))}"
        return f"{self.processes} CPU process{'es' if self.processes > 1 else ''}"


def visible_gpus() -> list[int]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves, by their numbers on the machine.

    None if DS_ACCELERATOR=cpu. Raises UserError for names in place of numbers, and as `device_kind` does.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or cpu_is_asked_for():
        return list(range(device_count()))
    try:
        return [number for number in map(int, filter(None, visible.split(","))) if number >= 0]
    except ValueError:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names devices in a way that deepspeed does not take; use their numbers"
        ) from None


def shares(gpus: Sequence[int], per_job: int, at_once: int | None, cores: int) -> list[Share]:
    """Disjoint parts of the machine, as many as jobs run at a time.

    `gpus` may be empty: then each job has `per_job` processes on the CPU, and `at_once` tells how many jobs; unset,
    as many as `cores` give each process one. Raises UserError for more than the machine has.
    """
    if len(set(gpus)) < len(gpus):
        raise UserError(f"hydra.launcher.gpus={list(gpus)} names a GPU twice; name each once")
    if not gpus:
        return [Share(per_job, ())] * (at_once or max(1, cores // per_job))
    room = len(gpus) // per_job
    if per_job * (at_once or 1) > len(gpus):
        wanted = f"hydra.launcher.gpus_per_job={per_job}" + (f" × jobs_at_once={at_once}" if at_once else "")
        raise UserError(f"{wanted} is more than the {len(gpus)} GPUs there are; ask for fewer")
    starts = range(0, per_job * (at_once or room), per_job)
    return [Share(per_job, tuple(gpus[start : start + per_job])) for start in starts]


def free_port(taken: Collection[int]) -> int:
    """A port of this machine that nobody listens on, none of those in `taken`."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if port in taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise UserError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on this machine; end what takes them")
