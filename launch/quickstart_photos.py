"""Copy images from scikit-image's wheel to two folders, for training and for evaluation.

python launch/quickstart_photos.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from hpcm_scale.files import atomic_file

# Colour images, because grey ones bias a small model to grey; the held-out images share no scene with the others.
TRAIN = (
    "astronaut.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
HELD_OUT = ("chelsea.png", "coffee.png")


def lay_out(folder: Path) -> None:
    """Copy the images, byte for byte, to `folder`/train and `folder`/held_out, unless they exist."""
    package = Path(find_spec("skimage").origin).parent  # found, not imported: that takes seconds
    for part, names in (("train", TRAIN), ("held_out", HELD_OUT)):
        for name in names:
            target = folder / part / name
            if not target.exists():
                with atomic_file(target) as unfinished:
                    shutil.copyfile(package / "data" / name, unfinished)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
