"""Scale shifts, which make files decodable on devices whose scales differ in the last digits (docs/file_format.md).

The encoder shifts each block of scales in ln(scale) by the least amount after which none is near the bound of a table,
and writes the shift; the decoder only applies it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcm_scale.entropy.range_coder import LOWEST, SPACING, TABLE_SIZE, SymbolReader, SymbolWriter, table_index


@dataclass(frozen=True)
class Tolerance:
    """Largest difference between the scales of two devices: `relative`·scale + `absolute`.

    The default exceeds the effect of relative noise of 1e-6 on the output of every layer, and is nine times that of
    fp32 arithmetic in another order (benchmarks/results/portable_decoding.md).
    """

    relative: float = 3e-5
    absolute: float = 2e-5


STEP = 3e-4
"""Unit of a shift, in ln(scale)."""
CHOICES = 255
"""A block is shifted by 0, 1, −1, 2, −2 … steps: up to a third of the distance between bounds."""
_CROWD = 2.0  # average scales near a bound in a block: more are hard to shift at once, fewer need more shifts
_BLOCK_SIZES = 24  # powers of two
_FREE = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)  # probability that a shift is chosen, in eight steps


@dataclass
class Shifts:
    """The shifts of an image: block size, index of their probability in `_FREE`, and choices (blocks,) of each step."""

    block_bits: int
    freedom: int
    choices: list[np.ndarray]

    def bits(self) -> float:
        """Bits of the shifts in the stream."""
        probabilities = np.array(_probabilities(self.freedom))
        chosen = np.concatenate(self.choices)
        return float(-np.log2(probabilities[chosen]).sum() + math.log2(_BLOCK_SIZES) + math.log2(len(_FREE)))


def choose_shifts(steps: list[Tensor], tolerance: Tolerance) -> Shifts:
    """Choose the shifts for the scales (n,) fp32 of each step.

    A block is not shifted if no shift moves all its scales away from bounds, which takes hundreds of scales.
    """
    near = math.fsum(_neighbourhood(scales, tolerance).sum().item() for scales in steps)
    total = sum(scales.numel() for scales in steps)
    longest = max(scales.numel() for scales in steps)
    wanted = _CROWD * total / max(near, 1e-9)
    block_bits = min(int(math.log2(max(wanted, 1))), (longest - 1).bit_length(), _BLOCK_SIZES - 1)
    choices = [_free_choices(scales, 2**block_bits, tolerance) for scales in steps]
    candidates = [Shifts(block_bits, freedom, choices) for freedom in range(len(_FREE))]
    return min(candidates, key=Shifts.bits)


def shifted_tables(scales: Tensor, block_bits: int, choices: np.ndarray) -> np.ndarray:
    """The table of each shifted scale, (n,) int64, for blocks of 2^block_bits scales."""
    signed = torch.as_tensor((choices + 1) // 2 * np.where(choices % 2 == 1, 1, -1))
    factors = torch.exp(signed.double() * STEP).float().to(scales.device)
    if len(choices) > 1:
        factors = factors.repeat_interleave(2**block_bits)[: scales.numel()]
    return table_index(scales.float() * factors).cpu().numpy()


def write_head(writer: SymbolWriter, shifts: Shifts) -> None:
    """Write the block size and the probability of the shifts."""
    writer.write_choices(np.array([shifts.block_bits]), _uniform(_BLOCK_SIZES))
    writer.write_choices(np.array([shifts.freedom]), _uniform(len(_FREE)))


def write_step(writer: SymbolWriter, shifts: Shifts, step: int) -> None:
    """Write the choices of one step."""
    writer.write_choices(shifts.choices[step], _probabilities(shifts.freedom))


class ShiftReader:
    """Reads what `write_head` and `write_step` wrote. Raises CorruptStream."""

    def __init__(self, reader: SymbolReader) -> None:
        self._reader = reader
        self.block_bits = int(reader.read_choices(1, _uniform(_BLOCK_SIZES))[0])
        self._probabilities = _probabilities(int(reader.read_choices(1, _uniform(len(_FREE)))[0]))

    def tables(self, scales: Tensor) -> np.ndarray:
        """Read the choices of a step; the tables of its scales (n,)."""
        blocks = -(-scales.numel() // 2**self.block_bits)
        return shifted_tables(scales, self.block_bits, self._reader.read_choices(blocks, self._probabilities))


def _neighbourhood(scales: Tensor, tolerance: Tolerance) -> Tensor:
    """The probability that each scale is near a bound, if it were uniform in ln(scale) between bounds."""
    return torch.where(_within_tables(scales), 2 / SPACING * (tolerance.relative + tolerance.absolute / scales), 0.0)


def _within_tables(scales: Tensor) -> Tensor:
    """Whether each scale, shifted by any amount, can be near a bound."""
    reach = math.exp(STEP * CHOICES)
    return (scales > LOWEST / reach) & (scales < LOWEST * math.exp(SPACING * (TABLE_SIZE - 2)) * reach)


def _free_choices(scales: Tensor, block: int, tolerance: Tolerance) -> np.ndarray:
    """The first choice of each block with no scale near a bound: (blocks,) int64."""
    blocks = -(-scales.numel() // block)
    position = torch.nonzero(_within_tables(scales))[:, 0]
    scale = scales[position].double()
    place = torch.log(scale / LOWEST)
    bound = (place / SPACING).round().clamp(0, TABLE_SIZE - 2) * SPACING
    reach = tolerance.relative + tolerance.absolute / scale
    # A scale excludes a shift of k steps if |place + k·STEP − bound| ≤ reach.
    first = torch.ceil((bound - place - reach) / STEP).long()
    last = torch.floor((bound - place + reach) / STEP).long()
    half = CHOICES // 2
    excluded = torch.zeros(blocks, CHOICES, dtype=torch.bool, device=scales.device)
    for k in range(int((last - first).max()) + 1 if len(position) else 0):
        shift = first + k
        valid = (shift <= last) & (shift.abs() <= half)
        shift = shift[valid]
        choice = torch.where(shift > 0, 2 * shift - 1, -2 * shift)
        excluded[position[valid] // block, choice] = True
    return excluded.logical_not().to(torch.uint8).argmax(dim=1).cpu().numpy()


def _probabilities(freedom: int) -> tuple[float, ...]:
    """Geometric, by multiplications only: equal on all devices."""
    values = [_FREE[freedom]]
    while len(values) < CHOICES:
        values.append(values[-1] * (1 - _FREE[freedom]))
    return tuple(values)


def _uniform(size: int) -> tuple[float, ...]:
    return (1.0,) * size
