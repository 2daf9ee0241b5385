"""BD-rate: the difference in bits of two codecs at equal quality, and the image sets that results are published on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from hpcm_scale.errors import UserError

if TYPE_CHECKING:  # needs torch, which `hpcm bd-rate` does without
    from hpcm_scale.data.sources import ImageSet

# Image sets.


@dataclass(frozen=True)
class NamedSet:
    """An image set, identified by the number and the sizes of its images."""

    name: str
    sizes: Counter[tuple[int, int] | int]
    """Count by (width, height), or by number of pixels if width and height are not known."""
    source: str
    """Download address."""

    @property
    def count(self) -> int:
        """Number of images."""
        return self.sizes.total()

    def size(self, width: int, height: int) -> tuple[int, int] | int:
        """Key of this size in `sizes`."""
        return (width, height) if isinstance(next(iter(self.sizes)), tuple) else width * height


# Pixels of each image, by name (alberto-montalesi-176097 … zugr-108), from Cool-chic's results
# (github.com/Orange-OpenSource/Cool-Chic, results/clic20-pro-valid). Their sum, 91,451,931, agrees with the limits of
# the challenge of 2021: 857,362, 1,714,724 and 3,429,448 bytes for 0.075, 0.15 and 0.3 bpp.
# fmt: off
_CLIC_PIXELS = (
    2791424, 2742272, 2433024, 2787328, 2795520, 1493280, 2787328, 2795520, 2785280, 2795520, 1266000,
    2512940, 2774400, 2040500, 2805760, 2795520, 2795520, 2361920, 1975125, 2795520, 2795520, 614400,
    2795520, 2795520, 893976, 2797568, 579840, 1296000, 2462082, 2795520, 196608, 2795520, 1585176,
    2799616, 998560, 316080, 2115584, 2797568, 2261952, 2634100, 2795520,
)
# fmt: on

SETS = {
    named.name: named
    for named in (
        NamedSet(
            name="kodak",
            sizes=Counter({(768, 512): 18, (512, 768): 6}),  # upright: 4, 9, 10, 17, 18, 19
            source="https://r0k.us/graphics/kodak/",
        ),
        NamedSet(
            name="clic-pro-valid",
            sizes=Counter(_CLIC_PIXELS),
            source="https://data.vision.ee.ethz.ch/cvl/clic/professional_valid_2020.zip",
        ),
        NamedSet(
            name="tecnick",
            sizes=Counter({(1200, 1200): 100}),
            source="https://testimages.org",
        ),
    )
}


def check_set(name: str, images: ImageSet) -> None:
    """Raises UserError unless number and sizes of `images` are those of the image set `name`.

    Sizes are those after rotation by EXIF; of clic-pro-valid, only numbers of pixels are known. Every image is decoded,
    so a damaged one raises as well. File names are ignored.
    """
    if name not in SETS:
        raise UserError("unknown-set", "--set", f"there is no image set {name}; choose from {', '.join(SETS)}")
    named = SETS[name]
    if len(images) != named.count:
        raise UserError(
            "set-of-other-count",
            "--set",
            f"{name} has {named.count} images, and {images.folder} has {len(images)}; the complete set is at "
            f"{named.source}",
        )
    found: Counter[tuple[int, int] | int] = Counter()
    for i, file in enumerate(images.names):
        height, width = images.load(i).shape[1:]
        size = named.size(width, height)
        if size not in named.sizes:
            raise UserError(
                "set-of-other-images",
                "--set",
                f"{images.folder} is not {name}: no image of {name} has the size of {file}, {width}×{height} pixels; "
                f"the complete set is at {named.source}",
            )
        found[size] += 1
    for size in found - named.sizes:
        shown = "×".join(map(str, size)) + " pixels" if isinstance(size, tuple) else f"{size:,} pixels"
        raise UserError(
            "set-of-other-sizes",
            "--set",
            f"{images.folder} is not {name}: {found[size]} of its images have {shown}, not {named.sizes[size]}; the "
            f"complete set is at {named.source}",
        )


# Curves and their BD-rate.


POINTS = 3
"""Fewest points of a curve; through two, pchip is a straight line."""
SHARED = 0.25
"""Least share of the narrower quality range that two curves must have in common."""


class Scale(NamedTuple):
    """A scale of quality, which increases with the rate."""

    name: str
    unit: str
    least: float = 1.0
    """Least range in that unit that two curves must have in common."""


METRICS = {"psnr": Scale("PSNR", "dB"), "ms-ssim": Scale("MS-SSIM in dB", "dB")}


class Line(NamedTuple):
    """The points of a codec on one scale."""

    name: str
    rates: Sequence[float]
    """bpp."""
    qualities: Sequence[float]
    """In the unit of the scale."""


@dataclass(frozen=True)
class RateCurve:
    """Rate and quality of a codec at several settings, means over the images of a set."""

    name: str
    codec: str
    source: str
    """Publication, or the file."""
    rate: str
    """"published"; of an evaluation "files" or "estimated"; of a file of points "given"."""
    bpp: tuple[float, ...]
    psnr: tuple[float, ...] | None
    """dB; None if not measured."""
    ms_ssim: tuple[float, ...] | None = None
    set: str | None = None
    """Name of the image set; None if unknown."""
    images: tuple[tuple[str, int, int], ...] | None = None
    """Name, width and height of each; None of a published curve."""
    recommended: bool = False
    """Whether it is the usual anchor of its set."""

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        return labelled(self.name, self.codec)

    def quality(self, metric: str) -> tuple[float, ...]:
        """The quality of each point in dB: PSNR, or −10·log10(1 − mean MS-SSIM), at most 100.

        `metric` is one of `METRICS`. Raises UserError if it was not measured.
        """
        values = self.psnr if metric == "psnr" else self.ms_ssim
        if values is None:
            other = next(key for key in METRICS if key != metric)
            raise UserError(
                "metric-not-measured",
                "--metric",
                f"{self.name} has no {METRICS[metric].name}; compare by {METRICS[other].name}",
            )
        return values if metric == "psnr" else tuple(decibels(1 - value) for value in values)


def decibels(distance: float) -> float:
    """−10·log10 of a distance, such as 1 − MS-SSIM, at most 100 dB."""
    return -10 * math.log10(max(distance, 1e-10))


def labelled(name: str, description: str) -> str:
    """A codec's name, followed by 4:2:0 if its description has that chroma format."""
    return f"{name} 4:2:0" if "4:2:0" in description else name


@dataclass(frozen=True)
class Comparison:
    """A BD-rate and its quality range."""

    bd_rate: float
    """Percent of the anchor's bits at equal quality; negative: fewer bits than the anchor."""
    low: float
    """Quality range that both curves share, in the unit of the scale; the log rate is averaged over it."""
    high: float
    share_of_curve: float
    """Shared part of the curve's quality range."""
    share_of_anchor: float


def compare(curve: RateCurve, anchor: RateCurve, metric: str = "psnr") -> Comparison:
    """BD-rate of `curve` against `anchor` by one of `METRICS`. Raises UserError as `bd_rate` and `same_images` do."""
    same_images(curve, anchor)
    line, other = (Line(each.name, each.bpp, each.quality(metric)) for each in (curve, anchor))
    return bd_rate(line, other, METRICS[metric])


def bd_rate(line: Line, anchor: Line, scale: Scale) -> Comparison:
    """BD-rate of `line` against `anchor` (Bjøntegaard 2001, VCEG-M33), log rate interpolated by pchip.

    Points may be in any order and are counted once. Raises UserError for lines with fewer than `POINTS` points, that do
    not rise strictly in rate and quality, or that share too little of their quality ranges (`SHARED`, `Scale.least`).
    """
    rates, qualities = _points(line, scale)
    anchor_rates, anchor_qualities = _points(anchor, scale)
    low, high = max(qualities[0], anchor_qualities[0]), min(qualities[-1], anchor_qualities[-1])
    span, anchor_span = np.ptp(qualities), np.ptp(anchor_qualities)
    if high - low < max(SHARED * min(span, anchor_span), scale.least):
        raise UserError(
            "disjoint-curves",
            "--anchor",
            f"{line.name} covers {qualities[0]:.2f} to {qualities[-1]:.2f} {scale.unit} of {scale.name} and "
            f"{anchor.name} {anchor_qualities[0]:.2f} to {anchor_qualities[-1]:.2f} {scale.unit}; a BD-rate needs at "
            f"least {scale.least:g} {scale.unit} and {SHARED:.0%} of the narrower range in common: evaluate at other "
            "settings, or choose another anchor",
        )
    import bjontegaard  # imports matplotlib, which trainings and most commands do without

    percent = bjontegaard.bd_rate(
        anchor_rates,
        anchor_qualities,
        rates,
        qualities,
        method="pchip",
        require_matching_points=False,
        min_overlap=0,  # only a warning; checked above
    )
    return Comparison(float(percent), low, high, (high - low) / span, (high - low) / anchor_span)  # pyright: ignore[reportArgumentType]


def rate_at(line: Line, quality: float, scale: Scale) -> float | None:
    """bpp of `line` at a quality, log rate interpolated by pchip; None outside its points and without a BD-rate."""
    try:
        rates, qualities = _points(line, scale)
    except UserError:
        return None
    if not qualities[0] <= quality <= qualities[-1]:
        return None
    return math.exp(PchipInterpolator(qualities, np.log(rates))(quality))


def same_images(curve: RateCurve, anchor: RateCurve) -> bool:
    """Whether both are known to be of the same images; False if unknown. Raises UserError if they are not."""
    if curve.set and anchor.set:
        same = curve.set == anchor.set
    elif curve.images and anchor.images:
        same = curve.images == anchor.images
    else:
        same = _can_be(curve, anchor.set) and _can_be(anchor, curve.set)
        if same:
            return False
    if not same:
        images = [each.set or f"the images of {each.source}" for each in (curve, anchor)]
        raise UserError(
            "curves-of-different-images",
            "--anchor",
            f"{curve.name} was measured on {images[0]} and {anchor.name} on {images[1]}; choose an anchor measured on "
            "the same images (--list)",
        )
    return True


def _can_be(curve: RateCurve, name: str | None) -> bool:
    """Whether number and sizes of a curve's images are those of the set `name`, as far as known."""
    if curve.images is None or name not in SETS:
        return True
    return Counter(SETS[name].size(width, height) for _, width, height in curve.images) == SETS[name].sizes


def _points(line: Line, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Rates and qualities in rising order, without duplicates."""
    points = sorted(set(zip(line.rates, line.qualities, strict=True)))
    impossible = [point for point in points if not (0 < point[0] < math.inf and math.isfinite(point[1]))]
    if impossible:
        raise UserError(
            "impossible-point",
            "",
            f"{line.name} has the impossible point {_shown(impossible[0], scale)}; evaluate it again",
        )
    if len(points) < POINTS:
        count = "1 point" if len(points) == 1 else f"{len(points)} different points"
        raise UserError(
            "few-points", "", f"{line.name} has {count}, but a BD-rate needs {POINTS}; add points (settings, λ)"
        )
    falls = [(one, other) for one, other in pairwise(points) if one[0] >= other[0] or one[1] >= other[1]]
    if falls:
        pairs = ", ".join(f"{_shown(one, scale)} before {_shown(other, scale)}" for one, other in falls)
        raise UserError(
            "falling-curve",
            "",
            f"{line.name} has no BD-rate, because rate and quality do not increase together ({pairs}); omit settings "
            "with a higher rate but no higher quality",
        )
    rates, qualities = np.array(points).T
    return rates, qualities


def _shown(point: tuple[float, float], scale: Scale) -> str:
    return f"{point[0]:.4f} bpp at {point[1]:.2f} {scale.unit}"
