"""Engine-independent training state: parts of named parameters, of the optimizer's state and of EMAs.

So a checkpoint can be resumed with another engine and another number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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
"""fp32 elements to which copies in host memory are aligned."""


def ema_kind(length: float) -> str:
    """The kind of shards of the EMA of that length, which also names files and metrics."""
    return f"ema_{length}"


class StateShard(NamedTuple):
    """A contiguous part of one flattened tensor."""

    kind: str
    """"weight", a kind of the optimizer's state, such as "exp_avg", or `ema_kind`."""
    name: str
    """Name of the parameter in the model."""
    start: int
    """First element in the flattened tensor: the parameter, or state of its shape or of another one."""
    values: Tensor
    """fp32 (n,), a view of the state: training continues from values written to it."""

    @property
    def key(self) -> str:
        """Name of the tensor in a file."""
        return f"{self.kind}/{self.name}@{self.start}"


def partition(shards: Sequence[StateShard], rank: int, world_size: int) -> list[StateShard]:
    """The part of replicated state that `rank` writes: an even share of the elements."""
    total = sum(shard.values.numel() for shard in shards)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    part, position = [], 0
    for shard in shards:
        start, stop = (min(max(edge - position, 0), shard.values.numel()) for edge in (first, last))
        if start < stop:
            part.append(shard._replace(start=shard.start + start, values=shard.values[start:stop]))
        position += shard.values.numel()
    return part


class HostCopy:
    """Copies of state shards in one host buffer, which is reused for the next copy of the same shards."""

    def __init__(self, pin: bool) -> None:
        """`pin`: pin the buffer, for state on a CUDA device. If that fails, copies take longer."""
        self._pin, self._pinned = pin, False
        self._buffer: Tensor | None = None
        self._tensors: dict[str, Tensor] = {}

    def copy(self, shards: Sequence[StateShard]) -> dict[str, Tensor]:
        """Copy the shards; the copies, by `StateShard.key`, are valid until the next call."""
        if self._buffer is None:
            self._allocate(shards)
        for shard in shards:
            self._tensors[shard.key].copy_(shard.values, non_blocking=True)
        if self._pin:
            torch.cuda.synchronize()
        return self._tensors

    def _allocate(self, shards: Sequence[StateShard]) -> None:
        sizes = [shard.values.numel() for shard in shards]
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self._buffer = torch.empty(sum(aligned), dtype=torch.float32)
        self._pinned = self._pin and _pin_memory(self._buffer)
        parts = self._buffer.split(aligned)
        self._tensors = {shard.key: part[:size] for shard, part, size in zip(shards, parts, sizes, strict=True)}

    def close(self) -> None:
        """Free the buffer."""
        if self._buffer is not None and self._pinned:  # an error here would only follow an earlier one of the device
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._tensors, self._pinned = None, {}, False


def _pin_memory(buffer: Tensor) -> bool:
    """Pin a buffer in place, since torch rounds its own pinned memory up to powers of two; whether it succeeded."""
    if not buffer.nbytes:
        return False
    cudart: Any = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0:
        return True
    with suppress(RuntimeError):  # CUDA reports the error again at the next kernel launch
        torch.zeros(1, device=CUDA)
    return False


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write copied shards to a safetensors file. Raises OSError, for example for a full disk."""
    try:
        save_file(tensors, path)
    except Exception as error:  # safetensors wraps OSError in an error of its own
        raise OSError(f"{error}") from error


def load(files: Sequence[Path], shards: Sequence[StateShard]) -> None:
    """Read the values of `shards` from files of `write`, which may be sharded differently.

    Raises ValueError if the files lack some of the values.
    """
    with open_state(files) as stored:
        for shard in shards:
            stored(shard)


StoredState = Callable[[StateShard], None]
"""Reads the values of a shard. Raises ValueError if some are missing."""


@contextmanager
def open_state(files: Sequence[Path]) -> Iterator[StoredState]:
    """Open files of `write`; tensors are read on demand."""
    parts: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)

    @torch.no_grad()
    def read(shard: StateShard) -> None:
        end = shard.start + shard.values.numel()
        missing = shard.values.numel()
        for start, stop, values in parts[f"{shard.kind}/{shard.name}"]:
            first, last = max(start, shard.start), min(stop, end)
            if first < last:
                shard.values[first - shard.start : last - shard.start].copy_(values[first - start : last - start])
                missing -= last - first
        if missing:
            raise ValueError(f"{shard.key} lacks {missing} of its values")

    with ExitStack() as stack:
        for path in files:
            file = stack.enter_context(safe_open(stack.enter_context(utf_8_path(path)), framework="pt"))
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor, _, start = key.rpartition("@")
                values = file.get_slice(key)
                parts[tensor].append((int(start), int(start) + values.get_shape()[0], values))
        yield read
