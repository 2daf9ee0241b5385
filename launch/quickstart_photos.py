"""Copy images from two packages to two folders: mvtb-data's for training, scikit-image's for evaluation.

python launch/quickstart_photos.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from hpcm_scale.errors import UserError, entry_point
from hpcm_scale.files import atomic_file

# Colour photographs only; docs/images.md has their sizes and licences.
TRAIN = (
    "building2-3.png church.png eiffel-1.png flowers[1-9].png lab-scene.png notre-dame.png parks.png road.png roof.png "
    "tomato_54.png walls-l.png campus/**/*.png"
)
HELD_OUT = "astronaut.png chelsea.png coffee.png motorcycle_left.png rocket.jpg"
PARTS = {"train": ("mvtb-data", "mvtbdata", "images", TRAIN), "held_out": ("scikit-image", "skimage", "data", HELD_OUT)}
LONGEST = 1100
"""Pixels of the longest side; larger images are reduced by a whole factor, which also removes traces of JPEG."""


def lay_out(folder: Path) -> None:
    """Write the images to `folder`/train and `folder`/held_out, unless they exist.

    Raises UserError if a package is not installed, or lacks an image.
    """
    for part, (name, module, inside, patterns) in PARTS.items():
        spec = find_spec(module)  # found, not imported: that takes seconds
        places = [Path(spec.origin).parent / inside] if spec else []
        for pattern in patterns.split():
            images = sorted(image for place in places for image in place.glob(pattern))
            if not images:
                raise UserError(
                    "no-quickstart-images",
                    "",
                    f"{name} is not installed, or has no {pattern}; run `bash launch/quickstart.sh`, which installs it",
                )
            for image in images:
                _copy(image, folder / part / image.name)


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    with Image.open(source) as image, atomic_file(target) as unfinished:
        factor = -(-max(image.size) // LONGEST)
        if factor == 1:
            shutil.copyfile(source, unfinished)
        else:
            image.convert("RGB").reduce(factor).save(unfinished, "PNG")


@entry_point
def main() -> None:
    """Lay out the images in the folder that the command line names."""
    lay_out(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
