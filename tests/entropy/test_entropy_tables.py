"""The scales of the tables, and which one a symbol takes."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcm_scale.entropy.generalized_gaussian import likelihood
from hpcm_scale.entropy.range_coder import frequencies, scale_table, table_index

FREQUENCIES_DIGEST = "3837c685e5151d0a118b81ce4b88a8015650ddbe00f6bc9d94409d42818d1efa"


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


def table_scales() -> list[float]:
    """Of every table: its own bound at both ends, the geometric mean of its bounds between."""
    bounds = scale_table().double().tolist()
    means = [(low * high) ** 0.5 for low, high in pairwise(bounds)]
    return [bounds[0], *means[:-1], bounds[-1]]


@pytest.mark.parametrize("table", [0, 1, 7, 20, 41, 58, 59])
def test_frequencies_are_the_likelihoods(table):
    counts = torch.tensor(frequencies(table), dtype=torch.float64)
    widest = len(counts) // 2 - 1
    symbols = torch.arange(-widest, widest + 1, dtype=torch.float64)
    exact = likelihood(symbols, torch.full_like(symbols, table_scales()[table])) * 2**24
    assert counts.sum() == 2**24 and counts.min() >= 1
    assert torch.equal(counts[:-1], counts[:-1].flip(0))
    # rounded down by less than 1, but to no less than 1; what is left over is given to 0
    rest = symbols != 0
    assert ((exact.clamp(min=1) - counts[:-1])[rest] > -1e-4 * exact[rest]).all()
    assert ((exact - counts[:-1])[rest] < 1 + 1e-4 * exact[rest]).all()
    scale = torch.tensor(table_scales()[table], dtype=torch.float64)
    assert likelihood(symbols[-1], scale) > 0.999e-9 > likelihood(symbols[-1] + 1, scale) * 0.998
    assert counts[widest] == pytest.approx(exact[widest].item(), abs=len(counts), rel=1e-4)
    assert counts[-1] == pytest.approx(2**24 - exact.sum().item(), abs=2 + 2e-5 * 2**24)


def test_frequencies_never_change():
    """They are part of the file format: whoever changes them makes every file unreadable, or a new version."""
    written = ";".join(",".join(map(str, frequencies(table))) for table in range(60))
    assert hashlib.sha256(written.encode()).hexdigest() == FREQUENCIES_DIGEST
