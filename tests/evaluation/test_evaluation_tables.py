"""images.csv, evaluation.md, evaluation.json and the table on the terminal."""

from __future__ import annotations

import csv
import json
from io import StringIO

import pytest
from odd_names import ODD_NAMES
from rich.console import Console

from hpcm_scale.evaluation.curves import ESTIMATED, FILES, Curve, Point, Results, system_info
from hpcm_scale.evaluation.equal_psnr import equal_psnr, sentences
from hpcm_scale.evaluation.measures import Estimated, Measured
from hpcm_scale.evaluation.points import find_curves
from hpcm_scale.evaluation.tables import console_table, csv_table, markdown, write_json
from hpcm_scale.formatting import escaped


def image(name: str, bpp: float, psnr: float, **more) -> Measured:
    size = {"width": 768, "height": 512, "bits": bpp * 768 * 512}
    values = {"bpp": bpp, "psnr": psnr, "ms_ssim": 0.95, "ms_ssim_db": 13.01} | size
    times = (
        {"encode_seconds": 0.5, "decode_seconds": 0.25}
        if not more
        else dict.fromkeys(("encode_seconds", "decode_seconds"))
    )
    return (Estimated if more else Measured)(name=name, **values, **times, **more)


def results(*curves: Curve) -> Results:
    return Results("photos/kodak", "kodak", 2, list(curves), system_info())


FACTS = {"lmbda": 0.013, "precision": "fp32", "step": 5}


@pytest.fixture
def files() -> Results:
    ours = [
        Point(f"λ = {lmbda}", [image("a|b,c.png", bpp, 30), image("[red]d.png", bpp * 3, 33)], "w", FACTS, 918.56)
        for lmbda, bpp in ((0.013, 0.1), (0.025, 0.2))
    ]
    jpeg = [Point("quality 50", [image("a|b,c.png", 0.7, 29), image("[red]d.png", 0.9, 31)])]
    return results(Curve("hpcm 68m", "HPCM 68m", FILES, ours), Curve("jpeg", "Pillow 13, 4:2:0", FILES, jpeg))


@pytest.fixture
def estimates() -> Results:
    training = {"bpp_y": 0.3, "bpp_z": 0.1, "mse": 0.001}
    images = [image("a.png", 0.4, 30, loss=1.25, **training), image("d.png", 0.4, 32, loss=2.25, **training)]
    return results(Curve("hpcm nano", "HPCM nano", ESTIMATED, [Point("λ = 0.013", images, "w", FACTS, 3.6)]))


def test_csv_holds_every_image_at_every_point_in_full(files):
    rows = list(csv.DictReader(StringIO(csv_table(files))))
    assert len(rows) == 6
    assert list(rows[0])[:6] == ["codec", "rate", "setting", "image", "width (px)", "height (px)"]
    assert {"bpp (bits/px)", "PSNR (dB)", "MS-SSIM (dB)", "encode (s)", "decode (s)"} < set(rows[0])
    assert not {"loss", "bpp of y"} & set(rows[0])
    measured = [(curve.name, point.setting, each) for curve, point in files.points() for each in point.images]
    for row, (name, setting, each) in zip(rows, measured, strict=True):
        assert (row["codec"], row["setting"], row["image"]) == (name, setting, each.name)
        assert (float(row["bpp (bits/px)"]), float(row["bits"])) == (each.bpp, each.bits)


def test_csv_of_estimates_has_the_loss_and_no_seconds(estimates):
    rows = list(csv.DictReader(StringIO(csv_table(estimates))))
    assert [float(row["loss"]) for row in rows] == [1.25, 2.25]
    assert not {"encode (s)", "decode (s)"} & set(rows[0]) and rows[0]["rate"] == "estimated"


def test_markdown_says_what_was_done(files):
    text = markdown(files)
    assert text.startswith("# kodak, 2 images\n") and "`kodak`" in text and "`photos/kodak`" in text
    assert "mean PSNR is the mean of the images' PSNRs" in text and "rounded to 8 bits" in text
    assert "those of real files" in text and "estimated: the bits" not in text
    assert f"torch {files.system['packages']['torch']}" in text and "pytorch-msssim" in text
    assert "- **jpeg 4:2:0**: Pillow 13, 4:2:0" in text
    means = [line for line in text.splitlines() if line.startswith("| hpcm 68m") and ".png" not in line]
    assert means == [
        "| hpcm 68m | λ = 0.013 | 0.2000 | 31.50 | 0.9500 | 13.01 | 0.500 | 0.250 | 918.6 |",
        "| hpcm 68m | λ = 0.025 | 0.4000 | 31.50 | 0.9500 | 13.01 | 0.500 | 0.250 | 918.6 |",
    ]
    assert r"| jpeg 4:2:0 | quality 50 | a\|b,c.png | 768×512 | 0.7000 | 29.00 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.replace(r"\|", "").count("|") for line in rows}
    assert widths == {10, 11}  # the table of means, the table of images


def test_markdown_of_estimates_says_so(estimates):
    text = markdown(estimates)
    assert "Rates of hpcm are estimated" in text and "those of real files" not in text and "Seconds" not in text
    assert "| hpcm nano | λ = 0.013 | 1.7500 | 0.4000 | 31.00 |" in text


def at_equal_psnr(*ours: tuple[float, float]) -> Results:
    """A model at these points of bpp and PSNR, one an image, against a baseline whose log2 rate is linear in PSNR."""
    exact = {"28": 28, "30": 30, "32": 32, "34": 34}  # bpp 0.25, 0.5, 1, 2; twice that for the second image
    line = [
        Point(name, [image("a", 2 ** (q / 2 - 16), q), image("b", 2 ** (q / 2 - 15), q)]) for name, q in exact.items()
    ]
    model = [
        Point("λ = 0.01", [image(name, *values) for name, values in zip("ab", ours, strict=True)], "w", FACTS, 1.0)
    ]
    return results(Curve("hpcm", "HPCM", FILES, model), Curve("jpeg", "Pillow, 4:2:0", FILES, line))


def test_bits_at_equal_psnr_of_images_and_of_means():
    shown = at_equal_psnr((0.25, 31), (2.0, 33))
    found = {row.image: row.relative["jpeg 4:2:0"] for row in equal_psnr(shown)}
    # 31 dB costs 2^-0.5 bpp on a, 33 dB 2^1.5 on b; the means are 1.125 bpp at 32 dB, which cost 1.5 bpp.
    assert found == pytest.approx({"a": 0.25 * 2**0.5 - 1, "b": 2 / 2**1.5 - 1, "means": -0.25}, rel=1e-9)
    assert sentences(shown) == ["hpcm λ = 0.01 at 32.00 dB: 25.0% fewer bits than jpeg 4:2:0"]
    text = markdown(shown)
    assert "## Bits at equal PSNR" in text and "| hpcm | λ = 0.01 | means | 1.1250 | 32.00 | -25.0% |" in text
    assert sentences(at_equal_psnr((2.5, 31), (2.0, 33)))[0].endswith(": 50.0% more bits than jpeg 4:2:0")


def test_bits_at_equal_psnr_only_within_the_curve_of_the_baseline(files, estimates):
    shown = at_equal_psnr((0.1, 27), (2.0, 33))
    assert [row.relative["jpeg 4:2:0"] is None for row in equal_psnr(shown)] == [True, False, False]
    assert "| hpcm | λ = 0.01 | a | 0.1000 | 27.00 | – |" in markdown(shown)
    assert sentences(files)[0] == "hpcm 68m λ = 0.013 at 31.50 dB: outside the curve of jpeg 4:2:0"  # of one point
    assert sentences(estimates) == []  # no baseline
    assert not any("equal PSNR" in markdown(each) for each in (files, estimates))


def test_json_is_what_bd_rate_reads(files, tmp_path):
    write_json(files, tmp_path / "evaluation.json")
    data = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert data["images"] == {"folder": "photos/kodak", "set": "kodak", "count": 2}
    point = data["curves"][0]["points"][0]
    assert (point["weights"], point["facts"], point["kmac_per_pixel"]) == ("w", FACTS, 918.56)
    assert point["mean"]["psnr"] == 31.5 and len(point["images"]) == 2
    assert "weights" not in data["curves"][1]["points"][0]
    ours, jpeg = find_curves(str(tmp_path))
    assert (ours.name, ours.set, ours.bpp, ours.psnr) == ("hpcm 68m", "kodak", (0.2, 0.4), (31.5, 31.5))
    assert (jpeg.name, jpeg.rate, len(jpeg.bpp)) == ("jpeg", "files", 1)


def printed(shown: Results) -> str:
    text = StringIO()
    Console(file=text, width=80, markup=False, emoji=False).print(console_table(shown))
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def test_the_terminal_shows_means_of_several_points(files):
    text = printed(files)
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split()[:6] for line in text.splitlines() if line.startswith(" hpcm")] == [
        ["hpcm", "68m", "λ", "=", "0.013", "0.2000"],
        ["hpcm", "68m", "λ", "=", "0.025", "0.4000"],
    ]
    assert "a|b,c.png" not in text and "918.6" in text


def test_the_terminal_shows_every_image_of_a_single_point(files, estimates):
    text = printed(estimates)
    assert "hpcm nano, λ = 0.013\n" in text and "3.6 kMAC/px, rate estimated" in text and "encode" not in text
    rows = [line.split() for line in text.splitlines() if line.startswith((" a.png", " d.png", " mean"))]
    assert [row[:1] for row in rows] == [["a.png"], ["d.png"], ["mean"]]
    assert rows[2] == ["mean", "1.7500", "0.4000", "31.00", "13.01"]
    alone = results(Curve("jpeg", "Pillow", FILES, files.curves[1].points))
    assert "[red]d.png" in printed(alone) and max(map(len, printed(alone).splitlines())) <= 80


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_written_as_they_are_spelled(name):
    shown = Results(
        f"photos/{name}", None, 1, [Curve(name, name, FILES, [Point(name, [image(name, 0.7, 29)])])], system_info()
    )
    text = markdown(shown)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and all(line.endswith("|") for line in rows)
    assert f"- **{escaped(name)}**: {escaped(name)}" in text
    (row,) = csv.DictReader(StringIO(csv_table(shown), newline=""))
    assert (row["codec"], row["setting"], row["image"]) == (name, name, name)
