"""The log beside a run's folder: what its processes say, and lines of ours on when they started and ended."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from hpcm_scale.errors import STOPPED

MARK = "hpcm sweep: "
"""What every line of ours begins with."""
_MARKS = re.compile(
    rf"^{MARK}(?:(submitted|starting|started)\b(?: on (\S+) as process group (\d+)$)?"
    r"|(ended) with exit code (-?\d+)(, as asked)?$)",
    re.MULTILINE,
)
TAIL = 1 << 16
"""Bytes at the end of a log that are looked at."""


@dataclass(frozen=True)
class Mark:
    """The last line of ours in a log."""

    kind: str
    """submitted, starting, started or ended."""
    code: int = 0
    """What it ended with."""
    asked: bool = False
    """Whether it had been asked to end."""
    group: int | None = None
    """The process group it was started as, where that was on this machine."""

    @property
    def failed(self) -> bool:
        """Whether it ended as it should not have."""
        return self.code not in (0, STOPPED) and not self.asked


def log_of(folder: Path) -> Path:
    """The log of the run in `folder` lies beside it."""
    return folder.with_name(folder.name + ".log")


def starting(command: Sequence[str]) -> str:
    """The line before a run's processes say anything."""
    return f"{MARK}starting {shlex.join(command)}\n"


def started(group: int) -> str:
    """The line for a run whose processes make up a process group of this machine."""
    return f"{MARK}started on {socket.gethostname()} as process group {group}\n"


def ended(code: int, *, asked: bool = False) -> str:
    """The line for the end of all of a run's processes; `code` is negative for a signal."""
    return f"{MARK}ended with exit code {code}{', as asked' if asked else ''}\n"


def tail(path: Path) -> str:
    """The end of a log, empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def last_mark(text: str) -> Mark | None:
    """The last line of ours in a log's text."""
    marks = list(_MARKS.finditer(text))
    if not marks:
        return None
    kind, host, group, end, code, asked = marks[-1].groups()
    here = host == socket.gethostname()
    return Mark(end or kind, int(code or 0), bool(asked), int(group) if here else None)


def last_error(text: str) -> str:
    """Why the processes whose log is `text` failed, in one line, as far as their last start tells."""
    text = re.split(rf"^{MARK}start(?:ing|ed in)", text, flags=re.MULTILINE)[-1]
    for pattern in (r"^hpcm: (.+)$", r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$"):
        found = re.findall(pattern, text, re.MULTILINE)
        if found:
            return found[-1].strip()
    code = re.findall(r"exits with return code = (-?\d+)", text) or re.findall(r"exit code (-?\d+)$", text.strip())
    return _in_words(int(code[-1])) if code else "it ended without a word"


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"a process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"a process was ended by signal {-code}"


def group_members(group: int) -> list[psutil.Process]:
    """The living processes of a process group of this machine."""
    return [process for process in psutil.process_iter() if _in_group(process, group)]


def _in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False  # it has ended by now


def lives(mark: Mark | None) -> bool:
    """Whether processes that a log's last mark tells of still run on this machine."""
    return mark is not None and mark.group is not None and any(map(_trains, group_members(mark.group)))


def _trains(process: psutil.Process) -> bool:
    """Not another program, which got the number of a group that is no more."""
    try:
        return any("hpcm_scale" in argument for argument in process.cmdline())
    except psutil.Error:
        return False
