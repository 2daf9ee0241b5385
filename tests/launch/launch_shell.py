"""Running the scripts of launch/, and programs that stand in for others."""

from __future__ import annotations

import subprocess
from pathlib import Path

BASE_PATH = "/usr/bin:/bin"


def program(path: Path, script: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def bash(*arguments: str | Path, cwd: Path, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """Run bash with nothing in its environment but what is given."""
    variables = {"PATH": BASE_PATH, "HOME": str(cwd)} | {key: str(value) for key, value in environment.items()}
    return subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
