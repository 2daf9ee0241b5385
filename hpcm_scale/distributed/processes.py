"""Environment variables that launchers set, and those that are missing without one."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch

from hpcm_scale.data.processes import available_cores
from hpcm_scale.devices import device_count, local_device


def world_size() -> int:
    """Number of ranks of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size(default: int | None = None) -> int:
    """Number of ranks on this node; DeepSpeed and torchrun set variables of different names.

    Without either, `default`, or the world size.
    """
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", default or world_size())))


def without_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """The user's arguments, without the --local_rank=N that DeepSpeed's launcher adds."""
    return [argument for argument in arguments if not argument.startswith("--local_rank")]


def complete_environment() -> None:
    """Set the variables of a launcher for a single process that was started without one."""
    if "RANK" not in os.environ:
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(defaults, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))


def gpu_index() -> int | None:
    """Index of this rank's GPU, None on the CPU. Raises UserError if there are fewer GPUs than local ranks."""
    count = device_count()
    if count == 0:
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return local_device(local_rank, local_world_size(default=1), count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def choose_device() -> None:
    """On the CPU set DeepSpeed's accelerator and the number of threads. Raises UserError as `gpu_index` does."""
    if gpu_index() is not None:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_world_size()))  # ranks of a node share its cores


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
