"""What receivers see in originals."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hpcm_scale.machine.extractor import TokenExtractor

_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Images to receivers to the images' version and their tokens: forgotten with either."""


def reference_tokens(receiver: TokenExtractor, x: Tensor) -> dict[str, Tensor]:
    """A receiver's tokens (B, T, C) fp32 of originals (B, 3, H, W), by layer, without gradients.

    It looks at a tensor once, as long as nothing is written to it: pre-editor and objective ask for the same.
    """
    if torch.is_inference_mode_enabled() or x.is_inference():  # such tensors must not get into training
        return receiver(x)
    by_receiver = _seen.setdefault(x, WeakKeyDictionary())
    version, tokens = by_receiver.get(receiver, (None, {}))
    if version != x._version:
        with torch.no_grad():
            tokens = receiver(x)
        by_receiver[receiver] = (x._version, tokens)
    return tokens
