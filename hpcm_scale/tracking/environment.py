"""Software and hardware of a run, recorded in its run folder."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from hpcm_scale import __version__
from hpcm_scale.files import without_secrets

PACKAGES = ("torch", "deepspeed", "accelerate", "webdataset", "wandb", "hydra-core", "numpy")


def environment() -> dict[str, Any]:
    """Versions, git commit, command line and hardware, as plain JSON values.

    Contains no environment variables, user names or secrets in URLs; the home folder is written as `~`. `git` is None
    unless the package runs from a git checkout; `dirty`: tracked files have changes.
    """
    return {
        "python": platform.python_version(),
        "packages": {"hpcm_scale": __version__} | {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "command": _command(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and state of the checkout that tracks this package; a checkout around it does not count."""
    package = Path(__file__).resolve().parents[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=10, env=clean)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None


def _command() -> str:
    interpreter, *arguments = sys.orig_argv
    home = f"{Path.home()}/"
    return without_secrets(" ".join([Path(interpreter).name, *(text.replace(home, "~/") for text in arguments)]))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch  # slow to import, and not needed to read a journal

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
