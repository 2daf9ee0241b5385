"""accelerate: one device, or data parallel on several; for laptops and for debugging."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpcm_scale.config.checks import accumulation
from hpcm_scale.config.schema import Config
from hpcm_scale.files import whole_file
from hpcm_scale.training.engine import Engine, Stepped, poisoned
from hpcm_scale.training.optimizer import clip_and_guard, create_optimizer, set_learning_rate

_FILE = "engine.pt"


class AccelerateEngine(Engine):
    """See `Engine`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device
        self._share = 1 / accumulation(config, self.world_size)

    def prepare(self, model: nn.Module) -> None:
        self._model = model.to(self.device)
        self.module = self._accelerator.prepare_model(self._model)
        self._optimizer = create_optimizer(self.module.parameters(), self._config.train)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(poisoned(loss) * self._share)

    def step(self, learning_rate: float) -> Stepped:
        set_learning_rate(self._optimizer, learning_rate)
        norm = float(clip_and_guard(self._optimizer, self._config.train.clip_norm))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Stepped(norm, self._optimizer.overflow)

    def save(self, folder: Path) -> None:
        if self.rank == 0:
            state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
            with whole_file(folder / _FILE) as unfinished:
                torch.save(state, unfinished)
        self._accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        state = torch.load(folder / _FILE, map_location="cpu", weights_only=True)  # copied to the device below
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def reduce(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values.to(self.device, copy=True), reduction="sum")

    def weights(self) -> dict[str, Tensor] | None:
        if self.rank != 0:
            return None
        return {name: tensor.detach().cpu().clone() for name, tensor in self._model.state_dict().items()}

    def close(self) -> None:
        self._accelerator.free_memory()
        del self.module, self._model, self._optimizer
