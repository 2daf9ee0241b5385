"""Figures of runs and laws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcm_scale.formatting import save
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.figures import (
    isoflop,
    learning_curves,
    loss_against_parameters,
    parts,
    residuals,
)
from hpcm_scale.scaling.figures.style import paper
from hpcm_scale.scaling.observations import Study
from hpcm_scale.tracking.progress import progress

FIGURES = {
    "learning_curves": learning_curves,
    "loss_against_parameters": loss_against_parameters,
    "residuals": residuals,
    "isoflop": isoflop,
    "parts": parts,
}
"""By the name of the file: modules with `draw(figure, study, analysis, extrapolate)` and `CAPTION`."""
SUFFIXES = (".png", ".svg")


def draw_figures(study: Study, analysis: Analysis, folder: Path, extrapolate: float = 10) -> Sequence[str]:
    """Draw every figure for which there is something to show, as PNG (300 dpi) and SVG, into `folder`.

    Laws are drawn out to `extrapolate` times the largest size and compute. Returns the names drawn (keys of
    FIGURES); files of those that are not are removed, for they would belong to other runs. The same study
    gives the same bytes.
    """
    drawn = []
    for name in progress(FIGURES, description="draw", unit="figure"):
        paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
        with paper() as figure:
            if FIGURES[name].draw(figure, study, analysis, extrapolate):
                for path in paths:
                    save(figure, path)
                drawn.append(name)
            else:
                for path in paths:
                    path.unlink(missing_ok=True)
    return drawn
