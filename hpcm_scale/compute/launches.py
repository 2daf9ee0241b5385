"""How many operations a step launches: what the host has to do, however fast the device is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_LAUNCH_NOTHING = (
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "promote_types",
)


class Launches(TorchDispatchMode):
    """`by_kind`: operations within this context that launch a kernel, counted by name.

    Views do not, nor does what only allocates memory. Operations are those of aten, each counted once, though a
    library may need several kernels for one (cuDNN a transposition, a split sum its last addition).
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.by_kind.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._overloadpacket.__name__
        if not func.is_view and func.namespace != "prim" and name not in _LAUNCH_NOTHING:
            self.by_kind[name] += 1
        return func(*args, **(kwargs or {}))
