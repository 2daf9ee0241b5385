"""A barrier holds up the host, not the device alone."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from hpcm_scale.training.engines.base import Engine


def test_a_barrier_reads_the_sum():
    """As under NCCL, the sum is not there when `reduce` returns; here it never will be."""

    def reduce(values: Tensor) -> Tensor:
        return values.to("meta")

    with pytest.raises(NotImplementedError, match="meta tensor"):
        Engine.barrier(SimpleNamespace(reduce=reduce))


def test_the_warning_of_torch_about_a_barrier_on_a_gpu_is_not_printed(monkeypatch):
    """Only there, and only of a process alone: here of a group that says it computes on a GPU."""
    from hpcm_scale.training.engines.deepspeed import BARRIER_WARNING

    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(distributed_c10d, "_get_object_coll_device", lambda group: "cuda")
    monkeypatch.setattr(distributed_c10d, "_rank_not_in_group", lambda group: False)
    group = SimpleNamespace(rank=lambda: 0, barrier=lambda opts: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            torch.distributed.barrier(group)
        warnings.filterwarnings("ignore", BARRIER_WARNING, UserWarning)
        torch.distributed.barrier(group)
