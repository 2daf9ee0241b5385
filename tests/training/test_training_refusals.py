"""A user's mistakes: one line, exit code 2, before any process group starts."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.launch

MISTAKES = {
    "modle=nano": "did you mean model?",
    "train.stesp=10": "did you mean train.steps?",
    "train.batch_size=3": "is not divisible by 2 processes; use train.batch_size=4",
    "data.crop=200": "use data.crop=256",
    "data.shards=nowhere": "hpcm shards build",
    "eval.images=nowhere": "eval.images",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_and_exit_code_2(mistake, launch, shards):
    defaults = {"model": "model=nano", "data.shards": f"data.shards={shards}", "train.batch_size": "train.batch_size=4"}
    overrides = [value for key, value in defaults.items() if key != mistake.split("=")[0]]
    result = launch(*overrides, mistake, "run.dir=refused")
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("hpcm: ") and result.stderr.count("\n") == 1
    assert MISTAKES[mistake] in result.stderr
    assert result.stdout == ""
    assert not (launch.folder / "refused").exists()


def test_the_launcher_passes_the_line_and_the_code_on(launch, shards):
    result = launch("model=nano", f"data.shards={shards}", "data.crop=200", "run.dir=refused", launcher=True)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("hpcm: ")]
    assert len(lines) == 1 and "use data.crop=256" in lines[0]
    assert "Traceback" not in result.stdout + result.stderr


def test_training_with_an_accelerator_that_cannot_be_had_is_refused_in_one_line(launch, shards):
    result = launch("model=nano", f"data.shards={shards}", "run.dir=xpu", DS_ACCELERATOR="xpu")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "hpcm: DS_ACCELERATOR=xpu is not supported; set it to cuda or cpu, or leave it unset\n"
    assert not (launch.folder / "xpu").exists()
