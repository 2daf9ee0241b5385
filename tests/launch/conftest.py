"""A copy of the scripts, and a virtual environment where pip only notes how it is called."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_shell import program


@pytest.fixture
def checkout(project: Path, tmp_path: Path) -> Path:
    """A copy of what the scripts need, in a folder whose name has a space in it."""
    copy = tmp_path / "a checkout"
    copy.mkdir()
    for name in ("launch", ".ci"):
        shutil.copytree(project / name, copy / name)
    shutil.copy(project / "pyproject.toml", copy)
    return copy


@pytest.fixture
def active(tmp_path: Path) -> Path:
    """A virtual environment whose `python -m pip` only writes its arguments to the file `calls`."""
    folder = tmp_path / "active"
    program(
        folder / "bin/python",
        f'if [ "$1 $2" = "-m pip" ]; then echo "pip $*" >>"{tmp_path}/calls"; exit "${{PIP_FAILS:-0}}"; fi\n'
        f'exec "{sys.executable}" "$@"',
    )
    program(folder / "bin/c++", "exit 0")
    return folder


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    """What the stand-ins were called with so far; forgets it."""

    def read() -> list[str]:
        path = tmp_path / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    return read
