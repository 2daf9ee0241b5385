"""The most memory that a piece of work holds at a time, from the allocator's own books."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

HOW = {
    "cpu": "every allocation and release of torch's CPU allocator in one step, in order, from its profiler; what "
    "kernels take for themselves through that allocator counts, what libraries take behind it does not",
    "cuda": "torch.cuda.max_memory_allocated over one step, less what was allocated before it",
}
"""How it is measured, by kind of device."""


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that `work` holds at a time beyond those that there were before it.

    What the work is to find in place (weights, gradients, inputs) is not counted; what it leaves behind is.
    Slower than the work itself: not for timing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    # Releases of what was there before are not among them: the allocator did not see it come.
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
