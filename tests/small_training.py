"""The training that most tests run: a step takes a tenth of the compute of nano's own crops and context fusion."""

from __future__ import annotations

SMALL = (
    "model=nano",
    "model.fusion=none",
    "data.crop=128",
    "data.workers=0",
    "train.batch_size=4",
    "schedule.learning_rate=1e-3",
    "log.wandb=disabled",
)
