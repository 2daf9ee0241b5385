"""Setting, findings and running of a check of gpu_acceptance.py."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcm_scale.errors import first_line, is_first_process


@dataclass(frozen=True)
class Setting:
    """The setting of a check."""

    device: torch.device
    tiny: bool
    folder: Path
    """Folder of this check."""
    shards: Path
    images: Path
    """Folder of three images of different sizes."""
    processes: int = 1

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def pick(self, full: Any, tiny: Any) -> Any:
        """`tiny` in a tiny setting, else `full`."""
        return tiny if self.tiny else full


class Findings:
    """Figures and failures of a check, written to a file immediately, so that a killed check keeps them."""

    def __init__(self, path: Path) -> None:
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []
        self.done = False
        self._path = path

    def note(self, name: str, value: Any) -> None:
        """Record a figure: a number, a text, or a list or dictionary of them."""
        self.figures[name] = rounded(value)
        self.write()

    def expect(self, condition: bool, failure: str) -> None:
        """Record a failure unless the condition holds."""
        if not condition:
            self.failures.append(failure)
            self.write()

    def write(self) -> None:
        """Write the file, on rank 0."""
        if is_first_process():
            content = {"figures": self.figures, "failures": self.failures, "done": self.done}
            unfinished = self._path.with_suffix(".part")
            unfinished.write_text(json.dumps(content), encoding="utf-8")
            unfinished.replace(self._path)


def rounded(value: Any) -> Any:
    """Numbers rounded to four digits, also in lists and dictionaries."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Check:
    """A check: a row of the table."""

    number: int
    title: str
    seconds: int
    """Budget on a GPU, imports included; longer if other checks of its part leave time."""
    part: str
    run: Callable[[Setting, Findings], None]
    needs_gpu: bool = False
    together: bool = False
    """Whether it runs again with two processes, in part d, if there are two devices."""


def perform(check: Check, setting: Setting) -> None:
    """Run a check in this process and write its findings to `found.json` in its folder."""
    found = Findings(setting.folder / "found.json")
    try:
        check.run(setting, found)
    except Exception as error:
        traceback.print_exc()
        found.expect(False, f"{type(error).__name__}: {first_line(error)}")
    found.done = True
    found.write()
    if found.failures and not is_first_process():
        raise SystemExit(1)  # for the launcher


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference; infinite if the lengths differ or a number is not finite."""
    if len(ours) != len(theirs) or not np.isfinite([*ours, *theirs]).all():
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
