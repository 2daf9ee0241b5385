"""Recognisers of lines of text (PP-OCR, https://github.com/PaddlePaddle/PaddleOCR) as receivers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcm_scale.errors import UserError
from hpcm_scale.machine.extractor import REMEDY, TokenExtractor, packaged_file, resized
from hpcm_scale.machine.onnx_graph import OnnxGraph

NETWORKS = {
    "pp-ocrv4": ("rapidocr-onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"),
    "pp-ocrv6": ("rapidocr", "models/PP-OCRv6_rec_small.onnx"),
}
"""Packages with the networks, and the files in them; rapidocr-onnxruntime does not support Python 3.13."""

LINE = 48
"""Height of a line of text in the networks' training, in pixels."""
HIGHEST_LINE = 1.5 * LINE
"""Images up to this height are one line."""
SHORTEST_LINE = 320
"""Shorter lines are padded with grey to this width for reading, as in PP-OCR."""


class TextRecogniser(TokenExtractor):
    """Convolutions and attention over one line of text: Chinese, English, digits and punctuation.

    An image of up to 72 pixels in height is one line, resized to a height of 48. A higher one is cut into strips of 48
    rows, each a line; the last is padded by replication. Tokens are the positions along the lines, one per 8 pixels,
    line by line: `backbone`, the output of the convolutions, and `sequence`, the input of the class layer. There is no
    posterior, since classes are characters.

    Raises UserError if a package or its file is missing or not as expected.
    """

    def __init__(self, name: str) -> None:
        path = packaged_file(name, *NETWORKS[name])
        network = OnnxGraph(path, name)
        self.values = _values(network)
        self.characters = ["", *network.metadata.get("character", "").splitlines(), " "]
        """Characters of the classes; the first is the blank of CTC."""
        with torch.no_grad():
            backbone, sequence, classes = network(torch.zeros(1, 3, LINE, LINE), tuple(self.values.values()))
        if classes.shape[-1] != len(self.characters):
            raise UserError(
                "classes-of-recogniser",
                "machine.receivers",
                f"{path} has {classes.shape[-1]} classes for {len(self.characters)} characters; {REMEDY} again",
            )
        super().__init__(name, network, {"backbone": backbone.shape[1], "sequence": sequence.shape[2]})

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        lines = _lines(x)
        backbone, sequence = self._outputs(lines, "backbone", "sequence")
        return {
            "backbone": _by_image(backbone.flatten(2).transpose(1, 2), len(x)),
            "sequence": _by_image(sequence, len(x)),
        }

    @torch.no_grad()
    def read(self, x: Tensor) -> list[str]:
        """The text of each image of (B, 3, H, W) in [0, 1], a line per strip; greedy, without a lexicon."""
        lines = _lines(x.float())
        lines = F.pad(lines, (0, max(SHORTEST_LINE - lines.shape[3], 0)), value=0.5)
        (classes,) = self._outputs(lines, "classes")
        best = classes.argmax(dim=-1).unflatten(0, (len(x), -1))
        return ["\n".join(self._decoded(line) for line in image) for image in best.tolist()]

    def _outputs(self, lines: Tensor, *names: str) -> list[Tensor]:
        blue_first = 2 * lines.flip(1) - 1
        return self.network(blue_first, tuple(self.values[name] for name in names))

    def _decoded(self, classes: list[int]) -> str:
        """CTC decoding (Graves et al., 2006): repeated classes once, without blanks."""
        kept = [new for old, new in zip([0, *classes], classes, strict=False) if new != old]
        return "".join(self.characters[i] for i in kept)


def _values(network: OnnxGraph) -> dict[str, str]:
    """The recogniser's outputs, by their names in the graph."""
    (pooling,) = network.find("AveragePool")  # reduces the height to 1
    *_, class_layer = network.find("MatMul")
    *_, probabilities = network.find("Softmax")
    return {"backbone": pooling.output, "sequence": class_layer.inputs[0], "classes": probabilities.output}


def _lines(x: Tensor) -> Tensor:
    """Lines (B·strips, 3, 48, width) of images (B, 3, H, W), image by image."""
    height, width = x.shape[2:]
    if height <= HIGHEST_LINE:
        size = (LINE, math.ceil(LINE * width / height))
        return resized(x, size, "bilinear")
    x = F.pad(x, (0, 0, 0, -height % LINE), mode="replicate")
    return x.unflatten(2, (-1, LINE)).transpose(1, 2).flatten(0, 1)


def _by_image(tokens: Tensor, images: int) -> Tensor:
    """(B·strips, T, C) to (B, strips·T, C)."""
    return tokens.unflatten(0, (images, -1)).flatten(1, 2)
