"""`hpcm check`, in which process 1 runs out of memory in its step."""

from __future__ import annotations

import os

import torch

from hpcm_scale.benchmark import cluster
from hpcm_scale.check import main

time_steps = cluster.time_steps


def failing(*arguments):
    """The real steps, and on process 1 the error that torch raises on a GPU."""
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return time_steps(*arguments)


cluster.time_steps = failing

if __name__ == "__main__":
    main()
