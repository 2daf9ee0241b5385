"""What to do when a device runs out of memory: which key to change, and what the memory held."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from hpcm_scale.config.checks import check, micro_batch_size
from hpcm_scale.config.schema import Checkpointing, Config, EngineName
from hpcm_scale.devices import CUDA, device_kind
from hpcm_scale.errors import Fault, UserError, in_a_line
from hpcm_scale.files import write_text

FOLDER = "out_of_memory"
"""Of a run folder."""
NOTHING_LEFT = "take more devices, smaller crops (data.crop) or a smaller model"


@contextmanager
def explaining(config: Config, world_size: int, rank: int, folder: Path | None) -> Iterator[None]:
    """A torch.OutOfMemoryError in here becomes a Fault that names the keys to change.

    What the memory of the device holds is written to `folder`, if one is given: that of a run that has begun. Use it
    where the tensors of the training are still alive.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        keys = remedies(config, world_size)
        again = "the same command goes on" if folder else "type the command again"
        change = f"set {' or '.join(keys)}, and {again}" if keys else NOTHING_LEFT
        report = write_report(folder, rank, error) if folder else None
        where = f"; what the memory held is in {report}" if report else ""
        raise Fault(f"process {rank} ran out of memory ({_shortened(error)}); {change}{where}") from error


def _shortened(error: torch.OutOfMemoryError) -> str:
    """What torch says first: how much was asked for, and how much there is."""
    return ". ".join(in_a_line(error).split(". ")[:3]).removesuffix(".")


def remedies(config: Config, world_size: int) -> list[str]:
    """Settings, as typed on the command line, that need less device memory and that this run does not use yet.

    A run goes on with each of them. The cheapest comes first: smaller micro-batches cost least time, offload most.
    """
    return [text for text, changed in _settings(config, world_size) if _is_valid(changed, world_size)]


def _settings(config: Config, world_size: int) -> Iterator[tuple[str, Config]]:
    engine, images = config.engine, micro_batch_size(config, world_size)
    if images > 1:
        smaller = max(size for size in range(1, images) if images % size == 0)
        yield (
            f"train.micro_batch_size={smaller}",
            replace(config, train=replace(config.train, micro_batch_size=smaller)),
        )
    if engine.checkpoint != Checkpointing.steps:
        stronger = Checkpointing.blocks if engine.checkpoint == Checkpointing.none else Checkpointing.steps
        yield f"engine.checkpoint={stronger.value}", replace(config, engine=replace(engine, checkpoint=stronger))
    deepspeed = replace(engine, name=EngineName.deepspeed)
    if world_size > 1 and engine.zero_stage < 2:
        yield "engine=zero2", replace(config, engine=replace(deepspeed, zero_stage=2))
    elif world_size > 1 and engine.zero_stage < 3:
        yield "engine=zero3", replace(config, engine=replace(deepspeed, zero_stage=3))
    elif not engine.offload:
        yield "engine=zero3_offload", replace(config, engine=replace(deepspeed, zero_stage=3, offload=True))


def _is_valid(config: Config, world_size: int) -> bool:
    with suppress(UserError):
        check(config, world_size)
        return True
    return False


def write_report(folder: Path, rank: int, error: torch.OutOfMemoryError) -> Path | None:
    """Write the error and torch's summary of the memory to `folder`/rank_00000.txt; returns that file.

    On CUDA a snapshot for https://pytorch.org/memory_viz is written beside it. Its blocks have no stack traces: to
    record them would slow down every step. None if nothing could be written.
    """
    file = folder / f"rank_{rank:05d}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        on_cuda = device_kind() == CUDA
        summary = torch.cuda.memory_summary() if on_cuda else "the memory of the CPU is not recorded"
        write_text(file, f"{error}\n\n{summary}\n")
        if on_cuda:
            torch.cuda.memory._dump_snapshot(os.fspath(file.with_suffix(".pickle")))
    except (OSError, RuntimeError):
        return None
    return file
