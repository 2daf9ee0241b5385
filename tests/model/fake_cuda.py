"""A training step on fake CUDA tensors: what a GPU would be asked to do, found without one. A program of its own:

python fake_cuda.py GUARD REPORT CASE... writes to REPORT, as JSON, a dictionary by case. GUARD: see `build_guard`; `-`
with a CUDA build of torch. CASES says what there is.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

NANO = "model=nano"
SHALLOW = (
    NANO,
    "model.g_a_blocks=[1,1,2,0]",
    "model.g_s_blocks=[0,2,1,1]",
    "model.hyper_blocks=[1,1]",
    "model.prior_s1_s2={before:1,after:1}",
    "model.prior_s3={before:1,after:1}",
)
"""Each kind of layer, with two blocks in a row where those of a family take turns."""
MACHINE = ("objective.target=vision_model", "machine.receivers=[random-vit]")
EDITED = ("machine.edit=true", "machine.pre_editor.tokens=random-vit", "model.rate.levels=3")
CASES = {
    **{preset: [f"model={preset}"] for preset in ("68m", "544m", "1b", "swin", "convnext")},
    "hpcm": [NANO],
    "without fusion": [*SHALLOW, "model.fusion=none"],
    "swin blocks": [*SHALLOW, "model.family=swin"],
    "convnext blocks": [*SHALLOW, "model.family=convnext"],
    "variable rate": [*SHALLOW, "model.rate.levels=3"],
    "blocks computed again": [*SHALLOW, "engine.activation_checkpointing=blocks"],
    "steps computed again": [NANO, "engine.activation_checkpointing=steps"],
    "fp32": [*SHALLOW, "engine.precision=fp32"],
    "ms-ssim": [*SHALLOW, "objective.distortion=ms_ssim"],
    "machine": [*SHALLOW, *MACHINE],
    "pre-editor": [*SHALLOW, *MACHINE, *EDITED],
    "pre-editor alone": [*SHALLOW, *MACHINE, *EDITED, "machine.freeze_codec=true"],
}
"""Overrides of training, by name."""


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def has_cuda_build() -> bool:
    """Whether the installed torch knows CUDA by itself."""
    return (torch_folder() / "lib" / "libtorch_cuda.so").exists()


def sees_a_gpu() -> bool:
    """Whether a process like those that `report` starts finds one."""
    ask = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(ask, env=_environment(), timeout=600).returncode == 0


def build_guard(folder: Path) -> Path:
    """Compile fake_cuda.cpp against the installed torch."""
    torch, guard = torch_folder(), folder / "guard.so"
    include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    source = Path(__file__).with_suffix(".cpp")
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", source, *include, "-o", guard]
    subprocess.run([*command, f"-L{torch}/lib", "-lc10", "-ltorch_cpu"], check=True, timeout=600)
    return guard


def report(folder: Path, guard: Path | str, *cases: str) -> dict[str, Any]:
    """Run the program for these cases."""
    file = folder / f"{'_'.join(cases)}.json".replace(" ", "_")
    subprocess.run([sys.executable, __file__, guard, file, *cases], check=True, env=_environment(), timeout=1200)
    return json.loads(file.read_text())


def _environment() -> dict[str, str]:
    """A CUDA build has to see its GPU, though nothing is computed there."""
    return {key: value for key, value in os.environ.items() if (key, value) != ("CUDA_VISIBLE_DEVICES", "")}


def main(guard: str, file: str, *cases: str) -> None:
    if guard != "-":
        for library in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(torch_folder() / "lib" / library), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(guard)
    import torch

    if guard != "-":
        torch.cuda.is_available = lambda: True
        torch.cuda.is_bf16_supported = lambda *arguments, **options: True
        torch._C._conv_determine_backend_memory_format = as_cudnn_lays_out
    from fake_steps import step

    Path(file).write_text(json.dumps({case: step(CASES[case]) for case in cases}))


def as_cudnn_lays_out(x: Any, weight: Any, backend: Any) -> Any:
    """The memory format that cuDNN's convolutions give their result, which a CPU build does not know."""
    import torch
    from torch._prims_common import suggest_memory_format

    either = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if either else torch.contiguous_format


if __name__ == "__main__":
    main(*sys.argv[1:])
