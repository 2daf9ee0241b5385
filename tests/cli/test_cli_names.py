"""Commands on files whose names, kinds and places are out of the ordinary, called as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import save_weights

pytestmark = pytest.mark.launch

ODD = os.fsdecode(b"caf\xe9")
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}


@pytest.fixture
def hpcm(fork_server, tmp_path):
    """`hpcm(command, *arguments)`: the command in a forked process."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        process = fork_server.start("hpcm_scale.cli", list(map(str, arguments)), cwd=tmp_path, env=os.environ)
        output, errors = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    return call


def fresh(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process whose streams take only ASCII, which Python settles at its start."""
    command = [sys.executable, "-m", "hpcm_scale.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | ASCII)


def reported(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a command wrote to stderr but for the progress of an evaluation, one line per setting."""
    return [line for line in done.stderr.splitlines() if " images in " not in line]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Untrained weights in a folder whose name is not UTF-8."""
    torch.manual_seed(0)
    model = HPCM(compose_model("nano"))
    path = tmp_path_factory.mktemp("run") / ODD / "weights.safetensors"
    save_weights(path, model.state_dict(), model.config, {})
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of one small image, its name and the folder's not UTF-8."""
    folder = tmp_path / f"{ODD}s"
    folder.mkdir()
    Image.effect_noise((20, 16), 50).convert("RGB").save(folder / f"{ODD}.png")
    return folder


def test_names_that_are_not_utf_8_pass_through_every_command(hpcm, weights, images, tmp_path):
    coded, back, out, shards = (tmp_path / f"{name}{ODD}" for name in ("coded", "back", "out", "shards"))
    for command, arguments in (
        (hpcm, ("encode", images, coded, "--weights", weights)),
        (hpcm, ("decode", coded, back, "--weights", weights)),
        (fresh, ("evaluate", "--images", images, "--weights", f"{ODD}={weights}", "--out", out, "--against", "jpeg")),
        (hpcm, ("shards", "build", images, "--out", shards, "--workers", "1")),
        (hpcm, ("shards", "info", shards)),
    ):
        done = command(*arguments)
        assert (done.returncode, reported(done)) == (0, []), done
        assert r"caf\xe9" in done.stdout or arguments[0] == "shards"
    assert [path.name for path in (*coded.iterdir(), *back.iterdir())] == [f"{ODD}.hpcm", f"{ODD}.png"]
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    [ours, _] = evaluation["curves"]
    assert ours["name"] == r"caf\xe9" and ours["points"][0]["images"][0]["name"] == r"caf\xe9.png"
    assert Path(ours["points"][0]["weights"]) == weights and Path(evaluation["images"]["folder"]) == images
    assert r"caf\xe9.png" in (out / "images.csv").read_text(encoding="utf-8")
    assert r"caf\\xe9.png" in (out / "evaluation.md").read_text(encoding="utf-8")  # Markdown has escapes of its own
    assert (out / "visual.png").is_file() and (out / "rate_distortion.png").is_file()


def test_pipes_and_links_to_nothing_hang_no_command(hpcm, weights, images, tmp_path):
    os.mkfifo(images / "pipe.png")
    os.mkfifo(images / "pipe.hpcm")
    (images / "self").symlink_to("self")
    left_out = (
        "skipped files that are not a JPEG, PNG or WebP image (3): pipe.hpcm (a pipe), pipe.png (a pipe), self (Too"
    )
    for arguments in (("encode", images, tmp_path / "coded"), ("evaluate", "--images", images)):
        done = hpcm(*arguments, "--weights", weights)
        [line] = reported(done)
        assert done.returncode == 0 and left_out in line
    (tmp_path / "coded" / "more").mkdir()
    (images / "pipe.hpcm").rename(tmp_path / "coded" / "more" / "pipe.hpcm")
    done = hpcm("decode", tmp_path / "coded", tmp_path / "back", "--weights", weights)
    assert done.returncode == 0 and "not a .hpcm file (1): more/pipe.hpcm (a pipe)\n" in done.stderr
    for source, command in ((images / "pipe.png", "encode"), (tmp_path / "coded" / "more" / "pipe.hpcm", "decode")):
        done = hpcm(command, source, tmp_path / "target", "--weights", weights)
        assert done.returncode == 2 and done.stderr.endswith("is a pipe; give a file or a folder\n")


def test_names_as_long_as_can_be(hpcm, weights, images, tmp_path):
    longest = tmp_path / "longest"
    longest.mkdir()
    Image.new("RGB", (20, 16)).save(longest / f"{'n' * 250}.png")
    coded = tmp_path / f"{'n' * 250}.hpcm"
    assert hpcm("encode", longest, tmp_path / "coded", "--weights", weights).returncode == 0
    assert hpcm("encode", longest / f"{'n' * 250}.png", coded, "--weights", weights).returncode == 0
    assert hpcm("decode", coded, tmp_path / f"{'b' * 251}.png", "--weights", weights).returncode == 0
    (longest / f"{'n' * 250}.png").rename(longest / f"{'m' * 251}.png")
    nowhere = tmp_path / "nowhere" / ("x" * 480)
    for arguments in (
        ("encode", longest, tmp_path / "none", "--weights", weights),
        ("evaluate", "--images", images, "--weights", weights, "--out", nowhere),
        ("shards", "build", images, "--out", nowhere),
        ("train", "model=nano", f"data.shards={tmp_path}", f"run.dir={nowhere}"),
    ):
        done = hpcm(*arguments)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert not (tmp_path / "none").exists() and not (tmp_path / "nowhere").exists()
