"""Images of a folder, whole, for evaluation."""

from __future__ import annotations

from pathlib import Path

import torch

from hpcm_scale.data.images import BACKGROUND, EXTENSIONS, Colour, TransparentImage, decode, to_array
from hpcm_scale.data.sources import files_below
from hpcm_scale.errors import UserError

MEND = "name a folder of images (eval.images in training, --images in evaluation)"


class ImageSet:
    """The JPEG, PNG and WebP files below a folder, in order of name.

    `names` are their paths below the folder. Raises `UserError` if the folder is missing or holds none.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {folder}; {MEND}")
        names = sorted(
            path.relative_to(self.folder).as_posix()
            for path in files_below(self.folder)
            if path.suffix.lower().lstrip(".") in EXTENSIONS
        )
        if not names:
            raise UserError(f"there is no JPEG, PNG or WebP in {folder}; {MEND}")
        self.names = names[:limit]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int) -> torch.Tensor:
        """Image `i` as RGB, uint8 (3, H, W). Raises `UserError` if it is broken."""
        return read_image(self.folder / self.names[i])


def check_size(pixels: torch.Tensor, name: str, mend: str, *, smallest: int, who: str) -> None:
    """Raise UserError, which names the image and ends with `mend`, if a side of (3, H, W) is below `smallest`."""
    height, width = pixels.shape[1:]
    if min(height, width) < smallest:
        raise UserError(f"{name} is {width}×{height} pixels, and {who} images with sides from {smallest}; {mend}")


def read_image(path: Path, background: Colour | None = BACKGROUND) -> torch.Tensor:
    """A JPEG, PNG or WebP file as RGB, uint8 (3, H, W), by the rule of `images.to_rgb`.

    Raises `UserError` if it is broken, `TransparentImage` as that rule does.
    """
    try:
        return torch.from_numpy(to_array(decode(path.read_bytes(), background)))
    except TransparentImage:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path} ({error}); mend or remove it") from error
