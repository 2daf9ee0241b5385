"""Means of the training metrics between two journal lines."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Meter:
    """Sums of per-step values; skipped steps and those without a finite loss are left out of the means."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0

    def add(self, values: dict[str, float], skipped: bool) -> None:
        """The values of one step, already averaged over the processes."""
        self.skipped += skipped
        if skipped or not math.isfinite(values["loss"]):
            return
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self, names: list[str]) -> dict[str, float | None]:
        """The means since the last call, None where there was no finite step; starts anew."""
        means = {name: self.sums[name] / self.steps if self.steps else None for name in names}
        means["skipped"] = self.skipped
        self.sums, self.steps, self.skipped = {}, 0, 0
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep: `Meter(**state)` goes on."""
        return asdict(self)
