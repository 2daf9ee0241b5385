"""The run folder: its layout, its lock, and the records in it that are not checkpoints."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from hpcm_scale.config.compose import from_yaml
from hpcm_scale.errors import UserError
from hpcm_scale.files import write_text, writing
from hpcm_scale.model.weights import WEIGHTS_NAME
from hpcm_scale.tracking.environment import environment
from hpcm_scale.training.checkpoints import Checkpoint, Checkpoints, Choice, Examine
from hpcm_scale.training.divergence import Divergence
from hpcm_scale.training.optimizer import decay_start

WAIT_SECONDS = 60.0
"""A killed launcher leaves processes that save a checkpoint before they exit."""
_LOCK = ".lock"
_POLL_SECONDS = 0.2
_STACKS = "stacks"


class RunFolder:
    """Everything a run writes: configuration, journal, checkpoints, weights, environment.

    The folder of a run that has not started contains only `early` names.
    """

    early = frozenset({_LOCK, _STACKS})

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.journal_file = self.path / "metrics.jsonl"
        self.weights_file = self.path / WEIGHTS_NAME
        self.origin_file = self.path / "origin.json"
        self.environment_file = self.path / "environment.json"
        self.divergences_file = self.path / "divergences.json"
        self.stop_file = self.path / "stop"
        self.lock_file = self.path / _LOCK
        self.stacks = self.path / _STACKS
        self.profile = self.path / "profile"
        self.out_of_memory = self.path / "out_of_memory"
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    def ema_file(self, length: float) -> Path:
        """The exported weights of the moving average of that length."""
        return self.path / f"weights_ema_{length}.safetensors"

    def cooldown_point(self, step: int, examine: Examine = Checkpoint.flaw) -> Choice:
        """The checkpoint of `step` of a constant-rate run, from which a cooldown can start.

        Raises UserError if there is none, if it is damaged, or if the run's own decay starts before it.
        """
        if not self.config_file.is_file():
            raise UserError("no-constant-rate-run", "RUN", f"{self.path} is not a run; give a run folder")
        point = self.checkpoints.at(step, examine)
        if point is None:
            steps = ", ".join(map(str, self.checkpoints.steps())) or "none yet"
            raise UserError(
                "no-cooldown-checkpoint",
                "--at",
                f"{self.path} has no checkpoint of step {step} (available: {steps}); choose one of these, or train "
                f"with train.keep_at=[{step}]",
            )
        config = from_yaml(self.config_file)
        start = decay_start(config.schedule, config.train.steps)
        if step > start:
            raise UserError(
                "cooldown-after-decay",
                "--at",
                f"step {step} of {self.path} lies in the run's own decay, which begins at step {start:.0f}; choose an "
                "earlier step",
            )
        return point

    def origin(self, constant_rate_run: str | None) -> dict[str, Any] | None:
        """The weights that the run, or the constant-rate run of its cooldown, started from (`task.origin_of`).

        None if they were initialized. `constant_rate_run`: `run.cooldown_of`.
        """
        if self.origin_file.is_file():
            return json.loads(self.origin_file.read_text(encoding="utf-8"))
        return RunFolder(constant_rate_run).origin(None) if constant_rate_run else None

    def record_start(self, config: str, origin: dict[str, Any] | None = None) -> None:
        """Write the resolved configuration (YAML), the environment after those of earlier starts, and the `origin`."""
        with writing(self.path):
            for left_behind in self.path.glob(".*.part"):  # by a process that was killed while writing
                left_behind.unlink()
            write_text(self.config_file, config)
            starts = []
            if self.environment_file.is_file():
                starts = json.loads(self.environment_file.read_text(encoding="utf-8"))
            write_text(self.environment_file, json.dumps([*starts, environment()], indent=1))
            if origin is not None:
                write_text(self.origin_file, json.dumps(origin, indent=1))

    def divergences(self) -> list[Divergence]:
        """The steps that the run was rolled back for, in order of time."""
        if not self.divergences_file.is_file():
            return []
        return [Divergence(**noted) for noted in json.loads(self.divergences_file.read_text(encoding="utf-8"))]

    def note_divergence(self, divergence: Divergence) -> None:
        """Record a divergence: every later start skips its images."""
        noted = [entry._asdict() for entry in (*self.divergences(), divergence)]
        with writing(self.divergences_file):
            write_text(self.divergences_file, json.dumps(noted, indent=1))


class RunLock:
    """Exclusive lock on a run folder, held until `release` or until the process ends.

    Waits `seconds` for another holder to release it. Raises UserError, naming the holder, if it does not, and if the
    folder cannot be made. On a file system without locks every process gets it.
    """

    def __init__(self, folder: RunFolder, seconds: float = WAIT_SECONDS) -> None:
        path = folder.path
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._file = folder.lock_file.open("a+", encoding="utf-8")
        deadline = time.monotonic() + seconds
        waiting = False
        while not self._acquire():
            if time.monotonic() > deadline:
                holder = self._holder()
                self._file.close()
                raise UserError(
                    "run-locked",
                    "run.dir",
                    f"{path} is being trained by {holder}; stop it, or choose another run.dir",
                )
            if not waiting:
                print(f"{path} is still in use by {self._holder()}: waiting for it to end", flush=True)
                waiting = True
            time.sleep(_POLL_SECONDS)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def release(self) -> None:
        """Release the lock."""
        self._file.close()

    def _acquire(self) -> bool:
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
