"""`hpcm check` on three processes, the last of which is taken for another node with an older deepspeed."""

from __future__ import annotations

import os

from quick_check import main

from hpcm_scale.preflight import measurements
from hpcm_scale.tracking.environment import environment


def found() -> dict:
    """What is installed, but for one version."""
    there = environment()
    if os.environ["RANK"] == "2":
        there["packages"]["deepspeed"] = "0.0.1"
    return there


measurements.hosts_of = lambda group: {"a": [0, 1], "b": [2]}
measurements.environment = found

if __name__ == "__main__":
    main()
