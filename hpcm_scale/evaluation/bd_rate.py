"""BD-rate: how many more or fewer bits one codec takes than another at equal quality."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcm_scale.errors import UserError

if TYPE_CHECKING:  # it brings torch along, and bd-rate needs none
    from hpcm_scale.data.sources import ImageSet
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import bjontegaard
import numpy as np

# The image sets that results are published on, and whether a folder is one of them.


@dataclass(frozen=True)
class NamedSet:
    """An image set by its size: which sizes its images have, and how many have each."""

    name: str
    sizes: Counter[tuple[int, int]] | Counter[int]
    """Count by (width, height); or, where those are not known for certain, by number of pixels."""
    source: str
    """Where it can be had."""

    @property
    def count(self) -> int:
        """Number of images."""
        return self.sizes.total()

    @property
    def sides_known(self) -> bool:
        """Whether `sizes` tells widths and heights."""
        return all(isinstance(size, tuple) for size in self.sizes)

    def size(self, width: int, height: int) -> tuple[int, int] | int:
        """What `sizes` counts an image of this size by."""
        return (width, height) if self.sides_known else width * height


# Pixels of each image, in order of name (alberto-montalesi-176097 … zugr-108), as the results of Cool-chic list them
# (github.com/Orange-OpenSource/Cool-Chic, results/clic20-pro-valid). Their sum, 91,451,931, is confirmed by the limits
# that the challenge of 2021 printed for the set: 857,362, 1,714,724 and 3,429,448 bytes for 0.075, 0.15 and 0.3 bpp.
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
    """Raise UserError, saying what differs, unless `images` can be the image set of that name.

    Checked are the count and the images' sizes, upright as they are evaluated; of clic-pro-valid, whose widths and
    heights could not be looked up, the numbers of pixels. Every image is decoded, so a broken one is refused, too.
    File names do not matter.
    """
    if name not in SETS:
        raise UserError(f"there is no image set {name}; known are {', '.join(SETS)}")
    named = SETS[name]
    mend = f"; the whole set is at {named.source}"
    if len(images) != named.count:
        raise UserError(f"{name} has {named.count} images, {images.folder} holds {len(images)}{mend}")
    found: Counter[tuple[int, int] | int] = Counter()
    for i, file in enumerate(images.names):
        height, width = images.load(i).shape[1:]
        size = named.size(width, height)
        if size not in named.sizes:
            has = f"{file} is {width}×{height}" + ("" if named.sides_known else f", {width * height:,} pixels")
            raise UserError(f"{images.folder} is not {name}: {has}, as no image of {name} is{_known(named)}{mend}")
        found[size] += 1
    for size in found - named.sizes:
        has = f"{found[size]} of its images are {_size(size)}, not {named.sizes[size]}"
        raise UserError(f"{images.folder} is not {name}: {has}{mend}")


def _known(named: NamedSet) -> str:
    """The sizes, if they are few."""
    told = " or ".join(map(_size, named.sizes))
    return f" (they are {told})" if named.sides_known else ""


def _size(size: tuple[int, int] | int) -> str:
    return f"{size[0]}×{size[1]}" if isinstance(size, tuple) else f"of {size:,} pixels"


POINTS = 3
"""What pchip needs to draw a curve; through two points it draws a straight line."""
SHARED = 0.25
"""Of the narrower of the two quality ranges: with less in common a BD-rate means nothing."""


class Scale(NamedTuple):
    """What a quality is told in; it rises with the rate."""

    name: str
    unit: str
    least: float = 1.0
    """In common, in that unit, however narrow the narrower range is."""


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
    """What a codec needs at several settings to reach what quality, means over the images of a set."""

    name: str
    codec: str
    source: str
    """Where it was published, or the file it was read from."""
    rate: str
    """"published"; of an evaluation "files" or "estimated"; of a file of points "given"."""
    bpp: tuple[float, ...]
    psnr: tuple[float, ...] | None
    """dB; None, as below, where it was not measured."""
    ms_ssim: tuple[float, ...] | None = None
    set: str | None = None
    """Name of the image set; None if it has none."""
    images: tuple[tuple[str, int, int], ...] | None = None
    """Name, width and height of each; None of a published curve."""
    recommended: bool = False
    """Whether it is the anchor to take for its set."""

    @property
    def label(self) -> str:
        """The name as tables and figures show it."""
        return labelled(self.name, self.codec)

    def quality(self, metric: str) -> tuple[float, ...]:
        """The quality of each point in dB: PSNR, or −10·log10(1 − mean MS-SSIM), at most 100.

        `metric` is one of `METRICS`. Raises UserError if it was not measured.
        """
        values = self.psnr if metric == "psnr" else self.ms_ssim
        if values is None:
            other = next(key for key in METRICS if key != metric)
            raise UserError(f"there is no {METRICS[metric].name} of {self.name}; compare by {METRICS[other].name}")
        return values if metric == "psnr" else tuple(-10 * math.log10(max(1 - value, 1e-10)) for value in values)


def labelled(name: str, description: str) -> str:
    """A codec's name; with the chroma format where its description says that colours are halved."""
    return f"{name} 4:2:0" if "4:2:0" in description else name


@dataclass(frozen=True)
class Comparison:
    """A BD-rate and what it rests on."""

    bd_rate: float
    """Percent of the anchor's bits at equal quality; negative: fewer bits than the anchor."""
    low: float
    """The quality range that both curves reach (dB, or another unit), over which the log of the rates is averaged."""
    high: float
    share_of_curve: float
    """Part of the curve's own quality range that is shared."""
    share_of_anchor: float


def compare(curve: RateCurve, anchor: RateCurve, metric: str = "psnr") -> Comparison:
    """BD-rate of `curve` against `anchor` by one of `METRICS` (`bd_rate`).

    Raises UserError for curves of different images, too.
    """
    same_images(curve, anchor)
    lines = (Line(each.name, each.bpp, each.quality(metric)) for each in (curve, anchor))
    return bd_rate(*lines, METRICS[metric])


def bd_rate(line: Line, anchor: Line, scale: Scale) -> Comparison:
    """BD-rate of `line` against `anchor` (Bjøntegaard 2001, VCEG-M33), log rate interpolated by pchip.

    Points may come in any order; a point that occurs twice counts once. Raises UserError, telling the points or
    ranges, for lines with fewer than `POINTS` points, that do not rise strictly in rate and quality, or that share
    less than `SHARED` of the narrower quality range or than the scale's least.
    """
    rates, qualities = _points(line, scale)
    anchor_rates, anchor_qualities = _points(anchor, scale)
    low, high = max(qualities[0], anchor_qualities[0]), min(qualities[-1], anchor_qualities[-1])
    span, anchor_span = np.ptp(qualities), np.ptp(anchor_qualities)
    if high - low < max(SHARED * min(span, anchor_span), scale.least):
        raise UserError(
            f"{line.name} reaches {qualities[0]:.2f} to {qualities[-1]:.2f} {scale.unit} and {anchor.name} "
            f"{anchor_qualities[0]:.2f} to {anchor_qualities[-1]:.2f} {scale.unit} ({scale.name}): too little in "
            f"common for a BD-rate (less than {scale.least:g} {scale.unit}, or than {SHARED:.0%} of the narrower "
            "range); evaluate at other settings or take another anchor"
        )
    percent = bjontegaard.bd_rate(
        anchor_rates,
        anchor_qualities,
        rates,
        qualities,
        method="pchip",
        require_matching_points=False,
        min_overlap=0,  # it would only warn
    )
    return Comparison(float(percent), low, high, (high - low) / span, (high - low) / anchor_span)


def same_images(curve: RateCurve, anchor: RateCurve) -> bool:
    """Whether both are known to be of the same images; False where that cannot be told.

    Raises UserError if they are known to be of different ones.
    """
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
            f"{curve.name} was measured on {images[0]}, but {anchor.name} on {images[1]}, "
            "and rates of different images do not compare; take an anchor of the same images (--list)"
        )
    return True


def _can_be(curve: RateCurve, name: str | None) -> bool:
    """Whether the images of a curve can be the set of that name, by their number and sizes."""
    if curve.images is None or name not in SETS:
        return True
    return Counter(SETS[name].size(width, height) for _, width, height in curve.images) == SETS[name].sizes


def _points(line: Line, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Rates and qualities in rising order, sound and each once."""
    points = sorted(set(zip(line.rates, line.qualities, strict=True)))
    unsound = [point for point in points if not (0 < point[0] < math.inf and math.isfinite(point[1]))]
    if unsound:
        raise UserError(f"{line.name} has the point {_told(unsound[0], scale)}, which cannot be; evaluate it again")
    if len(points) < POINTS:
        count = "1 point" if len(points) == 1 else f"{len(points)} different points"
        raise UserError(f"{line.name} has {count}, and a BD-rate needs {POINTS}; give it more points (settings, λ)")
    falls = [(one, other) for one, other in pairwise(points) if one[0] >= other[0] or one[1] >= other[1]]
    if falls:
        told = ", ".join(f"{_told(one, scale)} before {_told(other, scale)}" for one, other in falls)
        raise UserError(
            f"{line.name} does not rise in both rate and quality ({told}), so it has no BD-rate; "
            "leave out the settings that spend bits for nothing"
        )
    rates, qualities = np.array(points).T
    return rates, qualities


def _told(point: tuple[float, float], scale: Scale) -> str:
    return f"{point[0]:.4f} bpp at {point[1]:.2f} {scale.unit}"
