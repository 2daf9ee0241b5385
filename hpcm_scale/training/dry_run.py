"""A training step without a device: memory, launches and the gathers of ZeRO-3, counted on fake tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hpcm_scale.compute.tracker import Launches, PeakMemory
from hpcm_scale.config.schema import Checkpointing, ModelConfig, Precision
from hpcm_scale.model.arithmetic import Kernels, use_kernels
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.objective import rate_distortion_loss

# ZeRO-3 gather model: which weights one forward and backward pass gathers and keeps.
#
# Follows DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py) from the third step on, when it has recorded
# the order of the layers; agrees with the traffic of two real processes within 1.5 % (tests/training).


class LayerUse(NamedTuple):
    """One use of a layer with weights."""

    backward: bool
    weights: tuple[tuple[str, int], ...]
    """Names and numbers of elements."""


class GatherCost(NamedTuple):
    """Elements of whole tensors, per process."""

    elements: int
    """Gathered during one forward and backward pass, without persistent ones."""
    most: int
    """Peak of gathered elements, without persistent ones."""
    always: int
    """Persistent: not sharded, gathered once per optimizer step."""


def gather_cost(uses: list[LayerUse], zero: Mapping[str, Any]) -> GatherCost:
    """Simulate DeepSpeed's fetches and releases along the uses of the layers in one forward and backward pass.

    `zero`: the limits, in elements, as in DeepSpeed's `zero_optimization`. Tensors up to
    stage3_param_persistence_threshold are not sharded; a layer whose next use is nearer than stage3_max_reuse_distance
    is kept; at most stage3_prefetch_bucket_size are prefetched at a time, and none beyond stage3_max_live_parameters.
    """
    sizes = {name: size for use in uses for name, size in use.weights}
    always = {name for name, size in sizes.items() if size <= zero["stage3_param_persistence_threshold"]}
    here, elements, live, most = set(always), 0, 0, 0
    queue = deque((name, index) for index, use in enumerate(uses) for name, _ in use.weights)
    fetched_for = dict.fromkeys(sizes, -1)  # last use that a tensor was fetched for, or present at
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
        room = min(
            zero["stage3_max_live_parameters"] - live - _count(missing, sizes), zero["stage3_prefetch_bucket_size"]
        )
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
        # DeepSpeed releases a layer only once per forward pass, after its first backward pass.
        since_forward[use.weights] = since_forward.get(use.weights, 0) + 1 if use.backward else 0
        if since_forward[use.weights] <= 1:
            going = {name for name in names if name not in always and fetched_for[name] <= index + 1}
            going -= _used_soon(uses, index + 1, zero["stage3_max_reuse_distance"])
            here -= going
            live -= _count(going, sizes)
    return GatherCost(elements, most, _count(always, sizes))


def _count(names: set[str], sizes: dict[str, int]) -> int:
    return sum(sizes[name] for name in names)


def _used_soon(uses: list[LayerUse], start: int, distance: int) -> set[str]:
    soon: set[str] = set()
    passed = 0
    for use in uses[start:]:
        if passed >= distance:
            break
        soon.update(name for name, _ in use.weights)
        passed += sum(size for _, size in use.weights)
    return soon


# Dry run of a training step on fake tensors: memory, launches and the order in which weights are read.


class DryRun(NamedTuple):
    """Needs of a forward and backward pass over one micro-batch."""

    activations: int
    """Peak bytes without weights and their gradients: saved for the backward pass, and temporary at the peak."""
    uses: list[LayerUse]
    """In order, forward and backward; recomputed layers have another forward use in the backward pass."""
    launches: int
    """Operations as `Launches` counts them, without optimizer and communication."""


def dry_run(
    config: ModelConfig, precision: Precision, checkpoint: Checkpointing, side: int, images: int, gpu: bool = False
) -> DryRun:
    """Dry run of an eager, channels-last step over `images` crops of side×side pixels; takes seconds and no memory.

    `gpu`: with the kernels of a GPU (`Kernels.cuda`), else with those of this CPU.
    """
    # Fake tensors, unlike those on `meta`, support autocast.
    with FakeTensorMode(), use_kernels(Kernels.cuda) if gpu else nullcontext():
        model = HPCM(config, precision=precision, activation_checkpointing=checkpoint)
        x = torch.empty(images, 3, side, side).to(memory_format=torch.channels_last)
        noise = Noise(*(torch.empty(images, *shape) for shape in model.latent_shapes(side, side)))
        uses = _record_uses(model)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with PeakMemory() as memory, Launches() as launches:
            coded = model(x, noise)
            rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).loss.mean().backward()
    return DryRun(memory.peak, uses, launches.by_kind.total())


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # counted separately, and released at once with ZeRO-2 and ZeRO-3


def _record_uses(model: nn.Module) -> list[LayerUse]:
    """A list that grows with every use of a layer with weights."""
    uses: list[LayerUse] = []

    def follow(layer: nn.Module, weights: tuple[tuple[str, int], ...]) -> None:
        def forward(layer: nn.Module, inputs: object) -> None:  # a pre-hook: recomputation stops within its last layer
            uses.append(LayerUse(False, weights))

        def backward(layer: nn.Module, inputs: object, output: object) -> None:
            first = tree_leaves(output)[0]
            if first.requires_grad:
                first.register_hook(lambda gradient: uses.append(LayerUse(True, weights)))

        layer.register_forward_pre_hook(forward)
        layer.register_forward_hook(backward)

    for prefix, layer in model.named_modules():
        weights = tuple((f"{prefix}.{name}", value.numel()) for name, value in layer.named_parameters(recurse=False))
        if weights:
            follow(layer, weights)
    return uses
