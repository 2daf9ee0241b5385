"""Type checks of the package, by basedpyright as pyproject.toml configures it, and strictly in some rooms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STRICT = ("config", "entropy", "coding")
"""Rooms without errors of pyright's strict rules but those of unknown types, of which libraries without stubs have
many. Its own setting `strict` cannot leave these out."""


@pytest.fixture(scope="module", autouse=True)
def checker():
    pytest.importorskip("basedpyright", reason="needs basedpyright: extras=test,types bash launch/test.sh -m long")


def basedpyright(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "basedpyright", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.long
def test_types(project):
    checked = basedpyright(project)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.long
def test_strict_types(project, tmp_path):
    rooms = [str(project / "hpcm_scale" / room) for room in STRICT]
    configuration = {"include": rooms, "strict": rooms, "extraPaths": [str(project)], "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(configuration | {"typeCheckingMode": "basic"}))
    found = json.loads(basedpyright(project, "--project", str(tmp_path), "--outputjson").stdout)
    assert found["summary"]["filesAnalyzed"] > 10
    errors = [error for error in found["generalDiagnostics"] if "Unknown" not in error.get("rule", "")]
    assert errors == []
