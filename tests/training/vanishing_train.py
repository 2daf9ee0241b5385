"""Training in which an evaluation image vanishes, as VANISH says: {"image": path, "rank": …, "weights": [steps],
"averages": [steps], "memory": [steps]}.

At those steps process `rank` moves the image away before the weights are evaluated, or once their averages are in
place, and brings it back after the next step; or it may take hardly more memory than it has until then.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import psutil

from hpcm_scale.train import main
from hpcm_scale.training.ema import EMA
from hpcm_scale.training.loop import Trainer

EVENTS = json.loads(os.environ["VANISH"])
IMAGE = Path(EVENTS["image"])
AWAY = IMAGE.with_suffix(".away")
MARGIN = 640 * 2**20
"""Bytes: a large image can be read with so many, and not coded."""
STEP = 0


def hide(moment: str) -> None:
    """Move the image away if that is due."""
    if os.environ["RANK"] == str(EVENTS["rank"]) and STEP in EVENTS.get(moment, ()):
        IMAGE.rename(AWAY)


def limit_memory() -> None:
    """Have a large image not fit, if that is due."""
    most = resource.RLIM_INFINITY
    if os.environ["RANK"] == str(EVENTS["rank"]) and STEP in EVENTS.get("memory", ()):
        most = psutil.Process().memory_info().vms + MARGIN
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def vanishing(train_step):
    """Trainer.train_step, after which the image may be gone."""

    def step(trainer: Trainer, *arguments, **keywords):
        global STEP
        limit_memory()
        if AWAY.exists() and os.environ["RANK"] == str(EVENTS["rank"]):
            AWAY.rename(IMAGE)
        result = train_step(trainer, *arguments, **keywords)
        STEP = trainer.step + 1
        hide("weights")
        limit_memory()
        return result

    return step


def in_place(real):
    """EMA.in_place, within which the image may be gone."""

    @contextmanager
    def exchanged(averages: EMA, length: float) -> Iterator[None]:
        with real(averages, length):
            hide("averages")
            yield

    return exchanged


if __name__ == "__main__":
    with (
        patch.object(Trainer, "train_step", vanishing(Trainer.train_step)),
        patch.object(EMA, "in_place", in_place(EMA.in_place)),
    ):
        main()
