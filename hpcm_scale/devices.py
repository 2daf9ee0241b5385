"""The device of this process, chosen alike for training, coding and DeepSpeed."""

from __future__ import annotations

import errno
import os
import re
import warnings
from pathlib import Path

from hpcm_scale.errors import UserError

CUDA, CPU = "cuda", "cpu"
NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last one is set by Slurm."""


def device_kind(root: Path = Path("/")) -> str:
    """The default device type, "cuda" or "cpu".

    "cpu" if DS_ACCELERATOR=cpu or an empty CUDA_VISIBLE_DEVICES requests it, or if there is no GPU. `root` holds the
    system's /dev and /proc. Raises UserError if there are GPUs that torch cannot use, instead of silently training on
    the CPU, and for any other DS_ACCELERATOR.
    """
    accelerator = os.environ.get("DS_ACCELERATOR", CUDA)
    if accelerator not in (CUDA, CPU):
        raise UserError(
            "unknown-accelerator",
            "",
            f"DS_ACCELERATOR={accelerator} is not supported; set it to {CUDA} or {CPU}, or leave it unset",
        )
    if cpu_is_requested():
        return CPU
    import torch  # slow; commands that compute nothing do not import it

    with warnings.catch_warnings():  # torch warns about the driver
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return CUDA
    if any(_is_accessible(device) for device in (root / "dev").glob("nvidia[0-9]*")):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = f" with CUDA_VISIBLE_DEVICES={visible}" if visible else ""
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        driver = driver_version(root) or "of unknown version"
        raise UserError(
            "unusable-gpu",
            "",
            f"this node has NVIDIA GPUs with driver {driver}, but torch {torch.__version__}, {build}, cannot use "
            f"them{where}; install a driver and a torch that match, or set DS_ACCELERATOR=cpu to use the CPU",
        )
    if "DS_ACCELERATOR" in os.environ:
        raise UserError(
            "no-gpu", "", "DS_ACCELERATOR=cuda is set but torch finds no GPU; unset it, or set DS_ACCELERATOR=cpu"
        )
    return CPU


def cpu_is_requested() -> bool:
    """Whether DS_ACCELERATOR or CUDA_VISIBLE_DEVICES requests the CPU."""
    return os.environ.get("DS_ACCELERATOR") == CPU or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in NO_GPU


def device_count() -> int:
    """Number of GPUs visible to this process, 0 on the CPU. Raises UserError as `device_kind` does."""
    if device_kind() == CPU:
        return 0
    import torch

    return torch.cuda.device_count()


def local_device(local_rank: int, local_world_size: int, count: int, visible: str | None) -> int:
    """Index of a process's GPU among its `count` visible ones; `visible` is CUDA_VISIBLE_DEVICES.

    The local rank, or 0 if CUDA_VISIBLE_DEVICES lists a single GPU, as Slurm does for each process. Raises UserError
    if this node runs more processes than it has GPUs.
    """
    if count == 1 and visible is not None and "," not in visible:
        return 0
    processes = max(local_world_size, local_rank + 1)
    if processes > count:
        raise UserError(
            "more-processes-than-gpus",
            "",
            f"{processes} processes run on a node with {count} GPU{'s' if count > 1 else ''}; start one per GPU "
            "(--num_gpus, --nproc_per_node), or set DS_ACCELERATOR=cpu to use the CPU",
        )
    return local_rank


def _is_accessible(device: Path) -> bool:
    """Whether this process may open a device; Slurm reserves devices for other jobs."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError as error:
        return error.errno not in (errno.EPERM, errno.ENOENT)
    return True


def driver_version(root: Path = Path("/")) -> str | None:
    """Version of the NVIDIA driver, None without one."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\s(\d+(\.\d+)+)\s", text)
    return found and found[1]
