"""The commands as a user types them: what they print, and one line with exit code 2 for a mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_training import SHALLOW

from hpcm_scale import __version__
from hpcm_scale.cli import COMMANDS
from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import load_weights, save_weights

TYPED = [
    (),
    ("--help",),
    ("nonsense",),
    ("modles",),
    *((command, "--help") for command in COMMANDS),
    ("models", "nonsense"),
    ("estimate", "modle=nano"),
    ("estimate", "experiment=machine", "stage=joint"),
    ("evaluate", "--weights", "nowhere.safetensors", "--images", "."),
]


@pytest.fixture(scope="module")
def answers(fork_server, tmp_path_factory) -> dict[tuple[str, ...], subprocess.CompletedProcess]:
    """The answers of a forked process to all of `TYPED`."""
    folder = tmp_path_factory.mktemp("empty")
    Image.new("RGB", (8, 8)).save(folder / "a.png")

    def answer(arguments: tuple[str, ...]) -> subprocess.CompletedProcess:
        environment = os.environ | {"COLUMNS": "120"}
        process = fork_server.start("hpcm_scale.cli", arguments, cwd=folder, env=environment)
        output, errors = process.communicate(timeout=400)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    return {arguments: answer(arguments) for arguments in TYPED}


@pytest.mark.launch
def test_without_arguments_it_lists_the_commands(answers):
    for arguments in ((), ("--help",)):
        assert answers[arguments].returncode == 0
        for command, purpose in COMMANDS.items():
            assert re.search(rf"^  {command} +{re.escape(purpose)}$", answers[arguments].stdout, re.MULTILINE)


@pytest.mark.launch
def test_the_console_script():
    script = Path(sys.executable).with_name("hpcm")
    assert subprocess.check_output([script, "--version"], text=True, timeout=400) == f"{__version__}\n"


@pytest.mark.launch
@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, answers):
    result = answers[command, "--help"]
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert command in result.stdout and len(result.stdout.splitlines()) > 3


@pytest.mark.launch
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "there is no command `nonsense`; choose one of shards, models"),
        (("modles",), "there is no command `modles`; did you mean `models`?"),
        (("estimate", "experiment=machine", "stage=joint"), "supports only codecs without pre-editor"),
        (("estimate", "modle=nano"), "unknown key modle in modle=nano; did you mean model?"),
        (("evaluate", "--weights", "nowhere.safetensors", "--images", "."), "no weights at nowhere.safetensors"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, answers):
    result = answers[arguments]
    assert result.returncode == 2
    assert result.stderr.startswith("hpcm: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.launch
def test_what_argparse_refuses_is_no_traceback(answers):
    result = answers["models", "nonsense"]
    assert result.returncode == 2 and "nonsense" in result.stderr and "Traceback" not in result.stderr


FACTS = {"lmbda": 0.025, "precision": "fp32", "step": 80, "images": 640, "pflops": 0.9}


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    model = HPCM(compose_model("nano"))
    path = tmp_path / "run" / "weights.safetensors"
    save_weights(path, model.state_dict(), model.config, FACTS)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("wide.png", (70, 30)), ("high.jpg", (30, 70)), ("zebra.webp", (64, 64))):
        Image.effect_noise(size, 50).convert("RGB").save(folder / name)
    return folder


FILES = ["evaluation.json", "evaluation.md", "images.csv", "rate_distortion.png"]


@pytest.mark.launch
def test_evaluate(run, weights, photos, tmp_path):
    """Real files by default."""
    out_folder = tmp_path / "out"
    code, out, err = run("evaluate", "--weights", weights, "--images", photos, "--out", out_folder)
    assert code == 0, err
    assert re.search(r"wide\.png.*70×30", out) and "mean" in out and "rate files" in out
    result = json.loads((out_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert result["images"] == {"folder": str(photos), "set": None, "count": 3}
    (curve,) = result["curves"]
    (point,) = curve["points"]
    assert (curve["name"], curve["rate"], point["facts"]) == ("hpcm nano", "files", FACTS)
    assert point["kmac_per_pixel"] == pytest.approx(3.63, abs=0.01)
    images = point["images"]
    assert [image["name"] for image in images] == ["high.jpg", "wide.png", "zebra.webp"]
    assert all(image["bits"] % 8 == 0 and image["encode_seconds"] > 0 for image in images)
    mean = sum(image["psnr"] for image in images) / 3
    assert point["mean"]["psnr"] == pytest.approx(mean) and f"{mean:.2f}" in out
    for name in ("rate_distortion.png", "visual.png"):
        with Image.open(out_folder / name) as picture:
            assert picture.format == "PNG"
    assert sorted(path.name for path in out_folder.iterdir()) == [*FILES, "visual.png"]


def test_evaluate_estimates_as_training_does(run, weights, photos, tmp_path):
    out_folder = tmp_path / "out"
    arguments = ("--estimate", "--visual", 0, "--images", photos, "--out", out_folder)
    code, out, err = run("evaluate", "--weights", weights, *arguments)
    assert code == 0, err
    assert "loss" in out and "encode" not in out and "rate estimated" in out
    (curve,) = json.loads((out_folder / "evaluation.json").read_text(encoding="utf-8"))["curves"]
    assert curve["rate"] == "estimated"
    for image in curve["points"][0]["images"]:
        assert image["loss"] == pytest.approx(0.025 * 255**2 * image["mse"] + image["bpp"], rel=1e-5)
    assert sorted(path.name for path in out_folder.iterdir()) == FILES


@pytest.mark.launch
def test_evaluate_several_weights_against_another_codec(run, weights, photos, tmp_path):
    model, _ = load_weights(weights)
    save_weights(tmp_path / "low.safetensors", model.state_dict(), model.config, FACTS | {"lmbda": 0.005})
    arguments = ("--against", "jpeg", "--limit", 2, "--images", photos, "--out", tmp_path / "out")
    code, out, err = run("evaluate", "--weights", weights, tmp_path / "low.safetensors", *arguments)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    ours, jpeg = result["curves"]
    assert {point["setting"] for point in ours["points"]} == {"λ = 0.005", "λ = 0.025"}
    assert (ours["name"], jpeg["name"], result["images"]["count"]) == ("hpcm nano", "jpeg", 2)
    assert "4:2:0" in jpeg["codec"] and len(jpeg["points"]) > 2
    for curve in (ours, jpeg):
        rates = [point["mean"]["bpp"] for point in curve["points"]]
        assert rates == sorted(rates) and f"{rates[0]:.4f}" in out
    assert "zebra.webp" not in out and "jpeg" in (tmp_path / "out" / "images.csv").read_text(encoding="utf-8")


def test_evaluate_limits_and_writes_nothing_unasked(run, weights, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("evaluate", "--weights", weights, "--images", photos, "--limit", 1, "--device", "cpu")
    assert code == 0, err
    assert "high.jpg" in out and "wide.png" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "run"]


@pytest.mark.launch
def test_evaluate_fits_80_columns(run, weights, photos):
    for arguments in ((), ("--estimate",), ("--against", "jpeg")):
        code, out, err = run("evaluate", "--weights", weights, "--images", photos, "--limit", 1, *arguments, columns=80)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 80 and "…" not in out


@pytest.mark.parametrize(
    "case",
    [
        *("no weights", "no safetensors", "foreign weights", "same weights", "no folder", "no image", "broken image"),
        *("limit", "visual", "device", "out", "below a file", "below a broken link", "codec", "set"),
        *("other set", "part of a set"),
    ],
)
def test_evaluate_refuses_in_one_line(case, run, weights, photos, tmp_path):
    arguments = {"--weights": weights, "--images": photos, "--out": tmp_path / "out"}
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes((photos / "wide.png").read_bytes()[:-30])
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    change, message = {
        "no weights": ({"--weights": tmp_path / "nowhere"}, "there are no weights at"),
        "no safetensors": ({"--weights": tmp_path / "file"}, "is not a readable safetensors file"),
        "foreign weights": ({"--weights": tmp_path / "foreign.safetensors"}, "was not written by hpcm_scale"),
        "same weights": ({"--weights": (weights, weights)}, "twice; remove one"),
        "no folder": ({"--images": tmp_path / "nowhere"}, "there is no folder"),
        "no image": ({"--images": tmp_path / "nothing"}, "there is no JPEG, PNG or WebP image in"),
        "broken image": ({"--images": tmp_path / "broken"}, "b.png"),
        "limit": ({"--limit": 0}, "--limit: 0 must be at least 1"),
        "visual": ({"--visual": -1}, "--visual: -1 must be at least 0"),
        "device": ({"--device": "abacus"}, "--device abacus cannot be used here"),
        "out": ({"--out": tmp_path / "file"}, "is a file; choose another"),
        "below a file": ({"--out": tmp_path / "file" / "below"}, "is a file; choose another"),
        "below a broken link": ({"--out": tmp_path / "link" / "below"}, "is a dangling link; choose another"),
        "codec": ({"--against": "jpeg,jpge"}, "there is no codec 'jpge'"),
        "set": ({"--set": "codak"}, "there is no image set codak"),
        "other set": ({"--set": "kodak"}, "kodak has 24 images"),
        "part of a set": ({"--set": "kodak", "--limit": 3}, "--limit 3 makes kodak incomplete"),
    }[case]
    typed = []
    for name, value in (arguments | change).items():
        typed += [name, *(value if isinstance(value, tuple) else (value,))]
    code, out, err = run("evaluate", *typed)
    assert code == 2
    assert err.startswith("hpcm: ") and message in err and err.count("\n") == 1
    assert out == "" and not (tmp_path / "out").exists()


@pytest.mark.launch
def test_estimate_of_the_largest_model_on_eight_gpus(run):
    code, out, err = run("estimate", "model=1b", "engine=zero3", "engine.world_size=8")
    assert code == 0, err
    assert "1,000,328,003 parameters" in out and "8 × H100" in out and "4 crops of 256²" in out
    kinds = dict(re.findall(r"(weights|gradients|optimizer|activations|total) +│ +([\d.]+)", out))
    assert set(kinds) == {"weights", "gradients", "optimizer", "activations", "total"}
    # A share of an eighth of 4 GB and, for the weights, what is gathered at a time.
    assert float(kinds["gradients"]) == 0.50 and float(kinds["optimizer"]) == 1.00
    assert 1.5 < float(kinds["weights"]) < 1.7
    assert 5 < float(kinds["activations"]) < 16
    pflops = 2_000_000 * 96.5165e12 / 1e15
    assert f"{pflops:,.4g} PFLOPs" in out
    hours = pflops * 1e15 / (8 * 67e12 * 0.4) / 3600
    assert f"{hours:,.1f} hours, {hours * 8 / 24:,.1f} GPU-days" in out
    assert "each GPU sends 3.50 GB of gradients" in out and "at 450 GB/s" in out and "scaling efficiency" in out


@pytest.mark.launch
def test_estimate_over_machines_with_a_price_and_at_another_rate(run):
    keys = (*SHALLOW, "engine=zero3_offload", "engine.precision=bf16", "engine.world_size=16", "train.steps=100000")
    options = ("--bandwidth-network", 0.01, "--price", 2, "--gpu", "A100", "--mfu", "0.5")
    code, out, err = run("estimate", *keys, *options)
    assert code == 0, err
    assert "at 50% of 312 TFLOP/s (A100, bf16)" in out and "in host memory" in out
    assert "100,000 steps of 32 images: 3,200,000 images" in out and "at 0.01 GB/s" in out
    assert len(re.findall(r"hours, [\d.]+ GPU-days, [\d,]+ at 2 per GPU-hour", out)) == 2
    (alone, together) = (float(hours) for hours in re.findall(r": ([\d.]+) hours", out))
    [efficiency] = re.findall(r"scaling efficiency ([\d.]+)%", out)
    assert together >= alone and 0 < float(efficiency) < 100


def test_estimate_asks_for_links_that_no_data_sheet_tells(run):
    arguments = (*SHALLOW, "engine=zero2", "engine.world_size=2", "--gpu", "L40S")
    code, out, err = run("estimate", *arguments)
    assert code == 0, err
    assert "for the communication time, give --bandwidth-node" in out and "efficiency" not in out


@pytest.mark.launch
def test_estimate_reports_the_time_of_the_host(run):
    """A step takes no less than that, but for a compiled one, of which it is not known."""
    arguments = (*SHALLOW, "train.steps=3600000", "train.batch_size=4", "engine.precision=bf16")
    code, out, err = run("estimate", *arguments, "--launch-us", "10")
    assert code == 0, err
    [(operations, milliseconds)] = re.findall(
        r"the host launches ([\d,]+) operations in ([\d.]+) ms at 10 µs each", out
    )
    assert float(milliseconds) == pytest.approx(int(operations.replace(",", "")) / 100, rel=1e-3)
    assert f"the run: {float(milliseconds):.1f} hours" in out  # 3,600,000 steps
    code, out, err = run("estimate", *arguments, "engine.compile=true", "--launch-us", "10")
    assert code == 0, err
    assert "host time is unknown" in out and "the run: 0.0 hours" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=nanno"], "did you mean nano?"),
        (["model=nano", "--launch-us", "-1"], "--launch-us: -1 must be at least 0 and at most 10,000"),
        (["model=nano", "engine.world_size=3"], "is not divisible by 3 processes; use train.batch_size=33"),
        (["model=nano", "engine.world_size=-8"], "engine.world_size=-8 must be at least 1"),
        (["model=nano", "data.crop=200"], "use data.crop=256"),
        (["model=nano", "--gpu", "H300"], "the peak rate of --gpu H300 is unknown; give another"),
        (["model=nano", "--mfu", "1.5"], "--mfu: 1.5 must be at least 0.001 and at most 1"),
        (["model=nano", "--mfu", "nan"], "--mfu: nan must be at least 0.001 and at most 1"),
        (["model=nano", "--price", "-1"], "--price: -1 must be greater than 0"),
        (
            ["model=nano", "--bandwidth-node", "inf"],
            "--bandwidth-node: inf must be at least 0.001 and at most 1,000,000",
        ),
        (["model=nano", "--gpus-per-node", "0"], "--gpus-per-node: 0 must be at least 1"),
    ],
)
def test_estimate_refuses_in_one_line(arguments, message, run):
    code, out, err = run("estimate", *arguments)
    assert code == 2
    assert err.startswith("hpcm: ") and message in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        (("-m", "--cfg", "job"), "Only one of"),
        (("--run", "--multirun"), "Only one of"),
        (("--resolve",), "--resolve flag"),
        (("--cfg", "nonsense"), "invalid choice"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_hydras_own_options_are_refused_in_one_line(run, options, reported):
    code, out, err = run("train", "model=nano", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("hpcm: ") and reported in err and err.endswith("see hpcm train --help\n")
