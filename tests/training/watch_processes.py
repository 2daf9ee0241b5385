"""Starts the probe's processes as a scheduler without a launcher does, and collects what they say together.

They are forked where that can be, which spares them the imports; those that a launcher starts are not.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fork_server import Forked, ForkServer

PROBE = Path(__file__).with_name("watch_probe.py")


class Ended(NamedTuple):
    codes: list[int]
    lines: list[str]
    """Of all processes, in the order in which they were written."""


class Probes:
    """`processes` probes that are to meet, or those `ranks` of them; each may have arguments of its own.

    Forked from `forks`, if that is given.
    """

    def __init__(
        self,
        forks: ForkServer | None,
        folder: Path,
        processes: int,
        *arguments: str,
        ranks: Sequence[int] | None = None,
        own: dict[int, list[str]] | None = None,
        port: int | None = None,
    ) -> None:
        port = port or free_port()
        path = f"{PROBE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self._log = folder / f"log_{port}_{time.monotonic_ns()}.txt"
        self.processes: list[subprocess.Popen | Forked] = []
        with self._log.open("w", encoding="utf-8") as log:
            for rank in range(processes) if ranks is None else ranks:
                given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                environment = os.environ | {name: str(value) for name, value in given.items()}
                environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
                command = [*arguments, *(own or {}).get(rank, [])]
                where = {"cwd": folder, "env": environment}
                if forks:
                    process = forks.start(PROBE.stem, command, **where, output=log)
                else:
                    process = subprocess.Popen([sys.executable, str(PROBE), *command], **where, stdout=log, stderr=log)
                self.processes.append(process)

    def said(self) -> list[str]:
        return self._log.read_text(encoding="utf-8").splitlines()

    def await_line(self, part: str, seconds: float = 300) -> str:
        """Wait until one of them says something with `part` in it."""
        return await_line(self.said, part, seconds)

    def end(self) -> Ended:
        """Wait for all."""
        try:
            codes = [process.wait(300) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return Ended(codes, self.said())


def await_line(said, part: str, seconds: float = 300) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for line in said():
            if part in line:
                return line
        time.sleep(0.05)
    raise AssertionError(f"nobody says {part!r}: {said()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
