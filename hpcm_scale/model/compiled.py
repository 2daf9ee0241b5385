"""torch.compile by region: residual blocks, attention and rates, each as one graph without breaks.

What lies between them are single convolutions, which are as fast without. A region is compiled once for all blocks of
a shape, where the whole network would be one graph of thousands of nodes for every image size.
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

# Inductor's own launcher of CUDA kernels holds the interpreter while it waits for room in the queue: behind a slow
# process all threads stop, the watch's too. (In torch 2.13.0 it can crash as well: pytorch#188607.) It is left out by
# the environment, before torch._inductor reads that: its settings hold for one thread, and autograd compiles in others.
os.environ.setdefault("TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER", "0")

_MOST_SHAPES = 256
"""Of one region: widths × resolutions × with and without gradients."""


def compile_regions(model: nn.Module, backend: str = "inductor") -> None:
    """Have the regions of a model compiled when they are first called, in place.

    For every shape that is trained on there is one compilation. Without gradients, as in evaluation, it holds for all
    image sizes. `backend` is torch's; others than inductor are for tests.
    """
    if backend == "inductor":
        check_compiler(cuda=any(parameter.is_cuda for parameter in model.parameters()))
    torch._dynamo.config.optimize_ddp = False  # it would cut regions where gradients are sent
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for module in model.modules():
        if isinstance(module, (Block, WindowFusion, Rate)):
            module.compute = _region(module.compute, backend)


def check_compiler(cuda: bool) -> None:
    """Raises UserError where there is no C++ compiler, and for `cuda` where there is not what Triton needs, too.

    Triton compiles its launchers with a C compiler and Python's header.
    """
    # Here, for importing torch's compiler takes a second, and most runs do without.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "engine.compile needs a C++ compiler, and there is none; install g++, or leave engine.compile out"
        ) from error
    if not cuda:
        return
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        raise UserError(
            f"engine.compile needs a C compiler on GPUs, and {compiler or 'gcc'} is not there; install gcc, set CC, or "
            "leave engine.compile out"
        )
    include = sysconfig.get_paths()["include"]
    command = [compiler, "-E", "-I", include, "-x", "c", "-", "-o", os.devnull]
    if subprocess.run(command, input="#include <Python.h>", text=True, capture_output=True).returncode:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise UserError(
            f"engine.compile needs Python.h on GPUs, and it is not in {include}; install python{version}-dev, or leave "
            "engine.compile out"
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
