"""What a run starts from; all that can be refused is refused here, before processes talk to each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Size

from hpcm_scale.config.checks import MS_SSIM_SMALLEST_SIDE, check
from hpcm_scale.config.schema import Config, Distortion, Target
from hpcm_scale.data import sources
from hpcm_scale.data.index import ShardIndex, load_index
from hpcm_scale.data.mixture import Mixture, load_mixture
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.files import check_length, sha256_of
from hpcm_scale.machine.extractor import TokenExtractor, check_size
from hpcm_scale.machine.objective import MachineObjective
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model import families
from hpcm_scale.model.weights import WEIGHTS_NAME, WeightsFile, check_inheritance, exported_step, read_weights_file
from hpcm_scale.training.run_folder import Resume, RunFolder, run_directory
from hpcm_scale.training.task import check_origin


class Start(NamedTuple):
    """What a command finds of a run before it trains."""

    folder: RunFolder
    resume: Resume
    index: Mixture
    """Of all sets of shards."""
    images: ImageSet | None
    """For evaluation."""
    finished: bool
    """Whether it was trained to the end of its schedule, and its weights exported."""
    origin: WeightsFile | None
    """What a run that begins starts from."""
    receivers: dict[str, TokenExtractor]
    """Networks that it is trained for, instead of people."""


def prepare(
    config: Config,
    world_size: int,
    *,
    open_index: Callable[..., ShardIndex] = load_index,
    open_images: Callable[..., ImageSet] = ImageSet,
    open_receiver: Callable[[str], TokenExtractor] = receiver,
    to_come: Collection[Path] = (),
) -> Start:
    """Check a run of `world_size` processes and find what it goes on from; writes nothing.

    `open_index`, `open_images` and `open_receiver` read the shards' index, the images and the networks; many runs of
    the same can share what they read. `to_come`: run folders that will have weights when this run begins.

    Raises UserError, one sentence, for whatever keeps the run from being trained.
    """
    check(config, world_size)
    families.check(config.model)
    data = config.data
    if data.shards is None:
        raise UserError("data.shards is not set; name the folder that `hpcm shards build` made")
    index = load_mixture(data, open_index)
    images = open_images(config.eval.images, config.eval.limit) if config.eval.images else None
    folder = RunFolder(run_directory(config))
    check_length(folder.path)
    resume = folder.resume(config, index.digest)
    finished = resume.step == config.train.steps and exported_step(folder.weights_file) == resume.step
    # A frozen codec is in no checkpoint: a run that goes on takes it from where it began.
    needed = config.init_from is not None and (resume.choice is None or config.machine.freeze_codec) and not finished
    later = origin_folder(config) in to_come
    if later and resume.choice is not None and config.machine.freeze_codec and not finished:
        raise UserError(
            f"it goes on with the codec of init_from={config.init_from}, which this command would train further; "
            "choose another run.dir"
        )
    origin = origin_weights(config, folder) if needed and not later else None
    receivers = receivers_of(config, open_receiver)
    if images and not finished:
        _check_images(images, config, receivers)
    if receivers:
        MachineObjective(receivers, config.machine, config.objective.lmbda)  # refuses layers that there are not
    return Start(folder, resume, index, images, finished, origin, receivers)


def _check_images(images: ImageSet, config: Config, receivers: Mapping[str, TokenExtractor]) -> None:
    """Decode all of `eval.images`. Raise UserError if one is broken, or too small for what the run is trained for."""
    checks: list[Callable[[Size, str, str], None]] = [check_size] if receivers else []
    if config.objective.distortion == Distortion.ms_ssim:
        checks.append(partial(sources.check_size, smallest=MS_SSIM_SMALLEST_SIDE, who="MS-SSIM is defined for"))
    for name, size in zip(images.names, images.sizes, strict=True):
        for refuse in checks:
            refuse(size, f"{name} of eval.images={images.folder}", "leave it out")


def origin_folder(config: Config) -> Path | None:
    """The run folder whose weights a run starts from."""
    if config.init_from is None:
        return None
    path = Path(os.path.realpath(config.init_from))  # Path.resolve raises for a link to itself
    return path.parent if path.suffix == Path(WEIGHTS_NAME).suffix else path


def receivers_of(
    config: Config, open_receiver: Callable[[str], TokenExtractor] = receiver
) -> dict[str, TokenExtractor]:
    """The networks that a configuration trains for, by name; none if it trains for people."""
    for_machine = config.objective.target == Target.vision_model
    return {name: open_receiver(name) for name in config.machine.receivers if for_machine}


def origin_weights(config: Config, folder: RunFolder) -> WeightsFile:
    """What `init_from` names. Raises UserError if the run cannot start, or go on, from it."""
    file = read_weights_file(config.init_from)
    begun = folder.origin(config)
    if begun and config.machine.freeze_codec and begun["sha256"] != sha256_of(file.path):
        raise UserError(
            f"init_from={file.path} is not what {folder.path} was begun with; put that file back, or choose another "
            "run.dir"
        )
    check_inheritance(config.model, file)
    check_origin(config, file)
    return file
