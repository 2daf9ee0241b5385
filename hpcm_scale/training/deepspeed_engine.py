"""DeepSpeed: ZeRO stages 0 to 3, with or without offload, on clusters."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from hpcm_scale.config.deepspeed import deepspeed_dictionary
from hpcm_scale.config.schema import Config
from hpcm_scale.training.engine import Engine, Stepped, poisoned
from hpcm_scale.training.optimizer import clip_and_guard, create_optimizer, set_learning_rate

_TAG = "engine"


class DeepSpeedEngine(Engine):
    """See `Engine`."""

    def __init__(self, config: Config) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # Its shared-memory all-reduce for CPUs takes minutes to compile, and a build cut short hangs the next run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        self._config = config
        self.rank, self.world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        accelerator = get_accelerator()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(accelerator.device_name(local_rank))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def prepare(self, model: nn.Module) -> None:
        self._optimizer = create_optimizer(model.parameters(), self._config.train)
        dictionary = deepspeed_dictionary(self._config, self.world_size)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=dictionary)
        self.module = self._engine

    def backward(self, loss: Tensor) -> None:
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.backward(poisoned(loss))
        if not boundary:
            self._engine.step()  # only counts the micro-batch

    def step(self, learning_rate: float) -> Stepped:
        set_learning_rate(self._engine.optimizer, learning_rate)
        if self._config.engine.zero_stage == 0:
            norm = float(clip_and_guard(self._optimizer, self._config.train.clip_norm))
        before = self._engine.skipped_steps
        self._engine.step()
        if self._config.engine.zero_stage > 0:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        return Stepped(norm, self._engine.skipped_steps > before)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag=_TAG)

    def reduce(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        deepspeed.comm.all_reduce(values)
        return values

    def weights(self) -> dict[str, Tensor] | None:
        state = {}
        for name, parameter in self._engine.module.named_parameters():
            # One at a time: a sharded model need not fit on one device.
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._config.engine.zero_stage == 3):
                if self.rank == 0:
                    state[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        return state if self.rank == 0 else None

    def close(self) -> None:
        self._engine.destroy()
        del self._engine, self.module, self._optimizer
