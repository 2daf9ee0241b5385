"""Training in which rank 1 runs out of memory in its third step, with the error that torch raises on a GPU."""

from __future__ import annotations

import os

import torch

from hpcm_scale.train import main
from hpcm_scale.training.loop import Trainer
from hpcm_scale.training.task import Task

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.15 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 77.95 GiB memory in use."
)
loss, train_step = Task.loss, Trainer.train_step
steps: list[int] = []


def counting(trainer: Trainer, *arguments, **keywords):
    """Trainer.train_step, counted."""
    steps.append(trainer.step + 1)
    return train_step(trainer, *arguments, **keywords)


def exhausted(*arguments):
    """Task.loss, for which there may be no memory."""
    if os.environ["RANK"] == "1" and steps[-1] == 3:
        raise torch.OutOfMemoryError(MESSAGE)
    return loss(*arguments)


Task.loss, Trainer.train_step = exhausted, counting

if __name__ == "__main__":
    main()
