"""Vision towers of transformers, from folders with small random ones, and of open_clip as far as it can be had."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hpcm_scale.errors import UserError
from hpcm_scale.machine.receivers import receiver

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SIDES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 0}
TEXT |= {"eos_token_id": 1, "pad_token_id": 2, "intermediate_size": 32}
TOWERS = {
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIDES)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIDES)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIDES)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SIDES)),
    "both": lambda: transformers.CLIPModel(transformers.CLIPConfig(vision_config=SIDES, text_config=TEXT)),
}


@pytest.fixture
def saved(tmp_path):
    """A function that saves one of `TOWERS` with seeded weights, and gives the folder and the model."""

    def save(kind: str, images: dict | None = None) -> tuple[Path, torch.nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = TOWERS[kind]().eval()
        model.save_pretrained(tmp_path)
        description = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 40}, "crop_size": 32}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(description | (images or {})))
        return tmp_path, model

    return save


@pytest.mark.launch
@pytest.mark.parametrize("kind", TOWERS)
def test_the_tokens_of_its_patches(saved, kind):
    folder, model = saved(kind)
    before = torch.get_rng_state()
    extractor = receiver(f"transformers:{folder}")
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    normalised = (x - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    with torch.no_grad():
        states = getattr(model, "vision_model", model)(normalised, output_hidden_states=True).hidden_states
    tokens = extractor(x)
    assert extractor.token_channels == {"middle": 32, "penultimate": 32, "last": 32}
    for layer, depth in {"middle": 2, "penultimate": 3, "last": 4}.items():
        torch.testing.assert_close(tokens[layer], states[depth][:, -16:], atol=1e-4, rtol=1e-4)
    assert extractor.posterior(x) is None


def test_images_of_any_size_are_resized(saved):
    folder, _ = saved("dinov2", images={"crop_size": {"height": 48, "width": 32}})
    extractor = receiver(f"transformers:{folder}").train()
    x = torch.rand(2, 3, 100, 70, requires_grad=True)
    tokens = extractor(x)
    assert {of.shape for of in tokens.values()} == {(2, 6 * 4, 32)}
    tokens["last"].square().mean().backward()
    assert (x.grad != 0).float().mean() > 0.99
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    on_meta = copy.deepcopy(extractor).to("meta")(x.detach().to("meta"))
    assert {layer: of.shape for layer, of in on_meta.items()} == {layer: of.shape for layer, of in tokens.items()}


def test_a_half_model_is_refused(saved):
    folder, _ = saved("clip")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layers.3" in name)
    save_file(
        {name: of for name, of in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"lacks weights, such as .*layers\.3") as error:
        receiver(f"transformers:{folder}")
    assert error.value.code == "incomplete-receiver"


def test_a_model_of_text_is_refused(saved, tmp_path):
    folder, _ = saved("clip")
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(folder)
    with pytest.raises(UserError) as error:
        receiver(f"transformers:{folder}")
    assert error.value.code == "no-vision-transformer"


@pytest.mark.parametrize("lost", ["preprocessor_config.json", "model.safetensors", "config.json", "everything"])
def test_what_cannot_be_loaded_is_refused_in_one_sentence(saved, lost):
    folder, _ = saved("clip")
    if lost == "everything":
        folder = folder / "nothing"
    else:
        (folder / lost).unlink()
    with pytest.raises(UserError, match=r"transformers:.* \(.+\)") as error:
        receiver(f"transformers:{folder}")
    assert error.value.code == "transformers-not-loaded"
    assert "\n" not in str(error.value) and ". " not in str(error.value)


def test_without_the_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"needs the package open_clip_torch .* a torchvision that fits this torch"):
        receiver("open_clip:ViT-B-32:openai")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers .* install hpcm-scale\[machine\]"):
        receiver("transformers:facebook/dinov2-small")


def test_open_clip(tmp_path):
    """Where it is installed: it needs the torchvision that belongs to this torch."""
    library = pytest.importorskip("open_clip", exc_type=(ImportError, RuntimeError))
    vision = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "small-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    library.add_model_config(tmp_path / "small-clip.json")
    model = library.create_model("small-clip")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    extractor = receiver(f"open_clip:small-clip:{tmp_path / 'weights.pt'}")
    x = torch.rand(2, 3, 32, 32)
    normalised = (x - extractor.mean) / extractor.std
    with torch.no_grad():
        states = model.eval().visual.forward_intermediates(normalised, output_fmt="NLC")["image_intermediates"]
    for layer, depth in {"middle": 2, "penultimate": 3, "last": 4}.items():
        torch.testing.assert_close(extractor(x)[layer], states[depth - 1])
    with pytest.raises(UserError) as error:
        receiver("open_clip:small-clip:nothing")
    assert error.value.code == "open-clip-not-loaded"
