"""Type checks of the package, by basedpyright as pyproject.toml configures it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.long
def test_types(project):
    pytest.importorskip("basedpyright", reason="needs basedpyright: extras=test,types bash launch/test.sh -m long")
    checked = subprocess.run([sys.executable, "-m", "basedpyright"], cwd=project, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
