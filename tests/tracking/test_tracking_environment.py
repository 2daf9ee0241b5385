from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcm_scale.tracking.environment import environment

PRINT = "import json; from hpcm_scale.tracking import environment; print(json.dumps(environment.{}()))"


def reported(function: str, package_root: Path, **variables: str) -> dict | None:
    """What a function of the module says in a process that uses the package in `package_root`."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT.format(function), str(Path.home() / "photos")],
        env=os.environ | {"PYTHONPATH": str(package_root), "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        cwd=package_root,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture()
def copy(tmp_path: Path, project: Path) -> Path:
    """A copy of what the environment needs, outside any checkout."""
    for name in ("__init__.py", "errors.py", "files.py", "config", "tracking"):
        source, target = project / "hpcm_scale" / name, tmp_path / "hpcm_scale" / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return tmp_path


def test_names_versions_and_hardware() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == torch.__version__
    assert all(found["packages"].values())
    assert found["cpu_threads"] >= 1
    assert found["memory_gb"] > 0
    assert len(found["gpus"]) == torch.cuda.device_count()


@pytest.mark.launch
def test_tells_no_secret_and_no_home(copy: Path) -> None:
    text = json.dumps(reported("environment", copy, HPCM_TEST_SECRET="hunter2"))
    assert "hunter2" not in text
    assert str(Path.home()) + "/" not in text
    assert "~/photos" in text


def test_git_is_that_of_the_checkout_that_tracks_the_package(copy: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(copy), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert reported("_git", copy) is None
    git("init")
    (copy / "other").write_text("x")
    git("add", "other")
    git("commit", "-m", "a checkout that happens to surround the package")
    assert reported("_git", copy) is None
    git("add", ".")
    git("commit", "-m", "the package")
    assert reported("_git", copy) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    with (copy / "hpcm_scale" / "errors.py").open("a") as module:
        module.write("# changed\n")
    assert reported("_git", copy) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
