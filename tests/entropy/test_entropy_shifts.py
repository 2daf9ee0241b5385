"""No device whose scales differ a little takes another table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcm_scale.entropy.range_coder import SymbolReader, SymbolWriter, scale_table, table_index
from hpcm_scale.entropy.shifts import (
    ShiftReader,
    Tolerance,
    choose_shifts,
    shifted_tables,
    write_head,
    write_step,
)

TOLERANCE = Tolerance()


def scales_of(seed: int, count: int, kind: str) -> torch.Tensor:
    """fp32 scales as networks give them: spread over the tables, mostly below them, or crowding at the bounds."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "spread":
        return torch.exp(torch.rand(count, generator=generator) * 7 - 2.3)
    if kind == "small":
        return torch.randn(count, generator=generator) * 0.1 + 0.1
    at = scale_table()[torch.randint(60, (count,), generator=generator)]
    return at * (1 + 1e-5 * torch.randn(count, generator=generator))


def nudged(scales: torch.Tensor, seed: int) -> torch.Tensor:
    """Scales of another device: anywhere within 0.9 of the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    reach = TOLERANCE.relative * scales.abs() + TOLERANCE.absolute
    return scales + (torch.rand(scales.shape, generator=generator) * 2 - 1) * 0.9 * reach


def coded(steps: list[torch.Tensor], tolerance: Tolerance) -> tuple[bytes, list[np.ndarray]]:
    """The shifts as a decoder gets them, and the encoder's tables."""
    shifts, writer = choose_shifts(steps, tolerance), SymbolWriter()
    write_head(writer, shifts)
    for step in range(len(steps)):
        write_step(writer, shifts, step)
    return writer.bytes, [
        shifted_tables(scales, shifts.block_bits, choices)
        for scales, choices in zip(steps, shifts.choices, strict=True)
    ]


def disagreements(steps: list[torch.Tensor], tolerance: Tolerance, seed: int) -> int:
    data, expected = coded(steps, tolerance)
    reader = ShiftReader(SymbolReader(data))
    read = [reader.tables(nudged(scales, seed + i)) for i, scales in enumerate(steps)]
    return sum(int((a != b).sum()) for a, b in zip(read, expected, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(1, 5000), st.sampled_from(["spread", "small"])), min_size=1, max_size=4),
)
def test_another_device_takes_the_same_tables(seed, kinds):
    steps = [scales_of(seed + i, count, kind) for i, (count, kind) in enumerate(kinds)]
    assert disagreements(steps, TOLERANCE, seed) == 0


def test_without_shifts_it_does_not():
    steps = [scales_of(0, 200_000, "spread")]
    assert disagreements(steps, Tolerance(0, 0), 1) > 10


def test_scales_at_the_bounds_are_freed():
    steps = [scales_of(3, 20_000, "bounds")]
    assert disagreements(steps, TOLERANCE, 4) == 0
    assert disagreements(steps, Tolerance(0, 0), 4) > 1000


def test_tables_stay_near_the_scales():
    """A shift moves a scale by at most one table."""
    steps = [scales_of(5, 50_000, "spread")]
    _, (tables,) = coded(steps, TOLERANCE)
    assert np.abs(tables - table_index(steps[0]).numpy()).max() <= 1


def test_quiet_scales_cost_next_to_nothing():
    shifts = choose_shifts([torch.full((40_000,), 0.05)] * 11, TOLERANCE)
    assert shifts.bits() < 12
    assert all((choices == 0).all() for choices in shifts.choices)


def test_cost_is_a_few_bits_for_each_scale_near_a_bound():
    steps = [scales_of(seed, 40_000, "spread") for seed in range(11)]
    log_distance = [(torch.log(scales[:, None]) - torch.log(scale_table())).abs().amin(dim=1) for scales in steps]
    near = sum(
        int((distance < TOLERANCE.relative + TOLERANCE.absolute / scales).sum())
        for distance, scales in zip(log_distance, steps, strict=True)
    )
    shifts = choose_shifts(steps, TOLERANCE)
    assert near > 100
    assert shifts.bits() < 4 * near
    data, _ = coded(steps, TOLERANCE)
    assert 8 * len(data) == pytest.approx(shifts.bits(), abs=70)  # two words end a stream


def test_one_scale_and_odd_lengths():
    for count in (1, 2, 1023, 1025):
        assert disagreements([scales_of(7, count, "spread")], TOLERANCE, 8) == 0
