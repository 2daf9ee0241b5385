"""The blocks HPCM is made of (arXiv 2507.19125, figures 3 and 4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcm_scale.config.schema import Precision
from hpcm_scale.model.arithmetic import can_convolve, convolve, product
from hpcm_scale.model.variable_rate import mixed

SLOPE = 0.01
"""Of LeakyReLU, for negative values."""


def reduced_precision(x: Tensor, precision: Precision) -> AbstractContextManager[None]:
    """Autocast for convolutions and context networks, where the configuration asks for it."""
    if precision == Precision.fp32 or not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Leave autocast for the places that are fp32 always: y, z, scales, means, rates, pictures."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def reduced(x: Tensor) -> Tensor:
    """`x` in the dtype in which autocast, where it is on, has matrix products computed."""
    dtype = _autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of `x`; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def set_arithmetic(precision: Precision) -> None:
    """Say, for the whole process, how products are computed.

    Products of fp32 numbers are exact in fp32. Where convolutions are bf16, the few with fp32 results multiply TF32
    numbers on a GPU, and on a CPU bf16 numbers where they are matrix products; sums and results are fp32 always.
    Products of bf16 or fp16 numbers are summed in fp32 throughout: by default cuBLAS may split a long sum, such as
    that of a weight's gradient over all positions of a batch, and round the parts.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    reduced = precision == Precision.bf16
    # torch's compiler still reads these two, which can no longer be read where the newer settings differ by place.
    torch.set_float32_matmul_precision("medium" if reduced else "highest")
    torch.backends.cudnn.allow_tf32 = reduced


class Conv2d(nn.Conv2d):
    """Convolution with an fp32 result even under autocast, so that the residual stream after it is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


class ConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution with an fp32 result even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


class Pointwise(nn.Conv2d):
    """1×1 convolution, as a matrix product where that is faster; its result is fp32 even under autocast if `fp32`."""

    def __init__(self, inputs: int, outputs: int, *, fp32: bool = False) -> None:
        super().__init__(inputs, outputs, 1)
        self.fp32 = fp32
        self.reduced = False
        """Whether products may be of bf16 or TF32 numbers; `set_ways` says."""
        self.cast: tuple[Tensor, Tensor] | None = None
        """Weight and bias in the dtype of autocast, within `cast_once`."""

    def forward(self, x: Tensor, *, leaky: bool = False, onto: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, D, H, W): the convolution, of that LeakyReLU if `leaky`, and that added to `onto`."""
        if can_convolve(x, self.weight):
            return convolve(x, self, SLOPE if leaky else None, onto)
        if self.fp32:
            with full_precision(x):
                result = self._mix(x.to(self.weight.dtype))
        else:
            result = self._mix(x)
        result = leaky_relu(result) if leaky else result
        return result if onto is None else onto + result

    def _mix(self, x: Tensor) -> Tensor:
        if not product_is_faster(x, self):
            return super().forward(x)
        x = reduced(x)
        cast = self.cast if x.dtype != self.weight.dtype else None
        return product(x.permute(0, 2, 3, 1), self.weight, self.bias, cast).permute(0, 3, 1, 2)


def pointwise_layers(network: nn.Module) -> list[Pointwise]:
    """Those of a network whose products autocast reduces: what `cast_once` takes."""
    return [layer for layer in network.modules() if isinstance(layer, Pointwise) and not layer.fp32]


@contextmanager
def cast_once(layers: Sequence[Pointwise], x: Tensor) -> Iterator[None]:
    """Within it, and where the backward pass computes again what is within, layers share one cast of their weights.

    `x`: the network's input (B, C, H, W). All weights and biases whose layers are matrix products are cast together,
    in one operation, and none of the casts outlives the backward pass: the next forward pass sees the weights as they
    are then. Convolutions are cast once by autocast itself. Nothing is cast outside autocast, nor under ZeRO-3, which
    gathers weights layer by layer.
    """
    dtype = _autocast_dtype(x)
    if dtype is None:
        layers = ()
    chosen = [layer for layer in layers if product_is_faster(x, layer) and not hasattr(layer.weight, "ds_id")]
    with _given(_cast(chosen, dtype) if chosen else []):
        yield


Casts = Sequence[tuple[Pointwise, Tensor, Tensor]]
"""Layers, and their weights and biases in another dtype."""


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
def _given(casts: Casts) -> Iterator[None]:
    global _casts
    before, _casts = _casts, casts
    for layer, weight, bias in casts:
        vars(layer)["cast"] = weight, bias  # nn.Module's own way takes 20 times as long, and this is done often
    try:
        yield
    finally:
        for layer, *_ in casts:
            vars(layer)["cast"] = None
        _casts = before


def product_is_faster(x: Tensor, layer: Pointwise) -> bool:
    """Whether a 1×1 convolution of `x` (B, C, H, W) is faster as a matrix product; never on the plain layout.

    On CPUs oneDNN's convolutions win where rows are short, and in fp32 where MKL, which multiplies fp32 matrices, does
    not use all that the processor has (benchmarks/results/kernels.md).
    """
    if not channels_last(x) or x.device.type not in ("cpu", "cuda"):
        return False
    if x.is_cuda:
        return True
    long = min(layer.in_channels, layer.out_channels) >= _LONG_ROWS
    return long and (layer.reduced or _MKL_AT_HOME)


def channels_last(x: Tensor) -> bool:
    """Whether `x` (B, C, H, W) lies so in memory."""
    return x.is_contiguous(memory_format=torch.channels_last)


_LONG_ROWS = 192


def _mkl_at_home() -> bool:
    processor = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and processor.is_file() and "GenuineIntel" in processor.read_text()


_MKL_AT_HOME = _mkl_at_home()


def leaky_relu(x: Tensor) -> Tensor:
    """LeakyReLU that keeps its result alone for the backward pass, which the layer after it keeps anyway."""
    return _LeakyReLU.apply(x)


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


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of (…, positions, d) each; `bias` (…, positions, positions), which can be broadcast,
    is added to what the softmax takes."""
    bias = None if bias is None else bias.to(query.dtype)
    if products_are_faster(query):
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights = weights if bias is None else weights + bias
        return weights.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, bias)


def products_are_faster(query: Tensor) -> bool:
    """Whether attention is faster as matrix products: torch's kernel for bf16 on a CPU is ten times slower where there
    are few positions."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every position of (B, C, H, W); what it gives is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def down(inputs: int, outputs: int, *, kernel: int = 2, fp32: bool = False) -> nn.Conv2d:
    """Halve the resolution: (B, inputs, H, W) to (B, outputs, H/2, W/2)."""
    kind = Conv2d if fp32 else nn.Conv2d
    convolution = kind(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)
    return _variance_preserving(convolution, summands=inputs * kernel**2)


def up(inputs: int, outputs: int, *, kernel: int = 2, fp32: bool = False) -> nn.ConvTranspose2d:
    """Double the resolution: (B, inputs, H, W) to (B, outputs, 2H, 2W)."""
    kind = ConvTranspose2d if fp32 else nn.ConvTranspose2d
    convolution = kind(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)
    return _variance_preserving(convolution, summands=inputs * (kernel // 2) ** 2)


def _variance_preserving(convolution: nn.Module, summands: int) -> nn.Module:
    """torch's default weights would shrink a signal 30-fold on its way through four of these, and y to nothing."""
    nn.init.normal_(convolution.weight, std=summands**-0.5)
    nn.init.zeros_(convolution.bias)
    return convolution


class PartialConvolution(nn.Conv2d):
    """3×3 convolution of the first channels; the rest pass as they are."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__(channels // ratio, channels // ratio, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        convolved, untouched = x.split([self.in_channels, x.shape[1] - self.in_channels], dim=1)
        return torch.cat([super().forward(convolved), untouched], dim=1)


class Block(nn.Module, ABC):
    """A residual block, (B, C, H, W) to the same shape, dtype and memory format: what a network has most of.

    It is one region to the compiler, and to the backward pass, which may compute it again.
    """

    widest: int
    """Channels of the widest activation within."""
    grid = 1
    """Where a part of an input is cut out, it begins and ends at multiples of so many positions, or at the border."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False
        """Whether the backward pass computes again what is within, instead of keeping it; `set_ways` says."""

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self.compute, x) if self.recompute else self.compute(x)

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """`forward`, everything within kept for the backward pass."""

    @abstractmethod
    def spoilt(self, depth: int) -> int:
        """How many positions beside a cut differ from what they were in one piece, if `depth` of the input's do."""


class ResidualBlock(Block):
    """x + reduce(LeakyReLU(expand(spatial(x)))), with 1×1 convolutions around the non-linearity."""

    def __init__(self, spatial: nn.Conv2d, channels: int, expansion: int) -> None:
        super().__init__()
        self.spatial = spatial
        self.expand = Pointwise(channels, expansion * channels)
        self.reduce = Pointwise(expansion * channels, channels)
        self.widest = expansion * channels

    def compute(self, x: Tensor) -> Tensor:
        return self.reduce(self.expand(self.spatial(x), leaky=True), onto=x)

    def spoilt(self, depth: int) -> int:
        return depth + self.spatial.kernel_size[0] // 2


def set_ways(network: nn.Module, precision: Precision, recompute: Callable[[str], bool]) -> None:
    """Tell the layers of a network their products' precision, and its residual blocks, by name, whether the backward
    pass computes again what is within."""
    for name, module in network.named_modules():
        if isinstance(module, Pointwise):
            module.reduced = precision == Precision.bf16
        elif isinstance(module, Block):
            module.recompute = recompute(name)


def recomputed(function, *inputs: Tensor):
    """The function's result, with what is within computed again in the backward pass instead of being kept."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    casts = _casts
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _given(casts)),
    )


def partial_block(channels: int, ratio: int, expansion: int) -> ResidualBlock:
    """PConvRB(C, r, m): the block of the transforms."""
    return ResidualBlock(PartialConvolution(channels, ratio), channels, expansion)


def depthwise_block(channels: int) -> ResidualBlock:
    """DWConvRB(C): the block of the context model."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    return ResidualBlock(depthwise, channels, 2)


class ChannelScale(nn.Module):
    """A learned factor per channel, and per level of a variable-rate model.

    A module of its own so that ZeRO-3 gathers it where it is read.
    """

    def __init__(self, channels: int, levels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(levels, channels, 1, 1))

    def forward(self, x: Tensor, mix: Tensor | None = None) -> Tensor:
        """(B, C, H, W); `mix` (B, levels) where there are several levels (`variable_rate.mix_of`)."""
        return x * (self.weight if mix is None else mixed(self.weight, mix))
