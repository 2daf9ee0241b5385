"""torch's deterministic algorithms, for the length of one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable of cuBLAS, without one of two values of which torch refuses its products."""


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Within, use algorithms that give the same result every time, if `enabled`; restore all settings afterwards.

    On CUDA that covers cuDNN, cuBLAS, attention and torch's own kernels. An operation that has no such algorithm raises
    RuntimeError. It must not only warn: attention looks for its deterministic backward pass in the strict mode alone.
    Enter it before the first operation on a GPU, since cuBLAS reads the environment then.
    """
    if not enabled:
        yield
        return
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE)
    before = cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory
    os.environ[WORKSPACE] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    filling.fill_uninitialized_memory = False  # nothing reads memory before it is written
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        if workspace is None:
            del os.environ[WORKSPACE]
        else:
            os.environ[WORKSPACE] = workspace
