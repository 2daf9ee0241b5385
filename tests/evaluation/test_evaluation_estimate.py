"""Rate and distortion of a set of images, against counts by hand with a codec that is plain to see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from hpcm_scale.config.compose import compose_model
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.estimate import evaluate, pad
from hpcm_scale.model.hpcm import HPCM, Coded
from hpcm_scale.objective import RateDistortionObjective

CPU = torch.device("cpu")
SIZES = [(1, 1), (255, 257), (64, 64), (65, 128), (300, 40)]  # width, height


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return ImageSet(folder)


class Shifted:
    """Makes every value brighter by a constant, for 3 bits per padded pixel of y and 64 bits of z."""

    def __init__(self, shift: float = 0.01) -> None:
        self.shift, self.seen = shift, []

    def __call__(self, x: torch.Tensor) -> Coded:
        self.seen.append(x)
        bits_y = torch.tensor([3.0 * x.shape[2] * x.shape[3]])
        return Coded(x + self.shift, bits_y, torch.tensor([64.0]))


def measure(codec, images: ImageSet, **options):
    return evaluate(codec, images, multiple=64, objective=RateDistortionObjective(0.013), device=CPU, **options)


def test_by_hand(images):
    codec = Shifted()
    evaluation = measure(codec, images)
    assert [(result.width, result.height) for result in evaluation.images] == SIZES
    assert [result.name for result in evaluation.images] == images.names
    for (width, height), seen, result in zip(SIZES, codec.seen, evaluation.images, strict=True):
        padded_width, padded_height = 64 * math.ceil(width / 64), 64 * math.ceil(height / 64)
        assert seen.shape == (1, 3, padded_height, padded_width)
        # the padding costs bits, but only own pixels share them
        bpp_y, bpp_z = 3 * padded_width * padded_height / (width * height), 64 / (width * height)
        assert result.bpp_y == pytest.approx(bpp_y) and result.bpp_z == pytest.approx(bpp_z)
        assert result.bpp == pytest.approx(bpp_y + bpp_z)
        assert result.mse == pytest.approx(1e-4, rel=1e-3)  # 0.01², neither clamped nor rounded
        assert result.loss == pytest.approx(0.013 * 255**2 * 1e-4 + result.bpp, rel=1e-4)


def test_psnr_is_that_of_clamped_and_rounded_pixels(images):
    """2.55 levels brighter is 3 levels after rounding, and fewer where white is white already."""
    for i, result in enumerate(measure(Shifted(), images).images):
        pixels = images.load(i).numpy().astype(int)
        errors = np.minimum(pixels + 3, 255) - pixels
        assert result.psnr == pytest.approx(10 * math.log10(255**2 / (errors**2).mean()))


def test_padding_replicates_the_last_row_and_column(images):
    x = images.load(1)[None].float()
    padded = pad(x, 64)
    assert padded.shape == (1, 3, 320, 256)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 63), (0, 1)), mode="edge")
    assert np.array_equal(padded.numpy(), expected)
    assert pad(x[..., :64, :64], 64).shape == (1, 3, 64, 64)


def test_the_mean_is_over_images_whatever_their_size(images):
    evaluation = measure(Shifted(), images)
    mean = evaluation.mean()
    for key in ("loss", "bpp", "bpp_y", "bpp_z", "mse", "psnr"):
        assert mean[key] == pytest.approx(np.mean([getattr(result, key) for result in evaluation.images]))


def shared_out(codecs: list, images: ImageSet, **options) -> list:
    """What every process of a group gets: their tables are added up, as an all-reduce would."""
    tables: list[torch.Tensor] = []

    def collect(table: torch.Tensor) -> torch.Tensor:
        tables.append(table.clone())
        return table

    world_size = len(codecs)
    for rank, codec in enumerate(codecs):
        measure(codec, images, rank=rank, world_size=world_size, reduce=collect, **options)
    total = torch.stack(tables).sum(dim=0)
    return [
        measure(codec, images, rank=rank, world_size=world_size, reduce=lambda _: total, **options)
        for rank, codec in enumerate(codecs)
    ]


@pytest.mark.parametrize("world_size", [2, 3, 5, 7])
def test_any_number_of_processes_gives_the_same_results(images, world_size):
    alone = measure(Shifted(), images)
    codecs = [Shifted() for _ in range(world_size)]
    evaluations = shared_out(codecs, images, keep=1)
    for evaluation in evaluations:
        assert evaluation.images == alone.images
    # A sharded model needs all processes at each of its calls.
    assert {len(codec.seen) for codec in codecs} == {2 * math.ceil(len(images) / world_size)}
    kept = [item for evaluation in evaluations for item in evaluation.reconstructions]
    assert [item.result.name for item in kept] == images.names[:world_size]


def test_what_is_kept_are_the_images_themselves(images):
    evaluation = measure(Shifted(), images, keep=2)
    assert [item.result for item in evaluation.reconstructions] == evaluation.images[:2]
    for i, item in enumerate(evaluation.reconstructions):
        pixels = images.load(i)
        assert torch.equal(item.original, pixels)
        assert item.reconstruction.dtype == torch.uint8
        assert torch.equal(item.reconstruction.int(), (pixels.int() + 3).clamp(max=255))
    assert measure(Shifted(), images).reconstructions == []


def test_hpcm_itself_at_odd_sizes(images):
    """Padded by the evaluation or beforehand: the same code; all figures finite."""
    torch.manual_seed(0)
    model = HPCM(compose_model("nano")).eval()
    small = ImageSet(images.folder, limit=2)
    evaluation = evaluate(
        model, small, multiple=model.multiple, objective=RateDistortionObjective(0.013), device=CPU, keep=2
    )
    x = pad(small.load(1)[None].float() / 255, 256)
    assert x.shape == (1, 3, 512, 256)
    with torch.no_grad():
        coded = model(x)
    result = evaluation.images[1]
    assert result.bpp_y == pytest.approx(coded.bits_y.item() / (255 * 257), rel=1e-6)
    assert all(math.isfinite(value) for value in evaluation.mean().values())
    assert [tuple(item.reconstruction.shape) for item in evaluation.reconstructions] == [(3, 1, 1), (3, 257, 255)]
