"""Points that others measured: CompressAI's JSON and CSV files, sound or not."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hpcm_scale.commands import evaluate
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import RateCurve, compare
from hpcm_scale.evaluation.points import find_curves, shipped

BPP, PSNR, MS_SSIM = (0.12, 0.19, 0.29, 0.44), (26.9, 28.2, 29.6, 31.3), (0.91, 0.936, 0.955, 0.97)
COMPRESSAI = {
    "name": "bmshj2018-factorized",
    "description": "Inference (ans)",
    "results": {
        "psnr-rgb": [*PSNR],
        "ms-ssim-rgb": [*MS_SSIM],
        "bpp": [*BPP],
        "encoding_time": [0.02, 0.03, 0.02, 0.03],
    },
}


def write(folder: Path, content: object, name: str = "curve.json") -> str:
    file = folder / name
    data = content if isinstance(content, bytes) else str(content).encode()
    file.write_bytes(json.dumps(content).encode() if isinstance(content, dict | list) else data)
    return str(file)


def one(folder: Path, content: object, name: str = "curve.csv") -> RateCurve:
    (curve,) = find_curves(write(folder, content, name))
    return curve


def test_compressais_json(tmp_path):
    curve = one(tmp_path, COMPRESSAI)
    assert (curve.name, curve.codec, curve.rate) == ("bmshj2018-factorized", "Inference (ans)", "given")
    assert (curve.bpp, curve.psnr, curve.ms_ssim) == (BPP, PSNR, MS_SSIM)
    assert (curve.set, curve.images, curve.source) == (None, None, str(tmp_path / "curve.csv"))


@pytest.mark.parametrize("keys", [("psnr", "ms-ssim"), ("PSNR", "MS_SSIM"), ("psnr-rgb", None), (None, "ms-ssim-rgb")])
def test_older_and_partial_json(tmp_path, keys):
    results = {"bpp": [*BPP]} | {key: [*values] for key, values in zip(keys, (PSNR, MS_SSIM), strict=True) if key}
    for content in ({"results": results}, results):
        curve = one(tmp_path, content, "vtm.json")
        assert (curve.name, curve.bpp) == ("vtm", BPP)
        assert (curve.psnr, curve.ms_ssim) == (PSNR if keys[0] else None, MS_SSIM if keys[1] else None)


def test_a_list_of_objects_is_a_curve_each_under_names_of_their_own(tmp_path):
    unnamed = {"results": COMPRESSAI["results"]}
    curves = find_curves(write(tmp_path, [COMPRESSAI, COMPRESSAI, unnamed, unnamed], "many.json"))
    assert [curve.name for curve in curves] == [
        "bmshj2018-factorized",
        "bmshj2018-factorized (2)",
        "many",
        "many (2)",
    ]


@pytest.mark.parametrize("wrap", [lambda points: points, lambda points: {"name": "given", "results": points}])
def test_points_that_are_listed_one_by_one_are_one_curve(tmp_path, wrap):
    points = [{"bpp": a, "psnr": b, "quality": i} for i, (a, b) in enumerate(zip(BPP, PSNR, strict=True))]
    curve = one(tmp_path, wrap(points), "given.json")
    assert (curve.name, curve.bpp, curve.psnr, curve.ms_ssim) == ("given", BPP, PSNR, None)


def test_names_that_are_not_utf_8_are_shown(tmp_path):
    file = os.fsdecode(b"caf\xe9.csv")
    assert one(tmp_path, "bpp,psnr\n0.1,30\n", file).name == r"caf\xe9"
    described = {"name": "caf\udce9", "description": "\udce9", "bpp": [0.1], "psnr": [30]}
    curve = one(tmp_path, described)
    assert (curve.name, curve.codec) == (r"caf\xe9", r"\xe9")


TABLE = "\n".join(["bpp,psnr,ms-ssim", *(f"{a},{b},{c}" for a, b, c in zip(BPP, PSNR, MS_SSIM, strict=True))])


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        TABLE.replace("bpp,psnr,ms-ssim", "Rate (bpp), PSNR (dB), MS-SSIM") + "\n\n",
        TABLE.replace("bpp,psnr,ms-ssim", "# mean bpp,mean_PSNR,avg MS SSIM"),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace(",", ";"),
        TABLE.replace(",", ";").replace("0.", "0,"),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", "  "),
        TABLE.encode("utf-8-sig"),
        TABLE.encode("utf-16"),
        "\n".join(f"{i},{line}" for i, line in enumerate(TABLE.splitlines())).replace("0,bpp", "lambda,bpp", 1),
        "\n".join(f"{line},," for line in TABLE.splitlines()),
        "\n".join([TABLE.splitlines()[0], *reversed(TABLE.splitlines()[1:]), TABLE.splitlines()[2]]),
        TABLE.replace("bpp,psnr", "bpp (mean),Average PSNR (avg.)"),
        "# Kodak, 24 images\n# bpp 0.2, 3 settings\n" + TABLE.replace("\n", "\n# next\n"),
        "# Kodak\n# " + TABLE,
        "\n".join(f'"{line.replace(",", chr(34) + "," + chr(34))}"' for line in TABLE.splitlines()),
    ],
)
def test_csv_in_many_spellings(tmp_path, text):
    curve = one(tmp_path, text, "my codec.csv")
    assert (curve.name, curve.bpp, curve.psnr, curve.ms_ssim) == ("my codec", BPP, PSNR, MS_SSIM)


def test_ms_ssim_in_decibels_is_reported_by_its_size(tmp_path):
    decibels = "\n".join(["bpp,ms-ssim (dB)", "0.1,10", "0.2,20"])
    curve = one(tmp_path, decibels)
    assert curve.psnr is None and curve.ms_ssim == pytest.approx((0.9, 0.99))
    assert curve.quality("ms-ssim") == pytest.approx((10, 20))
    assert one(tmp_path, "bpp,ms-ssim\n0.1,1\n").ms_ssim == (1.0,)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "empty-points"),
        ("\n \n", "empty-points"),
        ("0.1,28\n0.2,30\n", "missing-column"),
        ("bpp,psnr\n", "missing-column"),
        ("bpp,psnr-y\n0.1,30\n", "missing-column"),
        ("bpp,psnr\n0.1,nan\n", "impossible-value"),
        ("bpp,psnr\n0.1,inf\n", "impossible-value"),
        ("bpp,psnr\n0.1,1e300\n", "impossible-value"),
        ('[{"bpp": 0.1, "psnr": 30}, {"bpp": 0.2}]', "impossible-value"),
        ("bpp,psnr\n-0.1,30\n", "impossible-value"),
        ("bpp,psnr\n0,30\n", "impossible-value"),
        ("bpp,psnr\n0.1,thirty\n", "impossible-value"),
        ("bpp,psnr\n0.1,30\n0.2\n", "impossible-value"),
        ("bpp,ms-ssim\n0.1,0.9\n0.2,17\n", "mixed-ms-ssim"),
        ("bpp,ms-ssim\n0.1,90\n0.2,98\n", "mixed-ms-ssim"),
        ("codec,image,bpp (bits/px),PSNR (dB)\nx,a.png,0.1,30\n", "points-per-image"),
        (b"d\xe9bit;psnr\n0.1;30\n", "points-not-text"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "points-not-text"),
        ('bpp,psnr\n0.1,"30\n' + "x" * 200_000, "damaged-csv"),
        ("{", "damaged-json"),
        ("[" * 100_000, "damaged-json"),
        ("[]", "no-points"),
        ("[1]", "no-points"),
        ('{"results": [1]}', "no-points"),
        ("{}", "missing-column"),
        ('{"results": {"bpp": [0.1, 0.2], "psnr": [30]}}', "uneven-columns"),
        ('{"results": {"bpp": [0.1], "psnr": [null, 1]}}', "impossible-value"),
        ('{"results": {"bpp": [[0.1]], "psnr": [1]}}', "impossible-value"),
        ('{"results": {"bpp": [1e999], "psnr": [1]}}', "impossible-value"),
        ('{"format": "hpcm_scale laws 1"}', "points-of-another-kind"),
        ('{"format": "hpcm_scale task evaluation 1"}', "points-of-another-kind"),
    ],
)
def test_files_that_hold_no_points_are_refused_in_one_sentence(tmp_path, content, code):
    file = write(tmp_path, content, "odd.file")
    with pytest.raises(UserError) as refusal:
        find_curves(file)
    assert refusal.value.code == code
    assert file in str(refusal.value) and "hpcm evaluate` again" not in str(refusal.value)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["points.csv", "result/evaluation.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    pipe = tmp_path / name
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"cannot read .* \(it is a pipe\)"):
        find_curves(str(pipe if pipe.parent == tmp_path else pipe.parent))


def test_points_compare_like_any_curve_and_their_images_are_not_known(tmp_path):
    anchor = shipped()["kodak/vtm-18"]
    table = "\n".join(["bpp,psnr", *(f"{a / 2!r},{b!r}" for a, b in zip(anchor.bpp, anchor.psnr, strict=True))])
    half = one(tmp_path, table)
    assert compare(half, anchor).bd_rate == pytest.approx(-50)
    assert compare(anchor, half).bd_rate == pytest.approx(100)
    with pytest.raises(UserError, match="curve has no MS-SSIM in dB; compare by PSNR"):
        compare(half, half, "ms-ssim")
    with pytest.raises(UserError, match="curve has no PSNR; compare by MS-SSIM in dB"):
        compare(replace(half, psnr=None, ms_ssim=(0.9,) * len(half.bpp)), anchor)
    with pytest.raises(UserError, match="has 1 point, but a BD-rate needs 3"):
        compare(one(tmp_path, "bpp,psnr\n0.1,30\n"), anchor)


@pytest.fixture
def hpcm_evaluate(monkeypatch, capsys, save_untrained, tmp_path):
    """Types `hpcm evaluate` with an untrained model and these arguments; gives the exit code and what it wrote."""

    def run(*arguments: object) -> tuple[int, str, str]:
        typed = ["--weights", save_untrained("points"), "--out", tmp_path / "out", "--device", "cpu", "--estimate"]
        monkeypatch.setattr(sys, "argv", ["hpcm evaluate", *map(str, [*typed, *arguments])])
        code = 0
        try:
            evaluate.main()
        except SystemExit as ended:
            code = ended.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


def test_evaluate_draws_and_lists_points_beside_ours(hpcm_evaluate, small_images, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    other, table = write(tmp_path, COMPRESSAI | {"name": "$other$"}), write(tmp_path, TABLE, "mine.csv")
    code, out, error = hpcm_evaluate("--images", small_images.folder, "--points", other, table, "kodak/vtm-18")
    assert code == 0, error
    assert "$other$" in out and "mine" in out and "published" in out
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert r"| \$other\$ | given | – | 0.1200 | 26.90 | 0.9100 | 10.46 |" in page
    assert "given in" in page and "image set unknown" in page and "image set kodak" in page
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [given["name"] for given in result["given"]] == ["$other$", "mine", "kodak/vtm-18"]
    assert [curve.name for curve in find_curves(str(tmp_path / "out"))] == ["hpcm nano"]  # ours alone


@pytest.mark.launch
def test_metrics_that_are_not_asked_for_are_not_measured(hpcm_evaluate, small_images, tmp_path):
    large = tmp_path / "large"
    large.mkdir()
    Image.effect_noise((170, 165), 60).convert("RGB").save(large / "a.png")
    code, out, error = hpcm_evaluate("--images", large, "--metrics", "psnr")
    assert code == 0, error
    files = [(tmp_path / "out" / name).read_text() for name in ("images.csv", "evaluation.md")]
    assert not any("MS-SSIM |" in text or "MS-SSIM (dB)" in text for text in [out, *files])
    (curve,) = find_curves(str(tmp_path / "out"))
    assert curve.ms_ssim is None and curve.psnr
    code, out, error = hpcm_evaluate("--images", large, "--metrics", "ms-ssim")
    assert code == 0, error
    assert "PSNR" not in out + (tmp_path / "out" / "images.csv").read_text()
    (curve,) = find_curves(str(tmp_path / "out"))
    assert curve.psnr is None and curve.ms_ssim
    assert (tmp_path / "out" / "visual.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--metrics", "psnr,vmaf"], "there is no metric 'vmaf'; choose from psnr, ms-ssim"),
        (["--metrics", ""], "there is no metric ''"),
        (["--metrics", "ms-ssim"], "a_noise.png is too small for MS-SSIM; add psnr to --metrics"),
        (["--points", "nowhere.json"], "there is no file, folder or shipped curve nowhere.json"),
        (["--points", "kodak/vtm-18", "--set", "tecnick"], "--points kodak/vtm-18 are on kodak, not on tecnick"),
        (["--points", "kodak/vtm-18", "--task", "text"], "--points needs --images with another task"),
    ],
)
def test_evaluate_refuses_before_anything_is_written(hpcm_evaluate, small_images, tmp_path, arguments, reported):
    code, out, error = hpcm_evaluate("--images", small_images.folder, *arguments)
    assert (code, out) == (2, "") and reported in error and error.count("hpcm: ") == 1
    assert not (tmp_path / "out").exists()
