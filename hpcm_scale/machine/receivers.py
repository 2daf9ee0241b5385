"""The machine receivers by name."""

from __future__ import annotations

from hpcm_scale.errors import UserError
from hpcm_scale.machine.efficientnet import WEIGHTS, EfficientNetLite
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.recogniser import NETWORKS, TextRecogniser
from hpcm_scale.machine.vision_towers import OpenClipTower, TransformersTower
from hpcm_scale.machine.vision_transformer import RandomVisionTransformer

NAMES = (
    *WEIGHTS,
    *NETWORKS,
    "random-vit",
    "random-vit:SEED",
    "transformers:NAME_OR_PATH",
    "open_clip:MODEL:PRETRAINED_OR_PATH",
)
"""What `receiver` takes; capitals stand for what users put there."""


def receiver(name: str) -> TokenExtractor:
    """The receiver called `name`, on the CPU. Leaves torch's random numbers as they were.

    Raises UserError for a name that is not in `NAMES`, and where a package or weights are missing.
    """
    if name in WEIGHTS:
        return EfficientNetLite(name)
    if name in NETWORKS:
        return TextRecogniser(name)
    kind, _, argument = name.partition(":")
    model, _, weights = argument.partition(":")
    if kind == "random-vit" and (argument.isdecimal() or name == kind):
        return RandomVisionTransformer(name, seed=int(argument or 0))
    if kind == "transformers" and argument:
        return TransformersTower(name, argument)
    if kind == "open_clip" and model and weights:
        return OpenClipTower(name, model, weights)
    raise UserError(f"there is no machine receiver {name!r}; choose from {', '.join(NAMES)}")
