"""`hpcm bench`: runs `bench.command` of the folder `benchmarks/`."""

from __future__ import annotations

import sys
from pathlib import Path

from hpcm_scale.errors import UserError, entry_point


def benchmarks_folder() -> Path:
    """The folder `benchmarks/`: beside the package in a checkout, inside it if installed as a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "benchmarks", package.parent / "benchmarks"):
        if (folder / "bench").is_dir():
            return folder
    raise UserError("no-benchmarks", "", "the folder benchmarks/ is missing; install hpcm_scale again")


@entry_point
def main() -> None:
    """Entry point of `hpcm bench`."""
    sys.path.insert(0, str(benchmarks_folder()))
    from bench.command import main

    main()
