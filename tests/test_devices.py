"""The choice of the device, and errors where a GPU would stay unused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hpcm_scale.devices import cpu_is_requested, device_kind, local_device
from hpcm_scale.distributed import processes
from hpcm_scale.errors import UserError
from hpcm_scale.model.weights import device_of

VERSION = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""


@pytest.fixture(autouse=True)
def no_usable_gpu(monkeypatch):
    """Nothing requests the CPU, and torch finds no GPU."""
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")


@pytest.fixture
def gpu_machine(tmp_path) -> Path:
    """The files by which a machine with GPUs is known."""
    for file in ("dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "proc/driver/nvidia/version"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(VERSION)
    return tmp_path


def test_gpus_that_torch_cannot_use_are_refused(gpu_machine):
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    with pytest.raises(UserError) as refused:
        device_kind(gpu_machine)
    assert refused.value.code == "unusable-gpu"
    for part in ("driver 535.104.05", f"torch {torch.__version__}, {build}", "with CUDA_VISIBLE_DEVICES=99"):
        assert part in str(refused.value)


def test_a_driver_without_a_version_is_refused_too(gpu_machine):
    (gpu_machine / "proc/driver/nvidia/version").unlink()
    with pytest.raises(UserError, match="driver of unknown version, but torch"):
        device_kind(gpu_machine)


@pytest.mark.parametrize(
    ("name", "value"), [("DS_ACCELERATOR", "cpu"), *(("CUDA_VISIBLE_DEVICES", value) for value in ("", "-1"))]
)
def test_the_cpu_can_be_requested(gpu_machine, monkeypatch, name, value):
    assert not cpu_is_requested()
    monkeypatch.setenv(name, value)
    assert cpu_is_requested() and device_kind(gpu_machine) == "cpu"


def test_a_container_without_gpus_on_a_machine_with_them_computes_on_the_cpu(gpu_machine):
    """It sees the version of the driver, or devices that it may not open."""
    for device in (gpu_machine / "dev").glob("nvidia[0-9]"):
        device.unlink()
        device.symlink_to(gpu_machine / "nothing")
    assert device_kind(gpu_machine) == "cpu"


def test_a_machine_without_gpus_computes_on_the_cpu(tmp_path):
    assert device_kind(tmp_path) == "cpu"


@pytest.mark.parametrize(("value", "code"), [("xpu", "unknown-accelerator"), ("cuda", "no-gpu")])
def test_an_unavailable_accelerator_is_refused(tmp_path, monkeypatch, value, code):
    monkeypatch.setenv("DS_ACCELERATOR", value)
    with pytest.raises(UserError, match=f"DS_ACCELERATOR={value}") as refused:
        device_kind(tmp_path)
    assert refused.value.code == code


def test_commands_follow_the_same_rule_unless_they_name_a_device(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(UserError, match="DS_ACCELERATOR=xpu"):
        device_of(None)
    assert device_of("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("local_rank", "local_world_size", "count", "visible", "index"),
    [
        (0, 1, 1, None, 0),
        (0, 1, 8, None, 0),
        (3, 4, 4, "0,1,2,3", 3),
        (2, 4, 8, None, 2),
        (3, 1, 4, None, 3),  # a launcher that does not tell how many there are
        (3, 4, 1, "3", 0),  # Slurm gives each task a GPU of its own
        (3, 4, 1, "0", 0),  # in a control group, where all are the first
        (1, 2, 1, "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 0),
    ],
)
def test_a_process_takes_the_gpu_of_its_local_rank_or_its_only_one(local_rank, local_world_size, count, visible, index):
    assert local_device(local_rank, local_world_size, count, visible) == index


@pytest.mark.parametrize(
    ("local_rank", "local_world_size", "count", "visible", "said"),
    [
        (0, 8, 4, "0,1,2,3,4,5,6,7", "8 processes run on a node with 4 GPUs"),
        (7, 8, 4, "0,1,2,3,4,5,6,7", "8 processes run on a node with 4 GPUs"),
        (1, 2, 1, "0,1", "2 processes run on a node with 1 GPU;"),
        (0, 2, 1, None, "2 processes run on a node with 1 GPU;"),
        (4, 1, 4, None, "5 processes run on a node with 4 GPUs"),
    ],
)
def test_more_processes_than_gpus_are_refused(local_rank, local_world_size, count, visible, said):
    with pytest.raises(UserError, match=said):
        local_device(local_rank, local_world_size, count, visible)


def test_the_variables_of_the_launcher_are_used(monkeypatch):
    monkeypatch.setattr(processes, "device_count", lambda: 4)  # there are none here
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_SIZE", "4")  # as DeepSpeed has it
    assert processes.gpu_index() == 3
    monkeypatch.setenv("LOCAL_SIZE", "8")
    with pytest.raises(UserError, match="8 processes"):
        processes.choose_device()


def test_the_device_is_chosen_in_one_place(project):
    """`torch.cuda.is_available` knows nothing of DS_ACCELERATOR."""
    files = (project / "hpcm_scale").rglob("*.py")
    asking = [file.name for file in files if re.search(r"cuda\.is_available|is_cuda_available", file.read_text())]
    assert asking == ["devices.py"]
