"""The hierarchical progressive context model: hyper parameters and decoded values to scales and means."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcm_scale.config.schema import Fusion, HyperPlacement, ModelConfig, PriorConfig
from hpcm_scale.model.coding_order import CodingOrder, Scale, misplaced
from hpcm_scale.model.layers import ChannelScale, Conv2d, depthwise_block
from hpcm_scale.model.transforms import start_scales

Code = Callable[[int, Tensor, Tensor], Tensor]
"""(step, scales, means) to ŷ at the step's positions; all packed as `Positions` says."""


class WindowFusion(nn.Module):
    """Cross-attention from new parameters to the old context within non-overlapping windows.

    Both (B, 2M, H, W), H and W multiples of the window; a 1×1 convolution of the parameters is added.
    """

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query, self.key, self.value, self.skip = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, parameters: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.query(parameters), self.key(context), self.value(context)
        attended = F.scaled_dot_product_attention(*(self._to_windows(x) for x in (query, key, value)))
        return self._from_windows(attended, query.shape) + self.skip(parameters)

    def _to_windows(self, x: Tensor) -> Tensor:
        """(B, heads·d, H, W) to (B·windows, heads, window², d)."""
        batch, channels, height, width = x.shape
        w = self.window
        x = x.reshape(batch, self.heads, channels // self.heads, height // w, w, width // w, w)
        return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(0, 2)

    def _from_windows(self, x: Tensor, shape: torch.Size) -> Tensor:
        batch, channels, height, width = shape
        w = self.window
        x = x.reshape(batch, height // w, width // w, self.heads, w, w, channels // self.heads)
        return x.permute(0, 3, 6, 1, 4, 2, 5).reshape(shape)


class ContextModel(nn.Module):
    """Walks the coding order: the one traversal that training, encoding and decoding share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        latent = config.latent_channels
        self.order = CodingOrder()
        self.aligned = config.hyper_placement == HyperPlacement.aligned
        self._without_network = (1, 0, 0)  # the very first step is coded with the hyper parameters alone
        networks = [
            len(scale.steps) - bare for scale, bare in zip(self.order.scales, self._without_network, strict=True)
        ]
        self.adaptors = nn.ModuleList(
            nn.ModuleList(_adaptor(3 * latent, blocks) for _ in range(count))
            for count, blocks in zip(networks, config.adaptor_blocks, strict=True)
        )
        self.q = nn.ModuleList(ChannelScale(3 * latent) for _ in range(sum(networks)))
        self.prior_s1_s2 = _prior(latent, config.prior_s1_s2)
        self.prior_s3 = _prior(latent, config.prior_s3)
        self.merge = nn.ModuleList(nn.Conv2d(2 * latent, 2 * latent, 1) for _ in range(2))
        self.fusion = nn.ModuleList()
        if config.fusion == Fusion.attention:
            self.fusion.extend(WindowFusion(2 * latent, config.attention_heads, window) for window in (4, 8, 8))

    def traverse(self, hyper_parameters: Tensor, code: Code) -> Tensor:
        """Walk through y in coding order.

        hyper_parameters: (B, 2M, H, W) fp32, scales then means. `code` is called once per step with the
        packed scales and means and answers ŷ there: by quantizing y, or from a stream.
        Returns ŷ (B, M, H, W) fp32.
        """
        hyper_grids = self._grids(hyper_parameters)
        y_hat = torch.zeros_like(hyper_grids[0].chunk(2, dim=1)[0])
        context = parameters = hyper_grids[0]
        step = 0
        for level, (scale, hyper) in enumerate(zip(self.order.scales, hyper_grids, strict=True)):
            prior = self.prior_s3 if level == 2 else self.prior_s1_s2
            if level > 0:
                y_hat = scale.refine(y_hat, torch.zeros_like(hyper.chunk(2, dim=1)[0]))
                context = self.merge[level - 1](self._refine_context(scale, level, context, hyper))
            for index, positions in enumerate(scale.steps):
                if step > 0:
                    adaptor = self.adaptors[level][index - self._without_network[level]]
                    adapted = adaptor(torch.cat([context, y_hat], dim=1))
                    parameters = prior.after(self.q[step - 1](prior.before(adapted)))
                    context = self.fusion[level](parameters, context) if self.fusion else parameters
                scales, means = (positions.take(part) for part in parameters.chunk(2, dim=1))
                y_hat = positions.put(code(step, scales, means), y_hat)
                step += 1
        return y_hat

    def _grids(self, hyper_parameters: Tensor) -> list[Tensor]:
        """The hyper parameters at every scale, coarse to fine, each (B, 2M, …)."""
        scales, means = (self.order.grids(part) for part in hyper_parameters.chunk(2, dim=1))
        return [torch.cat(pair, dim=1) for pair in zip(scales, means, strict=True)]

    def _refine_context(self, scale: Scale, level: int, context: Tensor, hyper: Tensor) -> Tensor:
        """The coarser context on its positions of this scale, hyper parameters on the others."""
        parts = []
        for coarse, fine in zip(context.to(hyper.dtype).chunk(2, dim=1), hyper.chunk(2, dim=1), strict=True):
            placed = fine if self.aligned or level == 2 else misplaced(fine)
            parts.append(scale.refine(coarse, placed))
        return torch.cat(parts, dim=1)


def _adaptor(channels: int, blocks: int) -> nn.Module:
    if blocks == 0:
        return nn.Conv2d(channels, channels, 1)
    return nn.Sequential(*(depthwise_block(channels) for _ in range(blocks)))


def _prior(latent_channels: int, depth: PriorConfig) -> nn.Module:
    """context and ŷ so far (3M channels) to the parameters (2M, fp32: scales, then means).

    Two halves, `before` and `after` the step's channel scale q.
    """
    wide, narrow = 3 * latent_channels, 2 * latent_channels
    halves = nn.Module()
    halves.before = nn.Sequential(*(depthwise_block(wide) for _ in range(depth.before)))
    halves.after = nn.Sequential(
        *(depthwise_block(wide) for _ in range(depth.after)),
        start_scales(Conv2d(wide, narrow, 1)),
        *(depthwise_block(narrow) for _ in range(depth.refine)),
    )
    return halves
