"""The micro-batches of a run, from one phase of its crops to the next."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

from hpcm_scale.config.checks import micro_batch_size
from hpcm_scale.config.phases import images_at, phases
from hpcm_scale.config.schema import Config
from hpcm_scale.data.mixture import Mixture
from hpcm_scale.data.stream import Batch, open_stream


def batches(
    config: Config, step: int, *, rank: int, world_size: int, index: Mixture, left_out: Sequence[range]
) -> Generator[Batch, None, None]:
    """The micro-batches of process `rank`, in order, from optimizer step `step` (from 0) on, without end.

    Where a phase ends, so do its data workers, and those of the next begin; images, `index` and `left_out` as in
    `data.stream.open_stream`. Close it after use. Raises UserError while iterating, as that does.
    """
    left = [phase for phase in phases(config) if step < phase.last_step]
    for phase in left:
        stream = open_stream(
            replace(config.data, crop=phase.crop),
            seed=config.train.seed,
            first_image=images_at(config, max(step, phase.first_step)),
            last_image=None if phase is left[-1] else images_at(config, phase.last_step),
            batch_size=phase.batch_size,
            micro_batch_size=micro_batch_size(config, world_size, phase),
            rank=rank,
            world_size=world_size,
            index=index,
            left_out=left_out,
        )
        with closing(stream):
            yield from stream
