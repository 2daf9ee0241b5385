"""What this process computes on: one answer for training, the codec and DeepSpeed."""

from __future__ import annotations

import errno
import os
import re
import warnings
from pathlib import Path

from hpcm_scale.errors import UserError

CUDA, CPU = "cuda", "cpu"
NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that leave no GPU; the last one is Slurm's."""


def device_kind(root: Path = Path("/")) -> str:
    """What this process computes on where no device is named: "cuda" or "cpu".

    The CPU if DS_ACCELERATOR=cpu or CUDA_VISIBLE_DEVICES= asks for it, or if there is no GPU. `root` is where the
    system's /dev and /proc lie. Raises UserError for GPUs that torch cannot use, which would train on the CPU unseen,
    and for another DS_ACCELERATOR.
    """
    accelerator = os.environ.get("DS_ACCELERATOR", CUDA)
    if accelerator not in (CUDA, CPU):
        raise UserError(f"DS_ACCELERATOR={accelerator} is not supported; set it to {CUDA} or {CPU}, or leave it unset")
    if cpu_is_asked_for():
        return CPU
    import torch  # commands that compute nothing do without

    with warnings.catch_warnings():  # of torch, about the driver
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return CUDA
    if any(_is_given(device) for device in (root / "dev").glob("nvidia[0-9]*")):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = f" with CUDA_VISIBLE_DEVICES={visible}" if visible else ""
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        driver = driver_version(root) or "of unknown version"
        raise UserError(
            f"this machine has NVIDIA GPUs with driver {driver}, and torch {torch.__version__}, {build}, cannot "
            f"use them{where}; install a driver and a torch that fit each other, or set DS_ACCELERATOR=cpu for the CPU"
        )
    if "DS_ACCELERATOR" in os.environ:
        raise UserError("DS_ACCELERATOR=cuda is set, and torch finds no GPU; unset it, or set DS_ACCELERATOR=cpu")
    return CPU


def cpu_is_asked_for() -> bool:
    """Whether DS_ACCELERATOR or CUDA_VISIBLE_DEVICES asks for the CPU."""
    return os.environ.get("DS_ACCELERATOR") == CPU or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in NO_GPU


def device_count() -> int:
    """The GPUs that this process sees; 0 where it computes on the CPU. Raises UserError as `device_kind` does."""
    if device_kind() == CPU:
        return 0
    import torch

    return torch.cuda.device_count()


def local_device(local_rank: int, local_world_size: int, count: int, visible: str | None) -> int:
    """The index of a process's GPU among the `count` that it sees; `visible` is its CUDA_VISIBLE_DEVICES.

    That is its local rank, or 0 where CUDA_VISIBLE_DEVICES names one GPU, which is then its own, as under Slurm.
    Raises UserError if there are more processes on this machine than GPUs.
    """
    if count == 1 and visible is not None and "," not in visible:
        return 0
    processes = max(local_world_size, local_rank + 1)
    if processes > count:
        raise UserError(
            f"{processes} processes are started on a machine with {count} GPU{'s' if count > 1 else ''}; start one for "
            "each GPU (--num_gpus, --nproc_per_node), or set DS_ACCELERATOR=cpu to use the CPU"
        )
    return local_rank


def _is_given(device: Path) -> bool:
    """Whether a device is there for this process; the system may keep it for others, as Slurm has it do."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError as error:
        return error.errno not in (errno.EPERM, errno.ENOENT)
    return True


def driver_version(root: Path = Path("/")) -> str | None:
    """The version of NVIDIA's driver, None if there is none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\s(\d+(\.\d+)+)\s", text)
    return found and found[1]
