"""What happens to a receiver's tokens: how far they move, and whether they still tell as much apart.

After arXiv 2407.17060, which trains with losses on the distortion and on the rank of semantic tokens, but whose exact
losses could not be had: the formulas here are our own. Effective rank is that of Roy and Vetterli ("The effective
rank", EUSIPCO 2007). A codec has to match the rank of the original's tokens: more is no better, for artefacts, too, can
raise it (JPEG at quality 30 does on most photos, in the middle layers of EfficientNet-Lite0).

All is worked out in fp32, under autocast too, or in float64 if the tokens are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcm_scale.model.layers import full_precision

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
