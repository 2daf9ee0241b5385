"""In which order a picture's numbers lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels-last or plain, for (B, C, H, W) or a slice of its channels; torch's own answer errs for both."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def settled(x: Tensor) -> Tensor:
    """The same tensor (B, C, H, W), dense.

    The first stride of a single image means nothing, but torch chooses the memory format of what follows by it.
    """
    if len(x) > 1 or memory_format_of(x) != torch.channels_last:
        return x
    return x.squeeze(0).permute(1, 2, 0)[None].permute(0, 3, 1, 2)
