"""Files of edited images: the pre-editor is the encoder's alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hpcm_scale.cli import main
from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.container import unpack
from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import PreEditorConfig, RateConfig
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import pad
from hpcm_scale.machine.codec import MachineCodec
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.variable_rate import level_of_byte
from hpcm_scale.model.weights import PreEditorWeights, load_weights, save_weights
from hpcm_scale.tasks import load_encoder

RECEIVER = "random-vit"
FACTS = {"lmbda": None, "precision": "fp32"}


@pytest.fixture(scope="module")
def machine_codec() -> MachineCodec:
    """A nano of three levels behind a pre-editor that does something."""
    torch.manual_seed(0)
    config = compose_model("nano")
    config.rate = RateConfig(levels=3)
    seen = receiver(RECEIVER)
    pre_editor = PreEditor(PreEditorConfig(tokens=RECEIVER), seen.token_channels, levels=3)
    with torch.no_grad():
        for parameter in pre_editor.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return MachineCodec(HPCM(config), pre_editor, seen).eval()


@pytest.fixture(scope="module")
def weights(machine_codec, tmp_path_factory):
    """Two weights files: of codec and pre-editor, and of the codec alone."""
    folder, codec = tmp_path_factory.mktemp("weights"), machine_codec.codec
    in_front = PreEditorWeights(PreEditorConfig(tokens=RECEIVER), machine_codec.pre_editor.state_dict())
    save_weights(folder / "machine.safetensors", codec.state_dict(), codec.config, FACTS, in_front)
    save_weights(folder / "codec.safetensors", codec.state_dict(), codec.config, FACTS)
    return folder


@pytest.fixture(scope="module")
def photo(image_folder):
    with Image.open(image_folder / "kodim04.png") as image:
        return image.crop((100, 200, 290, 340)).copy()


@pytest.fixture(scope="module")
def pixels(photo) -> torch.Tensor:
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)


@pytest.mark.parametrize("level", [0, 77, 255])
def test_training_and_encoder_edit_alike(shared, machine_codec, weights, pixels, level):
    """Up to the padding, which training never sees: editing comes first in the encoder, and in an estimate last."""
    loaded = load_encoder(weights / "machine.safetensors")
    codec = loaded.codec
    encoded = Codec(codec, edit=loaded.edit).encode(pixels, level)
    number = level_of_byte(codec.config.rate, level)
    x = (pixels / 255)[None].contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        edited = machine_codec.edit(x, number)
        assert (edited - x).abs().max() > 0.01
        estimate = codec(pad(edited, codec.multiple), level=torch.tensor([number]))
    bits = (estimate.bits_y + estimate.bits_z).item()
    assert 8 * len(encoded.data) == pytest.approx(bits, rel=0.02, abs=800)


def test_files_decode_without_the_pre_editor(weights, pixels):
    loaded, plain = (load_encoder(weights / f"{name}.safetensors") for name in ("machine", "codec"))
    assert plain.edit is None
    encoder, decoder = Codec(loaded.codec, edit=loaded.edit), Codec(plain.codec)
    encoded = encoder.encode(pixels, 128)
    assert torch.equal(decoder.decode(unpack(encoded.data)), encoded.y_hat)
    assert not torch.equal(decoder.encode(pixels, 128).y_hat, encoded.y_hat)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["hpcm", *map(str, arguments)])
    main()


@pytest.mark.launch
@pytest.mark.parametrize("aim", [("--quality", 50), ("--bpp", None)])
def test_commands_edit_and_decode(aim, weights, photo, pixels, tmp_path, monkeypatch, capsys):
    photo.save(tmp_path / "photo.png")
    option, value = aim
    if value is None:  # what quality 60 gives, so that it can be had
        run(monkeypatch, *("encode", tmp_path / "photo.png", tmp_path / "a.hpcm"), *files(weights), "--quality", 60)
        value = 8 * (tmp_path / "a.hpcm").stat().st_size / (190 * 140)
    file = tmp_path / "photo.hpcm"
    run(monkeypatch, "encode", tmp_path / "photo.png", file, *files(weights), option, value)
    if option == "--bpp":
        assert 8 * file.stat().st_size / (190 * 140) == pytest.approx(value, rel=0.03)
    pictures = []
    for name in ("machine", "codec"):
        run(monkeypatch, "decode", file, tmp_path / f"{name}.png", "--weights", weights / f"{name}.safetensors")
        with Image.open(tmp_path / f"{name}.png") as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]
    model, _ = load_weights(weights / "codec.safetensors")
    level = unpack(file.read_bytes()).level
    assert file.read_bytes() != Codec(model).compress(pixels, level)
    capsys.readouterr()


def files(weights) -> tuple:
    return "--weights", weights / "machine.safetensors"


def test_a_pre_editor_that_does_not_fit_is_reported(weights, tmp_path, machine_codec):
    codec = machine_codec.codec
    other = PreEditorWeights(PreEditorConfig(tokens=None), machine_codec.pre_editor.state_dict())
    save_weights(tmp_path / "w.safetensors", codec.state_dict(), codec.config, FACTS, other)
    with pytest.raises(UserError, match="do not fit the network"):
        load_encoder(tmp_path / "w.safetensors")
