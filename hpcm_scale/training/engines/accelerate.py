"""The accelerate engine: one device, or DistributedDataParallel on several."""

from __future__ import annotations

import warnings

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from hpcm_scale.config.schema import OptimizerConfig
from hpcm_scale.devices import CPU, device_kind
from hpcm_scale.training.engines.base import Engine, StepResult, propagate_non_finite
from hpcm_scale.training.optimizer import clip, create_optimizer, guard, set_learning_rate


class AccelerateEngine(Engine):
    """See `Engine`."""

    replicated = True

    def __init__(self, optimizer: OptimizerConfig, accumulation: int, clip_norm: float) -> None:
        self._config, self._clip_norm = optimizer, clip_norm
        # The buffers are constants.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset", UserWarning)
        threads = torch.get_num_threads()
        self._accelerator = Accelerator(cpu=device_kind() == CPU, mixed_precision="no", kwargs_handlers=[ddp])
        torch.set_num_threads(threads)  # accelerate sets that of all cores under launchers other than its own
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device
        self._rounds = accumulation
        self._done = 0  # of these micro-batches

    def prepare(self, model: nn.Module) -> None:
        # For kernels of one channel, whose strides are irrelevant.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        # Older versions of torch, and accelerate, lack its successor.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        self._model = model.to(self.device)
        self.module = self._accelerator.prepare_model(self._model)
        self._optimizer = create_optimizer(self._model, self._config)
        self._sync_gradients_in_last_round()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(propagate_non_finite(loss) / self._rounds)
        self._done += 1
        self._sync_gradients_in_last_round()

    def _sync_gradients_in_last_round(self) -> None:
        """Have DDP all-reduce gradients only for the last micro-batch; DDP reads this before each forward pass."""
        self.module.require_backward_grad_sync = self._done + 1 == self._rounds  # pyright: ignore[reportArgumentType]

    def clip(self) -> Tensor:
        return clip(self._optimizer, self._clip_norm)

    def step(self, learning_rate: float, norm: float, skip: bool = False) -> StepResult:
        set_learning_rate(self._optimizer, learning_rate)
        guard(self._optimizer, norm, skip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done = 0
        self._sync_gradients_in_last_round()
        return StepResult(norm, self._optimizer.overflow)

    def load_master_weights(self, updates: int) -> None:
        self._optimizer.set_updates(updates)

    def reduce(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values.to(self.device, copy=True), reduction="sum")  # pyright: ignore[reportReturnType]

    def weights(self) -> dict[str, Tensor] | None:
        if self.rank != 0:
            return None
        return {name: tensor.detach().cpu().clone() for name, tensor in self._model.state_dict().items()}

    def close(self) -> None:
        self._accelerator.free_memory()
        del self.module, self._model, self._optimizer
