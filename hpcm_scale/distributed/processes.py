"""What the launcher told this process, and what it forgot."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch

from hpcm_scale.data.processes import available_cores
from hpcm_scale.devices import device_count, local_device


def world_size() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of this run on this machine, as far as the launcher says: DeepSpeed's has a name of its own for it."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size())))


def without_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """The user's arguments: the DeepSpeed launcher adds --local_rank=N, which Hydra would refuse."""
    return [argument for argument in arguments if not argument.startswith("--local_rank")]


def complete_environment() -> None:
    """Fill in what a process started without a launcher lacks, so that every run looks alike."""
    if "RANK" not in os.environ:
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(defaults, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))


def gpu_index() -> int | None:
    """The index of this process's GPU, None on the CPU. Raises UserError if it cannot have one."""
    count = device_count()
    if count == 0:
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_this_machine = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return local_device(local_rank, on_this_machine, count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def choose_device() -> None:
    """Settle what this process trains on. Raises UserError for a GPU that it cannot have."""
    if gpu_index() is not None:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        # CPU processes of one machine share its cores instead of fighting for them.
        torch.set_num_threads(max(1, available_cores() // local_world_size()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
