"""`hpcm check`, in which rank 1 runs out of memory in its step."""

from __future__ import annotations

import os

import torch
from quick_check import main

from hpcm_scale.preflight import measurements

time_steps = measurements.time_steps


def failing(*arguments):
    """The real steps, and on rank 1 the error that torch raises on a GPU."""
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return time_steps(*arguments)


measurements.time_steps = failing

if __name__ == "__main__":
    main()
