"""The codecs that ours is compared with: real files, made by the libraries that people use."""

from __future__ import annotations

from collections.abc import Callable

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.baselines.base import OtherCodec, OtherCoded
from hpcm_scale.evaluation.baselines.codecs import AVIF, HEVC, JPEG, JPEGXL, VVC, WebP

OTHER_CODECS: dict[str, Callable[[], OtherCodec]] = {
    codec.name: codec for codec in (JPEG, WebP, AVIF, JPEGXL, HEVC, VVC)
}

__all__ = ["OTHER_CODECS", "OtherCodec", "OtherCoded", "other_codec"]


def other_codec(name: str) -> OtherCodec:
    """The codec called `name`, one of `OTHER_CODECS`.

    Raises `UserError` for another name, and where the library or the encoder that it needs is missing.
    """
    if name not in OTHER_CODECS:
        raise UserError(f"there is no codec {name!r} to compare with; choose from {', '.join(OTHER_CODECS)}")
    return OTHER_CODECS[name]()
