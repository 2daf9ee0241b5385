"""Layers and blocks of HPCM (arXiv 2507.19125, figures 3 and 4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcm_scale.config.schema import Precision
from hpcm_scale.model.arithmetic import Kernels, can_fuse, fused_convolution, kernels_in_use, product
from hpcm_scale.model.variable_rate import mixed

SLOPE = 0.01
"""Of LeakyReLU, for negative values."""

# Precision: convolutions and context networks may run in bf16; latents, rates and distortions are fp32.


def reduced_precision(x: Tensor, precision: Precision) -> AbstractContextManager[object]:
    """Autocast to bf16 on the device of `x` if `precision` is bf16."""
    if precision == Precision.fp32 or not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast, for the places that are always fp32: y, z, scales, means, rates, images."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def reduced(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast, or as it is where autocast is off."""
    dtype = _autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of `x`; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def set_arithmetic(precision: Precision) -> None:
    """Set, for the whole process, how products are computed.

    With fp32, products of fp32 matrices are computed in fp32. With bf16, the few layers with fp32 results use TF32 on a
    GPU and bf16 in matrix products on a CPU; sums and results stay fp32. Products of bf16 or fp16 numbers are always
    accumulated in fp32: by default cuBLAS may split a long sum, such as a weight's gradient, and round the parts.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    reduced = precision == Precision.bf16
    # torch's compiler still reads these two, which cannot be read once the newer settings differ by backend.
    torch.set_float32_matmul_precision("medium" if reduced else "highest")
    torch.backends.cudnn.allow_tf32 = reduced


class Conv2d(nn.Conv2d):
    """Convolution with an fp32 result, also under autocast: the residual stream after it is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


class ConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution with an fp32 result, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


# 1×1 convolutions.


class Pointwise(nn.Conv2d):
    """1×1 convolution, as a matrix product where that is faster; its result is fp32 also under autocast if `fp32`."""

    bias: Tensor

    def __init__(self, inputs: int, outputs: int, *, fp32: bool = False) -> None:
        super().__init__(inputs, outputs, 1)
        self.fp32 = fp32
        self.reduced = False
        """Whether products may use bf16 or TF32; set by `configure_layers`."""
        self.cast: tuple[Tensor, Tensor] | None = None
        """Weight and bias in the dtype of autocast, within `cast_once`."""

    def forward(self, x: Tensor, *, leaky: bool = False, onto: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, D, H, W): the convolution, followed by LeakyReLU if `leaky`, added to `onto` if given."""
        if can_fuse(x, self.weight):
            return fused_convolution(x, self, SLOPE if leaky else None, onto)
        if self.fp32:
            with full_precision(x):
                result = self._convolve(x.to(self.weight.dtype))
        else:
            result = self._convolve(x)
        result = leaky_relu(result) if leaky else result
        return result if onto is None else onto + result

    def _convolve(self, x: Tensor) -> Tensor:
        if not product_is_faster(x, self):
            return super().forward(x)
        x = reduced(x)
        cast = self.cast if x.dtype != self.weight.dtype else None
        return product(x.permute(0, 2, 3, 1), self.weight, self.bias, cast).permute(0, 3, 1, 2)


@contextmanager
def cast_once(layers: Sequence[Pointwise], x: Tensor) -> Iterator[None]:
    """Cast the weights of `layers` once for this context and for what the backward pass recomputes of it.

    `layers`: see `configure_layers`. `x`: the network's input (B, C, H, W). Weights and biases of all layers that run
    as matrix products are cast in one operation. The casts are freed after the backward pass, so the next forward pass
    uses the updated weights. Nothing is cast without autocast, nor under ZeRO-3, which gathers weights layer by layer.
    Autocast itself caches the casts of other convolutions.
    """
    dtype = _autocast_dtype(x)
    if dtype is None:
        yield
        return
    chosen = [layer for layer in layers if product_is_faster(x, layer) and not hasattr(layer.weight, "ds_id")]
    with _install(_cast(chosen, dtype) if chosen else []):
        yield


Casts = Sequence[tuple[Pointwise, Tensor, Tensor]]
"""Layers with their weights and biases in another dtype."""


@torch.no_grad()
def _cast(layers: Sequence[Pointwise], dtype: torch.dtype) -> Casts:
    parameters = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    sizes = [parameter.numel() for parameter in parameters]
    parts = torch.empty(sum(sizes), dtype=dtype, device=parameters[0].device).split(sizes)
    casts = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
    torch._foreach_copy_(casts, parameters)
    return list(zip(layers, casts[: len(layers)], casts[len(layers) :], strict=True))


_casts: Casts = ()
"""Those in use."""


@contextmanager
def _install(casts: Casts) -> Iterator[None]:
    global _casts
    before, _casts = _casts, casts
    for layer, weight, bias in casts:
        vars(layer)["cast"] = weight, bias  # nn.Module.__setattr__ takes 20 times as long, and this is done often
    try:
        yield
    finally:
        for layer, *_ in casts:
            vars(layer)["cast"] = None
        _casts = before


def product_is_faster(x: Tensor, layer: Pointwise) -> bool:
    """Whether a 1×1 convolution of `x` (B, C, H, W) is faster as a matrix product; never in the contiguous format.

    On CPUs oneDNN's convolutions are faster for few channels, and in fp32 on processors that MKL, which multiplies fp32
    matrices, does not fully use (benchmarks/results/kernels.md).
    """
    kernels = kernels_in_use()
    if kernels == Kernels.reference or not channels_last(x) or x.device.type not in ("cpu", "cuda"):
        return False
    if x.is_cuda or kernels == Kernels.cuda:
        return True
    many_channels = min(layer.in_channels, layer.out_channels) >= _MANY_CHANNELS
    return many_channels and (layer.reduced or _INTEL)


def channels_last(x: Tensor) -> bool:
    """Whether `x` (B, C, H, W) is in the channels-last format."""
    return x.is_contiguous(memory_format=torch.channels_last)


_MANY_CHANNELS = 192


def _mkl_on_intel() -> bool:
    processor = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and processor.is_file() and "GenuineIntel" in processor.read_text()


_INTEL = _mkl_on_intel()


def leaky_relu(x: Tensor) -> Tensor:
    """LeakyReLU that saves only its result for the backward pass, which the next layer saves anyway."""
    return F.leaky_relu(x, SLOPE) if kernels_in_use() == Kernels.reference else _LeakyReLU.apply(x)


class _LeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = F.leaky_relu(x, SLOPE)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(gradient, result, SLOPE, True)


# Other layers.


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at every position of (B, C, H, W); the result is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelScale(nn.Module):
    """A learned factor per channel, and per level of a variable-rate model.

    A module of its own so that ZeRO-3 gathers it where it is read.
    """

    def __init__(self, channels: int, levels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(levels, channels, 1, 1))

    def forward(self, x: Tensor, mix: Tensor | None = None) -> Tensor:
        """Scale (B, C, H, W); `mix` (B, levels) if there are several levels (`variable_rate.mix_of`)."""
        return x * (self.weight if mix is None else mixed(self.weight, mix))


def down(inputs: int, outputs: int, *, kernel: int = 2, fp32: bool = False) -> nn.Conv2d:
    """Strided convolution that halves the resolution: (B, inputs, H, W) to (B, outputs, H/2, W/2)."""
    kind = Conv2d if fp32 else nn.Conv2d
    convolution = kind(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)
    return _variance_preserving(convolution, summands=inputs * kernel**2)


def up(inputs: int, outputs: int, *, kernel: int = 2, fp32: bool = False) -> nn.ConvTranspose2d:
    """Transposed convolution that doubles the resolution: (B, inputs, H, W) to (B, outputs, 2H, 2W)."""
    kind = ConvTranspose2d if fp32 else nn.ConvTranspose2d
    convolution = kind(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)
    return _variance_preserving(convolution, summands=inputs * (kernel // 2) ** 2)


Convolution = TypeVar("Convolution", nn.Conv2d, nn.ConvTranspose2d)


def _variance_preserving(convolution: Convolution, summands: int) -> Convolution:
    """torch's default initialization would shrink a signal 30-fold over four of these, and y would round to zero."""
    assert convolution.bias is not None
    nn.init.normal_(convolution.weight, std=summands**-0.5)
    nn.init.zeros_(convolution.bias)
    return convolution


class PartialConvolution(nn.Conv2d):
    """3×3 convolution of the first 1/`ratio` of the channels; the others are unchanged."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__(channels // ratio, channels // ratio, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        convolved, untouched = x.split([self.in_channels, x.shape[1] - self.in_channels], dim=1)
        return torch.cat([super().forward(convolved), untouched], dim=1)


# Residual blocks.


class Block(nn.Module, ABC):
    """A residual block, (B, C, H, W) to the same shape, dtype and memory format.

    The unit of torch.compile and of activation checkpointing.
    """

    peak_channels: int
    """Channels of the largest activation within."""
    alignment = 1
    """A tile of an input begins and ends at multiples of this many positions, or at the border."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False
        """Whether the backward pass recomputes the activations within; set by `configure_layers`."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self.compute, x) if self.recompute else self.compute(x)

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """`forward` without activation checkpointing."""

    @abstractmethod
    def branches(self) -> Iterable[nn.Conv2d]:
        """The last layer of each residual branch."""

    @abstractmethod
    def halo(self, depth: int) -> int:
        """Positions next to a cut whose results are wrong, if `depth` of the input's are."""


class ResidualBlock(Block):
    """x + reduce(LeakyReLU(expand(spatial(x)))), with 1×1 convolutions around the non-linearity."""

    def __init__(self, spatial: nn.Conv2d, channels: int, expansion: int) -> None:
        super().__init__()
        self.spatial = spatial
        self.expand = Pointwise(channels, expansion * channels)
        self.reduce = Pointwise(expansion * channels, channels)
        self.peak_channels = expansion * channels

    def compute(self, x: Tensor) -> Tensor:
        return self.reduce(self.expand(self.spatial(x), leaky=True), onto=x)

    def branches(self) -> Iterable[nn.Conv2d]:
        return (self.reduce,)

    def halo(self, depth: int) -> int:
        return depth + self.spatial.kernel_size[0] // 2


def partial_block(channels: int, ratio: int, expansion: int) -> ResidualBlock:
    """PConvRB(C, r, m): the block of the transforms."""
    return ResidualBlock(PartialConvolution(channels, ratio), channels, expansion)


def depthwise_block(channels: int) -> ResidualBlock:
    """DWConvRB(C): the block of the context model."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    return ResidualBlock(depthwise, channels, 2)


def configure_layers(network: nn.Module, precision: Precision, recompute: Callable[[str], bool]) -> list[Pointwise]:
    """Set the precision of 1×1 convolutions, and activation checkpointing of the blocks that `recompute` selects by
    name. Returns the 1×1 convolutions that run in the dtype of autocast, for `cast_once`."""
    pointwise = []
    for name, module in network.named_modules():
        if isinstance(module, Pointwise):
            module.reduced = precision == Precision.bf16
            pointwise += [] if module.fp32 else [module]
        elif isinstance(module, Block):
            module.recompute = recompute(name)
    return pointwise


def checkpointed(function, *inputs: Tensor):
    """`function(*inputs)` with activation checkpointing: the backward pass recomputes its intermediates."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    casts = _casts
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _install(casts)),
    )
