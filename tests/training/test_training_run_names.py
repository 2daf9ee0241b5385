"""A run in a folder whose name is not UTF-8, whose output nobody reads, is trained and can be read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_training import SMALL

from hpcm_scale.tracking.journal import read_journal

pytestmark = pytest.mark.launch
UMASK = 0o002


@pytest.fixture(scope="module")
def run(shards, two_images, tmp_path_factory) -> Path:
    """A run that was trained with closed pipes for its streams."""
    place = tmp_path_factory.mktemp("odd") / os.fsdecode(b"caf\xe9")
    place.mkdir()
    common = (*SMALL, "engine=accelerate", f"data.shards={shards}", "data.workers=1", "log.wandb=offline")
    common += ("train.ema=[0.1]", "train.checkpoint_every=1", "eval.every=2", "eval.limit=1", "log.images=1")
    images = place / "images"
    images.mkdir()
    (images / os.fsdecode(b"caf\xe9.png")).symlink_to(two_images / "kodim01.png")
    before = os.umask(UMASK)
    try:
        reader, writer = os.pipe()
        os.close(reader)
        command = ["-m", "hpcm_scale.train", *common, "train.steps=4", "run.dir=run", "eval.images=images"]
        done = subprocess.run([sys.executable, *command], cwd=place, stdout=writer, stderr=writer, timeout=300)
        os.close(writer)
        assert done.returncode == 0
    finally:
        os.umask(before)
    return place / "run"


def test_it_is_trained_to_its_end_though_nobody_reads_its_output(run):
    assert [line["step"] for line in read_journal(run / "metrics.jsonl") if "eval/loss" in line] == [2, 4]
    assert (run / "weights.safetensors").is_file()
    assert list((run / "wandb").glob("offline-run-*/*.wandb")) and len(list(run.glob("reconstructions/*/*.png"))) == 2


def test_the_umask_decides_about_all_that_it_leaves(run):
    files = [path for path in run.rglob("*") if not path.is_symlink()]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in files}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~UMASK for path in files}
    assert modes == expected and len(list(run.rglob("*.safetensors"))) > 3


@pytest.mark.parametrize(
    "command", ["sweep status {}", "scaling curves {} --out {}/curves.png", "ema {} --length 0.1 --out {}/ema"]
)
def test_commands_read_it(command, run, fork_server, tmp_path):
    arguments = [part.replace("{}", str(run)) for part in command.split()]
    process = fork_server.start("hpcm_scale.cli", arguments, cwd=tmp_path, env=os.environ)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert arguments[0] == "sweep" or r"caf\xe9" in output
