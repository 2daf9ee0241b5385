"""Weights in and out: bit for bit, with their configuration, and never a traceback for a wrong file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hpcm_scale.config.compose import compose_model, to_dict
from hpcm_scale.config.schema import HyperPlacement, PriorConfig
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.model.weights import digest, load_weights, save_weights

FACTS = {"lmbda": 0.013, "step": 80, "images": 640, "pflops": 0.1234567890123456}


@pytest.fixture(scope="module")
def model() -> HPCM:
    torch.manual_seed(1)
    config = replace(compose_model("nano"), hyper_placement=HyperPlacement.upstream, prior_s3=PriorConfig(1, 1, 1))
    return HPCM(config)


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, model.state_dict(), model.config, FACTS)
    return path


def test_there_and_back_bit_for_bit(model, saved):
    loaded, facts = load_weights(saved)
    assert facts == FACTS
    assert loaded.config == model.config
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        for ours, theirs in zip(model(x), loaded(x), strict=True):
            assert torch.equal(ours, theirs)


def test_the_file_tells_what_it_is(model, saved):
    """Any reader of safetensors sees names, shapes, configuration and facts."""
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(model.state_dict())
    assert metadata["format"].startswith("hpcm_scale weights")
    assert json.loads(metadata["model"])["latent_channels"] == model.config.latent_channels
    assert json.loads(metadata["model"])["hyper_placement"] == "upstream"
    assert json.loads(metadata["facts"]) == FACTS


@pytest.mark.parametrize("name", ["nano", "1b", "swin", "convnext"])
def test_nothing_but_parameters_is_stored(name):
    """Index tables of the coding order are code, not weights: a checkpoint of another version still loads."""
    model = on_meta(compose_model(name))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_tensors_that_are_views_are_stored_whole(model, tmp_path):
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    name = "g_a.0.weight"
    state[name] = state[name].permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    save_weights(tmp_path / "views.safetensors", state, model.config, FACTS)
    assert torch.equal(load_weights(tmp_path / "views.safetensors")[0].state_dict()[name], model.g_a[0].weight)


def test_an_interrupted_export_leaves_the_old_file(model, saved):
    before = saved.read_bytes()
    with pytest.raises(Exception):  # noqa: B017
        save_weights(saved, {"a": "no tensor"}, model.config, FACTS)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def refusal(path) -> str:
    """The code of the error."""
    with pytest.raises(UserError) as refused:
        load_weights(path)
    text = str(refused.value)
    assert "\n" not in text and str(path) in text
    return refused.value.code


def test_missing(tmp_path):
    assert refusal(tmp_path / "nowhere.safetensors") == "no-weights-file"
    assert refusal(tmp_path) == "no-weights-file"


def test_no_safetensors(tmp_path, saved):
    path = tmp_path / "picture.safetensors"
    path.write_bytes(b"\x89PNG\r\n" + bytes(1000))
    assert refusal(path) == "damaged-weights"
    path.write_bytes(b"")
    assert refusal(path) == "damaged-weights"
    torch.save({"a": torch.zeros(1)}, path)
    assert refusal(path) == "damaged-weights"
    path.write_bytes(saved.read_bytes()[:-100])
    assert refusal(path) == "damaged-weights"


def test_foreign(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    assert refusal(path) == "foreign-weights"
    save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    assert refusal(path) == "foreign-weights"


@pytest.mark.parametrize("case", ["missing tensor", "extra tensor", "other shape"])
def test_tensors_that_do_not_fit(case, model, tmp_path):
    state = dict(model.state_dict())
    if case == "missing tensor":
        del state["g_a.0.bias"]
    elif case == "extra tensor":
        state["g_a.99.bias"] = torch.zeros(3)
    else:
        state["g_a.0.bias"] = torch.zeros(3)
    save_weights(tmp_path / "other.safetensors", state, model.config, FACTS)
    assert refusal(tmp_path / "other.safetensors") == "weights-mismatch"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("facts", []),
        ("facts", None),
        ("facts", {"origin": []}),
        ("facts", {"origin": {"facts": 5}}),
        ("facts", {"distortion": ["ssim"]}),
        ("pre_editor", {"channels": []}),
        ("pre_editor", {"channels": [0, 0, 0]}),
        ("pre_editor", {"blocks": -1}),
        ("pre_editor", []),
        ("rate", {"levels": 10**9}),
        ("rate", {"levels": 3, "lowest": 1.0}),
        ("family", "../swin"),
        ("options", {"window": 8}),
        ("options", {"window": "???"}),
        ("options", {"window": "${window}"}),
        ("channels", [10**9, 16, 24]),
        ("expansion", 10**30),
        ("g_a_blocks", [10**9] * 4),
    ],
)
def test_a_description_that_cannot_be(key, value, model, saved, tmp_path):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    if key not in ("facts", "pre_editor"):
        metadata["model"] = json.dumps(json.loads(metadata["model"]) | {key: value})
    else:
        metadata[key] = json.dumps(value)
    path = tmp_path / "crafted.safetensors"
    save_file(dict(model.state_dict()), path, metadata)
    refusal(path)


def test_a_pre_editor_without_a_description(model, saved, tmp_path):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    path = tmp_path / "orphan.safetensors"
    save_file(dict(model.state_dict()) | {"pre_editor.to_image.bias": torch.zeros(3)}, path, metadata)
    assert refusal(path) == "no-pre-editor-configuration"


@pytest.mark.parametrize("case", ["no JSON", "unknown key", "impossible", "no model", "no facts"])
def test_a_damaged_description(case, model, saved, tmp_path):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata["model"])
    if case == "no JSON":
        metadata["model"] = metadata["model"][:-5]
    elif case == "unknown key":
        metadata["model"] = json.dumps(description | {"of_a_later_version": 1})
    elif case == "impossible":
        metadata["model"] = json.dumps(description | {"attention_heads": 7})
    else:
        del metadata[case.removeprefix("no ")]
    path = tmp_path / "damaged.safetensors"
    save_file(dict(model.state_dict()), path, metadata)
    refusal(path)


def test_digest_tells_what_models_compute_with(monkeypatch):
    def made(**changes) -> HPCM:
        torch.manual_seed(0)
        return HPCM(replace(compose_model("nano"), **changes))

    model = made()
    assert digest(made(name="other")) == digest(model)
    assert digest(made(hyper_placement=HyperPlacement.upstream)) != digest(model)
    changed = made()
    with torch.no_grad():
        changed.hyper_prior.means[0, 0] += 1e-6
    assert digest(changed) != digest(model)
    before = digest(model)
    monkeypatch.setattr(
        "hpcm_scale.model.weights.to_dict", lambda config: to_dict(config) | {"new_field": "its default"}
    )
    assert digest(model) == before  # files of today stay readable when a configuration learns something new
