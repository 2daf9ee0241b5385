"""A training step without a device: memory, launches and ZeRO-3's gathering are counted on the meta device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hpcm_scale.compute.tracker import Launches, PeakMemory
from hpcm_scale.config.schema import Checkpointing, ModelConfig, Precision
from hpcm_scale.model import arithmetic, layers
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.objective import rate_distortion_loss

# What ZeRO-3 gathers of the weights, and keeps, in one forward and backward pass.
#
# Follows DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py) once it knows the order of the layers, which
# is from the third step on; two real processes send as much, within 1.5 % (tests/training).


class Use(NamedTuple):
    """One use of a layer that has weights of its own."""

    backward: bool
    weights: tuple[tuple[str, int], ...]
    """Names, and numbers of elements."""


class Limits(NamedTuple):
    """DeepSpeed's settings, all in elements."""

    kept: int
    """Every process keeps tensors up to this size whole (stage3_param_persistence_threshold)."""
    reuse: int
    """A layer stays that is used again before so many others (stage3_max_reuse_distance)."""
    live: int
    """Nothing is fetched ahead beyond so many (stage3_max_live_parameters)."""
    ahead: int
    """Fetched ahead at a time (stage3_prefetch_bucket_size)."""


class Gathered(NamedTuple):
    """Elements per process, whole tensors."""

    elements: int
    """Gathered in all during one forward and backward pass; without those that are always there."""
    most: int
    """There at a time; without those that are always there."""
    always: int
    """Kept whole; gathered once per optimizer step."""


def gather(uses: list[Use], limits: Limits) -> Gathered:
    """Walk through the layers in the order in which they are used, fetching and giving back as DeepSpeed does."""
    sizes = {name: size for use in uses for name, size in use.weights}
    always = {name for name, size in sizes.items() if size <= limits.kept}
    here, elements, live, most = set(always), 0, 0, 0
    queue = deque((name, index) for index, use in enumerate(uses) for name, _ in use.weights)
    fetched_for = dict.fromkeys(sizes, -1)  # the last use that a tensor was fetched for, or found there
    since_forward: dict[tuple, int] = {}
    for index, use in enumerate(uses):
        names = [name for name, _ in use.weights]
        missing = {name for name in names if name not in here}
        here |= missing
        passed = {name for name in names if fetched_for[name] < index}
        while queue and passed:
            name, at = queue.popleft()
            fetched_for[name] = at
            passed.discard(name)
        room = min(limits.live - live - _count(missing, sizes), limits.ahead)
        early: set[str] = set()
        while queue and _count(early, sizes) < room:
            name, at = queue.popleft()
            fetched_for[name] = max(fetched_for[name], at)
            if name not in here:
                early.add(name)
        here |= early
        come = _count(missing | early, sizes)
        elements, live = elements + come, live + come
        most = max(most, live)
        # After the backward pass of a layer that is used several times it gives back only once, until its next forward.
        since_forward[use.weights] = since_forward.get(use.weights, 0) + 1 if use.backward else 0
        if since_forward[use.weights] <= 1:
            going = {name for name in names if name not in always and fetched_for[name] <= index + 1}
            going -= _used_soon(uses, index + 1, limits.reuse)
            here -= going
            live -= _count(going, sizes)
    return Gathered(elements, most, _count(always, sizes))


def _count(names: set[str], sizes: dict[str, int]) -> int:
    return sum(sizes[name] for name in names)


def _used_soon(uses: list[Use], start: int, distance: int) -> set[str]:
    soon: set[str] = set()
    passed = 0
    for use in uses[start:]:
        if passed >= distance:
            break
        soon.update(name for name, _ in use.weights)
        passed += sum(size for _, size in use.weights)
    return soon


# The ways that layers take on a GPU, for tensors that are on none: to count there what a GPU would do.


@contextmanager
def gpu_ways() -> Iterator[None]:
    """Within it layers choose what they choose on an NVIDIA GPU, as far as it is theirs to choose; for fake tensors."""
    ways = [
        patch.object(layers, "product_is_faster", lambda x, layer: layers.channels_last(x)),
        patch.object(layers, "products_are_faster", lambda query: False),
        patch.object(arithmetic, "sums_are_kept", lambda x: True),
        patch.object(F, "scaled_dot_product_attention", attention),
    ]
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(way)
        yield


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention as one operation, as torch computes it on a GPU; on a CPU fake tensors would take it apart."""
    bias = None if bias is None else bias.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]


# A training step on fake tensors: the memory it would take, what it would launch, and in which order it would read the
# weights.


class Rehearsal(NamedTuple):
    """What a forward and backward pass over one micro-batch would do."""

    activations: int
    """Most bytes in use at a time, without weights and their gradients: what is kept for the backward pass, and at
    the peak also what is being computed, or computed again."""
    uses: list[Use]
    """In their order: forward, then backward, where layers that are computed again are used forward once more."""
    launches: int
    """Operations, as `Launches` counts them; those of the optimizer and of communication come on top."""


def rehearse(
    config: ModelConfig, precision: Precision, checkpoint: Checkpointing, side: int, images: int, gpu: bool = False
) -> Rehearsal:
    """Rehearse a step over side×side crops, eager, channels last; takes seconds and no memory.

    `gpu`: as on a GPU, whose layers take other ways to the same result (`model.gpu_ways`); else as on this CPU.
    """
    # Fake tensors, unlike those on `meta`, know autocast.
    with FakeTensorMode(), gpu_ways() if gpu else nullcontext():
        model = HPCM(config, precision=precision, checkpoint=checkpoint)
        x = torch.empty(images, 3, side, side).to(memory_format=torch.channels_last)
        noise = Noise(*(torch.empty(images, *shape) for shape in model.latent_shapes(side, side)))
        uses = _record_uses(model)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with PeakMemory() as memory, Launches() as launches:
            coded = model(x, noise)
            rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).loss.mean().backward()
    return Rehearsal(memory.peak, uses, launches.total)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # counted apart, and given away at once with ZeRO-2 and ZeRO-3


def _record_uses(model: nn.Module) -> list[Use]:
    """A list that grows with every use of a layer that has weights of its own."""
    uses: list[Use] = []

    def follow(layer: nn.Module, weights: tuple[tuple[str, int], ...]) -> None:
        def forward(layer: nn.Module, inputs: object) -> None:  # before it: recomputation leaves its last layer early
            uses.append(Use(False, weights))

        def backward(layer: nn.Module, inputs: object, output: object) -> None:
            first = tree_leaves(output)[0]
            if first.requires_grad:
                first.register_hook(lambda gradient: uses.append(Use(True, weights)))

        layer.register_forward_pre_hook(forward)
        layer.register_forward_hook(backward)

    for prefix, layer in model.named_modules():
        weights = tuple((f"{prefix}.{name}", value.numel()) for name, value in layer.named_parameters(recurse=False))
        if weights:
            follow(layer, weights)
    return uses
