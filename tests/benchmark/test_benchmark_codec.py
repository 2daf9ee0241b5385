"""Both variants to code an image: the reference computes nothing fast, and both give the image back."""

from __future__ import annotations

import pytest
import torch
from bench.codec import DIRECTIONS, FAST, REFERENCE, computed, measure_codec, synthetic_image

from hpcm_scale.coding.codec import Codec
from hpcm_scale.config.compose import compose_model
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM

CPU = torch.device("cpu")


def is_channels_last(x: torch.Tensor) -> bool:
    """And differs from the reference."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.fixture
def model() -> HPCM:
    """`nano`, untrained."""
    torch.manual_seed(0)
    return HPCM(compose_model("nano")).eval()


@pytest.mark.parametrize("variant", [REFERENCE, FAST])
def test_only_the_baseline_is_plain_throughout(model, variant):
    met: list[bool] = []
    for network in (model.g_a, model.h_a, model.h_s, model.context.prior_s3.before, model.g_s):
        network[0].register_forward_hook(
            lambda part, inputs, output: met.append(is_channels_last(inputs[0]) or is_channels_last(output))
        )
    codec, pixels = Codec(model), synthetic_image(256, 256)
    with computed(variant, model):
        codec.decompress(codec.compress(pixels))
    assert len(met) > 5
    assert any(met) == (variant == FAST)


@pytest.mark.launch
def test_both_ways_are_timed_in_both_directions(model):
    (speed,) = measure_codec(model, [("made", lambda: synthetic_image(256, 300))], 2, CPU)
    assert {direction: set(variants) for direction, variants in speed.seconds.items()} == {
        direction: {REFERENCE, FAST} for direction in DIRECTIONS
    }
    assert all(len(rounds) == 2 for variants in speed.seconds.values() for rounds in variants.values())
    assert (speed.width, speed.height) == (300, 256)
    assert speed.bytes == len(Codec(model).compress(synthetic_image(256, 300)))  # nothing plain is left behind


def test_an_image_that_does_not_come_out_of_its_file_is_no_result(model, monkeypatch):
    right = Codec.decompress
    monkeypatch.setattr(Codec, "decompress", lambda codec, data: right(codec, data) ^ 1)
    with pytest.raises(UserError, match="the decoded made differs from the encoder's reconstruction"):
        measure_codec(model, [("made", lambda: synthetic_image(64, 64))], 1, CPU)


def test_the_made_image_is_always_the_same_and_soft_as_images_are():
    pixels = synthetic_image()
    assert (pixels.shape, pixels.dtype) == ((3, 512, 768), torch.uint8)
    assert torch.equal(pixels, synthetic_image())
    numbers = pixels.float()
    neighbours = (numbers[..., 1:] - numbers[..., :-1]).std()
    assert neighbours < 0.7 * numbers.std() and numbers.std() > 40
