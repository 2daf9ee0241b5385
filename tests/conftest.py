"""Fixtures every room's tests may use."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import TRAINING, ForkServer

PHOTOS = ["Aqua", "Kite", "Wood", "Storm", "butterfly", "drop", "jelly", "cloud", "beam", "zen", "fog", "Dune"]

# Before torch is imported: the networks here are too small for several threads, and threads that wait for each other in
# busy loops take many times the time where others use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Background jobs of a shell ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, also from the processes that tests start, unless the tests marked `gpu` are asked for."""
    if not _wants_gpus(config):
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of GPUs are left out, unless they are asked for (`-m gpu`).

    The files whose tests launch trainings come first: each takes long, and in the end would leave a core idle.
    """
    if not _wants_gpus(config):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: run with -m gpu"))
    launching = {item.path for item in items if item.get_closest_marker("launch")}
    items.sort(key=lambda item: item.path not in launching)


def _wants_gpus(config: pytest.Config) -> bool:
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr) is not None


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def exit_codes(project: Path) -> dict[str, str]:
    """Who ends with a code, by the code as the table in docs/failures.md has it."""
    lines = (project / "docs" / "failures.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return {code.strip(): who for code, who, *_ in rows[1:]}


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
        [sys.executable, "-m", "hpcm_scale.commands.shards", "build", *photos, "--out", str(out)],
        check=True,
        timeout=400,
    )
    return out


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A process that has imported what trainings import."""
    with ForkServer(TRAINING, os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}) as server:
        yield server
