"""Figures of runs and laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import figure

from hpcm_scale.formatting import save
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.figures import compute, laws
from hpcm_scale.scaling.figures.style import paper
from hpcm_scale.scaling.observations import Study
from hpcm_scale.tracking.progress import progress


class Entry(NamedTuple):
    """A figure of a fit."""

    draw: Callable[[figure.Figure, Study, Analysis, float], bool]
    """Draws on an empty figure, with laws up to a multiple of the largest size; False if there is nothing to draw."""
    caption: str


FIGURES = {
    "learning_curves": Entry(compute.draw_learning_curves, compute.LEARNING_CURVES),
    "loss_against_parameters": Entry(laws.draw_loss_against_parameters, laws.LOSS_AGAINST_PARAMETERS),
    "residuals": Entry(laws.draw_residuals, laws.RESIDUALS),
    "isoflop": Entry(laws.draw_isoflop, laws.ISOFLOP),
}
"""By file name without suffix."""
SUFFIXES = (".png", ".svg")


def draw_figures(study: Study, analysis: Analysis, folder: Path, extrapolate: float = 10) -> Sequence[str]:
    """Draw every figure that has data as PNG (300 dpi) and SVG into `folder`; returns their names.

    Laws extend to `extrapolate` times the largest size and compute. Files of figures without data are removed. The
    same study gives the same bytes.
    """
    drawn = []
    for name in progress(FIGURES, description="draw", unit="figure"):
        with paper() as canvas:
            if FIGURES[name].draw(canvas, study, analysis, extrapolate):
                drawn.append(name)
            for path in (folder / f"{name}{suffix}" for suffix in SUFFIXES):
                save(canvas, path) if name in drawn else path.unlink(missing_ok=True)
    return drawn
