"""Rate against what happens to receivers' tokens: the objective of training for machine receivers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from hpcm_scale.objective import rate_distortion_loss

# What receivers see in originals.


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


# What happens to a receiver's tokens: how far they move, and whether they still tell as much apart.
#
# After arXiv 2407.17060, which trains with losses on the distortion and on the rank of semantic tokens, but whose exact
# losses could not be had: the formulas here are our own. Effective rank is that of Roy and Vetterli ("The effective
# rank", EUSIPCO 2007). A codec has to match the rank of the original's tokens: more is no better, for artefacts, too,
# can raise it (JPEG at quality 30 does on most photos, in the middle layers of EfficientNet-Lite0).
#
# All is worked out in fp32, under autocast too, or in float64 if the tokens are.


_SMALLEST_NORM = 1e-4
"""Of a token, relative to the largest number among the reference's: below, its direction counts for less and less."""
_SMALLEST_SPREAD = 1e-30
"""Tokens that differ by less count as the same: their gradients would not be finite."""


def token_distortion(tokens: Tensor, reference: Tensor) -> Tensor:
    """The mean over tokens of 1 − cosine, plus the squared error of all tokens relative to the reference's energy.

    Both (B, T, C); (B,). It and its gradient are exactly zero for tokens that are the reference's. It stays the same if
    both are multiplied by a number. Where the reference is zero the squared error is taken as it is.

    Raises:
        ValueError: shapes that are not the same, or not these.
    """
    _check(tokens, reference)
    with full_precision(tokens):
        tokens, reference = _at_least_fp32(tokens), _at_least_fp32(reference)
        largest = reference.detach().abs().amax(dim=(1, 2), keepdim=True)
        unit = torch.where(largest > 0, largest, 1.0)
        tokens, reference = tokens / unit, reference / unit
        directions = [F.normalize(x, dim=2, eps=_SMALLEST_NORM) for x in (tokens, reference)]
        # 1 − cosine is half the squared distance of the directions, in which equal ones leave no rounding error.
        turned = (directions[0] - directions[1]).square().sum(dim=2).mean(dim=1) / 2
        energy = reference.square().sum(dim=(1, 2)).clamp_min(1)  # 1 at least, but for a reference of zeros
        return turned + (tokens - reference).square().sum(dim=(1, 2)) / energy


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(H), H the entropy of the normalised eigenvalues of the centred tokens' Gram matrix.

    (B, T, C) to (B,): between 1 and min(T − 1, C). Shifting, turning and scaling the tokens leave it as it is. Tokens
    that are all the same have rank 1. Value and gradient are finite for all finite tokens, those of low rank included.

    Raises:
        ValueError: another shape.
    """
    _check(tokens)
    return _spectral_entropy(tokens).exp()


def rank_difference(tokens: Tensor, reference: Tensor) -> Tensor:
    """|log effective rank of the tokens − that of the reference's|, which takes no gradient.

    Both (B, T, C); (B,). It and its gradient are exactly zero for tokens that are the reference's.

    Raises:
        ValueError: shapes that are not the same, or not these.
    """
    _check(tokens, reference)
    with torch.no_grad():
        wanted = _spectral_entropy(reference)
        same = (tokens == reference).flatten(1).all(dim=1)
    # Of the same matrix in another place of memory, eigenvalues may come out with other rounding errors.
    return torch.where(same, 0.0, (_spectral_entropy(tokens) - wanted).abs())


def _spectral_entropy(tokens: Tensor) -> Tensor:
    """The logarithm of the effective rank, (B,)."""
    with full_precision(tokens):
        centred = _centred(_at_least_fp32(tokens).contiguous())
        transposed = centred.transpose(1, 2)
        # The T×T Gram matrix and the C×C scatter matrix differ by zeros in their spectrum: the smaller one.
        matrix = centred @ transposed if tokens.shape[1] <= tokens.shape[2] else transposed @ centred
        # The solver raises at what is not finite; the total lets it through, and the loop leaves out the step.
        eigenvalues = torch.linalg.eigvalsh(matrix.nan_to_num())
        total = centred.square().sum(dim=(1, 2)).clamp_min(0.25)  # 1/2 at least, but where all tokens are the same
        shares = eigenvalues / total[:, None]
        # Eigenvalues that are zero come out as rounding errors of either sign. There the logarithm stays where it is:
        # what they add cancels, and the gradient stays finite.
        return -(shares * shares.clamp_min(torch.finfo(shares.dtype).eps).log()).sum(dim=1)


def _centred(tokens: Tensor) -> Tensor:
    """Tokens (B, T, C) less their mean, in a unit in which they are neither large nor small.

    First less the first of them: so tokens that are the same, or nearly so, leave no rounding errors.
    """
    tokens = tokens - tokens[:, :1]
    # A constant, though it is made of the tokens: the rank knows no unit.
    tokens = tokens / tokens.detach().abs().amax(dim=(1, 2), keepdim=True).clamp_min(_SMALLEST_SPREAD)
    return tokens - tokens.mean(dim=1, keepdim=True)


def _check(*all_tokens: Tensor) -> None:
    shapes = [tuple(tokens.shape) for tokens in all_tokens]
    if len(shapes[0]) != 3 or len(set(shapes)) > 1:
        raise ValueError(f"tokens are (B, T, C), alike where they are compared, not {' and '.join(map(str, shapes))}")


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


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
        for weight, quantity in ((config.token_distortion_weight, token), (config.token_rank_weight, rank)):
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
