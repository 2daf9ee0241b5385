"""Training crops: square, seeded per image, never by the worker that happens to cut them."""

from __future__ import annotations

from PIL import Image, ImageOps

from hpcm_scale.data.order import AUGMENTATION, random_words


def cut(image: Image.Image, crop: int, flip: bool, *, seed: int, epoch: int, sample: int) -> tuple[Image.Image, bool]:
    """A random square of side `crop` pixels, mirrored half of the time if `flip`.

    Position and mirroring are a pure function of (seed, epoch, sample). Of an image with a side shorter
    than the crop, the largest square that fits is taken and scaled up (Lanczos).

    Returns the crop and whether it was scaled up.
    """
    width, height = image.size
    side = min(crop, width, height)
    words = [int(word) for word in random_words(seed, epoch, AUGMENTATION, sample, 3)]
    left, top = words[0] % (width - side + 1), words[1] % (height - side + 1)
    box = (left, top, left + side, top + side)
    square = image.resize((crop, crop), Image.Resampling.LANCZOS, box=box)  # a plain copy at equal size
    if flip and words[2] % 2:
        square = ImageOps.mirror(square)
    return square, side < crop
