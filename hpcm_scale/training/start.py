"""Inputs of a run and the checkpoint it resumes from. All errors are raised before any process group starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Size, nn

from hpcm_scale.config.checks import MS_SSIM_SMALLEST_SIDE, check, micro_batch_size
from hpcm_scale.config.compose import from_yaml, to_dict
from hpcm_scale.config.schema import Checkpointing, Config, Distortion, EngineName, Target
from hpcm_scale.config.spec import RunSpec, crop_starts
from hpcm_scale.data import sources
from hpcm_scale.data.index import ShardIndex, load_index
from hpcm_scale.data.mixture import Mixture, load_mixture
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.distributed.rendezvous import differences
from hpcm_scale.errors import UserError
from hpcm_scale.files import check_length, sha256_of
from hpcm_scale.model import families
from hpcm_scale.model.weights import WEIGHTS_NAME, WeightsFile, check_init_from, exported_step, read_weights_file
from hpcm_scale.tasks import plugin, receiver
from hpcm_scale.training.checkpoints import Checkpoint, Choice, Examine
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.task import check_origin


@dataclass(frozen=True)
class Resume:
    """Where training continues."""

    choice: Choice | None
    """The checkpoint; None for a new run."""
    previous_steps: int | None
    """train.steps of the last start in this folder; None if there was none."""

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return self.choice.state["step"] if self.choice else 0


class Start(NamedTuple):
    """What a command finds of a run before it trains."""

    config: Config
    spec: RunSpec
    folder: RunFolder
    resume: Resume
    index: Mixture
    """Of all training sets."""
    images: ImageSet | None
    """For evaluation."""
    finished: bool
    """Whether the schedule is complete and the weights are exported."""
    origin: WeightsFile | None
    """The weights that a new run starts from."""
    receivers: dict[str, nn.Module]
    """Vision models that the run is trained for; empty for human viewers."""


def prepare(
    config: Config,
    world_size: int,
    *,
    open_index: Callable[..., ShardIndex] = load_index,
    open_images: Callable[..., ImageSet] = ImageSet,
    open_receiver: Callable[[str], nn.Module] = receiver,
    to_come: Collection[Path] = (),
) -> Start:
    """Check a run of `world_size` processes and find its checkpoint; writes nothing.

    `open_index`, `open_images` and `open_receiver` read the shards' index, the images and the networks; the runs of a
    sweep share what they read. `to_come`: run folders that will have weights when this run begins.

    Raises UserError if the run cannot be trained.
    """
    check(config, world_size)
    families.check(config.model)
    spec = RunSpec.of(config, world_size)
    data = config.data
    if not data.sets:
        raise UserError(
            "no-shards", "data.shards", "data.shards is not set; set it to the folder written by `hpcm shards build`"
        )
    index = load_mixture(data, open_index)
    images = open_images(config.eval.images, config.eval.limit) if config.eval.images else None
    folder = RunFolder(spec.folder)
    check_length(folder.path)
    resume = find_resume(folder, config, spec, index.digest)
    finished = resume.step == config.train.steps and exported_step(folder.weights_file) == resume.step
    # Checkpoints do not hold a frozen codec: a resumed run reads it from its origin again.
    needed = config.init_from is not None and (resume.choice is None or config.machine.freeze_codec) and not finished
    later = origin_folder(config.init_from) in to_come
    if later and resume.choice is not None and config.machine.freeze_codec and not finished:
        raise UserError(
            "frozen-codec-in-training",
            "init_from",
            f"the run uses the frozen codec of init_from={config.init_from}, which this command would train further; "
            "choose another run.dir",
        )
    origin = origin_weights(config, folder) if needed and not later else None
    receivers = receivers_of(config, open_receiver)
    if images and not finished:
        _check_images(images, config, receivers)
    if receivers:
        plugin(config.objective.target).training_objective(
            config.machine, config.objective.lmbda, receivers
        )  # or raises
    return Start(config, spec, folder, resume, index, images, finished, origin, receivers)


def _check_images(images: ImageSet, config: Config, receivers: Mapping[str, nn.Module]) -> None:
    """Decode all of `eval.images`. Raise UserError if one is corrupt, or too small for the objective."""
    checks: list[Callable[[Size, str, str], None]] = [plugin(config.objective.target).check_size] if receivers else []
    if config.objective.distortion == Distortion.ms_ssim:
        checks.append(partial(sources.check_size, smallest=MS_SSIM_SMALLEST_SIDE, who="MS-SSIM is defined for"))
    for name, size in zip(images.names, images.sizes, strict=True):
        for refuse in checks:
            refuse(size, f"{name} of eval.images={images.folder}", "omit it")


def origin_folder(init_from: str | None) -> Path | None:
    """The run folder of `init_from`, a run folder or a weights file."""
    if init_from is None:
        return None
    path = Path(os.path.realpath(init_from))  # Path.resolve raises for a link to itself
    return path.parent if path.suffix == Path(WEIGHTS_NAME).suffix else path


def receivers_of(config: Config, open_receiver: Callable[[str], nn.Module] = receiver) -> dict[str, nn.Module]:
    """The vision models that a run is trained for, by name; empty for human viewers."""
    for_machine = config.objective.target == Target.vision_model
    return {name: open_receiver(name) for name in config.machine.receivers if for_machine}


def origin_weights(config: Config, folder: RunFolder) -> WeightsFile:
    """The weights of `init_from`. Raises UserError if the run cannot start, or resume, from them."""
    assert config.init_from is not None
    file = read_weights_file(config.init_from)
    begun = folder.origin(config.run.cooldown_of)
    if begun and config.machine.freeze_codec and begun["sha256"] != sha256_of(file.path):
        raise UserError(
            "other-frozen-codec",
            "init_from",
            f"init_from={file.path} is not the file that {folder.path} started from; restore that file, or choose "
            "another run.dir",
        )
    check_init_from(config.model, file)
    check_origin(config, file)
    return file


# Resuming: the checkpoint to continue, and whether this command is the same run.

_MAY_CHANGE = (
    "train.steps",
    "train.stop_after",
    "train.checkpoint_every",
    "train.keep_",
    "train.micro_batch_size",
    "train.on_divergence",
    "train.loss_spike_factor",
    "train.max_",
    "train.watchdog_timeout",
    "train.profile_steps",
    "data.shards",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.retries",
    "data.timeout",
    "data.max_corrupt_samples",
    "data.pipe",
    "schedule.crop_boundaries",
    "engine.name",
    "engine.zero_stage",
    "engine.offload",
    "engine.compile",
    "engine.deterministic",
    "engine.activation_checkpointing",
    "engine.world_size",
    "engine.init_timeout",
    "engine.options",
    "eval.",
    "log.",
    "run.dir",
    "run.sweep",
)
"""Keys that may change between two starts of a run; every other key makes it another run."""
_COOLDOWN_MAY_CHANGE = (*_MAY_CHANGE, "schedule.", "run.")
"""Keys that may differ between a constant-rate run and its cooldown."""
_SAME_NETWORK = ("train.", "optimizer.", "objective.", "schedule.", "data.", "engine.")
"""Keys whose change makes another run of the same network, which can start from this run's weights."""


def find_resume(
    folder: RunFolder, config: Config, spec: RunSpec, data_digest: str, examine: Examine = Checkpoint.flaw
) -> Resume:
    """The checkpoint that this command continues; writes nothing.

    That is the folder's newest checkpoint in which `examine` finds no flaw, or else, for a cooldown, the one of its
    constant-rate run. Raises UserError if the folder, or the constant-rate run, holds a different run.
    """
    previous_steps = None
    if folder.config_file.is_file():
        previous = from_yaml(folder.config_file)
        _check_same_run(folder, to_dict(previous), to_dict(config), _MAY_CHANGE)
        previous_steps = previous.train.steps
    elif folder.path.exists() and not (
        folder.path.is_dir() and {path.name for path in folder.path.iterdir()} <= folder.early
    ):
        raise UserError(
            "not-a-run", "run.dir", f"run.dir={folder.path} exists and is not a run; choose another run.dir"
        )
    newest = folder.checkpoints.newest(examine)
    if newest is not None:
        _check_state(folder, newest.state, config, spec, data_digest)
        return Resume(newest, previous_steps)
    if config.run.cooldown_of is None or config.run.cooldown_at is None:
        return Resume(None, previous_steps)
    constant_rate = RunFolder(config.run.cooldown_of)
    choice = constant_rate.cooldown_point(config.run.cooldown_at, examine)
    before = from_yaml(constant_rate.config_file)
    _check_same_run(constant_rate, to_dict(before), to_dict(config), _COOLDOWN_MAY_CHANGE)
    _check_state(constant_rate, choice.state, config, spec, data_digest)
    return Resume(choice, previous_steps)


def _check_state(folder: RunFolder, state: dict[str, Any], config: Config, spec: RunSpec, data_digest: str) -> None:
    """Raise UserError unless the data and the schedule lead to the loop's `state` of a checkpoint."""
    if state["data"] != data_digest:
        sets = [each.path for each in config.data.sets]
        raise UserError(
            "other-training-images",
            "data.shards",
            f"{' and '.join(sets)} {'hold' if len(sets) > 1 else 'holds'} other images than {folder.path} was trained "
            "on; list the same sets in the same order, or choose another run.dir",
        )
    if spec.steps < state["step"]:
        raise UserError(
            "fewer-steps-than-done",
            "train.steps",
            f"{folder.path} has already reached step {state['step']}, beyond train.steps={spec.steps}; raise "
            "train.steps, or choose another run.dir",
        )
    images = state["tracker"]["images"]
    if spec.images_at(state["step"]) != images:
        before = from_yaml(folder.config_file)
        starts = crop_starts(before.schedule, before.train.steps)
        raise UserError(
            "other-crop-schedule",
            "schedule.crop_boundaries",
            f"{folder.path} has trained on {images:,} images in {state['step']:,} steps, but with this train.steps, "
            f"schedule.crops and crop_boundaries it would be {spec.images_at(state['step']):,}; set "
            f"schedule.crop_boundaries={starts}, in steps, or choose another run.dir",
        )


def _check_same_run(
    folder: RunFolder, before: dict[str, Any], now: dict[str, Any], may_change: tuple[str, ...]
) -> None:
    for key, was, wanted in differences(before, now):
        if not key.startswith(may_change):
            same_network = key.startswith(_SAME_NETWORK) and folder.weights_file.is_file()
            new = f"; there, init_from={folder.path} starts from its weights" if same_network else ""
            raise UserError(
                "other-run",
                key,
                f"{folder.path} holds a run with {key}={was}, not {wanted}; give the same value to "
                f"resume it, or choose another run.dir{new}",
            )


# Out of memory.


def memory_remedies(config: Config, world_size: int) -> list[str]:
    """Settings, as typed on the command line, that need less device memory and that this run does not use yet.

    A run can be resumed with each of them. The cheapest comes first: smaller micro-batches cost least time, offload
    most.
    """
    remedies = []
    for text, changed in _with_less_memory(config, world_size):
        with suppress(UserError):
            check(changed, world_size)
            remedies.append(text)
    return remedies


def _with_less_memory(config: Config, world_size: int) -> Iterator[tuple[str, Config]]:
    engine, images = config.engine, micro_batch_size(config.train, world_size)
    if images > 1:
        smaller = max(size for size in range(1, images) if images % size == 0)
        key = f"train.micro_batch_size={smaller}"
        yield key, replace(config, train=replace(config.train, micro_batch_size=smaller))
    levels = list(Checkpointing)
    if engine.activation_checkpointing != levels[-1]:
        level = levels[levels.index(engine.activation_checkpointing) + 1]
        key = f"engine.activation_checkpointing={level.value}"
        yield key, replace(config, engine=replace(engine, activation_checkpointing=level))
    if world_size > 1 and engine.zero_stage < 3:
        stage, offload = max(2, engine.zero_stage + 1), engine.offload
    elif not engine.offload:
        stage, offload = 3, True
    else:
        return
    deepspeed = replace(engine, name=EngineName.deepspeed, zero_stage=stage, offload=offload)
    yield f"engine=zero{stage}{'_offload' * offload}", replace(config, engine=deepspeed)
