"""The check of `hpcm check`: measures, prints tables and reports problems."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hpcm_scale.compute.hardware import LAUNCH_US, MFU, peak_flops
from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.schema import EngineConfig, Precision, Target
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.data.stream import Batch
from hpcm_scale.distributed import processes
from hpcm_scale.distributed.processes import format_ranks
from hpcm_scale.distributed.rendezvous import Group, facts, init_process_group, join, launcher_gone, share_errors
from hpcm_scale.distributed.watchdog import Watchdog
from hpcm_scale.errors import is_first_process, translate_os_errors
from hpcm_scale.files import check_writable, write_json, writing
from hpcm_scale.formatting import markdown_table
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.preflight import measurements
from hpcm_scale.preflight.findings import (
    GB,
    AllReduce,
    Checkpoints,
    Data,
    Figures,
    Node,
    Step,
    fastest,
    problems,
    to_json,
)
from hpcm_scale.training import diagnostics
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.estimate import Estimate, checkpoint_bytes, estimate, launch_seconds
from hpcm_scale.training.run import check_room, lost_seconds, prepared_task
from hpcm_scale.training.signals import deterministic
from hpcm_scale.training.start import Start, memory_remedies, prepare

STALL_SECONDS = 600.0
"""Time-out without progress; engine.compile takes longest."""
UNKNOWN = "not known"


def check_cluster(overrides: Sequence[str], json_file: Path | None) -> bool:
    """Measure, print the results, and write them to `json_file` if one is given; whether there are problems.

    All ranks of the launch call it and get the same result. Raises UserError where training would.
    """
    config = compose_sized(overrides)
    processes.complete_environment()
    _print_stage("the configuration")
    with share_errors(), translate_os_errors():
        if json_file and is_first_process():
            check_writable(json_file)
        processes.choose_device()
        start = prepare(config, processes.world_size())
        check_room(config.data, start.spec)
        estimated = _estimate(start) if is_first_process() else None
    compared = facts(to_dict(config), start.index.digest)
    del compared["version"]  # reported instead of refused
    group = join(compared, config.engine.init_timeout)
    stacks = Path(tempfile.gettempdir(), f"hpcm_check_stacks_{os.getuid()}")  # one per user
    orphaned: list[str] = []
    with (
        deterministic(config.engine.deterministic),
        Watchdog(
            group, STALL_SECONDS, stacks, lost_seconds(config.engine.compile), on_orphaned=orphaned.append
        ) as watchdog,
        translate_os_errors(local=True),
    ):

        def progress() -> None:
            watchdog.progress()
            if orphaned:
                raise launcher_gone()

        return _measure(start, group, estimated, progress, json_file)


def _estimate(start: Start) -> Estimate | None:
    """`hpcm estimate` of the first phase of crops, which is the one measured; None if it does not apply."""
    config = start.config
    if config.objective.target != Target.human:
        return None
    first = replace(config, schedule=replace(config.schedule, crops=[], crop_boundaries=[]))
    spec = RunSpec.of(first, start.spec.world_size)
    return estimate(spec, config.model, config.engine, config.optimizer, len(config.train.ema))


def _measure(
    start: Start,
    group: Group,
    estimated: Estimate | None,
    progress: Callable[[], None],
    json_file: Path | None,
) -> bool:
    """All measurements, in order; whether there are problems."""
    config = start.config
    _print_stage("versions and drivers")
    nodes = measurements.nodes_of(group, start.spec.folder)
    _print_table(lambda: nodes_table(nodes))
    init_process_group(group, config.train.watchdog_timeout)
    engine = create_engine(config.engine, config.train, config.optimizer, start.spec)
    devices = engine.gather(measurements.device_of(engine))
    nodes = [replace(node, devices=[devices[rank] for rank in node.ranks]) for node in nodes]
    _print_table(lambda: devices_table(nodes))
    progress()
    if engine.world_size > 1:
        _print_stage("all-reduce")
    all_reduces = measurements.all_reduces(measurements.hosts_of(group), engine, progress)
    if all_reduces:
        _print_table(lambda: all_reduces_table(all_reduces))
    _print_stage("reading of the shards")
    data, kept = measurements.read_data(config.data, config.train.seed, start.spec, start.index, engine)
    _print_table(lambda: data_table(data))
    progress()
    _print_stage("a training step")
    timings, checkpoints = _time_steps(start, engine, kept, progress)
    found: list[str] = []
    if engine.rank == 0:
        step = _step(config.engine, start.spec, engine, timings, estimated, all_reduces)
        figures = Figures(str(start.spec.folder), nodes, all_reduces, data, step, checkpoints)
        _print_table(lambda: step_table(figures))
        found = problems(figures)
        print("\n".join(f"- {problem}" for problem in found) or "no problem found", flush=True)
        if json_file:
            with writing(json_file):
                write_json(json_file, to_json(figures, found))
    return any(engine.gather(bool(found)))


def _time_steps(
    start: Start, engine: Engine, kept: list[Batch], progress: Callable[[], None]
) -> tuple[list[dict], Checkpoints]:
    """Measurements of all ranks (`time_steps`), and the checkpoints of the run."""
    config, train = start.config, start.config.train
    task = prepared_task(start, engine)
    size = checkpoint_bytes(task.module, config.optimizer, len(train.ema))
    most = train.keep_checkpoints + len(train.keep_at) + train.keep_best + 1  # one is being written
    try:
        with diagnostics.explain_out_of_memory(memory_remedies(config, engine.world_size), engine.rank, folder=None):
            timing = measurements.time_steps(train, config.schedule, engine, task, kept, progress)
        return engine.gather(timing), Checkpoints(size, most)
    finally:
        engine.close()


def _step(
    settings: EngineConfig,
    spec: RunSpec,
    engine: Engine,
    timings: Sequence[dict],
    estimated: Estimate | None,
    all_reduces: Sequence[AllReduce],
) -> Step:
    """The step of all ranks, with its estimate."""
    seconds = max(timing["seconds"] for timing in timings)
    on_gpu = engine.device.type == "cuda"
    peak_rate = peak_flops(engine.device, settings.precision == Precision.bf16)
    bandwidths = [math.inf, *(one.bandwidth for one in fastest(all_reduces).values())]
    utilisation = estimated_seconds = None
    if estimated and peak_rate:
        launch = launch_seconds(settings.compile, LAUNCH_US)
        utilisation = estimated.flops_per_step / (peak_rate * seconds)
        estimated_seconds = estimated.times(peak_rate, MFU, bandwidths[-1], launch).overlapped
    return Step(
        seconds=seconds,
        images=spec.phases[0].batch_size,
        loss=timings[0]["loss"],
        peak=max(timing["peak"] for timing in timings) if on_gpu else None,
        reserved=max(timing["reserved"] for timing in timings) if on_gpu else None,
        estimated_peak=estimated.memory.device if estimated else None,
        utilisation=utilisation,
        estimated_seconds=estimated_seconds,
    )


def _print_stage(name: str) -> None:
    if is_first_process():
        print(f"checking {name} …", file=sys.stderr, flush=True)


def _print_table(table: Callable[[], str]) -> None:
    if is_first_process():
        print(f"{table()}\n", flush=True)


def nodes_table(nodes: Sequence[Node]) -> str:
    """Versions and drivers, one row per node."""
    names = list(nodes[0].versions)
    rows = [
        [
            node.host,
            str(len(node.ranks)),
            *(node.versions.get(name) or "none" for name in names),
            node.driver_cuda or "none",
        ]
        for node in nodes
    ]
    headings = ["node", "processes", *names, "CUDA of the driver"]
    return markdown_table(headings, rows, words=len(headings))


def devices_table(nodes: Sequence[Node]) -> str:
    """Devices, one row per node and name."""
    rows = []
    for node in nodes:
        for name in dict.fromkeys(device.name for device in node.devices):
            alike = [device for device in node.devices if device.name == name]
            memory = min((device.memory for device in alike if device.memory is not None), default=None)
            in_use = max((device.in_use for device in alike if device.in_use is not None), default=None)
            ranks = format_ranks([device.rank for device in alike])
            rows.append([node.host, ranks, name, _gigabytes(memory), _gigabytes(in_use)])
    return markdown_table(["node", "ranks", "device", "memory (GB)", "in use before (GB)"], rows, words=3)


def all_reduces_table(all_reduces: Sequence[AllReduce]) -> str:
    """Time and bus bandwidth by size."""
    rows = [
        [one.among, str(one.processes)]
        + [f"{value:,.3g}" for value in (one.bytes / 1e6, one.seconds * 1e3, one.bandwidth / GB)]
        for one in all_reduces
    ]
    return markdown_table(["all-reduce", "processes", "MB", "ms", "GB/s"], rows)


def data_table(data: Data) -> str:
    """Throughput of the training data."""
    rows = [
        ["images read, one reader per process", f"{data.images:,.4g}", f"{data.bytes / 1e6:,.4g}"],
        [f"crops, data.workers={data.workers} per process", f"{data.crops:,.4g}", ""],
    ]
    return markdown_table(["data, all processes", "per second", "MB/s"], rows)


def step_table(figures: Figures) -> str:
    """The step beside its estimate, and free disk space beside the size of the checkpoints."""
    step, checkpoints = figures.step, figures.checkpoints
    utilisation = UNKNOWN if step.utilisation is None else f"{step.utilisation:.1%}"
    estimated = UNKNOWN if step.estimated_seconds is None else f"{step.estimated_seconds:,.4g}"
    rows = [
        ["seconds", f"{step.seconds:,.4g}", estimated],
        ["MFU", utilisation, ""],
        ["crops per second", f"{step.images / step.seconds:,.4g}", ""],
        ["device memory (GB)", _gigabytes(step.peak), _gigabytes(step.estimated_peak)],
        ["device memory reserved by torch (GB)", _gigabytes(step.reserved), ""],
        ["free for run.dir (GB)", f"{figures.nodes[0].disk_free / GB:,.2f}", ""],
        [f"{checkpoints.most} checkpoints (GB)", "", f"{checkpoints.most * checkpoints.bytes / GB:,.2f}"],
    ]
    return markdown_table([f"a step of {step.images} images", "measured", "estimated"], rows)


def _gigabytes(size: float | None) -> str:
    return UNKNOWN if size is None else f"{size / GB:,.2f}"
