"""Pre-editor and codec as one module: what it lists, what it only takes along, and that it learns."""

from __future__ import annotations

import pytest
import torch

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import Fusion, MachineConfig, ModelConfig, PreEditorConfig
from hpcm_scale.machine.codec import MachineCodec
from hpcm_scale.machine.objective import MachineObjective
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.model.variable_rate import lmbda_of

RECEIVER = "random-vit"


def nano(levels: int = 3) -> ModelConfig:
    config = compose_model("nano")
    config.fusion, config.rate.levels = Fusion.none, levels  # sides of 128 pixels
    return config


def built(freeze: bool = False, levels: int = 3, tokens: bool = True) -> MachineCodec:
    torch.manual_seed(0)
    network = receiver(RECEIVER) if tokens else None
    editor = PreEditor(PreEditorConfig(channels=[8, 8, 8]), network and network.token_channels, levels)
    return MachineCodec(HPCM(nano(levels)), editor, network, freeze_codec=freeze)


def batch(count: int = 2) -> torch.Tensor:
    x = torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def noise(model: MachineCodec, x: torch.Tensor) -> Noise:
    generator = torch.Generator().manual_seed(1)
    shapes = model.codec.latent_shapes(*x.shape[2:])
    return Noise(*(torch.rand((len(x), *shape), generator=generator) - 0.5 for shape in shapes))


@pytest.mark.parametrize("levels", [1, 3])
def test_at_first_it_codes_as_the_codec_alone(levels):
    model, x = built(levels=levels), batch()
    level = torch.tensor([0.0, 1.5]) if levels > 1 else None
    for given in {None, level}:  # None: the reference's level
        for mine, expected in zip(
            model(x, noise(model, x), given), model.codec(x, noise(model, x), given), strict=True
        ):
            assert torch.equal(mine, expected)
    alone = MachineCodec(model.codec)
    assert alone.edit(x) is x and alone.precision == model.codec.precision


@pytest.mark.parametrize("freeze", [False, True])
def test_training_changes_what_it_lists_and_nothing_else(freeze):
    model, x = built(freeze), batch()
    names = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert names == ({"pre_editor"} if freeze else {"pre_editor", "codec"})
    assert {name.partition(".")[0] for name in model.state_dict()} == names
    config, level = MachineConfig(receivers=[RECEIVER]), torch.tensor([0.0, 2.0])
    rate = model.codec.config.rate
    objective = MachineObjective({RECEIVER: model.receiver}, config, lambda level: lmbda_of(rate, level))
    frozen = {name: tensor.clone() for name, tensor in model.codec.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = objective(x, model.train()(x, noise(model, x), level), level).mean().loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(model.edit(x, level), x)
    assert all(torch.equal(frozen[name], tensor) for name, tensor in model.codec.state_dict().items()) == freeze
    assert not any(parameter.grad is not None for parameter in model.receiver.parameters())
    if freeze:
        assert not any(parameter.requires_grad for parameter in model.codec.parameters())


@pytest.mark.parametrize("freeze", [False, True])
def test_everything_moves_with_it(freeze):
    model = built(freeze).to("meta")
    for part in (model.pre_editor, model.codec, model.receiver):
        assert {tensor.device.type for tensor in (*part.parameters(), *part.buffers())} == {"meta"}
    x = batch().to("meta")
    coded = model(x, Noise(*(torch.empty(2, *shape, device="meta") for shape in model.codec.latent_shapes(128, 128))))
    assert coded.x_hat.is_meta and coded.x_hat.shape == x.shape


def test_tokens_may_be_there_already():
    model, x = built(), batch(1)
    torch.nn.init.normal_(model.pre_editor.to_image.weight, std=0.1)
    looked = []
    model.receiver.register_forward_hook(lambda *_: looked.append(1))
    own = model.edit(x, 1.0)
    assert len(looked) == 1 and torch.equal(model.edit(x, 1.0, model.receiver(x)), own) and len(looked) == 2
    assert not torch.equal(built(tokens=False).edit(x, 1.0), own)


def test_images_of_any_size_can_be_edited():
    model = built()
    x = torch.rand(1, 3, 37, 101)
    assert torch.equal(model.edit(x), x)
