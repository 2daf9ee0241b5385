"""torch.compile by region: whole graphs, compiled once, with the results of the uncompiled network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from small_models import images, loss_and_gradients, with_few_shapes
from torch._dynamo.utils import counters

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import Checkpointing, Fusion, Precision
from hpcm_scale.errors import UserError
from hpcm_scale.model.compiled import check_compiler, compile_regions
from hpcm_scale.model.context import WindowFusion
from hpcm_scale.model.hpcm import HPCM, Rate
from hpcm_scale.model.layers import depthwise_block, partial_block


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("checkpoint", "backend"),
    [pytest.param(Checkpointing.none, "aot_eager", marks=pytest.mark.long), (Checkpointing.steps, "eager")],
)
def test_steps_of_nano_compile_once_and_never_break(checkpoint, backend):
    """Up to the code generator; a break would raise, for every region has to be one graph."""
    model = HPCM(compose_model("nano"), precision=Precision.bf16, activation_checkpointing=checkpoint)
    compile_regions(model, backend=backend)
    loss_and_gradients(model, images(2))
    compiled = graphs()
    assert 10 < compiled < 40
    for seed in (1, 2):
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss_and_gradients(model, images(2, seed=seed))
    assert graphs() == compiled and not counters["graph_break"]


@pytest.mark.launch
def test_an_evaluation_between_steps_compiles_nothing_anew():
    model, x = HPCM(with_few_shapes(Fusion.none)), images(2)
    compile_regions(model, backend="eager")
    loss_and_gradients(model, x)
    with torch.no_grad():
        model(images(1, 256, 512))
    with torch._dynamo.config.patch(error_on_recompile=True):
        loss_and_gradients(model, x)


@pytest.mark.launch
def test_evaluation_compiles_for_all_image_sizes():
    model = HPCM(with_few_shapes(), precision=Precision.bf16)
    compile_regions(model, backend="eager")
    with torch.no_grad():
        model(images(1, 512, 768))
        model(images(1, 768, 512))
        compiled = graphs()
        for height, width in ((512, 512), (768, 1024), (1024, 768)):
            with torch._dynamo.config.patch(error_on_recompile=True):
                model(images(1, height, width))
    assert graphs() == compiled


@pytest.mark.launch
@pytest.mark.parametrize("region", [depthwise_block(16), partial_block(16, 4, 2), WindowFusion(16, 2, 4)])
def test_the_code_generator_computes_what_the_region_defines(region):
    """fp32: results and gradients to 1e-5."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)]
    inputs *= 2 if isinstance(region, WindowFusion) else 1
    expected = region(*inputs)
    expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in region.named_parameters()}
    region.zero_grad()
    compile_regions(region)
    result = region(*inputs)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in region.named_parameters():
        scale = gradients[name].abs().max() + 1e-3
        assert (parameter.grad - gradients[name]).abs().max() < 1e-5 * max(scale, 1), name
    assert graphs() == 1


@pytest.mark.launch
def test_compiled_rates_are_the_rates():
    torch.manual_seed(0)
    rate, values = Rate("survival"), []
    for compiled in (False, True):
        if compiled:
            compile_regions(rate)
        y, mean, scale, noise = (torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(4))
        scale.requires_grad_()
        bits = rate(3 * y, mean, scale.abs(), noise)
        bits.sum().backward()
        values.append((bits.detach(), scale.grad))
    torch.testing.assert_close(*(value[0] for value in values), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(*(value[1] for value in values), rtol=1e-4, atol=1e-4)
    assert graphs() == 1


@pytest.mark.launch
def test_no_thread_launches_kernels_in_a_way_that_holds_the_interpreter():
    """Settings made in Python would hold for one thread, and backward passes on GPUs are compiled in others."""
    program = """
import threading, hpcm_scale.training.run, torch._inductor.config as config
thread = threading.Thread(target=lambda: print(config.use_static_cuda_launcher, config.use_static_triton_launcher))
thread.start()
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}  # ours, too
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=400)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize(
    ("missing", "code", "detail"),
    [
        ("nothing", None, ""),
        ("compiler", "no-c-compiler", "gcc is not found"),
        ("named", "no-c-compiler", "/no/such/cc is not found"),
        ("header", "no-python-header", "not in {folder}; install python3."),
    ],
)
def test_gpus_need_a_c_compiler_and_pythons_header(missing, code, detail, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.delenv("CC", raising=False)
    if missing == "compiler":
        compiler = shutil.which("g++")
        (tmp_path / "g++").symlink_to(compiler)
        monkeypatch.setenv("PATH", str(tmp_path))
    elif missing == "named":
        monkeypatch.setenv("CC", "/no/such/cc")
    else:
        headers = tmp_path / "include"
        headers.mkdir()
        if missing == "nothing":
            (headers / "Python.h").touch()
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(headers)})
        tmp_path = headers
    check_compiler(cuda=False)
    if code is None:
        check_compiler(cuda=True)
        return
    with pytest.raises(UserError) as error:
        check_compiler(cuda=True)
    assert (error.value.code, error.value.key) == (code, "engine.compile")
    assert detail.format(folder=tmp_path) in str(error.value) and "\n" not in str(error.value)
