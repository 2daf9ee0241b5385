"""The run folder, and whether a command continues what lies in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcm_scale.config.compose import from_yaml, to_dict, to_yaml
from hpcm_scale.config.schema import Config
from hpcm_scale.errors import UserError
from hpcm_scale.files import write_text
from hpcm_scale.tracking.environment import environment
from hpcm_scale.training.checkpoints import Checkpoints

# What may change when a run goes on; everything else would make it another run.
_MAY_CHANGE = (
    "train.steps",
    "train.stop_after",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_skipped",
    "data.shards",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.retries",
    "data.timeout",
    "engine.world_size",
    "eval.",
    "log.",
    "run.",
)


@dataclass(frozen=True)
class Resume:
    """Where a command takes a run up."""

    checkpoint: Path | None
    """None: from nothing."""
    state: dict[str, Any]
    """The loop's state in the checkpoint; empty from nothing."""
    previous: Config | None

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return self.state.get("step", 0)


class RunFolder:
    """Everything a run leaves: configuration, journal, checkpoints, weights, environment."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.journal_file = self.path / "metrics.jsonl"
        self.weights_file = self.path / "weights.safetensors"
        self.environment_file = self.path / "environment.json"
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    def resume(self, config: Config, world_size: int, data_digest: str) -> Resume:
        """What of an earlier run this command continues; writes nothing.

        Raises UserError, naming the key, if the folder holds a different run.
        """
        if not self.config_file.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"run.dir={self.path} exists and is not a run; choose another run.dir")
            return Resume(None, {}, None)
        previous = from_yaml(self.config_file)
        self._refuse_other_run(previous, config)
        newest = self.checkpoints.newest()
        if newest is None:
            return Resume(None, {}, previous)
        checkpoint, state = newest
        resume = Resume(checkpoint, state, previous)
        if state["world_size"] != world_size:
            raise UserError(
                f"{self.path} was trained by {state['world_size']} processes, not {world_size}; start as many "
                "as before, or choose another run.dir"
            )
        if state["data"] != data_digest:
            raise UserError(
                f"data.shards={config.data.shards} holds other photos than {self.path} was trained on; name "
                "the same set, or choose another run.dir"
            )
        if config.train.steps < resume.step:
            raise UserError(
                f"{self.path} has {resume.step} steps already, more than train.steps={config.train.steps}; "
                "ask for more, or choose another run.dir"
            )
        return resume

    def write_facts(self, config: Config) -> None:
        """Record the resolved configuration and the environment, beside those of earlier starts."""
        write_text(self.config_file, to_yaml(config))
        starts = []
        if self.environment_file.is_file():
            starts = json.loads(self.environment_file.read_text(encoding="utf-8"))
        write_text(self.environment_file, json.dumps([*starts, environment()], indent=1))

    def _refuse_other_run(self, previous: Config, config: Config) -> None:
        before, now = _flat(to_dict(previous)), _flat(to_dict(config))
        for key, value in now.items():
            if before.get(key) != value and not key.startswith(_MAY_CHANGE):
                raise UserError(
                    f"{self.path} holds a run with {key}={before.get(key)}, not {value}; give the same value to "
                    "go on, or choose another run.dir"
                )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
