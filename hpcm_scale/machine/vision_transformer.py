"""A small vision transformer with random weights: a receiver that needs no package, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcm_scale.machine.extractor import TokenExtractor, as_tokens, pad_to_multiple

PATCH = 16
"""Side of the square that is a token, in pixels."""


class RandomVisionTransformer(TokenExtractor):
    """ViT (arXiv 2010.11929) of 16×16 patches, its weights drawn with `seed`; the global generator is left alone.

    Images are taken in their own size, the last row and column repeated up to multiples of 16. Tokens are those after
    the middle and after the last layer. There are no classes.
    """

    def __init__(self, name: str, seed: int, width: int = 64, heads: int = 4, layers: int = 4) -> None:
        super().__init__(name, _random(width, heads, layers, seed), {"middle": width, "last": width})

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        """See `TokenExtractor.forward`."""
        patches = self.network["embed"](2 * pad_to_multiple(x, PATCH) - 1)
        tokens = as_tokens(patches) + _positions(patches)
        middle = len(self.network["layers"]) // 2
        for i, layer in enumerate(self.network["layers"]):
            if i == middle:
                halfway = tokens
            tokens = layer(tokens)
        return {"middle": halfway, "last": tokens}


class Layer(nn.Module):
    """Self-attention and a perceptron, each on normalised tokens and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens, width) to the same shape."""
        parts = self.attention(_normalised(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts)
        tokens = tokens + self.project(attended.transpose(1, 2).flatten(2))
        return tokens + self.reduce(F.gelu(self.expand(_normalised(tokens))))


def _normalised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def _random(width: int, heads: int, layers: int, seed: int) -> nn.ModuleDict:
    with torch.device("meta"):
        network = nn.ModuleDict(
            {
                "embed": nn.Conv2d(3, width, PATCH, stride=PATCH),
                "layers": nn.ModuleList(Layer(width, heads) for _ in range(layers)),
            }
        )
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.zero_()
    return network


def _positions(patches: Tensor) -> Tensor:
    """Sines and cosines of the row and the column of each patch of (B, width, h, w), as (h·w, width)."""
    width, rows, columns = patches.shape[1:]
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4, device=patches.device)
    angles = [torch.arange(n, device=patches.device)[:, None] * frequencies for n in (rows, columns)]
    row, column = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    return torch.cat(
        [row[:, None].expand(rows, columns, -1), column.expand(rows, columns, -1)],
        dim=2,
    ).flatten(0, 1)
