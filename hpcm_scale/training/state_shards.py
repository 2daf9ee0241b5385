"""What training changes, in pieces that belong to no engine: parts of named parameters and of their Adam moments.

So a checkpoint that one engine wrote with any number of processes is read by another with any other number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpcm_scale.devices import CUDA
from hpcm_scale.files import utf_8_path

ALIGNMENT = 64
"""Elements, of fp32: where a copy of a piece may begin in host memory."""
KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""A parameter, and Adam's running means of its gradient and of the gradient's square."""


class Piece(NamedTuple):
    """A part of one flattened tensor."""

    kind: str
    """One of KINDS, or an average of the weights (`averages.kind_of`)."""
    name: str
    """The parameter's name in the model."""
    start: int
    """Where it begins in the flattened parameter."""
    values: Tensor
    """The living fp32 values (n,): written to, they are trained on."""

    @property
    def key(self) -> str:
        """What it is called in a file."""
        return f"{self.kind}/{self.name}@{self.start}"


def share(pieces: Sequence[Piece], rank: int, world_size: int) -> list[Piece]:
    """Of pieces that every process holds alike, the part that process `rank` writes: an even one of their elements."""
    total = sum(piece.values.numel() for piece in pieces)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    part, position = [], 0
    for piece in pieces:
        start, stop = (min(max(edge - position, 0), piece.values.numel()) for edge in (first, last))
        if start < stop:
            part.append(piece._replace(start=piece.start + start, values=piece.values[start:stop]))
        position += piece.values.numel()
    return part


class HostCopy:
    """A copy of pieces in one buffer in host memory, which is used again for the next copy of the same pieces."""

    def __init__(self, pin: bool) -> None:
        """`pin`: whether the buffer is pinned, for pieces on a CUDA device; `close` gives it back.

        Where the system does not let it be pinned, copies take longer.
        """
        self._pin, self._pinned = pin, False
        self._buffer: Tensor | None = None
        self._tensors: dict[str, Tensor] = {}

    def take(self, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """Copy the pieces; the copies, by `Piece.key`, are valid until the next call."""
        if self._buffer is None:
            self._reserve(pieces)
        for piece in pieces:
            self._tensors[piece.key].copy_(piece.values, non_blocking=True)
        if self._pin:
            torch.cuda.synchronize()
        return self._tensors

    def _reserve(self, pieces: Sequence[Piece]) -> None:
        sizes = [piece.values.numel() for piece in pieces]
        rooms = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self._buffer = torch.empty(sum(rooms), dtype=torch.float32)
        self._pinned = self._pin and _pinned(self._buffer)
        parts = self._buffer.split(rooms)
        self._tensors = {piece.key: part[:size] for piece, part, size in zip(pieces, parts, sizes, strict=True)}

    def close(self) -> None:
        """Free the buffer."""
        if self._pinned:  # where that fails, the device has failed before, which is what is to be told
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._tensors, self._pinned = None, {}, False


def _pinned(buffer: Tensor) -> bool:
    """Pin a buffer in place, for torch's own pinned memory comes in powers of two; whether that could be done."""
    if not buffer.nbytes:
        return False
    if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0:
        return True
    with suppress(RuntimeError):  # CUDA reports it once more, to whatever launches a kernel next
        torch.zeros(1, device=CUDA)
    return False


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write copied pieces to a safetensors file. Raises OSError, for a full disk among others."""
    try:
        save_file(tensors, path)
    except Exception as error:  # the library wraps the system's errors in one of its own
        raise OSError(f"{error}") from error


def fill(files: Sequence[Path], pieces: Sequence[Piece]) -> None:
    """Read the values of `pieces` from files that `write` wrote, whatever the pieces in them.

    Raises ValueError if they do not hold all of them.
    """
    with opened(files) as stored:
        for piece in pieces:
            stored.fill(piece)


@contextmanager
def opened(files: Sequence[Path]) -> Iterator[Stored]:
    """The pieces in files that `write` wrote; they are read one by one, when they are asked for."""
    with ExitStack() as stack:
        plain = [stack.enter_context(utf_8_path(path)) for path in files]
        yield Stored([stack.enter_context(safe_open(path, framework="pt")) for path in plain])


class Stored:
    """Pieces in open files."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._parts: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
        for file in files:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor, _, start = key.rpartition("@")
                values = file.get_slice(key)
                self._parts[tensor].append((int(start), int(start) + values.get_shape()[0], values))

    @torch.no_grad()
    def fill(self, piece: Piece) -> None:
        """Read the values of a piece. Raises ValueError if they are not all there."""
        missing = piece.values.numel()
        for first, last, part in self._overlaps(piece):
            piece.values[first - piece.start : last - piece.start].copy_(part)
            missing -= last - first
        if missing:
            raise ValueError(f"{piece.key} is not all there")

    def _overlaps(self, piece: Piece) -> Iterator[tuple[int, int, Tensor]]:
        """What of a piece there is: from where to where in the flattened parameter, and its values."""
        end = piece.start + piece.values.numel()
        for start, stop, values in self._parts[f"{piece.kind}/{piece.name}"]:
            first, last = max(start, piece.start), min(stop, end)
            if first < last:
                yield first, last, values[first - start : last - start]
