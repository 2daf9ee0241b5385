"""What `fake_cuda` finds in a training step on fake CUDA tensors; importable only after its guard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcm_scale.compute.tracker import Launches
from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Config
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.arithmetic import efficient_attention
from hpcm_scale.model.context import WindowFusion
from hpcm_scale.model.hpcm import Noise
from hpcm_scale.model.layers import Block, Pointwise
from hpcm_scale.training.task import Task, task_of

CROPS = 4
CUDA = torch.device("cuda", 0)
_NETWORKS = ("g_a", "h_a", "h_s", "g_s")


def step(overrides: list[str]) -> dict[str, Any]:
    """Forward and backward of a step of 4 crops of 256², bf16 unless the overrides say otherwise.

    launches: operations by kind, forward and in all (the optimizer's left out). copies: tensors that are copied
    between host and device within the step, by operation. plain: layers that were given, or gave, another layout than
    channels-last. not_fp32: places that must be fp32 and were not. reduced: dtypes of what other layers gave.
    gradients: of the parameters, device and dtype. parameters: of these, those without a gradient.
    """
    config = compose(["engine.precision=bf16", *overrides])
    names = config.machine.receivers if config.objective.target.value == "vision_model" else []
    receivers = {name: receiver(name) for name in names}
    with torch.device("meta"):
        task = task_of(config, None, receivers)
    # As torch chooses on a GPU; a CPU build would take attention apart.
    nn.functional.scaled_dot_product_attention = efficient_attention
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in {task.module, task.codec, *receivers.values()}:
            _to_fake_cuda(module)
        return _step(config, task)


def _step(config: Config, task: Task) -> dict[str, Any]:
    images = torch.empty(CROPS, 3, 256, 256, device=CUDA).to(memory_format=torch.channels_last)
    noise = Noise(*(torch.empty(CROPS, *shape, device=CUDA) for shape in task.codec.latent_shapes(256, 256)))
    level = torch.empty(CROPS, device=CUDA) if config.model.rate.levels > 1 else None
    launches, copies, seen = Launches(), _Copies(), _Seen(task)
    with launches, copies, seen.watching():
        result = task.objective(images, task.forward(task.module, images, noise, level), level)
        forward = Counter(launches.by_kind)
        result.mean().loss.backward()
    seen.record("loss", *result)
    trained = {name: p.grad for name, p in task.module.named_parameters() if p.requires_grad}
    return {
        "launches": {"forward": forward, "all": launches.by_kind},
        "copies": copies.found,
        "plain": sorted(seen.plain),
        "not_fp32": sorted(seen.not_fp32),
        "places": sorted(seen.places),
        "reduced": sorted(seen.reduced),
        "gradients": sorted({f"{g.device} {g.dtype}" for g in trained.values() if g is not None}),
        "without": sorted(name for name, gradient in trained.items() if gradient is None),
    }


def _to_fake_cuda(module: nn.Module) -> None:
    """Have a module's parameters and buffers be fake tensors on the GPU, of the same shapes, strides and dtypes."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)


class _Copies(TorchDispatchMode):
    """Operations from tensors of one device to those of another: on a GPU the host would wait for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)}
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and len(devices) > 1:
            self.found[func._overloadpacket.__name__] += 1
        return result


class _Seen:
    """What goes in and out of layers in a step."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.plain: set[str] = set()
        self.places: set[str] = set()
        self.not_fp32: set[str] = set()
        self.reduced: set[str] = set()

    def record(self, place: str, *tensors: Tensor) -> None:
        self.places.add(place)
        if {(tensor.dtype, tensor.device) for tensor in tensors} != {(torch.float32, CUDA)}:
            self.not_fp32.add(place)

    @contextmanager
    def watching(self) -> Iterator[None]:
        codec, hooks = self._task.codec, []
        for name, module in self._task.module.named_modules():
            if isinstance(module, (Block, WindowFusion, Pointwise)):
                hooks.append(module.register_forward_hook(self._layout_of(name)))
            if isinstance(module, Pointwise) and not module.fp32 and not name.endswith(".reduce"):
                hooks.append(module.register_forward_hook(self._reduced))
        places = [*_NETWORKS, "rate", "hyper_prior", *(["context.gains"] if codec.context.gains else [])]
        hooks += [codec.get_submodule(name).register_forward_hook(self._fp32(name)) for name in places]
        traverse = codec.context.traverse

        def watched(hyper: Tensor, code: Any, mix: Tensor | None) -> tuple[Tensor, Tensor]:
            def watched_code(place: Any, scales: Tensor, means: Tensor) -> Tensor:
                coded = code(place, scales, means)
                self.record("scales, means and coded", scales, means, coded)
                return coded

            y_hat, parameters = traverse(hyper, watched_code, mix)
            self.record("y_hat and parameters", y_hat, parameters)
            return y_hat, parameters

        codec.context.traverse = watched
        try:
            yield
        finally:
            codec.context.traverse = traverse
            for hook in hooks:
                hook.remove()

    def _layout_of(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for tensor in (*inputs, output):
                if not tensor.is_contiguous(memory_format=torch.channels_last) or tensor.device != CUDA:
                    self.plain.add(name)

        return hook

    def _reduced(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.reduced.add(str(output.dtype))

    def _fp32(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            given = () if name in _NETWORKS else inputs
            self.record(name, *(leaf for leaf in tree_leaves((given, output)) if isinstance(leaf, Tensor)))

        return hook
