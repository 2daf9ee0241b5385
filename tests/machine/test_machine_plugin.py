"""Vision-model receivers are loaded only when a configuration, weights or a command line asks for them."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image

from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import save_weights

PROGRAMS = {
    "command": """
import sys
sys.argv[:] = ["hpcm", *sys.argv[1:]]
from hpcm_scale.cli import main
main()
""",
    "task": """
import sys
import hpcm_scale.training.run
from hpcm_scale.config.compose import compose
from hpcm_scale.training.costs import task_costs
from hpcm_scale.training.start import receivers_of
from hpcm_scale.training.task import task_of
config = compose(sys.argv[1:])
receivers = receivers_of(config)
task_of(config, None, receivers), task_costs(config.model, config.machine, 256, receivers)
""",
}
LOADED = '\nprint(any(name.startswith("hpcm_scale.machine") for name in sys.modules), file=sys.stderr)\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    for name, program in PROGRAMS.items():
        (folder / f"{name}_then_loaded.py").write_text(program + LOADED, encoding="utf-8")
    torch.manual_seed(0)
    model = HPCM(compose_model("nano"))
    save_weights(folder / "w.safetensors", model.state_dict(), model.config, {"lmbda": 0.013, "precision": "fp32"})
    (folder / "images").mkdir()
    Image.effect_noise((40, 33), 40).convert("RGB").save(folder / "images" / "a.png")
    return folder


@pytest.mark.launch
@pytest.mark.parametrize(
    ("program", "arguments", "loaded"),
    [
        ("command", "encode images/a.png a.hpcm --weights w.safetensors --device cpu", False),
        ("command", "evaluate --weights w.safetensors --images images --out out --device cpu", False),
        ("task", "model=nano", False),
        ("task", "model=nano objective.target=vision_model machine.receivers=[random-vit]", True),
    ],
    ids=["encode", "evaluate", "train for humans", "train for a vision model"],
)
def test_receivers_are_loaded_on_use(folder, fork_server, program, arguments, loaded):
    """The fork server has imported what trainings import."""
    module = f"{program}_then_loaded"
    process = fork_server.start(module, arguments.split(), cwd=folder, env=os.environ)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.splitlines()[-1] == str(loaded)
