"""The loss of training for vision models: rate, MSE, and the distortion and rank of receivers' tokens."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hpcm_scale.config.schema import MachineConfig
from hpcm_scale.errors import UserError
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.model.layers import full_precision
from hpcm_scale.objective import Lmbda, rate_distortion_loss

_references: MutableMapping[Tensor, WeakKeyDictionary[TokenExtractor, Any]] = WeakTensorKeyDictionary()
"""Version and tokens of images, by images and receiver; weak references to both."""


def reference_tokens(receiver: TokenExtractor, x: Tensor) -> dict[str, Tensor]:
    """A receiver's tokens (B, T, C) fp32 by layer of originals (B, 3, H, W), without gradients.

    Cached until the tensor changes: pre-editor and objective use the same tokens.
    """
    if torch.is_inference_mode_enabled() or x.is_inference():  # inference tensors must not enter training
        return receiver(x)
    by_receiver = _references.setdefault(x, WeakKeyDictionary())
    version, tokens = by_receiver.get(receiver, (None, {}))
    if version != x._version:
        with torch.no_grad():
            tokens = receiver(x)
        by_receiver[receiver] = (x._version, tokens)
    return tokens


# Token distortion and effective rank, in fp32, also under autocast, or in float64 for float64 tokens.
#
# After arXiv 2407.17060, which uses losses on the distortion and the rank of semantic tokens; the formulas here are our
# own. Effective rank: Roy and Vetterli, "The effective rank", EUSIPCO 2007. The loss is the difference to the rank of
# the original, since artefacts can also increase the rank (JPEG at quality 30 does for most Kodak images, in the middle
# layers of EfficientNet-Lite0).


_SMALLEST_NORM = 1e-4
"""Of a token, relative to the largest element of the reference; directions of smaller tokens are shrunk."""
_SMALLEST_SPREAD = 1e-30
"""Smaller differences count as zero, so that gradients are finite."""


def token_distortion(tokens: Tensor, reference: Tensor) -> Tensor:
    """Mean over tokens of 1 − cosine, plus the squared error relative to the reference's energy: (B, T, C) to (B,).

    Value and gradient are exactly zero for equal tokens. It is invariant to the scale of both; for a zero reference
    the squared error is absolute. Raises ValueError for other or different shapes.
    """
    _check(tokens, reference)
    with full_precision(tokens):
        tokens, reference = _at_least_fp32(tokens), _at_least_fp32(reference)
        largest = reference.detach().abs().amax(dim=(1, 2), keepdim=True)
        unit = torch.where(largest > 0, largest, 1.0)
        tokens, reference = tokens / unit, reference / unit
        directions = [F.normalize(x, dim=2, eps=_SMALLEST_NORM) for x in (tokens, reference)]
        # 1 − cosine is half the squared distance of the directions, which has no rounding error for equal ones.
        turned = (directions[0] - directions[1]).square().sum(dim=2).mean(dim=1) / 2
        energy = reference.square().sum(dim=(1, 2)).clamp_min(1)  # at least 1, except for a zero reference
        return turned + (tokens - reference).square().sum(dim=(1, 2)) / energy


def rank_difference(tokens: Tensor, reference: Tensor) -> Tensor:
    """|log effective rank of the tokens − that of the reference|: (B, T, C) to (B,).

    The reference has no gradient. Value and gradient are exactly zero for equal tokens. Raises ValueError for other or
    different shapes.
    """
    _check(tokens, reference)
    with torch.no_grad():
        wanted = log_effective_rank(reference)
        same = (tokens == reference).flatten(1).all(dim=1)
    # Eigenvalues of equal matrices may differ in rounding if their memory alignment differs.
    return torch.where(same, 0.0, (log_effective_rank(tokens) - wanted).abs())


def log_effective_rank(tokens: Tensor) -> Tensor:
    """The entropy of the normalised eigenvalues of the centred tokens' Gram matrix: (B, T, C) to (B,).

    From 0 (equal tokens) to log min(T − 1, C). It is invariant to shift, rotation and scale. Value and gradient are
    finite for all finite tokens.
    """
    with full_precision(tokens):
        centred = _centred(_at_least_fp32(tokens).contiguous())
        transposed = centred.transpose(1, 2)
        # The T×T Gram matrix and the C×C scatter matrix have the same non-zero eigenvalues; the smaller is used.
        matrix = centred @ transposed if tokens.shape[1] <= tokens.shape[2] else transposed @ centred
        # The solver raises for non-finite input; `total` propagates it, and training skips the step.
        eigenvalues = torch.linalg.eigvalsh(matrix.nan_to_num())
        total = centred.square().sum(dim=(1, 2)).clamp_min(0.25)  # at least 1/2, except for equal tokens
        shares = eigenvalues / total[:, None]
        # Zero eigenvalues have rounding errors of either sign; clamping the logarithm keeps the gradient finite.
        return -(shares * shares.clamp_min(torch.finfo(shares.dtype).eps).log()).sum(dim=1)


def _centred(tokens: Tensor) -> Tensor:
    """Tokens (B, T, C) minus their mean, scaled to a largest difference of 1.

    The first token is subtracted beforehand, so that nearly equal tokens have no rounding errors.
    """
    tokens = tokens - tokens[:, :1]
    # Without gradient: the rank is invariant to scale.
    tokens = tokens / tokens.detach().abs().amax(dim=(1, 2), keepdim=True).clamp_min(_SMALLEST_SPREAD)
    return tokens - tokens.mean(dim=1, keepdim=True)


def _check(*all_tokens: Tensor) -> None:
    shapes = [tuple(tokens.shape) for tokens in all_tokens]
    if len(shapes[0]) != 3 or len(set(shapes)) > 1:
        raise ValueError(f"tokens are (B, T, C), alike if compared, not {' and '.join(map(str, shapes))}")


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class MachineDistortion(NamedTuple):
    """`RateDistortion` with the distortion and the rank of tokens."""

    loss: Tensor
    """λ·(w_mse·255²·MSE + w_token·token + w_rank·rank) + bpp; has the gradient."""
    bpp: Tensor
    bpp_y: Tensor
    bpp_z: Tensor
    mse: Tensor
    """To the original, not to the edited image."""
    psnr: Tensor
    token: Tensor
    """`token_distortion`, weighted mean over layers, then mean over receivers."""
    rank: Tensor
    """`rank_difference`, likewise."""

    def mean(self) -> MachineDistortion:
        """The mean of each quantity over the images."""
        return MachineDistortion(*(quantity.mean() for quantity in self))


class MachineObjective:
    """The loss of each image of a batch, relative to the originals, also with a pre-editor (`objective.Objective`)."""

    fields = MachineDistortion._fields

    def __init__(self, receivers: Mapping[str, TokenExtractor], config: MachineConfig, lmbda: Lmbda) -> None:
        """`receivers`: at least one, by name, on the device of the images; `config`: weights of terms and layers.

        Raises UserError for a weight of an unknown layer, a negative weight, and a receiver whose weights are all zero.
        """
        assert receivers
        self._receivers, self._config, self._lmbda = receivers, config, lmbda
        self._weights = {name: _weights(name, of, config.layers) for name, of in receivers.items()}
        layers = {f"{name}/{layer}" for name, of in receivers.items() for layer in of.token_channels}
        if unknown := sorted(set(config.layers) - layers):
            raise UserError(
                "unknown-layer",
                "machine.layers",
                f"machine.layers has weights of unknown layers, {', '.join(unknown)}; choose from "
                f"{', '.join(sorted(layers))}",
            )

    def __call__(self, x: Tensor, coded: Any, level: Tensor | None = None) -> MachineDistortion:
        """The loss for originals (B, 3, H, W) in [0, 1], their reconstructions and bits, and their levels.

        `coded` has `x_hat`, `bits_y` and `bits_z`. Raises ValueError for shapes that do not fit together, and for sides
        below 32 pixels.
        """
        lmbda, config = self._lmbda, self._config
        if callable(lmbda):
            assert level is not None
            lmbda = lmbda(level)
        plain = rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, lmbda * config.mse)
        token, rank = self._compare(x, coded.x_hat)
        loss = plain.loss
        for weight, quantity in ((config.token_distortion_weight, token), (config.token_rank_weight, rank)):
            if weight:  # without a weight it is only measured, without a backward pass
                loss = loss + lmbda * weight * quantity
        return MachineDistortion(loss, *plain[1:], token, rank)

    def _compare(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Token distortion and rank difference, (B,) each."""
        x_hat = x_hat.float().clamp(0, 1)  # the range of decoded images
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
    """Weights of a receiver's layers, normalised to a sum of 1; without layers of weight 0."""
    weights = {layer: given.get(f"{name}/{layer}", 1.0) for layer in receiver.token_channels}
    for layer, weight in weights.items():
        if weight < 0:
            raise UserError(
                "negative-layer-weight",
                "machine.layers",
                f"machine.layers has the weight {weight:g} for {name}/{layer}; use 0 or more",
            )
    total = sum(weights.values())
    if total == 0:
        raise UserError(
            "receiver-without-weight",
            "machine.layers",
            f"machine.layers has the weight 0 for all layers of {name}; remove it from machine.receivers",
        )
    return {layer: weight / total for layer, weight in weights.items() if weight > 0}
