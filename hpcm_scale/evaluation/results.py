"""The results of an evaluation, and evaluation.json, which holds all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hpcm_scale import __version__, files
from hpcm_scale.evaluation.anchors import FORMAT
from hpcm_scale.evaluation.bd_rate import RateCurve
from hpcm_scale.evaluation.curves import Curve, Point
from hpcm_scale.streams import shown
from hpcm_scale.tracking.environment import environment

PACKAGES = ("torch", "numpy", "pillow", "pytorch-msssim")
"""What the measures depend on; the codecs name their own."""


@dataclass(frozen=True)
class Results:
    """Curves over one set of images."""

    folder: str
    set_name: str | None
    """Of the known set that the folder was found to be."""
    count: int
    """Of images."""
    curves: list[Curve]
    machine: dict[str, Any]
    """Versions and hardware (`machine`)."""
    given: tuple[RateCurve, ...] = ()
    """Points that others measured, to be shown beside the curves."""

    @property
    def title(self) -> str:
        """Set, or folder, and the number of images."""
        return f"{self.set_name or shown(Path(self.folder).resolve().name)}, {self.count} image{'s' * (self.count > 1)}"

    def points(self) -> Iterable[tuple[Curve, Point]]:
        """All points, curve after curve."""
        return ((curve, point) for curve in self.curves for point in curve.points)


def machine() -> dict[str, Any]:
    """Versions and hardware (`tracking.environment`), and how many threads torch uses."""
    packages = {"hpcm_scale": __version__} | {name: version(name) for name in PACKAGES}
    return environment() | {"packages": packages, "torch_threads": torch.get_num_threads()}


def write_json(results: Results, path: str | Path) -> None:
    """Write evaluation.json, which `hpcm bd-rate` reads; what is not finite is null."""
    files.write_json(path, _to_dict(results))


def _to_dict(results: Results) -> dict[str, Any]:
    images = {"folder": results.folder, "set": results.set_name, "count": results.count}
    curves = [
        {
            "name": curve.name,
            "codec": curve.codec,
            "rate": curve.rate,
            "points": [_point_to_dict(point) for point in curve.points],
        }
        for curve in results.curves
    ]
    given = {"given": [_given_to_dict(curve) for curve in results.given]} if results.given else {}
    return {"format": FORMAT, "images": images, "curves": curves, **given, "machine": results.machine}


def _given_to_dict(curve: RateCurve) -> dict[str, Any]:
    keys = ("name", "codec", "source", "rate", "set", "bpp", "psnr", "ms_ssim")
    return {key: getattr(curve, key) for key in keys}


def _point_to_dict(point: Point) -> dict[str, Any]:
    ours = {"weights": point.weights, "facts": point.facts, "kmac_per_pixel": point.kmac_per_pixel}
    return {
        "setting": point.setting,
        **(ours if point.weights else {}),
        "mean": point.mean,
        "images": [asdict(image) for image in point.images],
    }
