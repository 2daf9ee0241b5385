"""Real photos, small enough to decode quickly, and sets of shards built from them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from hpcm_scale.commands.shards import main
from hpcm_scale.data.build import build_shards
from hpcm_scale.tracking.progress import progress

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")


@pytest.fixture(scope="session")
def packaged_photos() -> list[Path]:
    """The six photos inside scikit-image's wheel."""
    folder = Path(find_spec("skimage").origin).parent / "data"
    return [folder / name for name in PHOTOS]


@pytest.fixture(scope="session")
def photo_folder(packaged_photos, tmp_path_factory) -> Path:
    """23 pieces of real photos of 90 to 250 pixels a side, in nested folders, as JPEG, PNG and WebP."""
    folder = tmp_path_factory.mktemp("photos")
    kinds = ("jpg", "png", "webp", "JPEG")
    for number in range(23):
        with Image.open(packaged_photos[number % 6]) as photo:
            left, top = 7 * number, 5 * number
            piece = photo.convert("RGB").crop((left, top, left + 90 + 7 * number, top + 250 - 6 * number))
        path = folder / f"{'abc'[number % 3]}/d{number % 2}/piece {number:02d}.{kinds[number % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        piece.save(path)
    return folder


@pytest.fixture(scope="session")
def small_set(photo_folder, tmp_path_factory) -> Path:
    """Several shards built from `photo_folder`."""
    out = tmp_path_factory.mktemp("small") / "shards"
    build_shards([photo_folder], out, min_side=0, shard_size=60_000, workers=1, progress=progress)
    return out


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def shards_command(monkeypatch, capfd):
    """Call `hpcm shards` with some arguments, in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["hpcm shards", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ending:
            code = ending.code
        return Done(code, *capfd.readouterr())

    return call
