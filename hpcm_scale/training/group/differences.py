"""What must be the same on all processes of a run, and where it is not."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from hpcm_scale import __version__
from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.schema import Config
from hpcm_scale.training.group.peers import Peer

Facts = Mapping[str, Mapping[str, Any]]
"""Plain JSON values by name, by kind."""

_MENDS = {
    "version": "install the same versions on all machines",
    "launch": "start all machines with the same hostfile and numbers",
    "setting": "type the same command on all machines",
    "photos": "give all machines the same shards",
    "run folder": "put run.dir on a file system that all machines share",
}


def facts(config: Config, data_digest: str) -> dict[str, dict[str, Any]]:
    """What a run's processes compare before they train; nothing of it may differ between machines."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "accelerate")}
    return {
        "version": {"Python": platform.python_version(), "hpcm_scale": __version__} | packages,
        "launch": {"WORLD_SIZE": os.environ.get("WORLD_SIZE", "1")},
        "setting": to_dict(config),
        "photos": {"digest": data_digest},
    }


def difference(peers: Sequence[Peer], all_facts: Sequence[Facts]) -> str | None:
    """The first difference to the first process's facts, in one sentence with its mend; None if there is none.

    Other kinds than those of `facts` may be compared, too: {"run folder": {"step": 40}}.
    """
    first = all_facts[0]
    for peer, other in zip(peers[1:], all_facts[1:], strict=True):
        for kind in first:
            found = _differing(first[kind], other.get(kind))
            if found:
                name, here, there = found
                return f"{peer} has {name}={there}, and {peers[0]} has {here}; {_MENDS[kind]}"
    return None


def _differing(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first entry that differs."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None if one == other else (name, one, other)
    for key in dict.fromkeys([*one, *other]):
        found = _differing(one.get(key), other.get(key), f"{name}.{key}" if name else key)
        if found:
            return found
    return None
