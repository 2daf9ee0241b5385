"""DeepSpeed: ZeRO stages 0 to 3, with or without offload, on clusters."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hpcm_scale.config.deepspeed import deepspeed_dictionary
from hpcm_scale.config.schema import Config
from hpcm_scale.errors import UserError
from hpcm_scale.training.engines.base import Engine, Stepped, poisoned
from hpcm_scale.training.optimizer import clip, create_optimizer, guard, set_learning_rate, whole_pieces
from hpcm_scale.training.state_shards import Piece

OF_BARRIERS = r"barrier\(\): using the device under current context"
"""How a warning of torch begins."""


class DeepSpeedEngine(Engine):
    """See `Engine`."""

    def __init__(self, config: Config) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # Said of stage 3's barriers where one process on a GPU is a group without a device of its own.
        warnings.filterwarnings("ignore", OF_BARRIERS, UserWarning)
        # Which of its compiled operators could be built here; asked for them, it would look for compilers and warn of
        # each that it misses. It wants to know of a shared-memory all-reduce for CPUs alone, which takes minutes to
        # compile, and a build cut short hangs the next run. An operator that is used is built in any case, or fails.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(verbose=False)
        self._config = config
        self._stage = config.engine.zero_stage
        self.replicated, self.sharded = self._stage == 0, self._stage == 3
        self.rank, self.world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        accelerator = get_accelerator()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(accelerator.device_name(local_rank))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @contextmanager
    def building(self) -> Iterator[None]:
        """With stage 3 every layer is sharded when the next one is made, so that no process holds the whole model."""
        if self._stage < 3:
            yield
            return
        dictionary = deepspeed_dictionary(self._config, self.world_size)
        zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=dictionary)
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
        model.to(self.device)  # where it is sharded already, DeepSpeed leaves buffers where they are
        self._optimizer = create_optimizer(model.parameters(), self._config.train)
        groups = enumerate(self._optimizer.param_groups)
        self._group_of = {parameter: number for number, group in groups for parameter in group["params"]}
        dictionary = deepspeed_dictionary(self._config, self.world_size)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=dictionary)
        self.module = self._engine
        self._check_pieces()

    def backward(self, loss: Tensor) -> None:
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.backward(poisoned(loss))
        if not boundary:
            self._engine.step()  # only counts the micro-batch

    def clip(self) -> Tensor:
        if self._stage > 0:
            return torch.full((), torch.nan, device=self.device)
        return clip(self._optimizer, self._config.train.clip_norm)

    def step(self, learning_rate: float, norm: float, leave_out: bool = False) -> Stepped:
        set_learning_rate(self._engine.optimizer, learning_rate)
        guard(self._optimizer, norm if self._stage == 0 else 0.0, leave_out)
        before = self._engine.skipped_steps
        self._engine.step()
        if self._stage > 0:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        return Stepped(norm, leave_out or self._engine.skipped_steps > before)

    def pieces(self) -> list[Piece]:
        if self._stage == 0:
            return whole_pieces(self._optimizer, self._engine.module.named_parameters())
        held = self._held_by_stage_3 if self._stage == 3 else self._held_by_stages_1_and_2
        return [
            piece
            for name, parameter in self._engine.module.named_parameters()
            for part in held(parameter)
            for piece in self._optimizer.pieces(name, *part)
        ]

    def _held_by_stages_1_and_2(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor, int, int]]:
        """Start in the flattened parameter, the flat tensor that is optimized, offset in it, number of elements."""
        group = self._group_of[parameter]
        held = self._engine.optimizer.single_partition_of_fp32_groups[group]
        # The parameters of a group lie one after the other in one tensor (DeepSpeed's own map of it is wrong where
        # round_robin_gradients changes their order), of which every process optimizes a part.
        begin = parameter.storage_offset() - self.rank * held.numel()
        first, last = max(begin, 0), min(begin + parameter.numel(), held.numel())
        if first < last:
            yield first - begin, held, first, last - first

    def _held_by_stage_3(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor, int, int]]:
        """The same of stage 3, which cuts every parameter into as many parts as there are processes."""
        zero = self._engine.optimizer
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = self.rank * parameter.ds_tensor.ds_numel
        size = min(int(size), parameter.ds_numel - start)  # the last part is padded
        if size > 0:
            yield start, zero.fp32_partitioned_groups_flat[group], int(offset), size

    def _check_pieces(self) -> None:
        """Raises UserError, on all processes, unless the pieces are the model: what DeepSpeed moves is not for ever."""
        right, held = True, 0
        parameters = dict(self._engine.module.named_parameters())
        for kind, name, start, values in self.pieces():
            if kind == "weight":
                parameter, held = parameters[name], held + values.numel()
                begin = self.rank * parameter.ds_tensor.ds_numel if self._stage == 3 else 0
                whole = (parameter.ds_tensor if self._stage == 3 else parameter).detach().view(-1)
                part = whole[start - begin :][: values.numel()]
                right = right and torch.equal(part.to(values.device), values)
        total = sum(parameter.ds_numel if self._stage == 3 else parameter.numel() for parameter in parameters.values())
        wrong, held = self.reduce(torch.tensor([not right, held], dtype=torch.float64)).tolist()
        if wrong or held != total * (self.world_size if self.replicated else 1):
            raise UserError(
                f"with engine.options={self._config.engine.options} DeepSpeed lays out the weights in a way that "
                "checkpoints do not follow; leave out what has to do with it"
            )

    def take_over(self, updates: int) -> None:
        self._optimizer.set_updates(updates)
        zero = self._engine.optimizer
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            zero.checkpoint_event_prologue()
            for flat, held in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
                flat.data.copy_(held.data)
            zero.checkpoint_event_epilogue()  # gathers anew the small parameters that every process keeps whole

    @property
    def updates(self) -> int:
        return self._optimizer.updates

    def reduce(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        deepspeed.comm.all_reduce(values)
        return values

    def weights(self) -> dict[str, Tensor] | None:
        state = {}
        for name, parameter in self._engine.module.named_parameters():
            # One at a time: a sharded model need not fit on one device.
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                if self.rank == 0:
                    state[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        return state if self.rank == 0 else None

    def close(self) -> None:
        self._engine.destroy()
        del self._engine, self.module, self._optimizer
