"""Parameters that DeepSpeed's ZeRO-3 has sharded: each process holds a part, and the tensor itself is empty."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Size, nn


def shape_of(parameter: nn.Parameter) -> Size:
    """The shape of a parameter, sharded or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[None]:
    """Within, a parameter is whole and may be changed, in all processes alike; a sharded one is sharded again after."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # only here: slow to import, and there already

    with GatheredParameters([parameter], modifier_rank=0):
        yield
