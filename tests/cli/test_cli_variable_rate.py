"""`hpcm encode --quality, --bpp and --psnr` as they are typed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from hpcm_scale.coding.container import unpack
from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import RateConfig
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import save_weights

AIMS = ("--quality", "--bpp", "--psnr")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Two seeded nanos, one with several rates and one with one."""
    paths = {}
    for name, levels in (("variable", 5), ("fixed", 1)):
        torch.manual_seed(0)
        model = HPCM(replace(compose_model("nano"), rate=RateConfig(levels=levels, lowest=1e-4)))
        paths[name] = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        save_weights(paths[name], model.state_dict(), model.config, {})
    return paths


@pytest.fixture(scope="module")
def photos(image_folder, tmp_path_factory) -> Path:
    """Crops of two images."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("kodim05", "kodim23"):
        with Image.open(image_folder / f"{name}.png") as image:
            image.crop((300, 200, 420, 300)).save(folder / f"{name}.png")
    return folder


def levels(folder: Path) -> list[int | None]:
    return [unpack(path.read_bytes()).level for path in sorted(folder.glob("*.hpcm"))]


@pytest.mark.parametrize(
    ("arguments", "level", "reported"),
    [((), 201, "79"), (("--quality", 0), 0, "0"), (("--quality", "99.9"), 255, "100"), (("--quality", 10), 26, "10")],
)
def test_a_quality_is_in_the_file_and_in_the_line(run, weights, photos, tmp_path, arguments, level, reported):
    """Without one it is that of λ = 0.013; decoding needs no option."""
    coded, back = tmp_path / "photo.hpcm", tmp_path / "back.png"
    chosen = ("--weights", weights["variable"], "--device", "cpu")
    code, out, err = run("encode", photos / "kodim05.png", coded, *chosen, *arguments)
    assert (code, err) == (0, "") and levels(tmp_path) == [level]
    assert f" bits per pixel, quality {reported}, in {coded}\n" in out
    assert run("decode", coded, back, *chosen) == (0, f"{coded}: decoded to {back}\n", "")


@pytest.mark.launch
def test_every_image_of_a_folder_is_searched_for(shared, run, weights, photos, tmp_path):
    chosen = ("--weights", weights["variable"], "--device", "cpu")
    by_rate = tmp_path / "rate"
    code, out, err = run("encode", photos, by_rate, *chosen, "--bpp", 4.2)
    assert (code, err) == (0, "")
    for path in by_rate.iterdir():
        assert 8 * path.stat().st_size / (120 * 100) == pytest.approx(4.2, rel=0.03)
    assert len(set(levels(by_rate))) == 2 and re.search(r", quality [\d.]+ to [\d.]+, in ", out)
    code, out, err = run("encode", photos, tmp_path / "psnr", *chosen, "--psnr", 1)
    assert (code, err) == (0, "") and levels(tmp_path / "psnr") == [0, 0]
    assert re.search(r", quality 0, PSNR [\d.]+ to [\d.]+ dB, in ", out)


def test_an_image_out_of_range_does_not_stop_the_others(shared, run, weights, photos, tmp_path):
    """The rate is that of one photo's smallest file, and the other's smallest is larger."""
    chosen = ("--weights", weights["variable"], "--device", "cpu")
    assert run("encode", photos, tmp_path / "smallest", *chosen, "--quality", 0)[0] == 0
    sizes = [path.stat().st_size for path in sorted((tmp_path / "smallest").iterdir())]
    assert sizes[0] != sizes[1]
    target = 8 * min(sizes) / (120 * 100)
    code, out, err = run("encode", photos, tmp_path / "out", *chosen, "--bpp", repr(target))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "hpcm: 1 of 2 files failed (" in err and " bpp is out of range for this image; " in err
    assert err.endswith("); correct the causes and repeat the command for them, the others are written\n")
    assert levels(tmp_path / "out") == [0]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        *(("fixed", (aim, 40), f"has one rate, that of the λ it was trained for; omit {aim}, or") for aim in AIMS),
        ("variable", ("--quality", 40, "--bpp", 1), "argument --bpp: not allowed with argument --quality"),
        ("variable", ("--quality", 101), "--quality: 101 must be at least 0 and at most 100"),
        ("variable", ("--quality", "nan"), "--quality: nan must be at least 0 and at most 100"),
        ("variable", ("--quality", "high"), "argument --quality: high is not a number; it must be at least 0"),
        ("variable", ("--bpp", 0), "--bpp: 0 must be greater than 0 and at most 1,000"),
        ("variable", ("--psnr", "inf"), "--psnr: inf must be greater than 0 and at most 1,000"),
        ("variable", ("--psnr", 90), "kodim05.png: 90 dB is out of range for this image; choose between "),
    ],
)
def test_a_mistake_is_one_line(run, weights, photos, tmp_path, kind, arguments, message):
    target = tmp_path / "a.hpcm"
    code, out, err = run(
        "encode", photos / "kodim05.png", target, "--weights", weights[kind], "--device", "cpu", *arguments
    )
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("hpcm: ") and message in err
    assert list(tmp_path.iterdir()) == []


def test_the_public_implementation_has_no_gains(run, weights, tmp_path):
    code, out, err = run("export", weights["variable"], "--out", tmp_path / "a.pth.tar")
    assert (code, out) == (2, "") and err == (
        "hpcm: nano has variable rate, but the public implementation has no gains; export a fixed-rate model\n"
    )
