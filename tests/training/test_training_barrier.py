"""A barrier holds up the host, not the device alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import Tensor

from hpcm_scale.training.engine import Engine


def test_a_barrier_reads_the_sum():
    """As under NCCL, the sum is not there when `reduce` returns; here it never will be."""

    def reduce(values: Tensor) -> Tensor:
        return values.to("meta")

    with pytest.raises(NotImplementedError, match="meta tensor"):
        Engine.barrier(SimpleNamespace(reduce=reduce))
