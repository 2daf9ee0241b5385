"""`hpcm bench processes`: training steps of one process, of two separate ones, and of two that train together.

Weak scaling: every process has the same number of images, and one thread. Two separate processes measure the cost of
sharing the machine, two that train one model the cost of communication on top.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import torch

from bench.arguments import choice
from bench.machine import machine
from bench.report import Report, Table, with_quartiles
from bench.timing import Quartiles, alternate, ratio, seconds
from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.data.processes import follow_parent
from hpcm_scale.distributed.processes import choose_device
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.task import image_noise

ONE, SEPARATE, TOGETHER = "one process", "two separate", "two together"
_TRACE_STEPS = 2
"""Steps in which ZeRO-3 records its order, before it prefetches."""


class Scaling(NamedTuple):
    """Seconds per step with one engine, per round."""

    engine: str
    one: list[float]
    separate: list[float]
    """The slower of two processes that train a model each."""
    together: list[float]

    @property
    def efficiency(self) -> Quartiles:
        """Images per second and process of two that train together, relative to one."""
        return ratio(self.one, self.together)

    @property
    def sharing(self) -> Quartiles:
        """The same for two separate processes: the efficiency of sharing the machine."""
        return ratio(self.one, self.separate)

    @property
    def communication(self) -> Quartiles:
        """Two together relative to two separate: the efficiency of communication."""
        return ratio(self.separate, self.together)


def measure_processes(
    preset: str, images: int, crop: int, rounds: int, engines: Sequence[str] = ("zero2", "zero3")
) -> list[Scaling]:
    """Time training steps over `images` crops of side `crop` per process, fp32 on the CPU.

    `engines`: presets of conf/engine. Raises UserError if a process fails.
    """
    return [_measure(engine, _overrides(preset, images, crop, engine), rounds) for engine in engines]


def _overrides(preset: str, images: int, crop: int, engine: str) -> list[str]:
    return [*choice(preset), f"data.crop={crop}", f"engine={engine}", f"train.micro_batch_size={images}"]


def _measure(engine: str, overrides: list[str], rounds: int) -> Scaling:
    with ExitStack() as stack:
        first, second = (stack.enter_context(_processes(1, overrides)) for _ in range(2))
        both = stack.enter_context(_processes(2, overrides))
        candidates = {
            ONE: lambda: _step(first),
            SEPARATE: lambda: _step([*first, *second]),
            TOGETHER: lambda: _step(both),
        }
        samples = alternate(candidates, rounds, torch.device("cpu"), warm_up=1 + _TRACE_STEPS, description=engine)
    return Scaling(engine, *(seconds(samples[name]) for name in candidates))


@contextmanager
def _processes(world_size: int, overrides: list[str]) -> Iterator[list[Connection]]:
    """Connections to the processes of a new group, which take a step per message."""
    spawn = multiprocessing.get_context("spawn")
    batch = next(int(value.partition("=")[2]) for value in overrides if value.startswith("train.micro_batch_size="))
    overrides = [*overrides, f"train.batch_size={world_size * batch}"]
    port, started, connections = _free_port(), [], []
    try:
        for rank in range(world_size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, rank, world_size, port, overrides), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            connections.append(ours)
        for connection in connections:
            _receive(connection)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in started:
            process.join()


def _step(connections: Sequence[Connection]) -> None:
    """One step of all processes at the same time."""
    for connection in connections:
        connection.send(True)
    for connection in connections:
        _receive(connection)


def _receive(connection: Connection) -> None:
    try:
        connection.recv()
    except EOFError:
        raise UserError(
            "benchmark-process-failed", "", "a process of the benchmark failed; its error is printed above"
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(connection: Connection, rank: int, world_size: int, port: int, overrides: list[str]) -> None:
    """A process of a group: prepares training, then takes a step per message until the connection closes."""
    follow_parent()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    choose_device()
    torch.set_num_threads(1)
    config = compose_sized(overrides)
    engine = create_engine(config.engine, config.train, config.optimizer, RunSpec.of(config, world_size))
    torch.manual_seed(config.train.seed)
    model = HPCM(config.model, precision=config.engine.precision)
    engine.prepare(model)
    try:
        connection.send(True)
        while connection.recv():
            _train_step(config, engine, model)
            connection.send(True)
    except (EOFError, BrokenPipeError):
        engine.close()
        torch.distributed.destroy_process_group()


def _train_step(config: Config, engine: Engine, model: HPCM) -> None:
    count, side = config.train.micro_batch_size, config.data.crop
    images = torch.rand(count, 3, side, side).to(memory_format=torch.channels_last)
    coded = engine.module(images, image_noise(model, images, torch.arange(count), config.train.seed))
    loss = rate_distortion_loss(images, coded.x_hat, coded.bits_y, coded.bits_z, config.objective.lmbda).mean().loss
    engine.backward(loss)
    engine.step(0.0, float(engine.clip()))


def processes_report(preset: str, images: int, crop: int, measured: Sequence[Scaling]) -> Report:
    """Tables and numbers of `measure_processes`."""
    rows = [
        [
            scaling.engine,
            *(f"{median(times):.3f}" for times in (scaling.one, scaling.separate, scaling.together)),
            with_quartiles(scaling.efficiency, 1, " %", 100),
            with_quartiles(scaling.sharing, 1, " %", 100),
            with_quartiles(scaling.communication, 1, " %", 100),
        ]
        for scaling in measured
    ]
    crops = f"{images} crop{'s' * (images > 1)} of {crop}²"
    return Report(
        name="processes",
        title=f"Training steps of {preset} on one process and on two: {crops} each",
        machine=machine(torch.device("cpu")),
        tables=[
            Table(
                title="",
                headings=[
                    "engine",
                    ONE,
                    SEPARATE,
                    TOGETHER,
                    "scaling efficiency",
                    "sharing the machine",
                    "communication",
                ],
                rows=rows,
                notes=[
                    f"Seconds per step and ratios, fp32, one thread per process, gloo over loopback; medians of "
                    f"{len(measured[0].one)} alternating rounds, in brackets the quartiles of the rounds' ratios.",
                    "Scaling efficiency: images per second and process of two that train one model, relative to one. "
                    "It is the product of the efficiencies of machine sharing (two separate processes) and of "
                    "communication (two together relative to two separate).",
                ],
            )
        ],
        results=_numbers(preset, images, crop, measured),
    )


def _numbers(preset: str, images: int, crop: int, measured: Sequence[Scaling]) -> dict[str, Any]:
    engines = [
        {
            **scaling._asdict(),
            "efficiency": scaling.efficiency._asdict(),
            "sharing": scaling.sharing._asdict(),
            "communication": scaling.communication._asdict(),
        }
        for scaling in measured
    ]
    return {"model": preset, "images_per_process": images, "crop": crop, "engines": engines}
