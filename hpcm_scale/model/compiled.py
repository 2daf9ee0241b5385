"""Regional torch.compile: each residual block, attention and rate is one graph without breaks.

Between them are single convolutions, which gain nothing. A region is compiled once for all blocks of a shape; the whole
network would be one graph of thousands of nodes per image size.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hpcm_scale.errors import UserError
from hpcm_scale.model.context import WindowFusion
from hpcm_scale.model.hpcm import Rate
from hpcm_scale.model.layers import Block

# Inductor's static CUDA launcher holds the GIL while it waits for a full launch queue: if another rank is slow, all
# threads stop, also the watchdog's. In torch 2.13.0 it can also crash (pytorch#188607). It is disabled by environment
# variable, before torch._inductor reads it: its configuration is per thread, and autograd compiles in other threads.
os.environ.setdefault("TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER", "0")

_MOST_SHAPES = 256
"""Compiled variants of one region: widths × resolutions × with and without gradients."""


def compile_regions(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the regions of a model, in place, when they are first called.

    Training compiles each region once per shape; evaluation once for all image sizes. `backend`: torch's name; tests
    use others than inductor. Raises UserError as `check_compiler` does.
    """
    if backend == "inductor":
        check_compiler(cuda=any(parameter.is_cuda for parameter in model.parameters()))
    torch._dynamo.config.optimize_ddp = False  # it would split regions at gradient buckets
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for module in model.modules():
        if isinstance(module, Block):
            module.compute = _region(module.compute, backend)
        elif isinstance(module, (WindowFusion, Rate)):
            module.forward = _region(module.forward, backend)


def check_compiler(cuda: bool) -> None:
    """Raise UserError if there is no C++ compiler or, for `cuda`, not the C compiler and Python.h that Triton needs."""
    # Imported here: torch's compiler takes a second to import.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "no-cpp-compiler",
            "engine.compile",
            "engine.compile needs a C++ compiler, and none is found; install g++, or omit engine.compile",
        ) from error
    if not cuda:
        return
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        raise UserError(
            "no-c-compiler",
            "engine.compile",
            f"engine.compile needs a C compiler on GPUs, and {compiler or 'gcc'} is not found; install gcc, set CC, "
            "or omit engine.compile",
        )
    include = sysconfig.get_paths()["include"]
    command = [compiler, "-E", "-I", include, "-x", "c", "-", "-o", os.devnull]
    if subprocess.run(command, input="#include <Python.h>", text=True, capture_output=True).returncode:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise UserError(
            "no-python-header",
            "engine.compile",
            f"engine.compile needs Python.h on GPUs, which is not in {include}; install python{version}-dev, or omit "
            "engine.compile",
        )


def _region(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def region(*inputs: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            for x in inputs:
                if x is not None and not isinstance(x, nn.Parameter):
                    torch._dynamo.maybe_mark_dynamic(x, (2, 3))
        return compiled(*inputs)

    return region
