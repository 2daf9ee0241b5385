"""Our HPCM with the public implementation's weights computes what the public implementation computed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections import defaultdict

import pytest
import torch
from packed_values import join
from public_reference import Reference

from hpcm_scale.entropy.generalized_gaussian import bits
from hpcm_scale.model.hpcm import Noise
from hpcm_scale.objective import rate_distortion_loss

LMBDA = 0.013


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(size, marks=pytest.mark.launch) for size in ("base", "phi")),
        *(pytest.param(size, marks=pytest.mark.long) for size in ("large", "1b")),
    ],
)
def reference(request, shared):
    yield Reference(shared / "reference", request.param)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps gigabytes of a model that is gone
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="module")
def trace(reference):
    """Every intermediate result of one traversal."""
    model, x = reference.model, reference.image()
    with torch.no_grad():
        y = model.g_a(x)
        z_hat, _ = model.hyper_prior(model.h_a(y), None, model.rate)
        hyper = model.h_s(z_hat)
        order, values = model.context.order, model.context.order.split(y)
        symbols, scales_of_step = [], []

        def code(step, scales, means):
            symbols.append((values[step] - means).round())
            scales_of_step.append(scales)
            return symbols[-1] + means

        y_hat = model.context.traverse_packed(hyper, code)
        z = model.h_a(y) - model.hyper_prior.means
        rates = {}
        for formula in ("public", "survival"):
            of_step = [
                bits(symbol, scale, formula=formula).sum()
                for symbol, scale in zip(symbols, scales_of_step, strict=True)
            ]
            rates[formula] = sum(of_step), bits(z.round(), model.hyper_prior.scales, formula=formula).sum()
        return {
            "rates": rates,
            "y": y,
            "z_hat": z_hat,
            "hyper_params": hyper,
            "y_q": join(order, symbols),
            "scales": join(order, scales_of_step),
            "y_hat": y_hat,
            "x_hat": model.g_s(y_hat),
        }


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_every_public_name_is_used(reference):
    assert sorted(reference.names.values()) == sorted(reference.parameters)
    assert sum(p.numel() for p in reference.model.parameters()) == reference.facts["params"]


def test_latents_and_hyper_parameters(reference, trace):
    for key in ("y", "z_hat", "hyper_params"):
        assert relative(trace[key], reference.output(key)) < 1e-4, key


def test_symbols_and_scales(reference, trace):
    theirs = reference.output("y_q")
    differing = trace["y_q"] != theirs
    assert differing.sum() <= 5  # rounding ties
    assert (trace["y_q"] - theirs).abs().max() <= 1
    off = (trace["scales"] - reference.output("scales")).abs() > 1e-3 * reference.output("scales").abs().max()
    assert off.sum() <= 5 * len(trace["scales"][0])


def test_reconstruction(reference, trace):
    assert relative(trace["y_hat"], reference.output("y_hat")) < 1e-3
    assert relative(trace["x_hat"], reference.output("x_hat")) < 1e-3


@pytest.mark.parametrize("formula, tolerance", [("public", 1e-4), ("survival", 5e-3)])
def test_rate_and_loss(reference, trace, formula, tolerance):
    x, theirs = reference.image(), reference.facts["eval"]
    bits_y, bits_z = (total[None] for total in trace["rates"][formula])
    ours = rate_distortion_loss(x, trace["x_hat"], bits_y, bits_z, LMBDA).mean()
    assert ours.bpp_y.item() == pytest.approx(theirs["y_bpp"], rel=tolerance)
    assert ours.bpp_z.item() == pytest.approx(theirs["z_bpp"], rel=tolerance)
    assert ours.mse.item() == pytest.approx(theirs["mse"], rel=1e-3)
    assert ours.loss.item() == pytest.approx(theirs["loss"], rel=1e-3)


def test_the_forward_pass_is_that_traversal(reference, trace):
    if reference.variant != "base":
        pytest.skip("shown once: every size is the same class")
    with torch.no_grad():
        coded = reference.model(reference.image())
    assert torch.equal(coded.x_hat, trace["x_hat"])
    bits_y, bits_z = trace["rates"]["public"]
    assert coded.bits_y.item() == pytest.approx(bits_y.item(), rel=1e-6)
    assert coded.bits_z.item() == pytest.approx(bits_z.item(), rel=1e-6)


def test_training_loss_and_gradients_without_noise(reference):
    if reference.variant != "phi":
        pytest.skip("shown once: every size is the same class")
    theirs = reference.facts["train_zero_noise"]
    model, x = reference.model, reference.image()
    noise = Noise(*(torch.zeros(1, *shape) for shape in model.latent_shapes(256, 256)))
    coded = model(x, noise)
    ours = rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, LMBDA).mean()
    ours.loss.backward()
    assert ours.loss.item() == pytest.approx(theirs["loss"], rel=1e-4)
    assert ours.bpp_y.item() == pytest.approx(theirs["y_bpp"], rel=1e-4)
    squares = defaultdict(float)
    for name, parameter in model.named_parameters():
        squares[reference.names[name].split(".")[0]] += parameter.grad.double().square().sum().item()
    model.zero_grad()
    norms = {module: value**0.5 for module, value in squares.items()}
    assert norms == pytest.approx(theirs["grad_norm"], rel=1e-3)
