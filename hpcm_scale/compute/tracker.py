"""Counts what a run has spent and how fast it goes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

PETA = 1e15
Costs = Mapping[int, float]
"""Model FLOPs of a training image, forward and backward, by the global index of the first that costs so much."""


def flops_of(costs: Costs, images: int) -> float:
    """Model FLOPs of the first so many training images; exact where the costs are whole numbers."""
    ends = [*list(costs)[1:], images]
    return sum(cost * max(0, min(end, images) - first) for (first, cost), end in zip(costs.items(), ends, strict=True))


@dataclass
class Window:
    """The steps since rates were last told."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass
class ComputeTracker:
    """Cumulative compute, images and time of one run; goes on over resumes.

    `peak`: FLOP/s of all devices together, None where it is not known.
    """

    costs: Costs
    device: torch.device
    peak: float | None = None
    images: int = 0
    seconds: float = 0.0
    """Training time so far, as of the last `step`."""
    _started: float = field(default_factory=time.perf_counter)
    _windows: dict[str, Window] = field(default_factory=lambda: {"journal": Window(), "log": Window()})

    @property
    def pflops(self) -> float:
        """Model PFLOPs (1e15 floating-point operations) spent so far; recomputation is not counted."""
        return flops_of(self.costs, self.images) / PETA

    def start_clock(self) -> None:
        """Training begins now; what went before is not counted."""
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Time since the last `step` was not training (evaluation, checkpoint): do not rate it."""
        now = time.perf_counter()
        self.seconds += now - self._started
        self._started = now

    def step(self, images: int, waited: float) -> None:
        """One optimizer step over `images` (all processes) is done; `waited` seconds went by for data."""
        now = time.perf_counter()
        self.images += images
        self.seconds += now - self._started
        for window in self._windows.values():
            window.steps += 1
            window.images += images
            window.seconds += now - self._started
            window.waited += waited
        self._started = now

    def position(self) -> dict[str, float]:
        """Where the run is: the keys every journal line has, but `step`."""
        return {
            "time": round(self.seconds, 3),
            "train/images": self.images,
            "compute/pflops": self.pflops,
        }

    def rates(self, to: str = "journal") -> dict[str, float]:
        """Speed since the last call: seconds per step, images/s, seconds waited for data, GB, MFU.

        Calls for the "journal" and for the "log" do not know of each other.

        On a GPU part of what is waited for goes by while the device is still at work on the step before.
        """
        window, self._windows[to] = self._windows[to], Window()
        steps, seconds = max(window.steps, 1), max(window.seconds, 1e-9)
        rates = {
            "perf/step_seconds": seconds / steps,
            "perf/images_per_second": window.images / seconds,
            "perf/data_seconds": window.waited / steps,
            "perf/memory_gb": peak_memory(self.device) / 1e9,
        }
        if self.peak:
            flops = flops_of(self.costs, self.images) - flops_of(self.costs, self.images - window.images)
            rates["perf/mfu"] = flops / seconds / self.peak
        return rates

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's `state`."""
        self.images, self.seconds = int(state["images"]), state["seconds"]


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
