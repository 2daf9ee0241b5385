"""Counters of FLOPs, kernel launches and memory; compute and speed of a run."""

from __future__ import annotations

import resource
import sys
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

# FLOPs, counted on the meta device.

TRAINING_FACTOR = 3
"""Model FLOPs of a training step over those of the forward pass: backward counts as twice forward.

torch's formula for the weight gradient of a grouped convolution ignores groups, which overestimates these models by
about 40 %. Counted correctly, backward is 1.984 (68m) to 2.000 (1b) times forward.
"""

aten = torch.ops.aten
_MOVEMENT = {aten.index_copy, aten.copy_, aten.embedding}
_PRODUCTS = {aten.mv, aten.addmv, aten.dot, aten.vdot}  # of vectors, without a formula in torch


class _RefuseUnknown(TorchDispatchMode):
    """Raises for a product, or an operation on several matrices, without a FLOP formula."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = func._overloadpacket
        free = torch.Tag.pointwise in func.tags or func.is_view or packet in _MOVEMENT
        matrices = sum(isinstance(argument, Tensor) and argument.dim() > 1 for argument in args)
        if packet in _PRODUCTS or (not free and matrices > 1 and packet not in flop_registry):
            raise ValueError(f"{func} has no FLOP formula; add it to hpcm_scale/compute/tracker.py")
        return func(*args, **(kwargs or {}))


def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs (2 per multiply-accumulate) of a forward pass of a module on the meta device.

    Convolutions, matrix products and attention count, elementwise operations do not. Raises ValueError for an operation
    on several matrices without a formula.
    """
    assert all(tensor.is_meta for tensor in inputs), "attention counts 0 on other devices"
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _RefuseUnknown():
        module(*inputs)
    return counter.get_total_flops()


# Kernel launches and memory of a step; fake tensors suffice.

_LAUNCH_NOTHING = (
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "promote_types",
)


class Launches(TorchDispatchMode):
    """Counts the operations in this context that launch a kernel, by name (`by_kind`).

    Views and allocations do not. Each aten operation counts once, although some launch several kernels (a transposition
    in cuDNN, the last addition of a split sum).
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._overloadpacket.__name__
        if not func.is_view and func.namespace != "prim" and name not in _LAUNCH_NOTHING:
            self.by_kind[name] += 1
        return func(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Tracks the peak memory of tensors that operations in this context allocate, in bytes (`peak`).

    A storage counts once, from its allocation until it is freed. Tensors from before the context and temporary memory
    of kernels do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:  # no view, not in place
                self._follow(leaf)
        self.peak = max(self.peak, self._live)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            del self._storages[key]
            self._live -= size

        self._storages[key] = weakref.ref(storage, freed)
        self._live += size


# Compute and speed of a run.

PETA = 1e15
Costs = Mapping[int, float]
"""Model FLOPs of a training image, forward and backward, and its share of the optimizer's products of matrices, by the
global index of the first image with this cost."""


def flops_of(costs: Costs, images: int) -> float:
    """Model FLOPs of the first `images` training images; exact if the costs are integers."""
    ends = [*list(costs)[1:], images]
    return sum(cost * max(0, min(end, images) - first) for (first, cost), end in zip(costs.items(), ends, strict=True))


@dataclass
class Window:
    """The steps since the last call of `ComputeTracker.rates`."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass
class ComputeTracker:
    """Cumulative compute, images and time of a run, also over resumes."""

    costs: Costs
    device: torch.device
    peak: float | None = None
    """FLOP/s of all devices together; None if unknown."""
    images: int = 0
    seconds: float = 0.0
    """Training time so far, as of the last `step`."""
    _started: float = field(default_factory=time.perf_counter)
    _windows: dict[str, Window] = field(default_factory=lambda: {"journal": Window(), "log": Window()})

    @property
    def pflops(self) -> float:
        """Model PFLOPs (1e15 floating-point operations) so far, with those of the optimizer, without recomputation."""
        return flops_of(self.costs, self.images) / PETA

    def start_clock(self) -> None:
        """Start the clock, at the beginning of training."""
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Exclude the time since the last `step` (evaluation, checkpoint) from the rates."""
        now = time.perf_counter()
        self.seconds += now - self._started
        self._started = now

    def step(self, images: int, waited: float) -> None:
        """Record an optimizer step over `images` (of all processes) that waited `waited` seconds for data."""
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
        """The keys of every journal line except `step`."""
        return {
            "time": round(self.seconds, 3),
            "train/images": self.images,
            "compute/pflops": self.pflops,
        }

    def rates(self, to: str = "journal") -> dict[str, float]:
        """Rates since the last call for the same destination: seconds per step, images/s, data seconds, GB, MFU.

        On a GPU the wait for data may overlap with the previous step.
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
        """State for a checkpoint."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state(self, state: dict[str, float]) -> None:
        """Restore the `state` of a checkpoint."""
        self.images, self.seconds = int(state["images"]), state["seconds"]


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
