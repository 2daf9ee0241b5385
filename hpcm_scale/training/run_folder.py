"""The run folder, and whether a command continues what lies in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from hpcm_scale.config.compose import from_yaml, to_dict, to_yaml
from hpcm_scale.config.phases import crop_starts, images_at
from hpcm_scale.config.schema import Config, RunConfig
from hpcm_scale.errors import UserError
from hpcm_scale.files import write_text, writing
from hpcm_scale.model.weights import WEIGHTS_NAME
from hpcm_scale.tracking.environment import environment
from hpcm_scale.training.averages import kind_of
from hpcm_scale.training.checkpoints import Checkpoint, Checkpoints, Choice, Examine
from hpcm_scale.training.divergence import Divergence
from hpcm_scale.training.optimizer import decay_start

# One training at a time writes a run folder.


LOCK = ".lock"
"""The lock's file in the run folder."""
WAIT_SECONDS = 60.0
"""A launcher that was killed leaves processes that save a checkpoint before they end."""
_POLL_SECONDS = 0.2


class RunLock:
    """The lock on the run folder `path`, held until `release`, or until the process ends in whatever way.

    Waits `seconds` for a holder that is just ending. Raises UserError, naming the holder, if it does not end, and if
    the folder cannot be made.
    """

    def __init__(self, path: str | Path, seconds: float = WAIT_SECONDS) -> None:
        path = Path(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._file: TextIO | None = (path / LOCK).open("a+", encoding="utf-8")
        deadline = time.monotonic() + seconds
        told = False
        while not self._take():
            if time.monotonic() > deadline:
                holder = self._holder()
                self._file.close()
                raise UserError(f"{path} is being trained by {holder}; stop that, or choose another run.dir")
            if not told:
                print(f"{path} is still in use by {self._holder()}: waiting for it to end", flush=True)
                told = True
            time.sleep(_POLL_SECONDS)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def release(self) -> None:
        """Let others write the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # else: a file system without locks
        return True

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"


# What may change when a run goes on; everything else would make it another run.
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
    "data.more_shards",
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
# Where another value makes another run of the same network, which can start from the weights of this one.
_WEIGHTS_STAY = ("train.", "objective.", "schedule.", "data.", "engine.")
# What may differ between a trunk and its branch, besides.
_BRANCH_MAY_CHANGE = (*_MAY_CHANGE, "schedule.", "run.")


_NAME_BYTES = 255
_PATH_BYTES = 4096 - 512
"""The longest name that file systems take, and the longest path, less the names of the files in a run folder."""
_STACKS = "stacks"
_EARLY = {LOCK, _STACKS}
"""What may lie in a run folder before the run's configuration does."""
_BESIDE = ".sbatch"
"""The longest ending of the files beside a run folder, which have its name."""


def run_directory(config: Config) -> Path:
    """`run.dir`, or runs/<model> where it is not set. Raises UserError if that is longer than file systems allow."""
    folder = Path(config.run.dir or f"runs/{config.model.name}")
    longest = max(len(os.fsencode(name)) for name in (*folder.parts, folder.name + _BESIDE))
    if longest > _NAME_BYTES or len(os.fsencode(folder.absolute())) > _PATH_BYTES:
        raise UserError(
            f"run.dir={str(folder)[:40]}… is too long; choose one with a name of at most "
            f"{_NAME_BYTES - len(_BESIDE)} bytes and a whole path of at most {_PATH_BYTES}"
        )
    return folder


@dataclass(frozen=True)
class Resume:
    """Where a command takes a run up."""

    choice: Choice | None
    """The checkpoint; None: from nothing."""
    previous: Config | None

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return self.choice.state["step"] if self.choice else 0


class RunFolder:
    """Everything a run leaves: configuration, journal, checkpoints, weights, environment."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.journal_file = self.path / "metrics.jsonl"
        self.weights_file = self.path / WEIGHTS_NAME
        self.origin_file = self.path / "origin.json"
        self.environment_file = self.path / "environment.json"
        self.divergences_file = self.path / "divergences.json"
        self.stop_file = self.path / "stop"
        self.stacks = self.path / _STACKS
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    def averaged_file(self, length: float) -> Path:
        """Where the moving average of the weights of that length is exported to."""
        return self.path / f"weights_{kind_of(length)}.safetensors"

    def resume(self, config: Config, data_digest: str, examine: Examine = Checkpoint.flaw) -> Resume:
        """What of an earlier run this command continues; writes nothing.

        That is the folder's own newest checkpoint in which `examine` finds no flaw, or else, for a branch, the one
        of its trunk. Raises UserError, naming the key, if the folder holds a different run, or the trunk is one.
        """
        previous = None
        if self.config_file.is_file():
            previous = from_yaml(self.config_file)
            self._refuse_other_run(previous, config, _MAY_CHANGE)
        elif self.path.exists() and not (self.path.is_dir() and {path.name for path in self.path.iterdir()} <= _EARLY):
            raise UserError(f"run.dir={self.path} exists and is not a run; choose another run.dir")
        newest = self.checkpoints.newest(examine)
        if newest is not None:
            self._refuse_state(newest.state, config, data_digest)
            return Resume(newest, previous)
        if config.run.cooldown_of is None:
            return Resume(None, previous)
        trunk = RunFolder(config.run.cooldown_of)
        start = trunk.branch_point(config.run.cooldown_at, examine)
        trunk._refuse_other_run(from_yaml(trunk.config_file), config, _BRANCH_MAY_CHANGE)
        trunk._refuse_state(start.state, config, data_digest)
        return Resume(start, previous)

    def branch_point(self, step: int, examine: Examine = Checkpoint.flaw) -> Choice:
        """The checkpoint of `step`, before any decay. Raises UserError if there is none, or it is damaged."""
        if not self.config_file.is_file():
            raise UserError(f"{self.path} is not a run; name the folder of the run to branch off")
        point = self.checkpoints.at(step, examine)
        if point is None:
            steps = ", ".join(map(str, self.checkpoints.steps())) or "none yet"
            raise UserError(
                f"{self.path} holds no checkpoint of step {step} (there are: {steps}); choose one of these, or train "
                f"with train.keep_at=[{step}]"
            )
        config = from_yaml(self.config_file)
        start = decay_start(config.schedule, config.train.steps)
        if step > start:
            raise UserError(
                f"at step {step} {self.path} is in its own decay, which began at step {start:.0f}; branch off before"
            )
        return point

    def origin(self, config: Config) -> dict[str, Any] | None:
        """The weights that the run, or the trunk that it branched off, started from; None if from nothing.

        What `task.origin_of` told of them.
        """
        if self.origin_file.is_file():
            return json.loads(self.origin_file.read_text(encoding="utf-8"))
        trunk = config.run.cooldown_of
        return RunFolder(trunk).origin(replace(config, run=RunConfig())) if trunk else None

    def write_facts(self, config: Config, origin: dict[str, Any] | None = None) -> None:
        """Record the resolved configuration and the environment, beside those of earlier starts, and the `origin`."""
        with writing(self.path):
            for left_behind in self.path.glob(".*.part"):  # of a process that was killed while it wrote
                left_behind.unlink()
            self._write_facts(config)
            if origin is not None:
                write_text(self.origin_file, json.dumps(origin, indent=1))

    def _write_facts(self, config: Config) -> None:
        write_text(self.config_file, to_yaml(config))
        starts = []
        if self.environment_file.is_file():
            starts = json.loads(self.environment_file.read_text(encoding="utf-8"))
        write_text(self.environment_file, json.dumps([*starts, environment()], indent=1))

    def divergences(self) -> list[Divergence]:
        """The steps that the run has been taken back for, in the order of time."""
        if not self.divergences_file.is_file():
            return []
        return [Divergence(**noted) for noted in json.loads(self.divergences_file.read_text(encoding="utf-8"))]

    def note_divergence(self, divergence: Divergence) -> None:
        """Have every later start go on without its images."""
        noted = [entry._asdict() for entry in (*self.divergences(), divergence)]
        with writing(self.divergences_file):
            write_text(self.divergences_file, json.dumps(noted, indent=1))

    def _refuse_state(self, state: dict[str, Any], config: Config, data_digest: str) -> None:
        if state["data"] != data_digest:
            more = config.data.more_shards
            named = f"data.shards={config.data.shards} " + (f"with data.more_shards={more} " if more else "")
            raise UserError(
                f"{named}holds other photos than {self.path} was trained on; name the same "
                f"{'sets, in the same order' if more else 'set'}, or choose another run.dir"
            )
        if config.train.steps < state["step"]:
            raise UserError(
                f"{self.path} has {state['step']} steps already, more than train.steps={config.train.steps}; "
                "ask for more, or choose another run.dir"
            )
        images = state["tracker"]["images"]
        if images_at(config, state["step"]) != images:
            starts = crop_starts(from_yaml(self.config_file))
            raise UserError(
                f"{self.path} has trained on {images:,} images in {state['step']:,} steps, and with these train.steps, "
                f"schedule.crops and crop_boundaries it would have been {images_at(config, state['step']):,}; give "
                f"schedule.crop_boundaries={starts}, in steps, or choose another run.dir"
            )

    def _refuse_other_run(self, previous: Config, config: Config, may_change: tuple[str, ...]) -> None:
        before, now = _flat(to_dict(previous)), _flat(to_dict(config))
        for key in before | now:  # a setting in model.options may be in one of the two alone
            if before.get(key) != now.get(key) and not key.startswith(may_change):
                stay = key.startswith(_WEIGHTS_STAY) and self.weights_file.is_file()
                new = f"; there, init_from={self.path} starts from its weights" if stay else ""
                raise UserError(
                    f"{self.path} holds a run with {key}={before.get(key)}, not {now.get(key)}; give the same value to "
                    f"go on, or choose another run.dir{new}"
                )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
