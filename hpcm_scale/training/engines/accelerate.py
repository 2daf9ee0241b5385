"""accelerate: one device, or data parallel on several; for laptops and for debugging."""

from __future__ import annotations

import warnings

from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from hpcm_scale.config.checks import accumulation
from hpcm_scale.config.schema import Config
from hpcm_scale.devices import CPU, device_kind
from hpcm_scale.training.engines.base import Engine, Stepped, poisoned
from hpcm_scale.training.optimizer import clip, create_optimizer, guard, set_learning_rate, whole_pieces
from hpcm_scale.training.state_shards import Piece


class AccelerateEngine(Engine):
    """See `Engine`."""

    replicated = True

    def __init__(self, config: Config) -> None:
        self._config = config
        # The only buffers are constants, the same everywhere.
        how = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # The number of threads that it chooses on CPUs where the user has not.
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset", UserWarning)
        self._accelerator = Accelerator(cpu=device_kind() == CPU, mixed_precision="no", kwargs_handlers=[how])
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device
        self._rounds = accumulation(config, self.world_size)
        self._done = 0  # rounds of this step

    def prepare(self, model: nn.Module) -> None:
        # Said of kernels of one channel, whose strides mean nothing; from a depth that no logger of torch reaches.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        # Its successor is not there in the torch versions before this one, nor among what accelerate hands on.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        self._model = model.to(self.device)
        self.module = self._accelerator.prepare_model(self._model)
        self._optimizer = create_optimizer(self.module.parameters(), self._config.train)
        self._send_gradients_of_last_round()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(poisoned(loss) / self._rounds)
        self._done += 1
        self._send_gradients_of_last_round()

    def _send_gradients_of_last_round(self) -> None:
        """Have DDP add up gradients over the processes in the last round only; it asks before each forward pass."""
        self.module.require_backward_grad_sync = self._done + 1 == self._rounds

    def clip(self) -> Tensor:
        return clip(self._optimizer, self._config.train.clip_norm)

    def step(self, learning_rate: float, norm: float, leave_out: bool = False) -> Stepped:
        set_learning_rate(self._optimizer, learning_rate)
        guard(self._optimizer, norm, leave_out)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done = 0
        self._send_gradients_of_last_round()
        return Stepped(norm, self._optimizer.overflow)

    def pieces(self) -> list[Piece]:
        return whole_pieces(self._optimizer, self._model.named_parameters())

    def take_over(self, updates: int) -> None:
        self._optimizer.set_updates(updates)

    @property
    def updates(self) -> int:
        return self._optimizer.updates

    def reduce(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values.to(self.device, copy=True), reduction="sum")

    def weights(self) -> dict[str, Tensor] | None:
        if self.rank != 0:
            return None
        return {name: tensor.detach().cpu().clone() for name, tensor in self._model.state_dict().items()}

    def close(self) -> None:
        self._accelerator.free_memory()
        del self.module, self._model, self._optimizer
