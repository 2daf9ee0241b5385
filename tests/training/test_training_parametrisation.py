"""muP: what every layer does in a step depends on no width, and each engine gives every layer its own rate."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import Tensor

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import Fusion, ModelConfig, OptimizerConfig, OptimizerName
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.model.families import names
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.model.parameters import Layer, fan_in, learning_rate_factor, on_meta, parametrise
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.optimizer import clip, create_optimizer, set_learning_rate

STEPS, LEARNING_RATE = 4, 2e-3
WIDTHS = (1, 4)
"""Times those of `nano`: 16 times the parameters."""


def widened(factor: int) -> ModelConfig:
    """`nano`, without attention, with that many times the channels everywhere."""
    nano = compose_model("nano")
    keys = ("latent_channels", "hyper_latent_channels", "hyper_channels")
    widths = {key: factor * getattr(nano, key) for key in keys}
    return replace(nano, fusion=Fusion.none, channels=[factor * width for width in nano.channels], **widths)


def outputs(model: HPCM, x: Tensor) -> dict[str, Tensor]:
    """Of every layer with weights; of one that is used several times, the last."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output.clone()))
        for name, layer in model.named_modules()
        if isinstance(layer, Layer)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def changes(factor: int, x: Tensor, mup: bool, config: OptimizerConfig) -> dict[str, float]:
    """By how much a few steps change every layer's outputs: root mean square."""
    torch.manual_seed(0)
    model = HPCM(widened(factor))
    if mup:
        parametrise(model)
    optimizer = create_optimizer(model, config)
    set_learning_rate(optimizer, LEARNING_RATE)
    before = outputs(model, x)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        noise = Noise(*(torch.rand(len(x), *s, generator=generator) - 0.5 for s in model.latent_shapes(*x.shape[2:])))
        coded = model(x, noise)
        optimizer.zero_grad()
        rate_distortion_loss(x, *coded, 0.013).loss.mean().backward()
        clip(optimizer, 1.0)
        optimizer.step()
    after = outputs(model, x)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


@pytest.fixture(scope="module")
def slopes(shared):
    """The power of the width with which changes grow, by layer: a function of the optimizer, without or with muP."""
    photo = ImageSet(shared / "data" / "kodak", 1).load(0)
    x = torch.stack([photo[:, top : top + 128, :128] for top in (0, 128)]).float() / 255

    def found(mup: bool, name: OptimizerName = OptimizerName.adam) -> dict[str, float]:
        measured = [changes(factor, x, mup, OptimizerConfig(name=name)) for factor in WIDTHS]
        return {layer: slope([change[layer] for change in measured]) for layer in measured[0]}

    return found


def slope(values: list[float]) -> float:
    """Of logarithms over those of the widths."""
    return math.log(values[-1] / values[0]) / math.log(WIDTHS[-1] / WIDTHS[0])


@pytest.mark.launch
def test_the_coordinate_check(slopes):
    """Wider networks change by as much as narrow ones; with one rate for all, the context model by ever more."""
    found = {mup: slopes(mup) for mup in (False, True)}
    context = {mup: [value for name, value in found[mup].items() if "prior_s3" in name] for mup in found}
    assert max(found[True].values()) < 0.35
    assert abs(median(found[True].values())) < 0.2
    assert max(context[False]) > 0.9
    assert median(context[False]) > median(context[True]) + 0.4


@pytest.mark.launch
def test_the_coordinate_check_of_muon(slopes):
    found = slopes(True, OptimizerName.muon)
    assert max(found.values()) < 0.35
    assert abs(median(found.values())) < 0.2


def test_rates_and_start_follow_the_inputs_of_a_layer():
    model, plain = (HPCM(compose_model("2m")) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    parametrise(model)
    factors = {name: learning_rate_factor(parameter) for name, parameter in model.named_parameters()}
    latent = 56 / 24
    assert factors["context.prior_s3.before.0.expand.weight"] == pytest.approx(1 / latent)
    assert factors["g_s.11.weight"] == pytest.approx(1 / 2)
    assert factors["g_a.0.weight"] == 1  # three colours at any width
    assert {factors[name] for name in factors if name.endswith((".bias", "spatial.weight")) and "context" in name} == {
        1
    }
    changed = {name for name, value in plain.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {"g_s.11.weight"}
    assert torch.allclose(model.g_s[11].weight, plain.g_s[11].weight / math.sqrt(2))


def test_at_the_widths_of_the_base_nothing_changes():
    model = HPCM(compose_model("450k"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parametrise(model)
    assert {*map(learning_rate_factor, model.parameters())} == {1.0}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [*({"family": name} for name in names()), {"partial_ratio": 9}])
def test_every_layer_has_one_to_compare_with(changes):
    base = replace(compose_model("450k"), **changes)
    wide = replace(base, channels=[32, 64, 128], latent_channels=96, hyper_latent_channels=96, hyper_channels=96)
    model = on_meta(wide)
    parametrise(model)
    found = {name: learning_rate_factor(parameter) for name, parameter in model.named_parameters()}
    assert found["g_a.0.weight"] == 1
    assert found["g_a.1.expand.weight"] == found["context.prior_s3.before.0.expand.weight"] == 1 / 4
    assert all(factor <= 1 for factor in found.values())


def test_inputs_of_layers_are_counted_as_their_outputs_sum_them():
    down, up = torch.nn.Conv2d(6, 4, 2, stride=2), torch.nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1)
    depthwise, linear = torch.nn.Conv2d(6, 6, 3, groups=6), torch.nn.Linear(6, 4)
    assert [fan_in(layer) for layer in (down, up, depthwise, linear)] == [24, 24, 9, 6]
