"""Variable rate: levels, gains, their gradients, and what a model takes over from one of fixed rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import images, noise, small

from hpcm_scale.compute.tracker import forward_flops
from hpcm_scale.config.schema import Fusion, ModelConfig, RateConfig
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM, quantize
from hpcm_scale.model.parameters import on_meta, parameters_by_part
from hpcm_scale.model.variable_rate import Gains, byte_of, level_of, level_of_byte, lmbda_of, mix_of, mixed
from hpcm_scale.model.weights import WeightsFile, check_init_from, init_from_weights
from hpcm_scale.objective import RateDistortionObjective

RATE = RateConfig(levels=6)
PAPER = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)


def variable(rate: RateConfig = RATE, **changes) -> ModelConfig:
    return replace(small(**changes), rate=rate)


def weights_file(model: HPCM) -> WeightsFile:
    return WeightsFile("fixed.safetensors", model.config, {}, dict(model.state_dict()), None)


def test_six_levels_are_the_papers_lambdas():
    lmbdas = lmbda_of(RATE, torch.arange(6.0))
    torch.testing.assert_close(lmbdas, torch.tensor(PAPER), rtol=0.01, atol=0)
    assert lmbdas[0].item() == pytest.approx(0.0018) and lmbdas[-1].item() == pytest.approx(0.0483)


@given(st.floats(0.0018, 0.0483), st.integers(2, 9))
def test_level_and_lambda_are_inverse(lmbda, levels):
    rate = RateConfig(levels=levels)
    level = level_of(rate, lmbda)
    assert lmbda_of(rate, torch.tensor(level, dtype=torch.float64)).item() == pytest.approx(lmbda, rel=1e-6)


def test_beyond_the_range_is_its_end():
    assert level_of(RATE, 1e-4) == 0 and level_of(RATE, 1.0) == 5


@pytest.mark.parametrize("levels", [2, 5, 6])
def test_every_byte_is_a_level_and_back(levels):
    rate = RateConfig(levels=levels)
    assert [byte_of(rate, level_of_byte(rate, byte)) for byte in range(256)] == [*range(256)]
    assert level_of_byte(rate, 0) == 0 and level_of_byte(rate, 255) == levels - 1


@given(st.lists(st.floats(0, 4), min_size=1, max_size=5))
def test_a_mix_is_of_two_neighbours_and_sums_to_one(levels):
    level = torch.tensor(levels, dtype=torch.float64)
    mix = mix_of(level, 5)
    torch.testing.assert_close(mix.sum(dim=1), torch.ones(len(levels), dtype=torch.float64))
    torch.testing.assert_close(mix @ torch.arange(5.0, dtype=torch.float64), level)
    assert ((mix > 0).sum(dim=1) <= 2).all()


def test_gains_start_at_the_root_of_lambda_and_mix_in_their_logarithms():
    gains = Gains(RATE, 3)
    with torch.no_grad():
        rows = gains(mix_of(torch.arange(6.0), 6))
        between = gains(mix_of(torch.tensor([2.5]), 6))
    torch.testing.assert_close(rows[:, 0, 0, 0], (lmbda_of(RATE, torch.arange(6.0)) / 0.013).sqrt())
    torch.testing.assert_close(between, (rows[2:3] * rows[3:4]).sqrt())


def test_gradients_of_quantization_with_gains():
    """Against autograd's own, of a rounding that is the identity backward."""
    generator = torch.Generator().manual_seed(0)
    y, means = (3 * torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    gain = torch.rand(2, 4, 1, 1, dtype=torch.float64, generator=generator) + 0.5
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=generator)

    def straight_through(y, means, gain):
        scaled = (y - means) * gain
        return (scaled + (scaled.round() - scaled).detach()) / gain + means

    expected, found = [], []
    for function, gradients in ((straight_through, expected), (quantize, found)):
        inputs = [tensor.clone().requires_grad_() for tensor in (y, means, gain)]
        function(*inputs).backward(upstream)
        gradients += [tensor.grad if tensor.grad is not None else torch.zeros_like(tensor) for tensor in inputs]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert found[2].abs().max() > 0


def test_mixed_rows():
    table = torch.arange(6.0).reshape(3, 2, 1, 1)
    mix = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])
    assert mixed(table, mix).flatten(1).tolist() == [[0, 1], [3, 4]]


@pytest.mark.parametrize("fusion", list(Fusion))
def test_a_model_started_from_fixed_rate_is_that_model_at_its_lambda(fusion):
    torch.manual_seed(0)
    fixed = HPCM(small(fusion)).eval()
    model = HPCM(variable(fusion=fusion)).eval()
    for scale in fixed.context.q:
        torch.nn.init.normal_(scale.weight, 1, 0.1)
    check_init_from(model.config, weights_file(fixed))
    init_from_weights(model, weights_file(fixed))
    x = images(2)
    with torch.no_grad():
        reference, found = fixed(x), model(x)
        named = model(x, None, torch.full((2,), level_of(RATE, 0.013)))
    for one, other, same in zip(reference, found, named, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert torch.equal(other, same)


def test_more_bits_and_less_distortion_with_every_level():
    torch.manual_seed(0)
    model = HPCM(variable()).eval()
    x = images(6)[:1].repeat(6, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        coded = model(x, None, torch.arange(6.0))
    assert (coded.bits_y.diff() > 0).all()
    assert torch.equal(coded.bits_z, coded.bits_z[:1].expand(6))


def test_images_of_one_batch_have_levels_of_their_own():
    torch.manual_seed(0)
    model = HPCM(variable()).eval()
    for scale in model.context.q:
        torch.nn.init.normal_(scale.weight, 1, 0.1)
    x, level = images(3), torch.tensor([0.0, 2.3, 5.0])
    with torch.no_grad():
        together = model(x, None, level)
        alone = [model(x[i : i + 1], None, level[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together.bits_y, torch.cat([one.bits_y for one in alone]), rtol=1e-4, atol=1)


def test_every_weight_of_a_step_over_all_levels_has_a_gradient():
    torch.manual_seed(0)
    model = HPCM(variable())
    x, level = images(6), torch.arange(6.0)
    objective = RateDistortionObjective(lambda levels: lmbda_of(RATE, levels))
    objective(x, model(x, noise(model, x), level), level).loss.mean().backward()
    # The last fusion's output goes nowhere, as in the published network.
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(name.startswith("context.fusion.2") for name in unused)
    assert (model.context.gains.log.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all((scale.weight.grad.abs().amax(dim=(1, 2, 3)) > 0).all() for scale in model.context.q)


def test_lambda_of_each_image_prices_its_distortion():
    model = HPCM(variable()).eval()
    x, level = images(2), torch.tensor([0.0, 5.0])
    with torch.no_grad():
        coded = model(x, None, level)
        result = RateDistortionObjective(lambda levels: lmbda_of(RATE, levels))(x, coded, level)
    for index, lmbda in enumerate((0.0018, 0.0483)):
        assert result.loss[index].item() == pytest.approx(
            lmbda * 255**2 * result.mse[index].item() + result.bpp[index].item(), rel=1e-5
        )


def test_costs_are_those_of_fixed_rate():
    fixed, model = on_meta(small()), on_meta(variable())
    x = torch.empty(1, 3, 256, 256, device="meta")
    assert forward_flops(fixed, x) == forward_flops(model, x)
    more = {part: count - parameters_by_part(fixed)[part] for part, count in parameters_by_part(model).items()}
    steps, latent = 10, 16
    assert more == {"g_a": 0, "g_s": 0, "hyper": 0, "context": 5 * steps * 3 * latent + 6 * latent}


def test_a_fixed_rate_model_has_no_levels():
    with pytest.raises(ValueError, match="no levels"):
        HPCM(small())(images(1), None, torch.zeros(1))


@pytest.mark.parametrize(
    ("started", "code", "key"),
    [
        (replace(small(), channels=[8, 8, 24]), "init-from-structure", "model.channels"),
        (replace(small(), rate=RateConfig(levels=3)), "init-from-rate", "model.rate"),
    ],
)
def test_weights_of_another_structure_are_refused(started, code, key):
    with pytest.raises(UserError) as error:
        check_init_from(variable(), WeightsFile("other.safetensors", started, {}, {}, None))
    assert (error.value.code, error.value.key) == (code, key)


def test_lambda_range_of_the_paper_is_the_default():
    assert (RATE.lowest, RATE.highest) == (PAPER[0], PAPER[-1])
    assert math.isclose(level_of(RATE, RATE.reference), 3, abs_tol=0.01)
