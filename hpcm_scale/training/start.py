"""What a run starts from; all that can be refused is refused here, before processes talk to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hpcm_scale.config.checks import check
from hpcm_scale.config.schema import Config
from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.data.index import ShardIndex, load_index
from hpcm_scale.errors import UserError
from hpcm_scale.model.weights import exported_step
from hpcm_scale.training.run_folder import Resume, RunFolder, run_directory


class Start(NamedTuple):
    """What a command finds of a run before it trains."""

    folder: RunFolder
    resume: Resume
    index: ShardIndex
    images: ImageSet | None
    """For evaluation."""
    finished: bool
    """Whether it was trained to the end of its schedule, and its weights exported."""


def prepare(
    config: Config,
    world_size: int,
    *,
    open_index: Callable[..., ShardIndex] = load_index,
    open_images: Callable[..., ImageSet] = ImageSet,
) -> Start:
    """Check a run of `world_size` processes and find what it goes on from; writes nothing.

    `open_index` and `open_images` read the shards' index and the images; many runs of the same can share what they
    read. Raises UserError, one sentence, for whatever keeps the run from being trained.
    """
    check(config, world_size)
    data = config.data
    if data.shards is None:
        raise UserError("data.shards is not set; name the folder that `hpcm shards build` made")
    index = open_index(data.shards, retries=data.retries, timeout=data.timeout, pipe=data.pipe)
    images = open_images(config.eval.images, config.eval.limit) if config.eval.images else None
    folder = RunFolder(run_directory(config))
    resume = folder.resume(config, index.digest)
    finished = resume.step == config.train.steps and exported_step(folder.weights_file) == resume.step
    return Start(folder, resume, index, images, finished)
