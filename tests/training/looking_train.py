"""Training that notes in LOOKED_AT how often each step copies values of tensors to where Python can see them.

Run as a module with the arguments of hpcm_scale.train.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpcm_scale.train import main
from hpcm_scale.training.loop import Trainer

LOOKS: list[dict[str, int]] = []


class Watchdog(TorchDispatchMode):
    """Counts float(x), x.item(), `if x` and the like."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.counts["item"] += 1
        return function(*args, **(kwargs or {}))


def watched(train_step):
    """Trainer.train_step, watched."""

    def step(trainer: Trainer, *arguments, **keywords):
        counts, tolist = Counter(), torch.Tensor.tolist

        def counted(tensor: torch.Tensor):
            counts["tolist"] += tensor.is_floating_point()  # image indices are integers, and were never elsewhere
            return tolist(tensor)

        def noting(name: str):
            real = getattr(torch.Tensor, name)

            def noted(tensor: torch.Tensor, *arguments, **keywords):
                counts["copies"] += tensor.is_floating_point()
                return real(tensor, *arguments, **keywords)

            return patch.object(torch.Tensor, name, noted)

        with Watchdog(counts), patch.object(torch.Tensor, "tolist", counted), noting("cpu"), noting("numpy"):
            result = train_step(trainer, *arguments, **keywords)
        LOOKS.append(dict(counts))
        Path(os.environ["LOOKED_AT"]).write_text(json.dumps(LOOKS), encoding="utf-8")
        return result

    return step


if __name__ == "__main__":
    with patch.object(Trainer, "train_step", watched(Trainer.train_step)):
        main()
