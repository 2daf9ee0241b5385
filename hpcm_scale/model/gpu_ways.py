"""The ways that layers take on a GPU, for tensors that are on none: to count there what a GPU would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcm_scale.model import layers, product


@contextmanager
def gpu_ways() -> Iterator[None]:
    """Within it layers choose what they choose on an NVIDIA GPU, as far as it is theirs to choose; for fake tensors."""
    ways = [
        patch.object(layers, "product_is_faster", lambda x, layer: layers.channels_last(x)),
        patch.object(layers, "products_are_faster", lambda query: False),
        patch.object(product, "sums_are_kept", lambda x: True),
        patch.object(F, "scaled_dot_product_attention", attention),
    ]
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(way)
        yield


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention as one operation, as torch computes it on a GPU; on a CPU fake tensors would take it apart."""
    bias = None if bias is None else bias.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]
