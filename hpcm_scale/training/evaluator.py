"""Evaluation while training, distributed over all processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.estimate import Evaluation, Reconstruction, evaluate
from hpcm_scale.training.ema import EMA, ema_kind
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.task import Task

Means = dict[str, dict[str, float]]
"""Loss, bpp, PSNR and so on, means over the images, of the weights (`eval`) and their averages (`eval_ema_…`)."""


@dataclass
class Evaluator:
    """Evaluates the model in training on the evaluation images."""

    images: ImageSet
    engine: Engine
    task: Task
    averages: EMA
    alive: Callable[[], None]
    """Called after each image."""
    every: int
    """Steps between evaluations."""
    last_step: int
    """Last step of the schedule, which is always evaluated."""
    multiple: int
    """Images are padded to sides that are multiples of this, pixels."""
    shown: int
    """Reconstructions that `measure` returns."""

    def due(self, step: int) -> bool:
        """Whether an evaluation is due after `step`."""
        return step % self.every == 0 or step == self.last_step

    def measure(self) -> tuple[Means, list[Reconstruction]]:
        """Evaluate the weights and their averages; rank 0 gets reconstructions to show.

        Collective. Raises CollectiveError on all ranks if an image cannot be read or memory runs out, and Fault on one
        rank if its part of a sharded forward pass fails.
        """
        evaluation = self._evaluate(keep=self.shown)
        means = {"eval": evaluation.mean()}
        for length in self.averages.lengths:
            with self.averages.in_place(length):
                means[f"eval_{ema_kind(length)}"] = self._evaluate(keep=0).mean()
        return means, evaluation.reconstructions

    def _evaluate(self, keep: int) -> Evaluation:
        """Evaluate the current weights."""
        engine = self.engine
        engine.module.eval()
        try:
            return evaluate(
                engine.module,
                self.images,
                multiple=self.multiple,
                objective=self.task.objective,
                level=self.task.evaluation_level,
                device=engine.device,
                rank=engine.rank,
                world_size=engine.world_size,
                reduce=engine.reduce,
                together=engine.run_collectively,
                keep=keep if engine.rank == 0 else 0,
                progress=self.alive,
            )
        finally:
            engine.module.train()
