"""The Karhunen–Loève start: an untrained codec that begins as the best linear block transform (`model.start=klt`).

The strided convolutions of g_a are initialized with eigenvectors of the covariance of their input patches under a model
of images, the transposed convolutions of g_s with the transposes, and the entropy model with the standard deviation of
each channel of y (docs/families.md). The model of images is a separable first-order autoregressive process with a
colour covariance.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn

from hpcm_scale.config.schema import Distortion, ObjectiveConfig, RateConfig
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.layers import Block, Pointwise
from hpcm_scale.model.parameters import gathered

CORRELATION = (0.945, 0.955)
"""Of vertical and horizontal neighbours. In photographs horizontal ones are more alike, and no two eigenvalues of a
colour may coincide: the eigenvectors of a common eigenvalue would depend on the library that computes them."""
VARIANCE = 0.06
"""Mean variance of R, G and B under the model, of pixels in [0, 1]."""
_COLOURS = ((1, 1, 1), (1, 1, -2), (1, -1, 0))
_COLOUR_VARIANCES = (2.75, 0.15, 0.10)
"""Times VARIANCE, along each of the colours in RGB."""
GAIN = 4.3
"""Of y at λ = 0.013; at other λ in proportion to √λ. The step 1/gain of rounding is then near the rate-distortion
optimum."""
REFERENCE = 0.013
BRANCH = 0.01
"""Factor of the last layers of residual branches, so that the stream passes through."""
BEYOND_RANK = (0.1, 0.05)
"""Factor of the random weights in g_a and g_s of outputs for which there is no eigenvector."""
SCALE_PER_DEVIATION, SMALLEST_SCALE = 0.9, 0.15
"""Initial scale of a channel of y: a multiple of its standard deviation under the model, at least the second."""
PARAMETER_WEIGHTS = 0.1
"""Factor of the weights of the layers that return scales and means of y: at first their biases set them."""
HYPER_WEIGHTS = 0.3
"""Factor of the weights of the layer that returns z: few bits, but not 0, where h_a and h_s would not learn."""
MS_SSIM_LMBDAS = ((2.4, 0.0018), (4.58, 0.0035), (8.73, 0.0067), (16.64, 0.013), (31.73, 0.025), (60.5, 0.0483))
"""The public λ of MS-SSIM, each with the λ of MSE of the same quality."""


class Stage(NamedTuple):
    """A linear transform of 2×2 patches."""

    basis: np.ndarray
    """(outputs, inputs, 2, 2) fp64 with orthonormal rows, by falling variance of the outputs."""
    deviations: np.ndarray
    """(outputs,) fp64: standard deviation of each output under the model."""


def linear_stages(widths: list[int]) -> list[Stage]:
    """The truncated Karhunen–Loève transform stage by stage, for RGB and `widths` outputs.

    A stage has at most four times as many outputs as the one before, so it may have fewer than its width. A pure
    function of its arguments: the colours are transformed one by one, since eigenvalues of two colours may coincide.
    """
    axes = np.array([np.divide(colour, np.linalg.norm(colour)) for colour in _COLOURS])
    colours = np.arange(3)  # of each channel
    transform = np.ones((3, 1, 1))  # weights of each channel in a block
    side = 1
    stages: list[Stage] = []
    for width in widths:
        inputs = len(transform)
        patches = np.zeros((inputs, 2, 2, 2 * side, 2 * side))
        for row in (0, 1):
            for column in (0, 1):
                rows, columns = (slice(place * side, (place + 1) * side) for place in (row, column))
                patches[:, row, column, rows, columns] = transform
        side *= 2
        correlation = np.kron(*(_autoregressive(neighbours, side) for neighbours in CORRELATION))
        found = []
        for colour, variance in enumerate(_COLOUR_VARIANCES):
            own = np.flatnonzero(colours == colour)
            if not own.size:  # no channel of it within the width of the stage before
                continue
            patch = patches[own].reshape(4 * len(own), -1)
            variances, vectors = np.linalg.eigh(VARIANCE * variance * patch @ correlation @ patch.T)
            basis = np.zeros((len(variances), inputs, 2, 2))
            basis[:, own] = _with_fixed_signs(vectors.T).reshape(-1, len(own), 2, 2)
            found += [(value, colour, vector) for value, vector in zip(variances, basis, strict=True)]
        found = sorted(found, key=lambda each: -each[0])[:width]
        colours, basis = np.array([colour for _, colour, _ in found]), np.array([vector for *_, vector in found])
        transform = np.einsum("oirc,ircyx->oyx", basis, patches)
        if not stages:
            basis = np.einsum("oirc,ij->ojrc", basis, axes)
        stages.append(Stage(basis, np.sqrt([max(variance, 0.0) for variance, *_ in found])))
    return stages


def _autoregressive(correlation: float, side: int) -> np.ndarray:
    place = np.arange(side)
    return correlation ** np.abs(place[:, None] - place)


def _with_fixed_signs(vectors: np.ndarray) -> np.ndarray:
    """The rows, negated where the first component above 1e-6 in magnitude is negative."""
    first = np.argmax(np.abs(vectors) > 1e-6, axis=1)
    return vectors * np.sign(vectors[np.arange(len(vectors)), first])[:, None]


def lmbda_of_start(rate: RateConfig, objective: ObjectiveConfig) -> float:
    """The λ of MSE that the gain of y is initialized for: the reference of a variable-rate model.

    A λ of MS-SSIM is interpolated, in the logarithm, between the six public ones; outside them the nearest is used.
    """
    lmbda = objective.lmbda if rate.levels == 1 else rate.reference
    if objective.distortion == Distortion.mse:
        return lmbda
    ours, theirs = np.log(MS_SSIM_LMBDAS).T
    return math.exp(np.interp(math.log(lmbda), ours, theirs))


@torch.no_grad()
def karhunen_loeve_start(codec: HPCM, lmbda: float) -> None:
    """Initialize a new codec, sharded or not, for `lmbda` of 255²·MSE. A meta model stays as it is.

    Weights of outputs without an eigenvector, of residual branches and of the context model keep the random values of
    the codec, scaled.
    """
    if next(codec.parameters()).is_meta:
        return
    downs = [layer for layer in codec.g_a if isinstance(layer, nn.Conv2d)]
    ups = [layer for layer in codec.g_s if isinstance(layer, nn.ConvTranspose2d)][::-1]
    gain = GAIN * math.sqrt(lmbda / REFERENCE)
    stages = linear_stages([down.out_channels for down in downs])
    for number, (stage, down, up) in enumerate(zip(stages, downs, ups, strict=True)):
        factor = gain if number == len(stages) - 1 else 1.0
        _set_basis(down, stage.basis * factor, BEYOND_RANK[0], centre=0.5 if number == 0 else 0.0)
        _set_basis(up, stage.basis / factor, BEYOND_RANK[1])
    assert ups[0].bias is not None
    with gathered(ups[0].bias):
        ups[0].bias.fill_(0.5)
    for part in (codec.g_a, codec.g_s):
        for block in part.modules():
            for last in block.branches() if isinstance(block, Block) else ():
                _scale(last, BRANCH)
    _start_entropy_model(codec, gain * stages[-1].deviations)


def _set_basis(layer: nn.Conv2d | nn.ConvTranspose2d, basis: np.ndarray, beyond: float, centre: float = 0.0) -> None:
    """Set the inner 2×2 of a kernel to `basis` (n, inputs, 2, 2), with the inputs beyond its own at 0, and scale the
    random weights of the outputs beyond n; of a transposed convolution, outputs and inputs change places.

    The bias subtracts `centre` from all inputs.
    """
    count, inputs = basis.shape[:2]
    inner = (layer.kernel_size[0] - 2) // 2
    assert layer.bias is not None
    with gathered(layer.weight), gathered(layer.bias):
        weight = layer.weight.mul_(beyond)
        weight[:count] = 0
        weight[:count, :inputs, inner : inner + 2, inner : inner + 2] = torch.from_numpy(basis).to(weight)
        layer.bias.copy_(-centre * weight.sum((1, 2, 3))) if centre else layer.bias.zero_()


def _scale(layer: nn.Conv2d, factor: float) -> None:
    assert layer.bias is not None
    with gathered(layer.weight), gathered(layer.bias):
        layer.weight.mul_(factor)
        layer.bias.zero_()


def _start_entropy_model(codec: HPCM, deviations: np.ndarray) -> None:
    """Initialize the scales of y (M channels) from the standard deviations of its first channels, and reduce z."""
    scales = torch.full((codec.config.latent_channels,), SMALLEST_SCALE)
    known = torch.from_numpy(SCALE_PER_DEVIATION * deviations).clamp(min=SMALLEST_SCALE)
    scales[: len(known)] = known
    for layer in scale_layers(codec):
        assert layer.bias is not None
        with gathered(layer.weight), gathered(layer.bias):
            layer.weight.mul_(PARAMETER_WEIGHTS)
            layer.bias[: len(scales)] = scales.to(layer.bias)
    _scale([layer for layer in codec.h_a if isinstance(layer, nn.Conv2d)][-1], HYPER_WEIGHTS)


def scale_layers(codec: HPCM) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    """The layers whose first M outputs are scales of y: the last of h_s between resolutions, and each prior's."""
    last_up = [layer for layer in codec.h_s if isinstance(layer, nn.ConvTranspose2d)][-1]
    priors = (codec.context.prior_s1_s2, codec.context.prior_s3)
    after = [layer for prior in priors for layer in cast(nn.Sequential, prior.after) if isinstance(layer, Pointwise)]
    return [last_up, *after]
