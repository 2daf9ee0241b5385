"""BD-rate: the published numbers, another way of computing it, and curves that have none."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from io import BytesIO

import bjontegaard
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.interpolate import PchipInterpolator

from hpcm_scale.commands import bd_rate as command
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import RateCurve, check_set, compare, same_images
from hpcm_scale.evaluation.curves import ESTIMATED, FILES, Curve, Point
from hpcm_scale.evaluation.measures import Measured, peak_signal_to_noise
from hpcm_scale.evaluation.points import shipped
from hpcm_scale.evaluation.tables import Results, write_json

KNOWN = [
    ("kodak/hpcm-base", "kodak/vtm-18", -15.45),
    ("clic-pro-valid/hpcm-base", "clic-pro-valid/vtm-17", -13.96),
    ("tecnick/hpcm-base", "tecnick/vtm-18", -18.24),
    ("kodak/hpcm-large", "kodak/vtm-18", -19.39),
    ("clic-pro-valid/hpcm-large", "clic-pro-valid/vtm-17", -18.13),
    ("tecnick/hpcm-large", "tecnick/vtm-18", -22.25),
]
BPP, PSNR = (0.1, 0.2, 0.4, 0.8), (28.0, 30.0, 32.5, 36.0)


def curve(bpp=BPP, psnr=PSNR, name="ours", **options) -> RateCurve:
    """A curve of points given in any order."""
    return RateCurve(name, "a codec", "a file", "files", tuple(bpp), tuple(psnr), **options)


@pytest.mark.parametrize(("name", "anchor", "percent"), KNOWN)
def test_known_answers(name, anchor, percent):
    assert compare(shipped()[name], shipped()[anchor]).bd_rate == pytest.approx(percent, abs=0.02)


def test_half_the_bits_are_minus_fifty_percent():
    found = compare(curve(np.array(BPP) / 2), curve())
    assert found.bd_rate == pytest.approx(-50, abs=1e-12)
    assert (found.low, found.high, found.share_of_curve, found.share_of_anchor) == (28, 36, 1, 1)


def test_the_overlap_is_stated():
    higher = curve(psnr=np.array(PSNR) + 6)
    found = compare(curve([*BPP, 1.6], [*PSNR, 38]), higher)
    assert (found.low, found.high) == (34, 38)
    assert (found.share_of_curve, found.share_of_anchor) == (pytest.approx(4 / 10), pytest.approx(4 / 8))


def by_quadrature(rates, qualities, anchor_rates, anchor_qualities) -> float:
    """BD-rate by Gauss-Legendre quadrature between neighbouring points, where pchip is a cubic."""
    low, high = max(qualities[0], anchor_qualities[0]), min(qualities[-1], anchor_qualities[-1])
    knots = np.union1d(qualities, anchor_qualities)
    knots = np.concatenate([[low], knots[(knots > low) & (knots < high)], [high]])
    nodes, weights = np.polynomial.legendre.leggauss(3)
    half = np.diff(knots)[:, None] / 2
    at = knots[:-1, None] + half * (nodes + 1)
    ours, theirs = (
        PchipInterpolator(x, np.log(y))(at) for x, y in ((qualities, rates), (anchor_qualities, anchor_rates))
    )
    return 100 * math.expm1(((ours - theirs) * weights * half).sum() / (high - low))


@st.composite
def points(draw) -> tuple[np.ndarray, np.ndarray]:
    """Three to twelve points that rise in rate and quality, and reach from below 33 to above 35 dB."""
    count = draw(st.integers(3, 12))
    steps = st.lists(st.floats(0.05, 1), min_size=count - 1, max_size=count - 1)
    rises = np.cumsum([0, *draw(steps)])
    low, high = draw(st.floats(25, 33)), draw(st.floats(35, 48))
    qualities = low + (high - low) * rises / rises[-1]
    rates = draw(st.floats(0.01, 0.5)) * np.exp(np.cumsum([0, *draw(steps)]))
    return rates, qualities


@settings(max_examples=60, deadline=None)
@given(points(), points(), st.randoms(use_true_random=False))
def test_any_pair_agrees_with_others(ours, theirs, random):
    """With the library called as its manual says, and with a quadrature of our own, whatever the order of points."""
    rows = list(zip(*ours, strict=True))
    rows += random.choices(rows, k=2)  # twice the same point is one point
    random.shuffle(rows)
    try:
        found = compare(curve(*zip(*rows, strict=True)), curve(*theirs, name="theirs")).bd_rate
    except UserError as error:
        assert error.code == "disjoint-curves"
        return
    options = {"method": "pchip", "require_matching_points": False, "min_overlap": 0}
    assert found == pytest.approx(bjontegaard.bd_rate(*theirs, *ours, **options), rel=1e-9, abs=1e-9)
    assert found == pytest.approx(by_quadrature(*ours, *theirs), rel=1e-9, abs=1e-9)
    back = compare(curve(*theirs), curve(*ours)).bd_rate
    assert (1 + found / 100) * (1 + back / 100) == pytest.approx(1)


def test_ms_ssim_is_compared_in_decibels():
    similarity = (0.9, 0.95, 0.99, 0.995)
    ours = curve(ms_ssim=similarity)
    theirs = curve((0.15, 0.3, 0.5, 1.0), ms_ssim=(0.91, 0.96, 0.985, 0.99))
    assert ours.quality("ms-ssim") == pytest.approx((10, 13.0103, 20, 23.0103), abs=1e-4)
    columns = (theirs.bpp, theirs.quality("ms-ssim"), ours.bpp, ours.quality("ms-ssim"))
    expected = bjontegaard.bd_rate(*columns, "pchip", min_overlap=0)
    assert compare(ours, theirs, "ms-ssim").bd_rate == pytest.approx(expected, abs=1e-9)
    with pytest.raises(UserError, match="theirs has no MS-SSIM in dB; compare by PSNR") as error:
        compare(ours, curve(name="theirs"), "ms-ssim")
    assert (error.value.code, error.value.key) == ("metric-not-measured", "--metric")


@pytest.mark.parametrize(
    ("bpp", "psnr", "code", "values"),
    [
        (BPP, (10, 12, 13, 15), "disjoint-curves", "10.00 to 15.00 dB.* 28.00 to 36.00 dB"),
        (BPP, (10, 12, 13, 28.2), "disjoint-curves", ""),
        ((0.1, 0.2), (28, 36), "few-points", "2 different points"),
        ((0.1, 0.1, 0.1, 0.2), (28, 28, 28, 36), "few-points", "2 different points"),
        (BPP, (28, 30, 29.9, 36), "falling-curve", r"0\.2000 bpp at 30\.00 dB before 0\.4000 bpp at 29\.90 dB"),
        (BPP, (28, 30, 30, 36), "falling-curve", ""),
        ((0.1, 0.2, 0.2, 0.8), PSNR, "falling-curve", r"0\.2000 bpp at 30\.00 dB before 0\.2000 bpp at 32\.50 dB"),
        (BPP, (28, 30, math.nan, 36), "impossible-point", "0.4000 bpp at nan dB"),
        (BPP, (28, 30, 32, math.inf), "impossible-point", "at inf dB"),
        ((0, 0.2, 0.4, 0.8), PSNR, "impossible-point", "0.0000 bpp at 28.00 dB"),
    ],
)
def test_curves_without_a_bd_rate_are_refused(bpp, psnr, code, values):
    for pair in ((curve(bpp, psnr), curve(name="theirs")), (curve(name="theirs"), curve(bpp, psnr))):
        if "28.00 to" in values and pair[1].name == "ours":
            values = "28.00 to 36.00 dB.* 10.00 to 15.00 dB"
        with pytest.raises(UserError, match=values) as error:
            compare(*pair)
        assert error.value.code == code


def test_a_quarter_of_the_narrower_range_is_enough():
    narrow = (28.0, 29.0, 31.0, 32.0)
    compare(curve(psnr=np.array(narrow) + 7), curve())  # shares 1 of 4 dB: a quarter
    with pytest.raises(UserError) as error:
        compare(curve(psnr=np.array(narrow) + 7.01), curve())
    assert error.value.code == "disjoint-curves"
    compare(curve(psnr=np.array(narrow) / 4 + 23), curve())  # 1 dB within 8: a narrow curve, wholly shared


def test_different_images_do_not_compare():
    with pytest.raises(UserError, match="kodak/hpcm-base was measured on kodak and tecnick/vtm-18 on tecnick") as error:
        compare(shipped()["kodak/hpcm-base"], shipped()["tecnick/vtm-18"])
    assert error.value.code == "curves-of-different-images"
    professional = replace(curve(), set="clic2020-professional")
    with pytest.raises(UserError, match="on clic2020-professional and clic-pro-valid/vtm-17 on clic-pro-valid"):
        compare(professional, shipped()["clic-pro-valid/vtm-17"])
    listed = curve(images=(("a.png", 8, 8),))
    other = curve(images=(("a.png", 8, 9),))
    with pytest.raises(UserError, match="on the images of a file"):
        compare(listed, other)
    assert same_images(listed, listed)
    assert same_images(replace(listed, set="kodak"), replace(other, set="kodak"))  # files of a set may be renamed
    with pytest.raises(UserError, match="on the images of a file and ours on kodak"):  # one image is not Kodak
        compare(listed, curve(set="kodak"))
    sizes = [(768, 512)] * 18 + [(512, 768)] * 6
    like_kodak = curve(images=tuple((f"{i}.png", *size) for i, size in enumerate(sizes)))
    assert not same_images(like_kodak, curve(set="kodak"))  # it may be, but nobody has checked
    assert not same_images(like_kodak, curve(set="clic2020-professional"))  # of which no sizes are known


def test_less_than_a_decibel_in_common_is_too_little():
    with pytest.raises(UserError, match="at least 1 dB") as error:
        compare(curve(psnr=np.array((28.0, 28.3, 28.6, 28.9))), curve())
    assert error.value.code == "disjoint-curves"


@pytest.fixture(scope="module")
def jpeg(image_folder, tmp_path_factory):
    """24 images through JPEG at five qualities, written down as `hpcm evaluate` does; another curve beside."""
    kodak = ImageSet(image_folder)
    check_set("kodak", kodak)
    originals = [kodak.load(i) for i in range(len(kodak))]
    points = []
    for quality in (10, 30, 50, 70, 90):
        images = []
        for name, pixels in zip(kodak.names, originals, strict=True):
            file = BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=quality, subsampling=0)
            decoded = pixels.new_tensor(np.asarray(Image.open(file)).transpose(2, 0, 1).copy())
            height, width = pixels.shape[1:]
            bits, psnr = 8 * file.tell(), peak_signal_to_noise(pixels, decoded)
            images.append(Measured(name, width, height, bits, bits / (width * height), psnr, None, None, None, None))
        points.append(Point(f"quality {quality}", images))
    halves = [Point(point.setting, [replace(image, bpp=image.bpp / 2) for image in point.images]) for point in points]
    curves = [
        Curve("jpeg", "Pillow JPEG 4:4:4", FILES, points),
        Curve("hpcm nano", "HPCM", ESTIMATED, halves),
        Curve("hpcm lone", "HPCM", ESTIMATED, halves[:1]),
    ]
    folder = tmp_path_factory.mktemp("result")
    write_json(Results("kodak", "kodak", 24, curves, {}), folder / "evaluation.json")
    return folder


@pytest.fixture
def hpcm(monkeypatch, capsys):
    """Types `hpcm bd-rate` with these arguments on a terminal of 80 columns; gives the exit code and what it wrote."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["hpcm bd-rate", *map(str, arguments)])
        code = 0
        try:
            command.main()
        except SystemExit as ended:
            code = ended.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


def row(out: str, name: str) -> list[str]:
    """The cells of a curve in the table."""
    return next(line for line in out.splitlines() if line.startswith(name)).removeprefix(name).split()


@pytest.mark.launch
def test_command_on_real_jpegs(shared, hpcm, jpeg):
    """JPEG takes about three times the bits of VTM; what it says is what `bjontegaard` says of the same points."""
    code, out, _ = hpcm(jpeg, "--anchor", "kodak/vtm-18")
    assert code == 0
    means = [point["mean"] for point in json.loads((jpeg / "evaluation.json").read_text())["curves"][0]["points"]]
    anchor = shipped()["kodak/vtm-18"]
    columns = ([mean["bpp"] for mean in means], [mean["psnr"] for mean in means])
    expected = bjontegaard.bd_rate(anchor.bpp, anchor.psnr, *columns, "pchip", False, min_overlap=0)
    assert 150 < expected < 300
    low, high = means[0]["psnr"], means[-1]["psnr"]
    share = (high - low) / (max(anchor.psnr) - min(anchor.psnr))
    assert row(out, "jpeg") == ["files", f"{low:.2f}–{high:.2f}", "100%", f"{share:.0%}", f"{expected:+.2f}%"]
    assert row(out, "hpcm nano")[0] == "estimated"
    assert "Left out: hpcm lone has 1 point" in " ".join(out.split())
    assert "HPCM-Base -15.31%, HPCM-Large -19.19%, HPCM-1B -24.21%" in " ".join(out.split())
    assert "not checked" not in out
    assert anchor.source in out
    assert max(map(len, out.splitlines()[:-1])) <= 80  # the last names the source, which may be long


@pytest.mark.launch
def test_command_against_a_curve_of_the_same_evaluation(hpcm, jpeg):
    code, out, _ = hpcm(jpeg / "evaluation.json", "--anchor", jpeg, "--anchor-curve", "jpeg", "--curve", "hpcm nano")
    assert code == 0 and row(out, "hpcm nano")[-1] == "-50.00%"
    _, out, _ = hpcm(jpeg, "--anchor", jpeg, "--anchor-curve", "jpeg")
    assert "\njpeg " not in out  # the anchor is not compared with itself
    code, _, error = hpcm(jpeg, "--anchor", jpeg)
    assert code == 2 and "choose one with --anchor-curve: jpeg, hpcm nano, hpcm lone" in error


@pytest.mark.launch
def test_command_reports_when_the_images_were_not_checked(hpcm, jpeg, tmp_path):
    text = (jpeg / "evaluation.json").read_text()
    (tmp_path / "evaluation.json").write_text(text.replace('"set": "kodak"', '"set": null'))
    code, out, _ = hpcm(tmp_path, "--anchor", "kodak/vtm-18", "--curve", "jpeg")
    assert code == 0 and "The image set was not checked: jpeg has none" in out


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        ((), "RESULT or --anchor is missing"),
        (("kodak/hpcm-base",), "RESULT or --anchor is missing"),
        (("kodak/hpcm-base", "--anchor", "kodak/vtm-19"), "did you mean kodak/vtm-18"),
        (("kodak/hpcm-base", "--anchor", "tecnick/vtm-18"), "on kodak and tecnick/vtm-18 on tecnick"),
        (("kodak/hpcm-base", "--anchor", "kodak/vtm-18", "--metric", "ms-ssim"), "has no MS-SSIM"),
        (("kodak/hpcm-base", "--anchor", "kodak/vtm-18", "--curve", "jpeg"), "has no curve jpeg; it has kodak/hpcm"),
        (("kodak/hpcm-base", "--anchor", "kodak/vtm-18", "--metric", "vmaf"), "see hpcm bd-rate --help"),
    ],
)
def test_command_refuses_in_one_line(hpcm, arguments, reported):
    code, out, error = hpcm(*arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert reported in error


def test_command_lists_what_is_shipped(hpcm):
    code, out, _ = hpcm("--list")
    assert code == 0
    for name, entry in shipped().items():
        assert name in out and entry.source in out


@pytest.mark.launch
def test_command_as_a_module(project):
    command = [sys.executable, "-m", "hpcm_scale.cli", "bd-rate", "kodak/hpcm-large", "--anchor", "kodak/vtm-18"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert row(result.stdout, "kodak/hpcm-large")[-1] == "-19.39%"


@pytest.mark.launch
def test_command_takes_points_of_others_as_curve_and_as_anchor(hpcm, jpeg, tmp_path):
    anchor = shipped()["kodak/vtm-18"]
    results = {"bpp": [rate / 2 for rate in anchor.bpp], "psnr-rgb": [*anchor.psnr]}
    (tmp_path / "other.json").write_text(json.dumps([{"name": "other", "results": results}]))
    code, out, _ = hpcm(tmp_path / "other.json", "--anchor", "kodak/vtm-18")
    assert code == 0 and row(out, "other")[0] == "given" and row(out, "other")[-1] == "-50.00%"
    assert "Unknown image set: other" in out
    code, out, _ = hpcm("kodak/vtm-18", "--anchor", tmp_path / "other.json")
    assert code == 0 and row(out, "kodak/vtm-18")[-1] == "+100.00%"
    code, out, _ = hpcm(jpeg, "--anchor", tmp_path / "other.json", "--curve", "jpeg")
    assert code == 0 and "Unknown image set: other" in out


@pytest.mark.launch
def test_curves_are_called_as_files_or_as_tables_call_them(hpcm, jpeg, tmp_path):
    text = (jpeg / "evaluation.json").read_text().replace("4:4:4", "4:2:0")
    (tmp_path / "evaluation.json").write_text(text)
    for name in ("jpeg", "jpeg 4:2:0"):
        code, out, _ = hpcm(tmp_path, "--anchor", "kodak/vtm-18", "--curve", name)
        assert code == 0 and row(out, "jpeg 4:2:0")[0] == "files"
        code, _, _ = hpcm("kodak/vtm-18", "--anchor", tmp_path, "--anchor-curve", name)
        assert code == 0
    code, _, error = hpcm(tmp_path, "--anchor", "kodak/vtm-18", "--curve", "jpeg 4:2.0")
    assert code == 2 and "it has jpeg 4:2:0, hpcm nano, hpcm lone; did you mean jpeg 4:2:0?" in error
