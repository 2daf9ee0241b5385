"""Counts of FLOPs, launched operations and activation memory, and the FLOPs of a training."""

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

# Floating-point operations of a model, counted on the `meta` device: no memory, no arithmetic.


TRAINING_FACTOR = 3
"""Model FLOPs of a training step per forward FLOPs: backward is taken as twice forward.

torch's own count of the backward pass is not used: its formula for the weight gradient of a grouped
convolution forgets the groups, which overstates this family by about 40 %. Counted right, backward is
1.984 (68m) to 2.000 (1b) times forward.
"""

aten = torch.ops.aten
_MOVEMENT = {aten.index_copy, aten.copy_, aten.embedding}
_PRODUCTS = {aten.mv, aten.addmv, aten.dot, aten.vdot}  # of vectors; torch has no formula for them


class _RefuseUnknown(TorchDispatchMode):
    """An operation on several matrices, or a product, that has no formula must not count as nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = func._overloadpacket
        free = torch.Tag.pointwise in func.tags or func.is_view or packet in _MOVEMENT
        matrices = sum(isinstance(argument, Tensor) and argument.dim() > 1 for argument in args)
        if packet in _PRODUCTS or (not free and matrices > 1 and packet not in flop_registry):
            raise ValueError(f"{func} has no FLOP formula; add it to hpcm_scale/compute/tracker.py")
        return func(*args, **(kwargs or {}))


def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs (2 per multiply-accumulate) of one forward pass of a module built on `meta`.

    Convolutions, matrix products and attention count; element-wise operations do not. Raises
    ValueError for an operation on several matrices that is neither known to be free nor has a formula.
    """
    assert all(tensor.is_meta for tensor in inputs), "attention counts 0 on other devices"
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _RefuseUnknown():
        module(*inputs)
    return counter.get_total_flops()


# How many operations a step launches: what the host has to do, however fast the device is.


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
    """`by_kind`: operations within this context that launch a kernel, counted by name.

    Views do not, nor does what only allocates memory. Operations are those of aten, each counted once, though a
    library may need several kernels for one (cuDNN a transposition, a split sum its last addition).
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.by_kind.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._overloadpacket.__name__
        if not func.is_view and func.namespace != "prim" and name not in _LAUNCH_NOTHING:
            self.by_kind[name] += 1
        return func(*args, **(kwargs or {}))


# Memory that operations take, followed tensor by tensor; on fake tensors it is that of a run that never was.


class PeakMemory(TorchDispatchMode):
    """`peak`: the most bytes that tensors made by operations within this context took at a time.

    A storage counts once, from the operation that makes it until nothing refers to it any more. Tensors that were
    there before do not count, nor does what a kernel takes and gives back within one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        there = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in there:  # no view, nothing in place
                self._follow(leaf)
        self.peak = max(self.peak, self._live)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: weakref.ref) -> None:
            del self._storages[key]
            self._live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self._live += size


# Counts what a run has spent and how fast it goes.


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
