"""HEVC still pictures in HEIF files, by x265, through pillow-heif."""

from __future__ import annotations

from io import BytesIO

import numpy as np

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.other_codecs.base import OtherCodec, optional_library

PARAMETERS = {
    "chroma": "444",
    "preset": "slower",
    "tune": "psnr",
    # The tuning leaves these on, and they cost up to 0.5 dB: bits spent on what looks like texture.
    "x265:psy-rd": "0",
    "x265:psy-rdoq": "0",
    # Rows that can be coded at once cost bits, and x265 makes them only where it has several processors.
    "x265:wpp": "0",
}
LARGEST = 1023
"""Of 10 bits: coded so, the way to YCbCr and back rounds less than with 8 (0.15 dB at 1 bpp)."""


class HEVC(OtherCodec):
    """HEVC intra at a constant quantizer, 10 bit, 4:4:4, full-range BT.601; tuned for PSNR."""

    name = "hevc"
    settings = (45, 41, 37, 33, 29, 25, 21)
    knob = "QP"

    def __init__(self) -> None:
        self._library = optional_library("pillow_heif", self.name)
        encoder = self._library.libheif_info()["encoders"].get("x265")
        if not encoder:
            raise UserError("this pillow-heif was built without x265; install a build that has it, or leave hevc out")
        version = encoder.removeprefix("x265 HEVC encoder (").rstrip(")")
        self.description = (
            f"pillow-heif {self._library.__version__}, libheif {self._library.libheif_version()}, x265 {version}; "
            "preset slower, constant QP, tuned for PSNR, 10 bit, BT.601 full range, 4:4:4"
        )

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """The file of an image, uint8 (H, W, 3)."""
        height, width = image.shape[:2]
        samples = np.rint(image * (LARGEST / 255)).astype("<u2") << 6  # the library drops the low 6 of 16 bits
        picture = self._library.from_bytes("RGB;16", (width, height), samples.tobytes())
        file = BytesIO()
        picture.save(
            file,
            enc_params={**PARAMETERS, "x265:qp": f"{setting:g}"},
            matrix_coefficients=6,
            full_range_flag=1,
        )
        return file.getvalue()

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The image in a file, uint8 (height, width, 3)."""
        picture = self._library.open_heif(BytesIO(data), convert_hdr_to_8bit=False)
        return np.rint((np.asarray(picture) >> 6) * (255 / LARGEST)).astype(np.uint8)
