"""Images of a folder, whole, for evaluation."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from hpcm_scale.data.images import BACKGROUND, Colour, TransparentImage, decode, to_array
from hpcm_scale.data.sources import image_files
from hpcm_scale.errors import UserError
from hpcm_scale.files import read_file
from hpcm_scale.streams import shown

MEND = "name a folder of images (eval.images in training, --images in evaluation)"


class ImageSet:
    """The JPEG, PNG and WebP files below a folder (`sources.image_files`), in order of name.

    `names` are their paths below the folder, as they are shown. Raises `UserError` if the folder is missing or holds
    none.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {folder}; {MEND}")
        self._paths = image_files(self.folder, MEND)[:limit]
        self.names = [shown(path.relative_to(self.folder).as_posix()) for path in self._paths]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int) -> torch.Tensor:
        """Image `i` as RGB, uint8 (3, H, W). Raises `UserError` if it is broken, or has not its size in `sizes`."""
        pixels = read_image(self._paths[i])
        known = self.__dict__.get("sizes")
        if known and pixels.shape[1:] != known[i]:
            (height, width), (before_height, before_width) = pixels.shape[1:], known[i]
            raise UserError(
                f"{self._paths[i]} was {before_width}×{before_height} pixels at the start and is {width}×{height} now; "
                "put the image back that was there"
            )
        return pixels

    @cached_property
    def sizes(self) -> list[torch.Size]:
        """Height and width of every image; all are decoded for it, once. Raises `UserError` if one is broken."""
        return [self.load(i).shape[1:] for i in range(len(self))]


def check_size(size: torch.Size, name: str, mend: str, *, smallest: int, who: str) -> None:
    """Raise UserError, which names the image and ends with `mend`, if its height or width is below `smallest`."""
    height, width = size
    if min(height, width) < smallest:
        raise UserError(f"{name} is {width}×{height} pixels, and {who} images with sides from {smallest}; {mend}")


def read_image(path: Path, background: Colour | None = BACKGROUND) -> torch.Tensor:
    """A JPEG, PNG or WebP file as RGB, uint8 (3, H, W), by the rule of `images.to_rgb`.

    Raises `UserError` if it is broken, `TransparentImage` as that rule does.
    """
    try:
        return torch.from_numpy(to_array(decode(read_file(path), background)))
    except TransparentImage:
        raise
    except (ValueError, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise UserError(f"cannot read {path} ({reason}); mend or remove it") from error
