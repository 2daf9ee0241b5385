"""reconstructions.png: every image at its own size, its caption beside it and over nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.evaluation.estimate import ImageResult, Reconstruction
from hpcm_scale.evaluation.pictures import draw_reconstructions


def item(name: str, pixels: torch.Tensor) -> Reconstruction:
    height, width = pixels.shape[1:]
    noisy = (pixels.int() + 9).clamp(max=255).to(torch.uint8)
    result = ImageResult(name, width, height, 1.0, bpp=0.123, bpp_y=0.1, bpp_z=0.023, mse=0.001, psnr=28.97)
    return Reconstruction(pixels, noisy, result)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw, and give back the picture's pixels and its figure."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))

    def draw(items, title="nano after 80 steps (0.00044 PFLOPs), λ = 0.013", name="picture.png"):
        draw_reconstructions(items, tmp_path / name, title)
        with Image.open(tmp_path / name) as picture:
            return np.asarray(picture.convert("RGB")), figures[-1]

    return draw


def test_kodak_is_shown_pixel_by_pixel(shared, drawn):
    kodak = ImageSet(shared / "data" / "kodak", limit=4)  # kodim04 is a portrait
    items = [item(kodak.names[i], kodak.load(i)) for i in (0, 3)]
    picture, figure = drawn(items)
    wide = items[0].original.permute(1, 2, 0).numpy()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert [(round(box.width), round(box.height)) for box in boxes] == [(768, 512)] * 2 + [(384, 576)] * 2
    for box, shown in zip(boxes[:2], (items[0].original, items[0].reconstruction), strict=True):
        top, left = picture.shape[0] - round(box.y1), round(box.x0)
        found = picture[top : top + 512, left : left + 768]
        assert np.array_equal(found, shown.permute(1, 2, 0).numpy())
    assert wide.shape == (512, 768, 3)


def test_nothing_overlaps_and_nothing_is_cut_off(drawn):
    sizes = [(500, 700), (700, 500), (3000, 200), (20, 2000), (1, 1), (40, 60), (2000, 2000)]
    long = "photos/of_a_folder_with_a_long_name/and_a_photo_with_a_longer_name_still.png"
    items = [item(long if width == 20 else "a.png", torch.zeros(3, height, width).byte()) for width, height in sizes]
    picture, figure = drawn(items)
    assert picture.shape[1] <= 1600
    boxes = [axes.get_window_extent() for axes in figure.axes]
    boxes += [text.get_window_extent() for text in figure.texts]
    assert len(boxes) == 1 + 4 * len(sizes)
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= picture.shape[1] and box.y1 <= picture.shape[0]
        assert box.width >= 1 and box.height >= 1
        assert not any(overlap(box, other) for other in boxes[:i])


def overlap(a, b) -> bool:
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5


def test_captions_tell_size_rate_and_psnr(drawn):
    _, figure = drawn([item("kodim04.png", torch.zeros(3, 64, 48).byte())])
    texts = [text.get_text() for text in figure.texts]
    assert texts[0].endswith("λ = 0.013")
    assert texts[1:] == ["kodim04.png, 48×64", "0.123 bpp (estimated), 28.97 dB PSNR"]
    assert min(text.get_fontsize() for text in figure.texts) >= 10


def test_other_formats_and_no_half_written_file(drawn, tmp_path):
    drawn([item("a.png", torch.zeros(3, 64, 64).byte())], name="picture.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.jpg"]
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert picture.format == "JPEG"
