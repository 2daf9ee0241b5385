"""The command in this process, and run folders made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hpcm_scale.config.compose import compose, to_yaml


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """`train(*arguments)`: the command, in this process and an empty folder; returns exit code, stdout, stderr."""
    from hpcm_scale.train import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpcm train", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def make_run(tmp_path):
    """`make_run(name, steps, *overrides)`: a run folder whose journal has a line a step, 2 s each."""

    def make(name: str, done: int, *overrides: str, evaluate: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = compose(["model=nano", "train.steps=10", "train.batch_size=4", *overrides])
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        lines = []
        for step in range(1, done + 1):
            position = {"step": step, "time": 2.0 * step, "train/images": 4 * step, "compute/pflops": step / 100}
            lines.append(position | {"train/loss": 10.0 / step, "train/bpp": 0.5, "train/psnr": 20.0 + step})
            if evaluate and step % evaluate == 0:
                lines.append(position | {"eval/loss": 9.0 / step, "eval/bpp": 0.4, "eval/psnr": 21.0 + step})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return folder

    return make
