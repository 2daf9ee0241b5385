"""The MS-SSIM loss against the package, against differences in float64, and where MS-SSIM breaks down."""

from __future__ import annotations

import pytest
import torch
from pytorch_msssim import ms_ssim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcm_scale.config.schema import Distortion
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.measures import measure
from hpcm_scale.model.hpcm import Coded
from hpcm_scale.objective import (
    MsSsimRateDistortion,
    RateDistortionObjective,
    image_ms_ssim,
    ms_ssim_loss,
    rate_distortion_loss,
)

LAMBDA = 8.73
SIDE = 176


@pytest.fixture(scope="module")
def photos(image_folder) -> torch.Tensor:
    """uint8 (2, 3, 176, 176) of two photos."""
    images = ImageSet(image_folder, limit=2)
    return torch.stack([images.load(i)[:, 100 : 100 + SIDE, 200 : 200 + SIDE] for i in range(2)])


@pytest.fixture(scope="module")
def batch(photos) -> tuple[torch.Tensor, ...]:
    """The photos, reconstructions with noise on 8-bit levels, bits of y and of z."""
    noise = torch.randint(-12, 13, photos.shape, generator=torch.Generator().manual_seed(0))
    x_hat = (photos + noise).clamp(0, 255) / 255
    return photos / 255, x_hat, torch.tensor([4000.0, 8000.0]), torch.tensor([300.0, 0.0])


def test_values(batch, photos):
    x, x_hat, *bits = batch
    result = ms_ssim_loss(*batch, LAMBDA)
    expected = ms_ssim(x, x_hat, data_range=1.0, size_average=False)
    torch.testing.assert_close(result.ms_ssim, expected)
    torch.testing.assert_close(result.loss, LAMBDA * (1 - expected) + sum(bits) / SIDE**2)
    plain = rate_distortion_loss(*batch, 0.013)
    assert all(torch.equal(getattr(result, name), getattr(plain, name)) for name in plain._fields if name != "loss")
    for i, similarity in enumerate(result.ms_ssim):
        of_eight_bits = measure("a", photos[i], (x_hat[i] * 255).round().to(torch.uint8), 8.0).ms_ssim
        assert similarity.item() == pytest.approx(of_eight_bits, abs=1e-5) and 0.5 < of_eight_bits < 0.99


def test_every_image_has_its_own_lambda(batch):
    x, x_hat, *bits = batch
    objective = RateDistortionObjective(lambda level: 2.4 * 2**level, Distortion.ms_ssim)
    result = objective(x, Coded(x_hat, *bits), torch.tensor([0.0, 1.0]))
    assert objective.fields == MsSsimRateDistortion._fields and isinstance(result, MsSsimRateDistortion)
    alone = [ms_ssim_loss(*(part[i : i + 1] for part in batch), lmbda).loss for i, lmbda in enumerate((2.4, 4.8))]
    torch.testing.assert_close(result.loss, torch.cat(alone))
    assert all(quantity.shape == () for quantity in result.mean())


def test_gradient_against_differences(batch):
    x, x_hat = (image[:1, :1].double() for image in batch[:2])
    x_hat.requires_grad_()
    image_ms_ssim(x, x_hat).sum().backward()
    random = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=random, dtype=torch.float64)
        ahead, behind = (image_ms_ssim(x, x_hat.detach() + step * direction) for step in (1e-5, -1e-5))
        difference = (ahead - behind).item() / 2e-5
        assert (x_hat.grad * direction).sum().item() == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("reconstruction", ["grey", "black", "noise"])
def test_the_start_of_training_has_a_gradient_that_leads_on(reconstruction, batch):
    x, bits = batch[0], batch[2:]
    random = torch.Generator().manual_seed(2)
    start = {"grey": torch.full_like(x, 0.5), "black": torch.zeros_like(x)}
    x_hat = start.get(reconstruction, 0.5 + 0.06 * torch.randn(x.shape, generator=random)).requires_grad_()
    before = ms_ssim_loss(x, x_hat, *bits, LAMBDA).loss
    before.sum().backward()
    gradient = x_hat.grad
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    step = 1e-3 / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    assert (ms_ssim_loss(x, x_hat.detach() - step * gradient, *bits, LAMBDA).loss < before).all()


def test_contrast_that_runs_against_the_original_costs_all_and_breaks_nothing(batch):
    x, x_hat, *bits = batch
    against = torch.stack([1 - x[0], x_hat[1]]).requires_grad_()  # a negative, beside an ordinary reconstruction
    result = ms_ssim_loss(x, against, *bits, LAMBDA)
    result.loss.sum().backward()
    assert result.ms_ssim[0] == 0 and result.loss[0] == LAMBDA + result.bpp[0]
    assert not against.grad[0].any() and against.grad[1].any() and against.grad.isfinite().all()


def test_an_exact_reconstruction_costs_its_rate(batch):
    x, _, *bits = batch
    x_hat = x.clone().requires_grad_()
    result = ms_ssim_loss(x, x_hat, *bits, LAMBDA)
    result.loss.sum().backward()
    torch.testing.assert_close(result.loss, result.bpp, rtol=0, atol=1e-5)
    assert x_hat.grad.isfinite().all()


def test_fp32_under_autocast_and_from_half_inputs(batch):
    *images, bits_y, bits_z = batch
    half = [image.bfloat16().to(memory_format=torch.channels_last) for image in images]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ms_ssim_loss(*half, bits_y, bits_z, LAMBDA)
    expected = ms_ssim_loss(*(image.float() for image in half), bits_y, bits_z, LAMBDA)
    for found, wanted in zip(result, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_images_that_are_too_small_are_refused():
    x, bits = torch.rand(1, 3, 160, 300), torch.ones(1)
    with pytest.raises(ValueError, match="sides from 161"):
        ms_ssim_loss(x, x, bits, bits, LAMBDA)


class HostTensors(TorchDispatchMode):
    """Counts operations that read or make a tensor in host memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.count += any(tensor.is_cpu for tensor in tensors)
        return result


def test_nothing_is_copied_from_the_host():
    """A copy from pageable memory waits until the GPU has done all it was given to do."""
    x, x_hat = (torch.empty(2, 3, 256, 256, device="meta", requires_grad=True) for _ in range(2))
    bits = torch.empty(2, device="meta")
    with HostTensors() as host:
        ms_ssim_loss(x, x_hat, bits, bits, LAMBDA).loss.sum().backward()
    assert host.count == 0
