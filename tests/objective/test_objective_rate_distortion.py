"""The rate-distortion loss against hand numbers and the reference outputs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hpcm_scale.objective import rate_distortion_loss

LAMBDA = 0.013


def batch():
    """Two images of 2×4 pixels, off by 0.1 and by 0.2 everywhere; 16 + 8 and 32 + 0 bits."""
    x = torch.full((2, 3, 2, 4), 0.5)
    x_hat = x + torch.tensor([0.1, -0.2]).reshape(2, 1, 1, 1)
    return x, x_hat, torch.tensor([16.0, 32.0]), torch.tensor([8.0, 0.0])


def test_hand_numbers():
    result = rate_distortion_loss(*batch(), LAMBDA)
    torch.testing.assert_close(result.bpp_y, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(result.bpp_z, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(result.bpp, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(result.mse, torch.tensor([0.01, 0.04]))
    torch.testing.assert_close(result.psnr, torch.tensor([20.0, 20 - 20 * math.log10(2)]))
    torch.testing.assert_close(result.loss, torch.tensor([3 + 8.45325, 4 + 33.813]))


def test_mean_over_the_images():
    x, x_hat, bits_y, bits_z = batch()
    result = rate_distortion_loss(x, x_hat, bits_y, bits_z, LAMBDA).mean()
    assert all(quantity.shape == () for quantity in result)
    # The loss of the batch taken as a whole, …
    pooled = LAMBDA * 255**2 * (x - x_hat).square().mean() + (bits_y + bits_z).sum() / (2 * 2 * 4)
    torch.testing.assert_close(result.loss, pooled)
    # … but the mean of the PSNRs, not the PSNR of the mean.
    assert result.psnr.item() == pytest.approx(20 - 10 * math.log10(2), abs=1e-4)


def test_gradients_by_hand():
    x, x_hat, bits_y, bits_z = batch()
    for tensor in (x_hat, bits_y, bits_z):
        tensor.requires_grad_()
    result = rate_distortion_loss(x, x_hat, bits_y, bits_z, LAMBDA).mean()
    result.loss.backward()
    assert not result.psnr.requires_grad
    torch.testing.assert_close(bits_y.grad, torch.full((2,), 1 / 16))
    torch.testing.assert_close(bits_z.grad, torch.full((2,), 1 / 16))
    torch.testing.assert_close(x_hat.grad, LAMBDA * 255**2 * 2 * (x_hat - x).detach() / x.numel())


def test_an_exact_reconstruction_has_a_finite_loss_and_gradient():
    x, _, bits_y, bits_z = batch()
    x_hat = x.clone().requires_grad_()
    result = rate_distortion_loss(x, x_hat, bits_y, bits_z, LAMBDA)
    result.loss.sum().backward()
    assert torch.equal(result.loss.detach(), result.bpp) and torch.equal(x_hat.grad, torch.zeros_like(x))
    assert result.psnr.isposinf().all()


def test_fp32_under_autocast_and_from_half_inputs():
    *images, bits_y, bits_z = batch()
    half = [image.bfloat16() for image in images]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = rate_distortion_loss(*half, bits_y, bits_z, LAMBDA)
    expected = rate_distortion_loss(*(image.float() for image in half), bits_y, bits_z, LAMBDA)
    for found, wanted in zip(result, expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["base", "phi", "large", "1b"])
def test_reference_outputs(shared, name):
    expected = json.loads((shared / "reference" / f"{name}.json").read_text())["eval"]
    arrays = np.load(shared / "reference" / f"{name}.npz")
    x = torch.from_numpy(arrays["image"]).permute(2, 0, 1)[None].float() / 255
    pixels = x.shape[2] * x.shape[3]
    bits = (torch.tensor([expected[key] * pixels]) for key in ("y_bpp", "z_bpp"))
    result = rate_distortion_loss(x, torch.from_numpy(arrays["x_hat"]), *bits, LAMBDA).mean()
    assert result.bpp_y.item() == pytest.approx(expected["y_bpp"], rel=1e-6)
    assert result.bpp_z.item() == pytest.approx(expected["z_bpp"], rel=1e-6)
    assert result.mse.item() == pytest.approx(expected["mse"], rel=1e-6)
    assert result.loss.item() == pytest.approx(expected["loss"], rel=1e-6)


def test_shapes_that_do_not_belong_together_are_refused():
    x, x_hat, bits_y, bits_z = batch()
    with pytest.raises(ValueError, match="differ in shape"):
        rate_distortion_loss(x, x_hat[:1], bits_y, bits_z, LAMBDA)
    with pytest.raises(ValueError, match="differ in shape"):
        rate_distortion_loss(x[0], x_hat[0], bits_y, bits_z, LAMBDA)
    with pytest.raises(ValueError, match="per image"):
        rate_distortion_loss(x, x_hat, bits_y.sum(), bits_z, LAMBDA)
