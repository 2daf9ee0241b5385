"""A figure of the time of a step by kind of operation, for baseline and fastest candidate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.kinds import KINDS, seconds_by_kind
from bench.step import Step
from bench.timing import timed
from hpcm_scale.formatting import save, tidy
from hpcm_scale.scaling.figures.style import COLOURS, paper

SMALLEST = 0.002
"""Kinds below this share of the longest step are not drawn."""


def profiled(step: Step, device: torch.device, unprofiled: float) -> dict[str, float]:
    """Seconds of one step by kind (`KINDS`), scaled to sum to `unprofiled`, after a warm-up step.

    The profiler slows steps down, so only the shares of its times are used.
    """
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as trace:
        profiled_seconds = timed(step, device).seconds
    spent = seconds_by_kind(trace.events(), profiled_seconds, device)
    return {kind: seconds * unprofiled / profiled_seconds for kind, seconds in spent.items()}


def draw_profile(spent: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Draw bars by kind of operation; `spent` holds seconds by kind for each variant."""
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
        axes.set_xlabel(f"time in one step ({unit}); labels: share of the step (%)")
        axes.set_title(title, loc="left")
        tidy(axes)
        axes.grid(False, axis="y")
        axes.legend(loc="lower right")
        save(figure, path)
