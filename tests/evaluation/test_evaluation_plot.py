"""rate_distortion.png: what is drawn where, and that the legend lies over nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from odd_names import ODD_NAMES
from PIL import Image

from hpcm_scale.evaluation.bd_rate import RateCurve
from hpcm_scale.evaluation.crops import Crops, Panel, draw_crops
from hpcm_scale.evaluation.curves import ESTIMATED, FILES, Curve, Point
from hpcm_scale.evaluation.measures import Measured, measure
from hpcm_scale.evaluation.rate_distortion_plot import draw_rate_distortion
from hpcm_scale.evaluation.tables import Results
from hpcm_scale.formatting import label


def curve(name: str, *points: tuple[float, float, float | None], codec: str = "", rate: str = FILES, weights=None):
    def point(bpp: float, psnr: float, ms_ssim_db: float | None) -> Point:
        images = [
            Measured(
                each,
                8,
                8,
                64 * bpp,
                bpp,
                psnr + shift,
                ms_ssim_db and 1 - 10 ** (-ms_ssim_db / 10),
                ms_ssim_db,
                None,
                None,
            )
            for each, shift in (("a", -1), ("b", 1))
        ]
        return Point(f"quality {psnr:g}", images, weights)

    return Curve(name, codec, rate, [point(*values) for values in points])


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draw curves, and give back the figure."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))

    def drawn(*curves: Curve, name: str = "plot.png", folder: str = "somewhere/holiday", given=()) -> Figure:
        draw_rate_distortion(Results(folder, None, 2, list(curves), {}, given), tmp_path / name)
        return figures[-1]

    return drawn


OURS = curve("hpcm nano", (0.2, 28, 10), (0.4, 30, 12), weights="w")
VVC = curve("vvc", (0.1, 27, 9), (0.3, 31, 13), (0.9, 36, 17), codec="VVenC, 4:2:0")


def test_means_are_drawn_with_units_and_names(draw, tmp_path):
    figure = draw(OURS, VVC)
    psnr, ms_ssim = figure.axes
    assert [line.get_xydata().tolist() for line in psnr.lines] == [
        [[0.2, 28], [0.4, 30]],
        [[0.1, 27], [0.3, 31], [0.9, 36]],
    ]
    assert ms_ssim.lines[0].get_xydata().ravel().tolist() == pytest.approx([0.2, 10, 0.4, 12])
    assert "bits per pixel" in psnr.get_xlabel() and "dB" in psnr.get_ylabel() and "MS-SSIM" in ms_ssim.get_ylabel()
    assert figure.get_suptitle() == "Rate and distortion: holiday, 2 images"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hpcm nano", "vvc 4:2:0"]
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and picture.width > 1200


def test_twelve_curves_are_told_apart(draw):
    lines = draw(*(curve(f"codec {i}", (0.1 + i, 27, None), (0.9 + i, 36, None)) for i in range(12))).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12


def test_a_single_point_is_a_marker_with_its_setting(draw):
    figure = draw(curve("hpcm nano", (0.2, 28, 10), rate=ESTIMATED, weights="w"))
    (line,) = figure.axes[0].lines
    assert line.get_linestyle() == "None" and line.get_marker() not in ("", "None")
    assert figure.legends[0].get_texts()[0].get_text() == "hpcm nano, quality 28 (estimated rate)"
    low, high = figure.axes[0].get_xlim()
    assert low == 0 and high > 0.3


def test_ms_ssim_is_drawn_only_if_every_point_has_it(draw):
    assert len(draw(OURS, curve("jpeg", (0.1, 27, None))).axes) == 1


def test_other_formats_and_no_half_written_file(draw, tmp_path):
    draw(OURS, name="plot.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.svg"]
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_what_is_not_finite_is_left_out(draw):
    figure = draw(curve("broken", (math.nan, 28, 10), (math.inf, 30, 12)), OURS)
    assert figure.axes[0].get_xlim() == pytest.approx((0, 0.42))
    draw(curve("broken", (math.nan, 28, 10)))


GIVEN = RateCurve("$other$", "", "other.json", "given", (0.1, 1.0), (27.0, 36.0), (0.9, 0.99))


def test_points_that_are_given_are_drawn_dashed_beside_ours(draw):
    without = replace(GIVEN, name="only MS-SSIM", psnr=None)
    figure = draw(OURS, given=(GIVEN, replace(GIVEN, name="only PSNR", ms_ssim=None), without))
    psnr, ms_ssim = figure.axes
    assert [line.get_xydata().tolist() for line in psnr.lines[1:]] == [[[0.1, 27], [1.0, 36]]] * 2
    assert ms_ssim.lines[1].get_xydata().ravel().tolist() == pytest.approx([0.1, 10, 1.0, 20])
    assert {line.get_linestyle() for line in psnr.lines[1:]} == {"--"} and psnr.get_xlim()[1] > 1
    names = ["hpcm nano", "$other$ (given)", "only PSNR (given)", "only MS-SSIM (given)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert len({line.get_color() for line in psnr.lines}) == 3


@pytest.mark.launch
def test_names_are_drawn_as_they_are_spelled(draw):
    figure = draw(*(curve(name, (0.1, 27, 9), (0.9, 36, 17)) for name in ODD_NAMES), name="plot.svg")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [label(name) for name in ODD_NAMES]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_crops_show_names_as_they_are_spelled(name, tmp_path):
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    crops = Crops(1)
    measured = measure(name, pixels, pixels + 1, 8.0)
    crops.watch(f"{name} λ = 0.013", 0, pixels, pixels + 1, measured)
    (crop,) = crops.chosen()
    crop.baseline = Panel(name, crop.window.cut(pixels + 2), measured)
    draw_crops([crop], tmp_path / "visual.png", name)
    assert (tmp_path / "visual.png").is_file()
