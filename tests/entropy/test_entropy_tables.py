"""The scales of the tables, and which one a symbol takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcm_scale.entropy.tables import scale_table, table_index


def test_table_is_log_spaced():
    table = scale_table()
    assert table.shape == (60,) and table.dtype == torch.float32
    assert table[0].item() == pytest.approx(0.12) and table[-1].item() == 64
    ratios = table[1:].double() / table[:-1]
    assert ratios.max().item() == pytest.approx((64 / 0.12) ** (1 / 59), rel=3e-7)
    assert ratios.min().item() == pytest.approx((64 / 0.12) ** (1 / 59), rel=3e-7)


@given(st.floats(-1, 200, width=32))
def test_index_counts_the_entries_below(scale):
    expected = sum(entry < scale for entry in scale_table().tolist()[:-1])
    assert table_index(torch.tensor(scale)).item() == expected


def test_an_entry_takes_its_own_table_and_the_last_takes_all_above():
    assert table_index(scale_table()).tolist() == list(range(60))
    assert table_index(torch.tensor([0.0, 0.12, 63.9, 1e6])).tolist() == [0, 0, 59, 59]


def test_shape_and_half_precision():
    scale = torch.rand(2, 3, 4, 5).transpose(1, 3)
    assert table_index(scale).shape == (2, 5, 4, 3)
    assert torch.equal(table_index(scale.bfloat16()), table_index(scale.bfloat16().float()))
