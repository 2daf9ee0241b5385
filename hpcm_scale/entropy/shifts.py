"""What lets another device decode: no scale stands near a table's bound.

Two devices compute scales that differ in their last digits. Where a scale lies so near a table's bound that
those digits decide, encoder and decoder may take different tables, and all that follows is garbage. Telling
for each scale near a bound on which side it stood does not help: whether it is near is as uncertain. So the
scales are cut into blocks; the encoder shifts each block in ln(scale), by as little as frees all its scales
from the neighbourhood of every bound, and writes the shift. The decoder applies it and needs to know nothing
else. A block is so long that about two of its scales lie near a bound, and one try in several frees them.
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
    """How far another device's scale may lie from ours: `relative`·scale + `absolute`.

    The default is more than relative noise of 1e-6 on the output of every layer did to any scale, and nine
    times what fp32 arithmetic in another order did (benchmarks/results/portable_decoding.md).
    """

    relative: float = 3e-5
    absolute: float = 2e-5


STEP = 3e-4
"""Of a shift, in ln(scale)."""
CHOICES = 255
"""A block is shifted by 0, 1, −1, 2, −2 … steps: by up to a third of the distance of two bounds."""
_CROWD = 2.0  # scales near a bound in a block, on average: more are hard to free at once, fewer need more shifts
_BLOCK_SIZES = 24  # powers of two
_FREE = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)  # how often a shift frees a block, in eight steps


@dataclass
class Shifts:
    """The shifts of an image: the block size, how they are coded, and for each step its blocks' choices."""

    block_bits: int
    freedom: int
    choices: list[np.ndarray]

    def bits(self) -> float:
        """What they cost in the stream."""
        probabilities = np.array(_probabilities(self.freedom))
        chosen = np.concatenate(self.choices)
        return float(-np.log2(probabilities[chosen]).sum() + math.log2(_BLOCK_SIZES) + math.log2(len(_FREE)))


def choose_shifts(steps: list[Tensor], tolerance: Tolerance) -> Shifts:
    """The shifts for the scales of each step, each (n,) fp32.

    Where no shift frees a block, which takes hundreds of scales spread just so, it is left unshifted.
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
    """The table of each scale (n,) in blocks of 2^block_bits with these choices: (n,) int64."""
    signed = torch.as_tensor((choices + 1) // 2 * np.where(choices % 2 == 1, 1, -1))
    factors = torch.exp(signed.double() * STEP).float().to(scales.device)
    if len(choices) > 1:
        factors = factors.repeat_interleave(2**block_bits)[: scales.numel()]
    return table_index(scales.float() * factors).cpu().numpy()


def write_head(writer: SymbolWriter, shifts: Shifts) -> None:
    """Write what holds for all steps."""
    writer.write_choices(np.array([shifts.block_bits]), _uniform(_BLOCK_SIZES))
    writer.write_choices(np.array([shifts.freedom]), _uniform(len(_FREE)))


def write_step(writer: SymbolWriter, shifts: Shifts, step: int) -> None:
    """Write one step's choices."""
    writer.write_choices(shifts.choices[step], _probabilities(shifts.freedom))


class ShiftReader:
    """Reads what `write_head` and `write_step` wrote. Raises `CorruptStream`."""

    def __init__(self, reader: SymbolReader) -> None:
        self._reader = reader
        self.block_bits = int(reader.read_choices(1, _uniform(_BLOCK_SIZES))[0])
        self._probabilities = _probabilities(int(reader.read_choices(1, _uniform(len(_FREE)))[0]))

    def tables(self, scales: Tensor) -> np.ndarray:
        """The tables of a step's scales (n,), as `shifted_tables` gave them to the encoder."""
        blocks = -(-scales.numel() // 2**self.block_bits)
        return shifted_tables(scales, self.block_bits, self._reader.read_choices(blocks, self._probabilities))


def _neighbourhood(scales: Tensor, tolerance: Tolerance) -> Tensor:
    """For every scale the chance that it stands near a bound, were it anywhere between its bounds."""
    return torch.where(_within_tables(scales), 2 / SPACING * (tolerance.relative + tolerance.absolute / scales), 0.0)


def _within_tables(scales: Tensor) -> Tensor:
    """Whether a scale can come near a bound at all, however its block is shifted."""
    reach = math.exp(STEP * CHOICES)
    return (scales > LOWEST / reach) & (scales < LOWEST * math.exp(SPACING * (TABLE_SIZE - 2)) * reach)


def _free_choices(scales: Tensor, block: int, tolerance: Tolerance) -> np.ndarray:
    """The first choice of each block that leaves none of its scales near a bound: (blocks,) int64."""
    blocks = -(-scales.numel() // block)
    position = torch.nonzero(_within_tables(scales))[:, 0]
    scale = scales[position].double()
    place = torch.log(scale / LOWEST)
    bound = (place / SPACING).round().clamp(0, TABLE_SIZE - 2) * SPACING
    reach = tolerance.relative + tolerance.absolute / scale
    # A shift of k steps is forbidden to a scale if |place + k·STEP − bound| is at most its reach.
    first = torch.ceil((bound - place - reach) / STEP).long()
    last = torch.floor((bound - place + reach) / STEP).long()
    half = CHOICES // 2
    forbidden = torch.zeros(blocks, CHOICES, dtype=torch.bool, device=scales.device)
    for k in range(int((last - first).max()) + 1 if len(position) else 0):
        shift = first + k
        meant = (shift <= last) & (shift.abs() <= half)
        shift = shift[meant]
        choice = torch.where(shift > 0, 2 * shift - 1, -2 * shift)
        forbidden[position[meant] // block, choice] = True
    return forbidden.logical_not().to(torch.uint8).argmax(dim=1).cpu().numpy()


def _probabilities(freedom: int) -> tuple[float, ...]:
    """Geometric, by multiplications only, so that they are the same everywhere."""
    values = [_FREE[freedom]]
    while len(values) < CHOICES:
        values.append(values[-1] * (1 - _FREE[freedom]))
    return tuple(values)


def _uniform(size: int) -> tuple[float, ...]:
    return (1.0,) * size
