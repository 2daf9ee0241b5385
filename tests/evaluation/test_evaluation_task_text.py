"""Pictures of text and how their reading is scored: real recognisers, real pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.baselines import open_baseline
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.machine.text import (
    CONTRAST,
    HEIGHT,
    LONGEST,
    WIDTH,
    LabelledImages,
    Reading,
    RenderedText,
    TextLine,
    digest,
    normalised,
    pink_noise,
    scanned_page,
)

CPU = torch.device("cpu")


@pytest.mark.launch
def test_rendered_images_are_the_same_every_time_and_differ_from_each_other():
    one, two = RenderedText(1), RenderedText(2)
    assert torch.equal(one.load(0), two.load(0)) and one.lines(0) == two.lines(0)
    assert not torch.equal(two.load(0), two.load(1)) and digest(one) != digest(two) == digest(RenderedText(2))
    assert one.load(0).shape == (3, HEIGHT, WIDTH) and one.load(0).dtype == torch.uint8


def test_lines_lie_in_the_image_beside_each_other():
    pictures = RenderedText(2)
    for i in range(2):
        lines, taken = pictures.lines(i), np.zeros((HEIGHT, WIDTH), dtype=int)
        assert len(lines) > 40
        for line in lines:
            assert 0 < len(line.text) <= LONGEST and line.cut(pictures.load(i)).shape == (3, line.height, line.width)
            taken[line.top : line.top + line.height, line.left : line.left + line.width] += 1
        assert taken.max() == 1
    texts = [line.text for line in pictures.lines(0)]
    assert any(any(c.isdigit() for c in text) for text in texts) and any(text.isalpha() for text in texts)


def test_letters_stand_out_from_their_background_by_the_contrast_asked_for():
    """Within a line the darkest or lightest pixels are letters; the border is background, which varies."""
    pictures, ratios = RenderedText(1), []
    for line in pictures.lines(0):
        pixels = line.cut(pictures.load(0)).permute(1, 2, 0).numpy() / 255
        linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
        luminance = linear @ (0.2126, 0.7152, 0.0722)
        ground = np.median(luminance[[0, -1]])
        letter = luminance.ravel()[np.abs(luminance - ground).argmax()]
        ratios.append((max(ground, letter) + 0.05) / (min(ground, letter) + 0.05))
    assert min(ratios) > CONTRAST[0] * 0.7 and np.ptp(ratios) > 4


def test_noise_has_the_spectrum_of_natural_images():
    noise = pink_noise(np.random.default_rng(0))
    assert abs(noise.mean()) < 1e-9 and noise.std() == pytest.approx(1)
    amplitude = np.abs(np.fft.fft2(noise))
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.fftfreq(WIDTH))
    use = (frequency > 0.01) & (frequency < 0.5)
    slope, _ = np.polyfit(np.log(frequency[use]), np.log(amplitude[use]), 1)
    assert slope == pytest.approx(-1.2, abs=0.03)


@pytest.fixture(scope="module")
def page():
    page = scanned_page()
    assert page is not None  # scikit-image is among what tests install
    return page


@pytest.fixture(scope="module")
def reading(page) -> Reading:
    return Reading(receiver("pp-ocrv4"), page, CPU)


@pytest.mark.launch
def test_a_scanned_page_is_read_and_compression_hurts(page, reading):
    """So the lines are cut where they are, and the truth is what is printed there."""
    truth = sum(len(normalised(line.text)) for line in page.lines(0))
    originals = reading.of_originals()
    assert originals["characters"] == truth == 253 and originals["cer"] == originals["errors"] / truth < 0.02
    pixels = page.load(0)
    rates = [reading.score(0, pixels, open_baseline("jpeg").code(pixels, q).decoded)["cer"] for q in (5, 35)]
    assert rates[0] > 0.3 > 0.1 > rates[1] >= originals["cer"]


def test_errors_are_counted_over_all_lines_together(reading):
    pooled = reading.mean([{"cer": 1.0, "errors": 2, "characters": 2}, {"cer": 0.0, "errors": 0, "characters": 8}])
    assert pooled == {"cer": 0.2, "errors": 2, "characters": 10}


def test_every_change_of_the_truth_is_an_error(reading, page, monkeypatch):
    """The distance is that of Levenshtein: one for a letter that is another, missing, or too much."""
    lines = page.lines(0)
    right = reading._read(lines[0].cut(page.load(0)))
    assert normalised(right) == normalised(lines[0].text) == "Region-basedsegmentation"
    for wrong, errors in (("Region-basedsegmentatiom", 1), ("Region-based segmentatio", 1), ("Regions-based", 13)):
        monkeypatch.setattr(page, "lines", lambda i, wrong=wrong: [lines[0]._replace(text=wrong)])
        assert reading.score(0, page.load(0), page.load(0))["errors"] == errors


def test_high_lines_are_read_whole(reading, page):
    """Recognisers would cut what is higher than their lines into strips."""
    line = page.lines(0)[0]
    large = torch.nn.functional.interpolate(line.cut(page.load(0))[None].float(), scale_factor=4, mode="bicubic")
    assert normalised(reading._read(large[0].clamp(0, 255).to(torch.uint8))) == normalised(line.text)


def test_what_does_not_count_as_a_difference():
    assert normalised("ＡＢ：1 2\u3000c\n") == "AB:12c" and normalised("Ab") != normalised("ab")


def test_receivers_that_do_not_read_are_refused(page):
    with pytest.raises(UserError) as error:
        Reading(receiver("random-vit"), page, CPU)
    assert (error.value.code, error.value.key) == ("receiver-without-text", "--receivers")


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 20)).save(tmp_path / "b.png")
    Image.new("RGB", (70, 30)).save(tmp_path / "a.png")
    return tmp_path


def test_labels_name_images_and_lines(folder):
    (folder / "labels.csv").write_text("file,text\nb.png,two words\na.png,one\n", encoding="utf-8-sig")
    pictures = LabelledImages(folder)
    assert pictures.names == ["a.png", "b.png"] and pictures.lines(1) == [TextLine(0, 0, 60, 20, "two words")]
    assert LabelledImages(folder, limit=1).names == ["a.png"]
    boxes = 'file,left,top,width,height,text\na.png,1,2,9,8,one\na.png,0,10,70,20,"two, three"\n'
    (folder / "labels.csv").write_text(boxes)
    pictures = LabelledImages(folder)
    assert pictures.names == ["a.png"]
    assert pictures.lines(0) == [TextLine(1, 2, 9, 8, "one"), TextLine(0, 10, 70, 20, "two, three")]
    assert pictures.lines(0)[1].cut(pictures.load(0)).shape == (3, 20, 70)


@pytest.mark.parametrize(
    ("table", "code"),
    [
        (None, "unreadable-labels"),
        ("", "columns-of-labels"),
        ("file;text\na.png;one\n", "columns-of-labels"),
        ("file,text,left\na.png,one,3\n", "columns-of-labels"),
        ("file,text\n", "empty-labels"),
        ("file,text\na.png, \n", "line-without-text"),
        ("file,text\na.png\n", "line-without-text"),
        ("file,text\nc.png,one\n", "missing-labelled-image"),
        ("file,left,top,width,height,text\na.png,1,1,x,9,one\n", "box-without-pixels"),
        ("file,left,top,width,height,text\na.png,1,1,70,9,one\n", "box-outside-image"),
        (b"file,text\na.png,\xff\n", "damaged-labels"),
    ],
)
def test_wrong_labels_are_reported_in_a_sentence(folder, table, code):
    if table is not None:
        (folder / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(UserError) as error:
        LabelledImages(folder)
    assert (error.value.code, error.value.key) == (code, "--images")
