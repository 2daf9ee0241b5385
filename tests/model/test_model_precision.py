"""Under bf16 the convolutions and context networks are reduced; latents, rates and pictures are fp32."""

from __future__ import annotations

import pytest
import torch
from seeded_models import small_1b
from small_models import noise
from torch import nn

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import Precision
from hpcm_scale.model import hpcm as module
from hpcm_scale.model.hpcm import HPCM, quantize
from hpcm_scale.model.layers import Pointwise, ResidualBlock
from hpcm_scale.objective import rate_distortion_loss


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """Soft patches of colour with some grain."""
    generator = torch.Generator().manual_seed(5)
    patches = torch.rand(1, 3, 16, 16, generator=generator)
    soft = nn.functional.interpolate(patches, size=(256, 256), mode="bicubic")
    return (soft + 0.05 * torch.randn(1, 3, 256, 256, generator=generator)).clamp(0, 1)


def build(name: str, precision: Precision) -> HPCM:
    torch.manual_seed(0)
    config = compose_model(name.split()[0])
    if name.endswith("variable"):
        config.rate.levels = 6
    return HPCM(config, precision=precision)


class Watched:
    """A model in which every tensor at a place that must be fp32 is recorded by the name of the place."""

    def __init__(self, model: HPCM, monkeypatch) -> None:
        self.model, self.places = model, {}
        real = module.bits

        def bits(residual, scale, **options):
            self.record("likelihood input", residual)
            self.record("likelihood scale", scale)
            result = real(residual, scale, **options)
            self.record("bits", result)
            return result

        monkeypatch.setattr(module, "bits", bits)
        for name in ("g_a", "h_a", "h_s", "g_s"):
            getattr(model, name).register_forward_hook(lambda _, inputs, output, name=name: self.record(name, output))
        model.g_s.register_forward_pre_hook(lambda _, inputs: self.record("y_hat", *inputs))
        model.h_s.register_forward_pre_hook(lambda _, inputs: self.record("z_hat", *inputs))
        traverse = model.context.traverse

        def watched(hyper, code, mix):
            self.record("hyper parameters", hyper)

            def watched_code(place, scales, means):
                self.record("scales", scales)
                self.record("means", means)
                y_hat = code(place, scales, means)
                self.record("coded", y_hat)
                return y_hat

            return traverse(hyper, watched_code, mix)

        monkeypatch.setattr(model.context, "traverse", watched)
        if model.context.gains:
            model.context.gains.register_forward_hook(lambda _, inputs, output: self.record("gains", output))

    def record(self, place: str, tensor: torch.Tensor) -> None:
        self.places.setdefault(place, []).append(tensor.detach())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", ["nano", "nano variable", "tiny 1b"])
def test_what_must_be_fp32_is(name, training, image, monkeypatch):
    watched = Watched(tiny_1b(Precision.bf16) if name == "tiny 1b" else build(name, Precision.bf16), monkeypatch)
    sums = [block.reduce for block in watched.model.modules() if isinstance(block, ResidualBlock)]
    reduced = []
    for layer in watched.model.modules():
        if type(layer) is nn.Conv2d or (isinstance(layer, Pointwise) and not layer.fp32 and layer not in sums):
            layer.register_forward_hook(lambda _, inputs, output: reduced.append(output.dtype))
    coded = watched.model(image, noise(watched.model, image, seed=3) if training else None)
    expected = {"g_a", "h_a", "h_s", "g_s", "y_hat", "z_hat", "hyper parameters", "scales", "means", "coded"}
    assert set(watched.places) >= expected | {"likelihood input", "likelihood scale", "bits"}
    assert {
        place for place, tensors in watched.places.items() if any(t.dtype != torch.float32 for t in tensors)
    } == set()
    assert [tensor.dtype for tensor in coded] == [torch.float32] * 3
    assert len(watched.places["scales"]) == 11  # 2 + 3 + 6 steps
    assert ("gains" in watched.places) == (name == "nano variable")
    # ... and the rest really is reduced.
    assert reduced and set(reduced) == {torch.bfloat16}


def tiny_1b(precision: Precision) -> HPCM:
    torch.manual_seed(0)
    return HPCM(small_1b(), precision=precision)


@pytest.mark.parametrize("precision", Precision)
def test_symbols_are_integers_however_large(precision, image, monkeypatch):
    """Values of y beyond 256, where bf16 has no odd integers any more, keep all of them."""
    model = build("nano", precision)
    with torch.no_grad():
        model.g_a[-1].weight *= 3000
    watched = Watched(model, monkeypatch)
    with torch.no_grad():
        model(image)
    y = watched.places["g_a"][0]
    assert y.abs().max() > 600
    residuals = torch.cat([symbols.flatten() for symbols in watched.places["likelihood input"][1:]])
    assert torch.equal(residuals, residuals.round())
    large = residuals[residuals.abs() > 256]
    assert len(large) > 100 and (large.long() % 2 != 0).float().mean() > 0.3
    # ŷ is within half a symbol of y, everywhere
    assert (watched.places["y_hat"][0] - y).abs().max() <= 0.5 + 1e-3


def test_quantizing_is_exact_and_passes_the_gradient():
    x = torch.linspace(-1000, 1000, 4001, requires_grad=True)
    mean = torch.full_like(x, 0.25, requires_grad=True)
    quantized = quantize(x, mean)
    assert torch.equal(quantized, (x.detach() - 0.25).round() + 0.25)
    quantized.backward(torch.arange(4001.0))
    assert torch.equal(x.grad, torch.arange(4001.0)) and mean.grad is None


def test_close_to_fp32_with_finite_gradients(image):
    losses = {}
    for precision in Precision:
        model = build("nano", precision)
        coded = model(image, noise(model, image, seed=3))
        result = rate_distortion_loss(image, coded.x_hat, coded.bits_y, coded.bits_z, 0.013)
        result.loss.mean().backward()
        losses[precision] = result
        for name, parameter in model.named_parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all(), name
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        losses[precision, "gradient"] = gradients
    fp32, bf16 = losses[Precision.fp32], losses[Precision.bf16]
    assert bf16.loss.item() == pytest.approx(fp32.loss.item(), rel=2e-3)
    assert bf16.bpp.item() == pytest.approx(fp32.bpp.item(), rel=2e-2)
    assert bf16.loss.item() != fp32.loss.item()
    similarity = torch.cosine_similarity(losses[Precision.fp32, "gradient"], losses[Precision.bf16, "gradient"], dim=0)
    assert similarity > 0.99
