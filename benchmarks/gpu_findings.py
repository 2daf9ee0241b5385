"""What a check of gpu_acceptance.py runs on, and what it finds."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcm_scale.errors import in_a_line, is_first_process


@dataclass(frozen=True)
class Setting:
    """What a check runs on."""

    device: torch.device
    tiny: bool
    folder: Path
    """Of this check alone."""
    shards: Path
    images: Path
    """Folder of three pictures of different sizes."""
    processes: int = 1

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def pick(self, full: Any, tiny: Any) -> Any:
        """The one or the other."""
        return tiny if self.tiny else full


class Findings:
    """Figures and failures of a check, written to a file at once: a check that is cut short has told them."""

    def __init__(self, path: Path) -> None:
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []
        self.done = False
        self._path = path

    def note(self, name: str, value: Any) -> None:
        """A figure: a number, a text, or a list or dictionary of them."""
        self.figures[name] = rounded(value)
        self.write()

    def expect(self, condition: bool, otherwise: str) -> None:
        """`otherwise` says what is wrong unless the condition holds."""
        if not condition:
            self.failures.append(otherwise)
            self.write()

    def write(self) -> None:
        """By the first process."""
        if is_first_process():
            content = {"figures": self.figures, "failures": self.failures, "done": self.done}
            unfinished = self._path.with_suffix(".part")
            unfinished.write_text(json.dumps(content), encoding="utf-8")
            unfinished.replace(self._path)


def rounded(value: Any) -> Any:
    """Numbers of four digits, in whatever they lie."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Check:
    """A line of the table."""

    number: int
    title: str
    seconds: int
    """It may take on a GPU, imports included, and longer if others of its part leave time."""
    part: str
    run: Callable[[Setting, Findings], None]
    needs_gpu: bool = False
    together: bool = False
    """Whether it is run once more with two processes, where there are two devices: part d."""


def perform(check: Check, setting: Setting) -> None:
    """Run a check in this process; its findings go to `found.json` in the setting's folder."""
    found = Findings(setting.folder / "found.json")
    try:
        check.run(setting, found)
    except Exception as error:
        traceback.print_exc()
        found.expect(False, f"{type(error).__name__}: {in_a_line(error)}")
    found.done = True
    found.write()
    if found.failures and not is_first_process():
        raise SystemExit(1)  # the launcher hears of it


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference; infinite if the numbers are not as many or not finite."""
    if len(ours) != len(theirs) or not np.isfinite([*ours, *theirs]).all():
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
