"""Command: check in about a minute whether the nodes of a job can train a configuration.

deepspeed --hostfile hostfile --module hpcm_scale.commands.check model=1b engine=zero3 data.shards=shards
"""

from __future__ import annotations

import sys
from pathlib import Path

from hpcm_scale.distributed import processes
from hpcm_scale.errors import Parser, entry_point
from hpcm_scale.preflight.check import check_cluster

PROBLEM = 1
"""Exit code if there is a problem."""


@entry_point
def main() -> None:
    """Entry point of `hpcm check` and `python -m hpcm_scale.commands.check`."""
    parser = Parser(
        prog="hpcm check",
        description="Measures on the nodes of a job, with the overrides of its training: versions and drivers, "
        "all-reduce within and between nodes, reading of the shards, and one step with its time and memory beside "
        "`hpcm estimate`. Prints tables and one sentence per problem. Launch it as the training, for example with "
        "`deepspeed --module hpcm_scale.commands.check model=1b …`. It takes about a minute and writes nothing to the "
        "run folder. Exit code 0: no problem; 1: a problem; 2: refused, as the training would be.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and problems to this file")
    arguments = parser.parse_intermixed_args(processes.without_launcher_arguments(sys.argv[1:]))
    if check_cluster(arguments.overrides, arguments.json):
        raise SystemExit(PROBLEM)


if __name__ == "__main__":
    main()
