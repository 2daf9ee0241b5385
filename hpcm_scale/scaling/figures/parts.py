"""Where the parameters of each size sit."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from hpcm_scale.formatting import label
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.figures.style import COLOURS, calm
from hpcm_scale.scaling.observations import Study
from hpcm_scale.scaling.wording import count

CAPTION = "Shares of the parameters by part: analysis g_a, synthesis g_s, hyper (h_a, h_s and the prior of z), context."
HATCHES = ("", "///", "", "\\\\\\")


def draw(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False where there is one size only."""
    if analysis.breakdown is None:
        return False
    sizes = analysis.breakdown.sizes
    figure.set_size_inches(figure.get_figwidth(), 0.75 + 0.24 * len(sizes))
    axes = figure.add_subplot()
    left = np.zeros(len(sizes))
    for index, part in enumerate(sizes[0].parts):
        shares = np.array([100 * size.parts[part] / size.parameters for size in sizes])
        style = {"color": COLOURS[index % len(COLOURS)], "hatch": HATCHES[index % len(HATCHES)], "edgecolor": "white"}
        axes.barh(range(len(sizes)), shares, left=left, label=part, height=0.72, linewidth=0.4, **style)
        for row, share in enumerate(shares):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
            if share >= 7:
                axes.text(left[row] + share / 2, row, f"{share:.0f}", ha="center", va="center", fontsize=6.5, bbox=box)
        left += shares
    axes.set_yticks(range(len(sizes)), [f"{label(size.model)} ({count(size.parameters)})" for size in sizes])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of parameters (%)")
    calm(axes)
    axes.grid(False)
    figure.legend(handles=axes.get_legend_handles_labels()[0], loc="outside upper center", ncols=4)
    return True
