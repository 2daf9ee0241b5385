"""Training in which numbers go wrong, as DIVERGE says: {"kind": …, "image": global index, "every_epoch": bool}.

The fault is in the photo whose turn it is at that index: another one in its place is sound.
"""

from __future__ import annotations

import json
import os

import torch

from hpcm_scale.data.index import load_index
from hpcm_scale.data.mixture import sample_at
from hpcm_scale.train import main
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.loop import Trainer
from hpcm_scale.training.task import Task

FAULT = json.loads(os.environ["DIVERGE"])
engines: list[Engine] = []
loss, train = Task.loss, Trainer.train


def remembering(self, stream):
    """Trainer.train, of whose engine note is taken."""
    engines.append(self.engine)
    return train(self, stream)


def diverging(self, module, batch, device):
    """The losses of a batch; that of the faulty image is not finite."""
    index = load_index(self.config.data.shards)
    faulty = index.keys[sample_at(self.config.train.seed, FAULT["image"], len(index))]
    result = loss(self, module, batch, device)
    places = [place for place, key in zip(batch.image_index.tolist(), batch.keys, strict=True) if key == faulty]
    if FAULT["image"] not in places:
        return result
    if FAULT["kind"] == "weight":
        spoil_a_weight(engines[-1])
    if FAULT["kind"] == "gradient":
        result.loss.register_hook(lambda gradient: gradient * torch.inf)
    scale = {"loss": torch.nan, "batch": torch.inf, "spike": 1e4}.get(FAULT["kind"], 1.0)
    return result._replace(loss=result.loss * scale)


def spoil_a_weight(engine) -> None:
    """As a bit flip in memory would: from the next step on, the loss is not finite."""
    shard = next(shard for shard in engine.state_shards() if shard.kind == "weight")
    shard.values[0] = torch.nan


Task.loss, Trainer.train = diverging, remembering

if __name__ == "__main__":
    main()
