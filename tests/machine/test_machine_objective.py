"""The machine objective against its parts, and what may be weighed."""

from __future__ import annotations

import pytest
import torch

from hpcm_scale.config.schema import MachineConfig
from hpcm_scale.errors import UserError
from hpcm_scale.machine.objective import MachineObjective, rank_difference, reference_tokens, token_distortion
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.hpcm import Coded
from hpcm_scale.objective import rate_distortion_loss

NAMES = ["random-vit", "random-vit:7"]
LAMBDA = 0.013


def batch() -> tuple[torch.Tensor, Coded]:
    """Images and noisy ones, some of it beyond [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 64, 48, generator=generator)
    x_hat = x + torch.tensor([0.05, 0.2])[:, None, None, None] * torch.randn(x.shape, generator=generator)
    return x, Coded(x_hat.requires_grad_(), torch.tensor([3000.0, 4000]).requires_grad_(), torch.tensor([100.0, 200]))


def objective(names=NAMES, lmbda=LAMBDA, **config) -> MachineObjective:
    return MachineObjective({name: receiver(name) for name in names}, MachineConfig(receivers=names, **config), lmbda)


def measured(name: str, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token distortion and rank difference of one layer."""
    x, coded = batch()
    network = receiver(name)
    decoded, original = network(coded.x_hat.clamp(0, 1))[layer], network(x)[layer]
    return token_distortion(decoded, original), rank_difference(decoded, original)


def test_it_is_the_sum_of_its_parts():
    x, coded = batch()
    weights = {"random-vit/middle": 3.0, "random-vit:7/last": 0.0}
    result = objective(mse=0.5, token_distortion_weight=20.0, token_rank_weight=7.0, layers=weights)(x, coded)
    first, second, third = measured(NAMES[0], "middle"), measured(NAMES[0], "last"), measured(NAMES[1], "middle")
    token, rank = ((0.75 * a + 0.25 * b + c) / 2 for a, b, c in zip(first, second, third, strict=True))
    torch.testing.assert_close(result.token, token)
    torch.testing.assert_close(result.rank, rank)
    plain = rate_distortion_loss(x, *coded, LAMBDA)
    assert result._fields[:6] == plain._fields and result._fields == MachineObjective.fields
    for name in ("bpp", "bpp_y", "bpp_z", "mse", "psnr"):
        assert torch.equal(getattr(result, name), getattr(plain, name))
    torch.testing.assert_close(
        result.loss, plain.bpp + LAMBDA * (0.5 * 255**2 * plain.mse + 20 * result.token + 7 * result.rank)
    )
    assert all(quantity.shape == () for quantity in result.mean()) and result.mean().token == result.token.mean()


def test_every_image_has_the_lmbda_of_its_level():
    x, coded = batch()
    result = objective(lmbda=lambda level: 0.001 * 2**level)(x, coded, torch.tensor([0.0, 3.0]))
    distortion = 255**2 * result.mse + 100 * result.token + 10 * result.rank
    torch.testing.assert_close(result.loss, result.bpp + torch.tensor([0.001, 0.008]) * distortion)


def test_gradients_come_from_all_that_has_a_weight():
    gradients = {}
    for name, weights in {"all": (1, 100, 10), "mse": (1, 0, 0), "token": (0, 100, 0), "rank": (0, 0, 10)}.items():
        x, coded = batch()
        keys = ("mse", "token_distortion_weight", "token_rank_weight")
        result = objective(**dict(zip(keys, weights, strict=True)))(x, coded)
        result.loss.sum().backward()
        gradients[name] = coded.x_hat.grad
        assert (result.token > 0).all() and (result.rank > 0).all()
        torch.testing.assert_close(coded.bits_y.grad, torch.full((2,), 1 / (64 * 48)))
    assert all(gradient.any() for gradient in gradients.values())
    torch.testing.assert_close(gradients["all"], gradients["mse"] + gradients["token"] + gradients["rank"])
    torch.testing.assert_close(gradients["mse"], LAMBDA * 255**2 * 2 * (coded.x_hat - x).detach() / x[0].numel())
    beyond = (coded.x_hat < 0) | (coded.x_hat > 1)
    assert beyond.any() and not gradients["token"][beyond].any()  # a decoder writes 0 or 1 there


def test_an_exact_reconstruction_costs_its_bits():
    x, coded = batch()
    x_hat = x.clone().requires_grad_()
    result = objective()(x, coded._replace(x_hat=x_hat))
    result.loss.sum().backward()
    assert torch.equal(result.loss, result.bpp) and not x_hat.grad.any()


def test_a_receiver_looks_at_originals_once():
    network, looked = receiver("random-vit"), []
    network.register_forward_hook(lambda _, inputs, output: looked.append(inputs[0]))
    x, coded = batch()
    before = reference_tokens(network, x)
    assert not any(tokens.requires_grad for tokens in before.values())
    MachineObjective({"random-vit": network}, MachineConfig(), LAMBDA)(x, coded)
    assert sum(images is x for images in looked) == 1 and len(looked) == 2
    x.mul_(0.5)  # another picture now
    again = reference_tokens(network, x)
    assert len(looked) == 3 and not torch.equal(again["last"], before["last"])
    with torch.inference_mode():
        assert torch.equal(reference_tokens(network, x)["last"], again["last"])
    other = reference_tokens(receiver("random-vit:7"), x)
    assert not torch.equal(other["last"], again["last"]) and len(looked) == 4


@pytest.mark.parametrize(
    ("layers", "code"),
    [
        ({"random-vit/first": 1.0}, "unknown-layer"),
        ({"middle": 1.0}, "unknown-layer"),
        ({"random-vit/last": -1.0}, "negative-layer-weight"),
        ({"random-vit/last": 0.0, "random-vit/middle": 0.0}, "receiver-without-weight"),
    ],
)
def test_weights_of_what_is_not_there_are_refused(layers, code):
    with pytest.raises(UserError) as error:
        objective(layers=layers)
    assert (error.value.code, error.value.key) == (code, "machine.layers")
