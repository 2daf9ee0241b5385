"""A picture of where the time of a step goes, for baseline and fastest candidate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.kinds import KINDS, seconds_by_kind
from bench.step import Step
from hpcm_scale.formatting import save
from hpcm_scale.scaling.figures.style import COLOURS, calm, paper
from hpcm_scale.tracking.timing import timed

SMALLEST = 0.002
"""Share of the longest step below which a kind is not drawn."""


def profiled(step: Step, device: torch.device, unwatched: float) -> dict[str, float]:
    """Seconds of one step by kind (`KINDS`), which add up to `unwatched`; a step before it warms up.

    The profiler's own work makes steps longer, so its seconds are taken as shares of the time of a step without it.
    """
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as trace:
        watched = timed(step, device).seconds
    spent = seconds_by_kind(trace.events(), watched, device)
    return {kind: seconds * unwatched / watched for kind, seconds in spent.items()}


def draw_profile(spent: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Bars for each kind of work: `spent` holds, for each way to compute a step, seconds by kind."""
    longest = max(sum(kinds.values()) for kinds in spent.values())
    drawn = [kind for kind in KINDS if any(kinds[kind] > SMALLEST * longest for kinds in spent.values())]
    unit, factor = ("s", 1.0) if longest >= 1 else ("ms", 1e3)
    places, thickness = np.arange(len(drawn)), 0.8 / len(spent)
    with paper() as figure:
        figure.set_size_inches(1.6 * figure.get_figwidth(), 0.9 + 0.34 * len(drawn))
        axes = figure.add_subplot()
        for index, (name, kinds) in enumerate(spent.items()):
            total = sum(kinds.values())
            values = [factor * kinds[kind] for kind in drawn]
            label = f"{name}: {factor * total:.3g} {unit}"
            offset = (index - (len(spent) - 1) / 2) * thickness
            bars = axes.barh(places + offset, values, thickness, label=label, color=COLOURS[index])
            shares = [f"{100 * kinds[kind] / total:.1f} %" for kind in drawn]
            axes.bar_label(bars, shares, padding=2, fontsize=6)
        axes.set_yticks(places, drawn)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.set_xlim(0, 1.12 * factor * max(kinds[kind] for kinds in spent.values() for kind in drawn))
        axes.set_xlabel(f"time in one step ({unit}); beside the bars: share of the step (%)")
        axes.set_title(title, loc="left")
        calm(axes)
        axes.grid(False, axis="y")
        axes.legend(loc="lower right")
        save(figure, path)
