"""Evaluation while training, by all processes together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpcm_scale.config.checks import side_multiple
from hpcm_scale.config.schema import Config
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.estimate import Evaluation, Reconstruction, evaluate
from hpcm_scale.training.averages import Averages, kind_of
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.task import Task

Means = dict[str, dict[str, float]]
"""Loss, bpp, PSNR and so on, means over the images: `eval` of the weights, `eval_ema_…` of their averages."""


@dataclass
class Evaluator:
    """Codes the evaluation images with what is trained."""

    config: Config
    images: ImageSet
    engine: Engine
    task: Task
    averages: Averages
    alive: Callable[[], None]
    """Called after each image."""

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after `step`."""
        return step % self.config.eval.every == 0 or step == self.config.train.steps

    def measure(self) -> tuple[Means, list[Reconstruction]]:
        """Evaluate the weights and their averages; the first process gets reconstructions to show.

        Every process calls it. Raises FailedTogether on all of them if an image cannot be read, or memory runs out; a
        Fault on one of them if its part of a sharded forward pass fails.
        """
        evaluation = self._evaluate(keep=self.config.log.images)
        means = {"eval": evaluation.mean()}
        for length in self.averages.lengths:
            with self.averages.in_place(length):
                means[f"eval_{kind_of(length)}"] = self._evaluate(keep=0).mean()
        return means, evaluation.reconstructions

    def _evaluate(self, keep: int) -> Evaluation:
        """Code the images with what the model has for weights now."""
        engine = self.engine
        engine.module.eval()
        try:
            return evaluate(
                engine.module,
                self.images,
                multiple=side_multiple(self.config.model),
                objective=self.task.objective,
                level=self.task.evaluation_level,
                device=engine.device,
                rank=engine.rank,
                world_size=engine.world_size,
                reduce=engine.reduce,
                together=engine.together,
                keep=keep if engine.rank == 0 else 0,
                progress=self.alive,
            )
        finally:
            engine.module.train()
