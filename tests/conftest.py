"""Fixtures every room's tests may use."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
from drawn_images import write_images
from fork_server import TRAINING, ForkServer
from hypothesis import settings
from PIL import Image

from hpcm_scale.config import compose
from hpcm_scale.config.schema import Config

TRAINING_IMAGES = ["Aqua", "Kite", "Wood", "Storm", "butterfly", "drop", "jelly", "cloud", "beam", "zen", "fog", "Dune"]
PORTRAITS = (4, 9, 10, 17, 18, 19)
"""Kodak's images of 512×768 pixels; the others have 768×512."""
SHARED = Path(__file__).resolve().parents[2] / "shared"
WITHOUT_SHARED = "../shared is missing"

# Before torch is imported: the networks here are too small for several threads, and threads that wait for each other in
# busy loops take many times the time where others use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Background jobs of a shell ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, also from the processes that tests start, unless the tests marked `gpu` are asked for."""
    if not _wants(config, "gpu"):
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    compose.compose = _once(compose.compose)
    settings.register_profile("any machine", deadline=None)  # no test depends on a quiet one
    settings.load_profile("any machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of GPUs and the longer ones, unless they are asked for (`-m gpu`, `-m long`).

    The files with tests marked `launch` come first: most take long, and in the end would leave a core idle.
    """
    if not _wants(config, "gpu"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: run with -m gpu"))
    if not _wants(config, "long"):
        longer = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=longer)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    launching = {item.path for item in items if item.get_closest_marker("launch")}
    items.sort(key=lambda item: item.path not in launching)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests that were skipped without ../shared."""
    skipped = [report for report in terminalreporter.getreports("skipped") if WITHOUT_SHARED in str(report.longrepr)]
    if skipped:
        terminalreporter.line(f"{len(skipped)} tests were skipped: {WITHOUT_SHARED}")


def _once(composed: Callable[..., Config]) -> Callable[..., Config]:
    """`compose` with a cache: Hydra takes a fifth of a second, and tests compose the same overrides often."""
    known: dict[tuple, Config] = {}

    def cached(overrides: Sequence[str] = ()) -> Config:
        key = tuple(overrides)
        if key not in known:
            known[key] = composed(overrides)
        return deepcopy(known[key])

    return cached


def _wants(config: pytest.Config, marker: str) -> bool:
    return re.search(rf"(?<!not )\b{marker}\b", config.option.markexpr) is not None


@pytest.fixture(autouse=True)
def no_common_wandb_service() -> Iterator[None]:
    """Keeps programs that tests start from using the service that wandb starts in this process, with its umask."""
    yield
    os.environ.pop("WANDB_SERVICE", None)


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
def shared() -> Path:
    """Real images, reference outputs and known answers beside the checkout; a test that needs them is skipped without.

    Tests that need only some images take `image_folder` or `shards`.
    """
    if not SHARED.is_dir():
        pytest.skip(WITHOUT_SHARED)
    return SHARED


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """The 24 images of Kodak; drawn ones of the same names and sizes without ../shared."""
    if SHARED.is_dir():
        return SHARED / "data" / "kodak"
    folder = tmp_path_factory.mktemp("drawn") / "kodak"
    sizes = {f"kodim{number:02}.png": (768, 512) if number in PORTRAITS else (512, 768) for number in range(1, 25)}
    write_images(folder, sizes, compress_level=1)
    return folder


@pytest.fixture(scope="session")
def two_images(image_folder, tmp_path_factory) -> Path:
    """A folder of two images of 256×256 pixels, to evaluate trainings on."""
    folder = tmp_path_factory.mktemp("two_images")
    for name in ("kodim01.png", "kodim02.png"):
        with Image.open(image_folder / name) as image:
            image.crop((0, 0, 256, 256)).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def training_images(tmp_path_factory) -> list[Path]:
    """Twelve images to train on: real ones, or drawn ones without ../shared."""
    names = [f"{name}.jpg" for name in TRAINING_IMAGES]
    if SHARED.is_dir():
        return [SHARED / "data" / "photos" / "train" / name for name in names]
    return write_images(tmp_path_factory.mktemp("drawn"), dict.fromkeys(names, (614, 819)))


@pytest.fixture(scope="session")
def shards(training_images, tmp_path_factory) -> Path:
    """A set of shards of `training_images`."""
    from hpcm_scale.data.build import build_shards  # imports torch
    from hpcm_scale.tracking.progress import progress

    out = tmp_path_factory.mktemp("data") / "shards"
    build_shards(training_images, out, min_side=0, shard_size=10**9, workers=1, progress=progress)
    return out


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A process that has imported what trainings import, and knows what `counted_costs` counts."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    with ForkServer((*TRAINING, "counted_costs"), environment) as server:
        yield server
