"""The DeepSpeed engine: ZeRO stages 0 to 3, with or without offload."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hpcm_scale.config.schema import EngineConfig, OptimizerConfig
from hpcm_scale.errors import UserError
from hpcm_scale.training.engines.base import Engine, StepResult, propagate_non_finite
from hpcm_scale.training.matrix_optimizers import Layout
from hpcm_scale.training.optimizer import GuardedOptimizer, clip, guard, set_learning_rate

BARRIER_WARNING = r"barrier\(\): using the device under current context"
"""Start of a warning of torch."""


class DeepSpeedEngine(Engine):
    """See `Engine`."""

    _engine: Any
    """DeepSpeed's; its optimizer is of another class in each stage."""

    def __init__(
        self, engine: EngineConfig, optimizer: OptimizerConfig, dictionary: dict[str, Any], clip_norm: float
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # For ZeRO-3's barriers on a single GPU, whose process group has no device id.
        warnings.filterwarnings("ignore", BARRIER_WARNING, UserWarning)
        # DeepSpeed would probe which operators it can compile, warn about each missing compiler, and compile a
        # shared-memory all-reduce for CPUs, which takes minutes; an interrupted build hangs the next run. Operators in
        # use are compiled without the probe.
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
        deepspeed.init_distributed(verbose=False)
        self._config, self._options, self._dictionary = optimizer, engine.options, dictionary
        self._clip_norm = clip_norm
        self._stage = engine.zero_stage
        self.replicated, self.sharded = self._stage == 0, self._stage == 3
        self.rank, self.world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        accelerator: Any = get_accelerator()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(accelerator.device_name(local_rank))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @contextmanager
    def building(self) -> Iterator[None]:
        """With ZeRO-3 every layer is sharded when the next one is created, so that no rank holds the whole model."""
        if self._stage < 3:
            yield
            return
        zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=self._dictionary)
        layer, parameters = None, []

        def shard() -> None:
            zero._convert_to_zero_parameters(parameters)
            parameters.clear()

        def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            nonlocal layer
            if parameter is None or parameter.is_meta:
                return
            if module is not layer:
                shard()
            layer = module
            parameters.append(parameter)

        hook = register_module_parameter_registration_hook(register)
        try:
            yield
            shard()
        finally:
            hook.remove()

    def prepare(self, model: nn.Module) -> None:
        model.to(self.device)  # also moves the buffers, which ZeRO-3's sharding does not
        self._optimizer = GuardedOptimizer(model, self._config)
        groups = enumerate(self._optimizer.param_groups)
        group_of = {parameter: number for number, group in groups for parameter in group["params"]}
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=self._dictionary)
        self.module = self._engine
        if self._stage == 0:
            self._optimizer.place()
        else:
            layout = self._layout_of_stage_3 if self._stage == 3 else self._layout_of_stages_1_and_2
            layouts = {name: layout(each, group_of[each]) for name, each in model.named_parameters()}
            self._optimizer.place(layouts, self.rank, self._exchange)
        self._check_state_shards()

    def backward(self, loss: Tensor) -> None:
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.backward(propagate_non_finite(loss))
        if not boundary:
            self._engine.step()  # only counts the micro-batch

    def clip(self) -> Tensor:
        if self._stage > 0:
            return torch.full((), torch.nan, device=self.device)
        return clip(self._optimizer, self._clip_norm)

    def step(self, learning_rate: float, norm: float, skip: bool = False) -> StepResult:
        set_learning_rate(self._engine.optimizer, learning_rate)
        guard(self._optimizer, norm if self._stage == 0 else 0.0, skip)
        before = self._engine.skipped_steps
        self._engine.step()
        if self._stage > 0:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        return StepResult(norm, skip or self._engine.skipped_steps > before)

    def _layout_of_stages_1_and_2(self, parameter: nn.Parameter, group: int) -> Layout:
        held = self._engine.optimizer.single_partition_of_fp32_groups[group]
        # The parameters of a group are contiguous in one tensor, of which every rank optimizes a part. DeepSpeed's own
        # map of it is wrong if round_robin_gradients changes their order.
        begins = [rank * held.numel() - parameter.storage_offset() for rank in range(self.world_size + 1)]
        cuts = tuple(min(max(begin, 0), parameter.numel()) for begin in begins)
        return Layout(held, max(-begins[self.rank], 0), cuts)

    def _layout_of_stage_3(self, parameter: Any, _: int) -> Layout:
        """Every parameter is split into one part per rank."""
        zero = self._engine.optimizer
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        begins = [rank * parameter.ds_tensor.ds_numel for rank in range(self.world_size + 1)]
        cuts = tuple(min(begin, parameter.ds_numel) for begin in begins)  # the last part is padded
        return Layout(zero.fp32_partitioned_groups_flat[group], int(offset), cuts)

    def _exchange(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """See `matrix_optimizers.Exchange`; offloaded tensors are exchanged on the device."""
        sent = torch.cat(parts)
        received = torch.empty(sum(sizes), device=self.device)
        deepspeed.comm.all_to_all_single(received, sent.to(self.device), sizes, [len(part) for part in parts])
        return [*received.to(sent.device).split(sizes)]

    def _check_state_shards(self) -> None:
        """Raise UserError on all ranks unless the shards are the model, since DeepSpeed's layout may change."""
        matches, held = True, 0
        parameters = dict(self._engine.module.named_parameters())
        for kind, name, start, values in self.state_shards():
            if kind == "weight":
                parameter, held = parameters[name], held + values.numel()
                begin = self.rank * parameter.ds_tensor.ds_numel if self._stage == 3 else 0
                whole = (parameter.ds_tensor if self._stage == 3 else parameter).detach().view(-1)
                part = whole[start - begin :][: values.numel()]
                matches = matches and torch.equal(part.to(values.device), values)
        total = sum(parameter.ds_numel if self._stage == 3 else parameter.numel() for parameter in parameters.values())
        mismatches, held = self.reduce(torch.tensor([not matches, held], dtype=torch.float64)).tolist()
        if mismatches or held != total * (self.world_size if self.replicated else 1):
            raise UserError(
                "unknown-weight-layout",
                "engine.options",
                f"with engine.options={self._options} DeepSpeed lays out the weights in a way that checkpoints do not "
                "support; remove the options that affect it",
            )

    def load_master_weights(self, updates: int) -> None:
        self._optimizer.set_updates(updates)
        zero = self._engine.optimizer
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            zero.checkpoint_event_prologue()
            for flat, held in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
                flat.data.copy_(held.data)
            zero.checkpoint_event_epilogue()  # gathers the small parameters that every rank keeps whole

    def reduce(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        deepspeed.comm.all_reduce(values)
        return values

    def weights(self) -> dict[str, Tensor] | None:
        state = {}
        for name, parameter in self._engine.module.named_parameters():
            # One at a time, since a sharded model may not fit on one device.
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                if self.rank == 0:
                    state[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        return state if self.rank == 0 else None

    def close(self) -> None:
        self._engine.destroy()
        del self._engine, self.module, self._optimizer
