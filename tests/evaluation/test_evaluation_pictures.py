"""visual.png: which crops are chosen, and that they are shown pixel by pixel with nothing over them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.baselines import BASELINES, open_baseline
from hpcm_scale.evaluation.crops import Crop, Crops, Panel, Window, code_to_size, draw_crops, worst_window
from hpcm_scale.evaluation.measures import Estimated, Measured, peak_signal_to_noise


def spoiled(pixels: torch.Tensor, top: int, left: int, by: int, side: int = 40) -> torch.Tensor:
    """The image with a square of it that much darker or brighter."""
    changed = pixels.clone()
    square = changed[:, top : top + side, left : left + side]
    square.copy_((square.int() + by).clamp(0, 255))
    return changed


@pytest.mark.parametrize(("height", "width"), [(300, 700), (257, 256), (256, 900), (90, 400), (1, 1)])
def test_the_worst_window_is_that_of_a_search_by_hand(height, width):
    random = np.random.default_rng(height)
    original, decoded = (torch.from_numpy(random.integers(0, 256, (3, height, width), np.uint8)) for _ in range(2))
    window, error = worst_window(original, decoded)
    errors = (original.numpy().astype(int) - decoded.numpy()) ** 2
    tops = sorted({*range(0, max(height - 255, 1), 32), max(height - 256, 0)})
    lefts = sorted({*range(0, max(width - 255, 1), 32), max(width - 256, 0)})
    places = {(t, l): errors[:, t : t + 256, l : l + 256].mean() for t in tops for l in lefts}  # noqa: E741
    assert (window.top, window.left) == max(places, key=places.get)
    assert (window.height, window.width) == (min(height, 256), min(width, 256))
    assert error == pytest.approx(max(places.values()))


def test_the_first_of_equal_windows():
    black = torch.zeros(3, 600, 600, dtype=torch.uint8)
    assert worst_window(black, black) == (Window(0, 0, 256, 256), 0)
    assert worst_window(black, spoiled(black, 590, 590, 9, side=10))[0] == Window(344, 344, 256, 256)


@pytest.fixture
def photos(image_folder) -> ImageSet:
    return ImageSet(image_folder, limit=4)


def offer(watch, photos: ImageSet, decoded: dict[int, torch.Tensor], bits: dict[int, float]) -> None:
    """What a codec at work would show its watcher."""
    for i, picture in decoded.items():
        measured = Measured(photos.names[i], 768, 512, bits[i], bits[i] / (768 * 512), 30, None, None, 1, 1)
        watch("ours", i, photos.load(i), picture, measured)


def test_crops_of_the_images_with_the_largest_errors(photos):
    crops = Crops(2)
    by = {0: 20, 1: 60, 2: 5, 3: 40}
    ours = {i: spoiled(photos.load(i), 300, 300, by[i]) for i in range(4)}
    offer(crops.watch, photos, ours, dict.fromkeys(range(4), 1e5))
    chosen = crops.chosen()
    expected = sorted(range(4), key=lambda i: -worst_window(photos.load(i), ours[i])[1])[:2]
    assert [crop.model.measured.name for crop in chosen] == [photos.names[i] for i in expected]
    assert [crop.error for crop in chosen] == sorted((crop.error for crop in chosen), reverse=True)
    for crop, i in zip(chosen, expected, strict=True):
        top, left = crop.window.top, crop.window.left
        assert top <= 300 and left <= 300 and top + 256 >= 340 and left + 256 >= 340
        assert torch.equal(crop.original, photos.load(i)[:, top : top + 256, left : left + 256])
        assert torch.equal(crop.model.pixels, ours[i][:, top : top + 256, left : left + 256])
        assert crop.baseline is None


def test_a_baseline_at_the_rate_of_the_model_image_by_image(photos):
    crops, jpeg = Crops(2), open_baseline("jpeg")
    bits = {0: 2e5, 1: 6e4}
    offer(crops.watch, photos, {i: spoiled(photos.load(i), 0, 0, 40) for i in range(2)}, bits)
    crops.compare(jpeg, photos)
    for crop in crops.chosen():
        i, panel = photos.names.index(crop.model.measured.name), crop.baseline
        assert panel.measured.bits == pytest.approx(bits[i], rel=0.02)
        quality = float(panel.codec.removeprefix("jpeg 4:2:0 quality "))
        assert panel.measured.psnr == pytest.approx(measured_psnr(jpeg, photos.load(i), quality), abs=0.1)
        assert panel.pixels.shape == crop.original.shape


def measured_psnr(codec, pixels: torch.Tensor, setting: float) -> float:
    return peak_signal_to_noise(pixels, codec.code(pixels, setting).decoded)


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_the_setting_of_a_size(photos, name):
    """The nearest whole setting, or of JPEG a setting within 2 %; for too small sizes the lowest."""
    codec, pixels = open_baseline(name), photos.load(3)[:, :96, :128]
    sizes = [codec.code(pixels, setting).bits for setting in range(27, 35)]
    setting, coded = code_to_size(codec, pixels, sizes[4] + 8)
    assert coded.bits == codec.code(pixels, setting).bits
    nearest = min(abs(size - sizes[4] - 8) for size in sizes)
    assert abs(coded.bits - sizes[4] - 8) <= (nearest if codec.whole else 0.02 * sizes[4])
    setting, coded = code_to_size(codec, pixels, 8)
    assert setting == codec.settings[0] if codec.lowest is None else codec.lowest


def test_a_quality_between_two_whole_ones(photos):
    """At whole ones the tables are libjpeg's own; sizes and quality rise in between."""
    pixels, jpeg = photos.load(3), BASELINES["jpeg"]()
    coded = [jpeg.code(pixels, quality) for quality in (5, 5.3, 5.7, 6, 70, 70.5, 71)]
    for low, high in pairwise(coded):
        assert low.bits < high.bits
        assert peak_signal_to_noise(pixels, low.decoded) < peak_signal_to_noise(pixels, high.decoded)


def test_equal_errors_keep_the_first_images(photos):
    crops = Crops(2)
    offer(crops.watch, photos, {i: photos.load(i) for i in range(4)}, dict.fromkeys(range(4), 1.0))
    assert [crop.model.measured.name for crop in crops.chosen()] == photos.names[:2]


def test_no_crops_are_kept_unasked(photos):
    crops = Crops(0)
    offer(crops.watch, photos, {0: photos.load(0)}, {0: 1.0})
    crops.compare(open_baseline("jpeg"), photos)
    assert crops.chosen() == []


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw, and give back the picture's pixels and its figure."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))

    def draw(crops, name="picture.png"):
        draw_crops(crops, tmp_path / name, "kodak, 24 images")
        with Image.open(tmp_path / name) as picture:
            return np.asarray(picture.convert("RGB")), figures[-1]

    return draw


def crop(name: str, height: int, width: int, baseline: bool = True, kind: type = Measured) -> Crop:
    random = torch.Generator().manual_seed(height * width)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    more = {"loss": 1.0, "bpp_y": 0.1, "bpp_z": 0.1, "mse": 0.1} if kind is Estimated else {}
    measured = kind(name, 768, 512, 1e5, 0.254, 31.257, 0.9, 10, 1, 1, **more)
    ours = Panel("hpcm nano λ = 0.013", 255 - pixels, measured)
    other = Panel("vvc 4:2:0 QP 37", pixels // 2, measured) if baseline else None
    return Crop(Window(32, 64, height, width), 100.0, pixels, ours, other)


def test_crops_are_shown_pixel_by_pixel(drawn):
    shown = crop("kodim04.png", 256, 256)
    picture, figure = drawn([shown])
    panels = (shown.original, shown.model.pixels, shown.baseline.pixels)
    for axes, pixels in zip(figure.axes, panels, strict=True):
        box = axes.get_window_extent()
        assert (round(box.width), round(box.height)) == (512, 512)
        top, left = picture.shape[0] - round(box.y1), round(box.x0)
        found = picture[top : top + 512, left : left + 512]
        assert np.array_equal(found, pixels.permute(1, 2, 0).numpy().repeat(2, axis=0).repeat(2, axis=1))


def test_captions_tell_codec_rate_and_psnr(drawn):
    _, figure = drawn([crop("kodim04.png", 256, 256)])
    title, rule, *captions = [text.get_text() for text in figure.texts]
    assert title == "Largest errors of hpcm nano λ = 0.013: kodak, 24 images"
    assert "largest squared error" in rule and "at the nearest rate" in rule and "whole image" in rule
    assert captions == [
        "kodim04.png\n256×256 of 768×512, at (64, 32)",
        "hpcm nano λ = 0.013\n0.254 bpp, 31.26 dB",
        "vvc 4:2:0 QP 37\n0.254 bpp, 31.26 dB",
    ]
    _, figure = drawn([crop("kodim04.png", 256, 256, baseline=False, kind=Estimated)])
    texts = [text.get_text() for text in figure.texts]
    assert len(texts) == 4 and "nearest" not in texts[1]
    assert texts[3] == "hpcm nano λ = 0.013\n0.254 bpp (estimated), 31.26 dB"


def test_other_formats_and_no_half_written_file(drawn, tmp_path):
    drawn([crop("a.png", 64, 64)], name="picture.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.jpg"]
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert picture.format == "JPEG"
