"""Rate against what happens to receivers' tokens: the objective of training for machine receivers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcm_scale.config.schema import MachineConfig
from hpcm_scale.errors import UserError
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.reference_tokens import reference_tokens
from hpcm_scale.machine.token_losses import rank_difference, token_distortion
from hpcm_scale.objective.rate_distortion import rate_distortion_loss


class MachineDistortion(NamedTuple):
    """What a batch of reconstructions costs and what receivers make of it; fp32, (B,) or, after `mean`, ()."""

    loss: Tensor
    """λ·(w_mse·255²·MSE + w_token·token + w_rank·rank) + bpp; carries the gradient."""
    bpp: Tensor
    """Bits per image pixel: bpp_y + bpp_z."""
    bpp_y: Tensor
    bpp_z: Tensor
    mse: Tensor
    """Mean squared error over channels and pixels, for values in [0, 1], to the original, not to what was edited."""
    psnr: Tensor
    """−10·log10(MSE) in dB, without gradient."""
    token: Tensor
    """`token_distortion`, the weighted mean over layers, the mean over receivers."""
    rank: Tensor
    """`rank_difference`, likewise."""

    def mean(self) -> MachineDistortion:
        """Each quantity averaged over the images; the PSNR is the mean of the images' PSNRs."""
        return MachineDistortion(*(quantity.mean() for quantity in self))


class MachineObjective:
    """The loss of a batch, image by image; the originals are the reference, whether they have been edited or not."""

    fields = MachineDistortion._fields

    def __init__(
        self,
        receivers: Mapping[str, TokenExtractor],
        config: MachineConfig,
        lmbda: float | Callable[[Tensor | None], Tensor],
    ) -> None:
        """What is compared, and what counts how much.

        Args:
            receivers: at least one, by name, on the device of the images.
            config: weights of the terms, and of `receiver/layer`.
            lmbda: λ, or with variable rate what gives it, (B,), for levels (B,).

        Raises:
            UserError: a weight of a layer that there is not, that is negative, or that are zero for all of a receiver.
        """
        assert receivers
        self._receivers, self._config, self._lmbda = receivers, config, lmbda
        self._weights = {name: _weights(name, of, config.layers) for name, of in receivers.items()}
        layers = {f"{name}/{layer}" for name, of in receivers.items() for layer in of.token_channels}
        if unknown := sorted(set(config.layers) - layers):
            raise UserError(
                f"machine.layers weighs {', '.join(unknown)}, and there is no such layer; there are "
                f"{', '.join(sorted(layers))}"
            )

    def __call__(self, x: Tensor, coded: Any, level: Tensor | None = None) -> MachineDistortion:
        """Originals (B, 3, H, W) in [0, 1], what a codec made of them (`x_hat`, `bits_y`, `bits_z`), and their levels.

        Raises:
            ValueError: shapes that do not belong together, or sides below 32 pixels.
        """
        lmbda, config = self._lmbda(level) if callable(self._lmbda) else self._lmbda, self._config
        plain = rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, lmbda * config.mse)
        token, rank = self._compare(x, coded.x_hat)
        loss = plain.loss
        for weight, quantity in ((config.token, token), (config.rank, rank)):
            if weight:  # what has none is measured all the same, but nothing goes backward through it
                loss = loss + lmbda * weight * quantity
        return MachineDistortion(loss, *plain[1:], token, rank)

    def _compare(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Token distortion and rank difference, (B,) each."""
        x_hat = x_hat.float().clamp(0, 1)  # what a decoder writes, and receivers expect
        token, rank = [], []
        for name, receiver in self._receivers.items():
            weights = self._weights[name]
            originals = reference_tokens(receiver, x)
            decoded = receiver(x_hat)
            for measures, measure in ((token, token_distortion), (rank, rank_difference)):
                by_layer = [weight * measure(decoded[layer], originals[layer]) for layer, weight in weights.items()]
                measures.append(torch.stack(by_layer).sum(dim=0))
        return torch.stack(token).mean(dim=0), torch.stack(rank).mean(dim=0)


def _weights(name: str, receiver: TokenExtractor, given: Mapping[str, float]) -> dict[str, float]:
    """What the layers of a receiver weigh, 1 in all; those that weigh nothing are left out."""
    weights = {layer: given.get(f"{name}/{layer}", 1.0) for layer in receiver.token_channels}
    for layer, weight in weights.items():
        if weight < 0:
            raise UserError(f"machine.layers gives {name}/{layer} the weight {weight:g}; give 0 or more")
    total = sum(weights.values())
    if total == 0:
        raise UserError(f"machine.layers gives all layers of {name} the weight 0; leave it out of machine.receivers")
    return {layer: weight / total for layer, weight in weights.items() if weight > 0}
