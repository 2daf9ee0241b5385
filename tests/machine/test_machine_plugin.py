"""Vision-model receivers are loaded only when a configuration, weights or a command line asks for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image

from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import save_weights

COMMAND = """
import sys
sys.argv[:] = ["hpcm", *sys.argv[1:]]
from hpcm_scale.cli import main
main()
"""
TASK = """
import sys
import hpcm_scale.training.run
from hpcm_scale.config.compose import compose
from hpcm_scale.training.costs import task_costs
from hpcm_scale.training.start import receivers_of
from hpcm_scale.training.task import task_of
config = compose(sys.argv[1:])
receivers = receivers_of(config)
task_of(config, None, receivers), task_costs(config.model, config.machine, 256, receivers)
"""
LOADED = '\nprint(any(name.startswith("hpcm_scale.machine") for name in sys.modules), file=sys.stderr)\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    model = HPCM(compose_model("nano"))
    save_weights(folder / "w.safetensors", model.state_dict(), model.config, {"lmbda": 0.013, "precision": "fp32"})
    (folder / "images").mkdir()
    Image.effect_noise((40, 33), 40).convert("RGB").save(folder / "images" / "a.png")
    return folder


@pytest.mark.parametrize(
    ("program", "arguments", "loaded"),
    [
        (COMMAND, "encode images/a.png a.hpcm --weights w.safetensors --device cpu", False),
        (COMMAND, "evaluate --weights w.safetensors --images images --out out --device cpu", False),
        (TASK, "model=nano", False),
        (TASK, "model=nano objective.target=vision_model machine.receivers=[random-vit]", True),
    ],
    ids=["encode", "evaluate", "train for humans", "train for a vision model"],
)
def test_receivers_are_loaded_on_use(folder, program, arguments, loaded):
    command = [sys.executable, "-c", program + LOADED, *arguments.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == str(loaded)
