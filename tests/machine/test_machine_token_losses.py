"""Token distortion and token rank: known values, invariances, gradients, and tokens that tell little apart."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpcm_scale.machine.objective import log_effective_rank, rank_difference, token_distortion
from hpcm_scale.machine.receivers import receiver

SHAPES = [(1, 1, 4), (2, 3, 1), (2, 2, 3), (2, 7, 4), (2, 4, 7)]


def random_tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(tokens: int, channels: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One image's tokens that span so many dimensions."""
    return random_tokens(1, tokens, rank, seed=seed, dtype=dtype) @ random_tokens(
        1, rank, channels, seed=seed + 1, dtype=dtype
    )


def effective_rank(tokens: torch.Tensor) -> torch.Tensor:
    return log_effective_rank(tokens).exp()


def rank_by_definition(tokens: torch.Tensor) -> list[float]:
    """From the singular values, in float64."""
    ranks = []
    for image in tokens.double().numpy():
        energies = np.linalg.svd(image - image.mean(axis=0), compute_uv=False) ** 2
        shares = energies[energies > 1e-20 * energies.sum()] / energies.sum()
        ranks.append(math.exp(-(shares * np.log(shares)).sum()))
    return ranks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", [token_distortion, rank_difference])
def test_gradients(loss, shape):
    """Those of autograd against finite differences."""
    tokens = random_tokens(*shape, dtype=torch.float64).requires_grad_()
    reference = random_tokens(*shape, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, reference), tokens)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_rank(shape):
    tokens = random_tokens(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(effective_rank, tokens)


@pytest.mark.parametrize(("tokens", "channels"), [(9, 5), (5, 9)])
def test_gradients_at_low_rank(tokens, channels):
    """Among eigenvalues that are zero and equal; finite differences meet x·log x there, so they are less exact."""
    tokens = low_rank(tokens, channels, rank=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(effective_rank, tokens, atol=1e-3)


def test_gradients_with_equal_eigenvalues():
    tokens = torch.cat([torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64)])[None].requires_grad_()
    assert torch.autograd.gradcheck(effective_rank, tokens)
    assert effective_rank(tokens).item() == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 50, 12), (3, 12, 50), (3, 16, 16)])
def test_rank_is_that_of_the_definition(shape):
    tokens = 3 + random_tokens(*shape) * torch.logspace(-3, 1, shape[2])
    assert effective_rank(tokens).tolist() == pytest.approx(rank_by_definition(tokens), rel=1e-4)
    assert effective_rank(tokens.double()).tolist() == pytest.approx(rank_by_definition(tokens), rel=1e-12)


def test_rank_by_hand():
    """Two directions with four fifths and one fifth of the energy."""
    tokens = torch.tensor([[[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0]]])
    expected = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert effective_rank(tokens).item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(2, 24),
    channels=st.integers(1, 24),
    seed=st.integers(0, 2**31),
    factor=st.floats(-20, 20).map(lambda exponent: 10**exponent),
)
def test_rank_has_bounds_and_knows_neither_unit_nor_place_nor_direction(tokens, channels, seed, factor):
    x = random_tokens(1, tokens, channels, seed=seed)
    rank = effective_rank(x).item()
    assert 1 - 1e-5 <= rank <= min(tokens - 1, channels) * (1 + 1e-5)
    turn, _ = torch.linalg.qr(random_tokens(channels, channels, seed=seed + 1))
    shift = random_tokens(1, 1, channels, seed=seed + 2)
    for other in (factor * x, x + shift, x @ turn, x.flip(1)):
        assert effective_rank(other).item() == pytest.approx(rank, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.floats(-20, 20).map(lambda e: 10**e))
def test_tokens_that_are_the_references_cost_nothing(tokens, channels, seed, factor):
    reference = factor * random_tokens(2, tokens, channels, seed=seed)
    for loss in (token_distortion, rank_difference):
        x = reference.clone().requires_grad_()
        value = loss(x, reference)
        value.sum().backward()
        assert torch.equal(value.detach(), torch.zeros(2)) and torch.equal(x.grad, torch.zeros_like(x))


DEGENERATE = {
    "one token": (random_tokens(1, 1, 8), 1),
    "all the same": (random_tokens(1, 1, 8).expand(1, 50, 8), 1),
    "zeros": (torch.zeros(1, 5, 8), 1),
    "a line": (low_rank(100, 30, 1), 1),
    "a plane of many": (low_rank(200, 30, 2), None),
    "a plane of few": (low_rank(30, 200, 2), None),
    "nearly the same": (1 + 1e-6 * random_tokens(1, 30, 8), None),
    "tiny": (1e-30 * random_tokens(1, 20, 8), None),
    "near the smallest numbers": (1e-36 * random_tokens(1, 20, 8), 1),
    "huge": (1e37 * random_tokens(1, 20, 8), None),
}


@pytest.mark.parametrize(("tokens", "rank"), DEGENERATE.values(), ids=DEGENERATE)
def test_value_and_gradient_are_finite_whatever_the_tokens(tokens, rank):
    x = tokens.clone().requires_grad_()
    result = effective_rank(x)
    assert result.item() == pytest.approx(rank or rank_by_definition(tokens)[0], rel=1e-3)
    unit = tokens.abs().max() or 1.0
    nearby, nothing = tokens + unit * random_tokens(*x.shape), torch.zeros_like(tokens)
    distortions = [token_distortion(x, nearby), token_distortion(x / unit, nothing), token_distortion(x, tokens)]
    for loss in (result, rank_difference(x, nearby), *distortions):
        (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_what_is_not_finite_spoils_its_own_image_alone():
    """And raises nothing: the loop leaves out such a step."""
    tokens, reference = random_tokens(3, 20, 8), random_tokens(3, 20, 8, seed=1)
    expected = [token_distortion(tokens, reference), rank_difference(tokens, reference)]
    tokens[0, 3, 3], tokens[2, 0, 0] = math.nan, math.inf
    for loss, good in zip([token_distortion, rank_difference], expected, strict=True):
        value = loss(tokens, reference)
        assert not value[0].isfinite() and not value[2].isfinite() and value[1] == good[1]


def test_distortion_is_one_less_cosine_and_relative_error():
    reference = random_tokens(2, 30, 8)
    tokens = reference + 0.5 * random_tokens(2, 30, 8, seed=1)
    turned = (1 - F.cosine_similarity(tokens, reference, dim=2)).mean(dim=1)
    moved = (tokens - reference).square().sum(dim=(1, 2)) / reference.square().sum(dim=(1, 2))
    for factor in (1, 1e-25, 1e25):  # the squares of these are no fp32 numbers
        result = token_distortion(factor * tokens, factor * reference)
        torch.testing.assert_close(result, turned + moved, rtol=1e-5, atol=0)


def test_distortion_by_hand():
    """One token turned by a right angle, the other of double length; then the opposite; then from and to nothing."""
    reference = torch.tensor([[[3.0, 0], [0, 4]]])
    assert token_distortion(torch.tensor([[[0.0, 3], [0, 8]]]), reference).item() == pytest.approx(0.5 + 34 / 25)
    assert token_distortion(-reference, reference).item() == pytest.approx(2 + 4)
    assert token_distortion(0 * reference, reference).item() == pytest.approx(0.5 + 1)
    assert token_distortion(reference, 0 * reference).item() == pytest.approx(0.5 + 25)


def test_full_precision_under_autocast_and_from_half_tokens():
    tokens, reference = (random_tokens(2, 40, 12, seed=seed).bfloat16() for seed in (0, 1))
    for loss in (token_distortion, rank_difference):
        expected = loss(tokens.float(), reference.float())
        with torch.autocast("cpu", torch.bfloat16):
            result = loss(tokens, reference)
        assert result.dtype == torch.float32 and torch.equal(result, expected)
        assert loss(tokens.double(), reference.double()).dtype == torch.float64


def test_nothing_in_it_looks_at_a_value():
    """On the meta device there are no values: whatever asks for one raises."""
    tokens, reference = (torch.empty(2, 40, 12, device="meta").requires_grad_() for _ in range(2))
    for loss in (token_distortion, rank_difference):
        loss(tokens, reference).sum().backward()
        assert tokens.grad.is_meta


def test_shapes_that_are_not_tokens_are_refused():
    with pytest.raises(ValueError, match="tokens are"):
        rank_difference(torch.zeros(3, 4), torch.zeros(3, 4))
    for loss in (token_distortion, rank_difference):
        with pytest.raises(ValueError, match=r"alike .* \(2, 3, 4\) and \(2, 4, 4\)"):
            loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4))


def test_jpeg_raises_the_rank_of_an_images_tokens(image_folder):
    """So a larger rank is no better one: what counts is the distance, which grows as quality falls."""
    photo = Image.open(image_folder / "kodim04.png").convert("RGB").crop((200, 100, 456, 356))
    pictures = [photo]
    for quality in (90, 30):
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=quality)
        pictures.append(Image.open(file))
    x = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 for picture in pictures])
    tokens = receiver("efficientnet-lite0")(x)["stride16"]
    original = tokens[:1].expand(3, -1, -1)
    distortion, difference = token_distortion(tokens, original), rank_difference(tokens, original)
    rank = effective_rank(tokens)
    assert rank[0] < rank[1] < rank[2]
    assert 0 == difference[0] < difference[1] < difference[2] > 0.02
    assert 0 == distortion[0] < distortion[1] < distortion[2] > 0.1
