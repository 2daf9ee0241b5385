"""`hpcm bench` as it is typed: what it prints and writes, and its mistakes."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bench import data
from bench.command import main
from bench.entropy import draw_symbols, measure_range_coder
from mistakes import mistake_in
from PIL import Image

mistake = partial(mistake_in, main)


def bench(monkeypatch, folder: Path, *arguments: str) -> dict:
    """Run it with an output folder; what its JSON holds."""
    command = [*arguments, "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", ["hpcm bench", *command])
    main(command)
    return json.loads((folder / f"{arguments[0]}.json").read_text())


@pytest.mark.long
def test_train_writes_times_utilisation_memory_and_a_profile(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    arguments = ("train", "--preset", "nano", "--batch", "1", "--rounds", "1", "--device", "cpu", "--profile")
    found = bench(monkeypatch, tmp_path / "out", *arguments)
    names = [found["baseline"]["name"], *(candidate["name"] for candidate in found["candidates"])]
    assert names == [
        "fp32, plain NCHW",
        "fp32, channels-last",
        "bf16, channels-last",
        "bf16, channels-last, checkpoint=blocks",
        "bf16, channels-last, checkpoint=steps",
    ]
    for measured in (found["baseline"], *found["candidates"]):
        ratios = [a / b for a, b in zip(found["baseline"]["seconds"], measured["seconds"], strict=True)]
        assert measured["times_as_fast"]["median"] == pytest.approx(np.median(ratios))
        rates = found["matmul"][measured["precision"]]["rates"]
        shares = [found["step_flops"] / (a * b) for a, b in zip(measured["seconds"], rates, strict=True)]
        assert measured["utilisation"]["median"] == pytest.approx(np.median(shares))
        assert 0 < measured["utilisation"]["median"] < 2
        shares = found["profile"].get(measured["name"])
        assert shares is None or sum(shares.values()) == pytest.approx(np.median(measured["seconds"]))
        assert measured["loss"] == pytest.approx(found["baseline"]["loss"], rel=2e-2)
    first, second = found["profile"]
    assert first == names[0] and second in names[1:]
    fp32, bf16, blocks, steps = (candidate["activation_bytes"] for candidate in found["candidates"])
    assert found["baseline"]["activation_bytes"] > fp32 > bf16 > blocks > steps > 0
    assert found["candidates"][3]["activations_of_baseline"] == steps / found["baseline"]["activation_bytes"]
    assert found["machine"]["command"] == f"hpcm bench {' '.join(arguments)} --out {tmp_path / 'out'}"
    assert {"date", "cpu", "cpu_flags", "torch_threads", "python", "git", "packages"} <= set(found["machine"])

    printed, page = capsys.readouterr().out, (tmp_path / "out" / "train.md").read_text()
    for name in names:
        assert name in printed and f"| {name} |" in page
    assert "![train_profile](train_profile.png)" in page
    assert Image.open(tmp_path / "out" / "train_profile.png").width > 1000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.json", "train.md", "train_profile.png"]


@pytest.mark.long
def test_optimizer_relates_steps_to_those_with_adam(tmp_path, capsys, monkeypatch):
    arguments = ("--preset", "nano", "--crop", "256", "--batches", "1", "2", "--rounds", "1", "--device", "cpu")
    found = bench(monkeypatch, tmp_path, "optimizer", *arguments)
    adam, muon, soap = (found["optimizers"][name] for name in ("adam", "muon", "soap"))
    assert adam["flops"] == 0 < min(muon["flops"], soap["flops"])
    assert adam["update"]["median"] == adam["step"]["2"]["median"] == 1
    [gradients], [ours], [theirs] = found["gradients"]["2"], muon["seconds"], adam["seconds"]
    assert muon["step"]["2"]["median"] == pytest.approx((gradients + ours) / (gradients + theirs))
    assert "step of 1" in capsys.readouterr().out


@pytest.mark.long
def test_data_times_the_stream_from_synthetic_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "IMAGES", 2)
    arguments = ("--rounds", "1", "--batch", "2", "--batches", "1", "--workers", "1", "--crop", "512")
    found = bench(monkeypatch, tmp_path, "data", *arguments)
    assert (found["images"], found["crop"], found["workers"], found["crops"]) == (2, 512, 1, 2)
    assert [each["model"] for each in found["demands"]] == ["68m", "68m", "1b"]
    share = found["demands"][0]["share"]  # of 16 workers as fast as this one
    speed = found["crops"] / found["seconds"]["training stream"][0]
    assert found["waits"]["step"] == pytest.approx(2 / (share * speed))
    assert "synthetic images" in capsys.readouterr().out


def test_codec_codes_images_of_a_folder(tmp_path, capsys, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 70, 130, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    arguments = ("--preset", "nano", "--images", str(tmp_path), "--limit", "1", "--rounds", "2", "--device", "cpu")
    found = bench(monkeypatch, tmp_path / "out", "codec", *arguments)
    (image,) = found["images"]
    assert (image["image"], image["width"], image["height"]) == ("0.png", 130, 70)
    for direction in ("encode", "decode"):
        times, entropy = image["seconds"][direction], image["entropy_seconds"][direction]
        assert {variant: len(rounds) for variant, rounds in times.items()} == {"plain NCHW": 2, "optimized": 2}
        assert all(0 < share < whole for share, whole in zip(entropy, times["optimized"], strict=True))
    printed = capsys.readouterr().out
    assert "1 images" not in printed and "over 1 image × 2 rounds" in printed
    assert f"{8 * image['bytes'] / (130 * 70):.3f} bits per pixel" in printed


@pytest.mark.launch
def test_entropy_measures_range_coder_and_likelihood(tmp_path, capsys, monkeypatch):
    arguments = ("--symbols", "20000", "--elements", "1000", "--rounds", "2", "--device", "cpu")
    found = bench(monkeypatch, tmp_path, "entropy", *arguments)
    single, in_steps, at_once = found["range_coder"]
    assert [kind["symbols"] for kind in (single, in_steps, at_once)] == [5000, 20000, 20000]
    for kind in (single, in_steps, at_once):
        assert kind["least_bits"] < kind["bits"] < 1.01 * kind["least_bits"]
    assert len(found["likelihood"]["public"]) == len(found["likelihood"]["survival"]) == 2
    printed = capsys.readouterr().out
    assert "by table, in 11 steps as in files" in printed and "survival formula" in printed


def test_drawn_symbols_follow_their_tables():
    symbols, tables = draw_symbols(100_000)
    assert len(np.unique(tables)) > 50
    assert symbols[tables == 1].std() < 0.2 < 10 < symbols[tables > 50].std()
    (single, *_) = measure_range_coder(2_000, 1)
    assert single.symbols == 2_000


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (("train", "--preset", "68n"), "there is no preset 68n; did you mean 68m?"),
        (("train", "--preset", "nano", "--crop", "250"), "--crop 250 does not fit nano, whose inputs are multiples of"),
        (("train", "--preset", "nano", "--rounds", "0"), "--rounds: 0 must be at least 1"),
        (("train", "--preset", "nano", "--batch", "-1"), "--batch: -1 must be at least 1"),
        (("train", "--preset", "nano", "--precision", "fp8"), "invalid choice: 'fp8'"),
        (("train", "--preset", "nano", "--profile"), "--profile writes a figure to --out; add --out FOLDER"),
        (("train", "--preset", "nano", "--device", "cuda:77"), "--device cuda:77 cannot be used here"),
        (("data", "--shards", "nowhere", "--workers", "1"), "nowhere"),
        (("data", "--crop", "300"), "--crop 300 does not fit 68m"),
        (("processes", "--engines", "zero9"), "invalid choice: 'zero9'"),
        (("codec", "--preset", "nano", "--images", "nowhere"), "there is no folder nowhere"),
        (("codec", "--preset", "nano", "--limit", "2"), "--limit needs a folder of images; add --images FOLDER"),
        (("codec", "--weights", "nowhere.safetensors"), "there are no weights at nowhere.safetensors"),
        (("entropy", "--out", __file__), "is a file; choose another"),
        (("train", "--out", f"{__file__}/below"), "is a file; choose another"),
        (("entropy", "--symbols", "0"), "--symbols: 0 must be at least 1"),
        ((), "the following arguments are required: COMMAND"),
        (("trian",), "invalid choice: 'trian'"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(arguments, reported, capsys):
    assert reported in mistake(capsys, *arguments)
