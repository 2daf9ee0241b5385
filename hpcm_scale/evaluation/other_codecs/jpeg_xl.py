"""JPEG XL, through imagecodecs."""

from __future__ import annotations

import numpy as np

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.other_codecs.base import OtherCodec, optional_library


class JPEGXL(OtherCodec):
    """JPEG XL (VarDCT in its XYB colours, 4:4:4) at the library's usual effort; it is tuned for looks, not for PSNR."""

    name = "jxl"
    settings = (25, 16, 10, 6, 4, 2.5, 1.5, 0.9)
    knob = "distance"

    def __init__(self) -> None:
        self._library = optional_library("imagecodecs", self.name)
        if not self._library.JPEGXL.available:
            raise UserError("this imagecodecs was built without JPEG XL; install a build that has it, or leave jxl out")
        version = self._library.jpegxl_version()  # "libjxl 0.11.2"
        self.description = f"imagecodecs {self._library.__version__}, {version}; effort 7, XYB 4:4:4"

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """The file of an image, uint8 (H, W, 3); the setting is Butteraugli's distance, 1 being hard to see."""
        return bytes(self._library.jpegxl_encode(image, distance=float(setting), effort=7))

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The image in a file, uint8 (height, width, 3)."""
        return self._library.jpegxl_decode(data)
