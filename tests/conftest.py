"""Fixtures every room's tests may use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PHOTOS = ["Aqua", "Kite", "Wood", "Storm", "butterfly", "drop", "jelly", "cloud", "beam", "zen", "fog", "Dune"]

# Before torch is imported: the networks here are too small for several threads, and threads that wait for each other in
# busy loops take many times the time where others use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Background jobs of a shell ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared(project: Path) -> Path:
    """Real images, reference outputs and known answers that lie beside the checkout."""
    folder = project.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def shards(shared, tmp_path_factory) -> Path:
    """A small set of real photos."""
    out = tmp_path_factory.mktemp("data") / "shards"
    photos = [str(shared / "data" / "photos" / "train" / f"{name}.jpg") for name in PHOTOS]
    subprocess.run(
        [sys.executable, "-m", "hpcm_scale.shards", "build", *photos, "--out", str(out)], check=True, timeout=120
    )
    return out
