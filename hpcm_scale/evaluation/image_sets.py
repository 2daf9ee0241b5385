"""The image sets that results are published on, and whether a folder is one of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcm_scale.errors import UserError

if TYPE_CHECKING:  # it brings torch along, and bd-rate needs none
    from hpcm_scale.data.image_set import ImageSet


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
        has = f"{found[size]} of its images are {_told(size)}, not {named.sizes[size]}"
        raise UserError(f"{images.folder} is not {name}: {has}{mend}")


def _known(named: NamedSet) -> str:
    """The sizes, if they are few."""
    told = " or ".join(map(_told, named.sizes))
    return f" (they are {told})" if named.sides_known else ""


def _told(size: tuple[int, int] | int) -> str:
    return f"{size[0]}×{size[1]}" if isinstance(size, tuple) else f"of {size:,} pixels"
