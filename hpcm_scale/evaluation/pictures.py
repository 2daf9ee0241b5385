"""A picture of reconstructions beside their originals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from hpcm_scale.evaluation.estimate import Reconstruction
from hpcm_scale.files import whole_file


def draw_reconstructions(reconstructions: Sequence[Reconstruction], path: str | Path, title: str) -> None:
    """One row per image: the original, then the reconstruction, its bits per pixel and PSNR written above."""
    rows = len(reconstructions)
    heights = [8 / 2 * r.original.shape[1] / r.original.shape[2] + 0.3 for r in reconstructions]
    figure, axes = plt.subplots(
        rows, 2, figsize=(8, sum(heights) + 0.4), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for (left, right), (original, reconstruction, result) in zip(axes, reconstructions, strict=True):
        for axis, pixels in ((left, original), (right, reconstruction)):
            axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="lanczos")
            axis.set_axis_off()
        left.set_title(f"{result.name}, {result.width}×{result.height}", fontsize=9)
        right.set_title(f"{result.bpp:.3f} bpp (estimated), {result.psnr:.2f} dB PSNR", fontsize=9)
    figure.suptitle(title, fontsize=11)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format=Path(path).suffix.lstrip(".") or "png")
    plt.close(figure)
