"""The network without any of what makes it fast: to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch.nn.functional as F

from hpcm_scale.model import layers


@contextmanager
def plain() -> Iterator[None]:
    """Within it models compute as they are written down: convolutions, LeakyReLU and attention of torch.

    For images in the plain memory format. What has been compiled stays compiled.
    """
    ways = [
        patch.object(layers, "product_is_faster", lambda x, layer: False),
        patch.object(layers, "can_convolve", lambda x, weight: False),
        patch.object(layers, "leaky_relu", lambda x: F.leaky_relu(x, layers.SLOPE)),
        patch.object(layers, "products_are_faster", lambda query: False),
    ]
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(way)
        yield
