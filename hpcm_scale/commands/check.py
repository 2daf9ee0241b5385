"""Command: whether the nodes of a job can train a configuration, in about a minute, before it is trained.

deepspeed --hostfile hostfile --module hpcm_scale.commands.check model=1b engine=zero3 data.shards=shards
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from hpcm_scale.compute.hardware import LAUNCH_US, MFU, peak_flops
from hpcm_scale.config.compose import compose
from hpcm_scale.config.phases import phases
from hpcm_scale.config.schema import Config, Precision, Target
from hpcm_scale.distributed import processes
from hpcm_scale.distributed.ranks import facts
from hpcm_scale.distributed.rendezvous import Group, initialise, join, telling_refusals
from hpcm_scale.distributed.watch import Watch
from hpcm_scale.errors import Fault, Parser, is_first_process, one_line, refusals
from hpcm_scale.files import check_writable, write_json, writing
from hpcm_scale.model.ladder import sized
from hpcm_scale.preflight import findings, measurements
from hpcm_scale.preflight.findings import Checkpoints, Device, Figures, Step
from hpcm_scale.training import diagnostics
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.estimate import Estimate, checkpoint_bytes, estimate, launch_seconds
from hpcm_scale.training.run import check_room, lost_seconds, prepared_task
from hpcm_scale.training.run_folder import run_directory
from hpcm_scale.training.signals import deterministic
from hpcm_scale.training.start import Start, prepare

WRONG = 1
"""Exit code if something is wrong or suspicious."""
STALL_SECONDS = 600.0
"""Without progress: engine.compile takes longest."""


@one_line
def main() -> None:
    """Entry point of `hpcm check` and `python -m hpcm_scale.commands.check`."""
    arguments = _parser().parse_intermixed_args(processes.without_launcher_arguments(sys.argv[1:]))
    config = compose(arguments.overrides, sized)
    processes.complete_environment()
    if check_cluster(config, arguments.json):
        raise SystemExit(WRONG)


def _parser() -> Parser:
    parser = Parser(
        prog="hpcm check",
        description="Measures, on the nodes of a job and with the overrides of its training: versions and drivers, "
        "all-reduce within and between nodes, reading of the shards, and one step, its time and memory against "
        "`hpcm estimate`. Prints tables, and one sentence for each problem. Start it as training is started, for example by "
        "`deepspeed --module hpcm_scale.commands.check model=1b …`. It takes about a minute and writes nothing to the "
        "run folder. Exit code 0: no problem; 1: a problem; 2: refused, as training would be.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and sentences to this file")
    return parser


def check_cluster(config: Config, json_file: Path | None) -> bool:
    """Measure, print, and write all of it to `json_file` if one is named. Whether something is wrong.

    Every process of the launch calls it, and gets the same answer. Raises UserError for what training would refuse.
    """
    _stage("the configuration")
    with telling_refusals(), refusals():
        if json_file and is_first_process():
            check_writable(json_file)
        processes.choose_device()
        start = prepare(config, processes.world_size())
        check_room(config)
        needs = _needs(config) if is_first_process() else None
    compared = facts(config, start.index.digest)
    del compared["version"]  # reported, not refused
    group = join(compared, config.engine.init_timeout)
    stacks = Path(tempfile.gettempdir(), f"hpcm_check_stacks_{os.getuid()}")  # others may have theirs there
    orphaned: list[str] = []
    with (
        deterministic(config.engine.deterministic),
        Watch(group, STALL_SECONDS, stacks, lost_seconds(config), on_orphaned=orphaned.append) as watch,
        refusals(local=True),
    ):

        def alive() -> None:
            watch.alive()
            if orphaned:  # nobody waits for the answer
                raise Fault("the launcher of these processes is gone; type the command again")

        return _Check(config, start, group, needs, alive).run(json_file)


def _needs(config: Config) -> Estimate | None:
    """What `hpcm estimate` says of the first phase of crops, which is what is measured; None where it says nothing."""
    if config.objective.target != Target.human:
        return None
    first = replace(config, schedule=replace(config.schedule, crops=[], crop_boundaries=[]))
    return estimate(first, processes.world_size())


def _stage(name: str) -> None:
    """Progress, on process 0."""
    if is_first_process():
        print(f"checking {name} …", file=sys.stderr, flush=True)


def _show(text: Callable[[], str]) -> None:
    """A part of the report, on process 0."""
    if is_first_process():
        print(f"{text()}\n", flush=True)


class _Check:
    """One check in one process."""

    def __init__(
        self, config: Config, start: Start, group: Group, needs: Estimate | None, alive: Callable[[], None]
    ) -> None:
        self.config, self.start, self.group, self.needs, self.alive = config, start, group, needs, alive

    def run(self, json_file: Path | None) -> bool:
        """Each measurement, and what follows from them all."""
        config, group = self.config, self.group
        _stage("versions and drivers")
        nodes = measurements.nodes_of(group, config)
        _show(lambda: measurements.nodes_table(nodes))
        initialise(group, config.train.watchdog_timeout)
        engine = create_engine(config)
        devices = [Device(**values) for values in measurements.gathered(engine, asdict(measurements.device_of(engine)))]
        nodes = [replace(node, devices=[devices[rank] for rank in node.ranks]) for node in nodes]
        _show(lambda: measurements.devices_table(nodes))
        self.alive()
        if engine.world_size > 1:
            _stage("all-reduce")
        all_reduces = measurements.all_reduces(measurements.hosts_of(group), engine, self.alive)
        if all_reduces:
            _show(lambda: measurements.all_reduces_table(all_reduces))
        _stage("reading of the shards")
        data, kept = measurements.read_data(config, self.start.index, engine)
        _show(lambda: measurements.data_table(data))
        self.alive()
        _stage("a training step")
        timings, checkpoint = self._steps(engine, kept)
        found: list[str] = []
        if engine.rank == 0:
            step = self._step(engine, timings, all_reduces)
            figures = Figures(str(run_directory(config)), nodes, all_reduces, data, step, checkpoint)
            _show(lambda: measurements.step_table(figures))
            found = findings.sentences(figures)
            for sentence in found or ["nothing wrong was found"]:
                print(f"- {sentence}" if found else sentence, flush=True)
            if json_file:
                with writing(json_file):
                    write_json(json_file, findings.plain(figures, found))
        return any(engine.gather("wrong" if found else ""))

    def _steps(self, engine: Engine, kept: list) -> tuple[list[dict], Checkpoints]:
        """What every process measured of its steps, and the checkpoints to come."""
        config, train = self.config, self.config.train
        task = prepared_task(config, self.start, engine)
        trained = [weight for weight in task.module.parameters() if weight.requires_grad]
        parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in trained)  # ZeRO-3 keeps shards alone
        checkpoints = Checkpoints(
            bytes=checkpoint_bytes(parameters, len(train.ema)),
            most=train.keep_checkpoints + len(train.keep_at) + train.keep_best + 1,  # the one that is being written
        )
        try:
            with diagnostics.explaining(config, engine.world_size, engine.rank, folder=None):
                timing = measurements.time_steps(config, engine, task, kept, self.alive)
            return measurements.gathered(engine, timing), checkpoints
        finally:
            engine.close()

    def _step(self, engine: Engine, timings: list[dict], all_reduces: list[findings.AllReduce]) -> Step:
        """The step of all processes, beside what was estimated."""
        config, needs = self.config, self.needs
        seconds = max(timing["seconds"] for timing in timings)
        peak = peak_flops(engine.device, config.engine.precision == Precision.bf16) if needs else None
        widest = list(findings.fastest(all_reduces).values())[-1:]
        bandwidth = widest[0].bandwidth if widest else math.inf
        launch = launch_seconds(config, LAUNCH_US)
        return Step(
            seconds=seconds,
            images=phases(config)[0].batch_size,
            loss=timings[0]["loss"],
            peak=max(timing["peak"] for timing in timings) if engine.device.type == "cuda" else None,
            reserved=max(timing["reserved"] for timing in timings) if engine.device.type == "cuda" else None,
            estimated_peak=needs.memory.device if needs else None,
            utilisation=needs.flops_per_step / (peak * seconds) if peak else None,
            estimated_seconds=needs.times(peak, MFU, bandwidth, launch).overlapped if peak else None,
        )


if __name__ == "__main__":
    main()
