"""Checkpoints of the public implementation: imported they compute what it computed, exported they are its own again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from public_reference import PRESETS, Reference
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.commands.weights import export_weights, import_weights
from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import HyperPlacement
from hpcm_scale.errors import UserError
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.model.public_checkpoints import (
    PUBLISHED,
    export_state,
    import_state,
    needs_placement,
    published_config,
    read_checkpoint,
)
from hpcm_scale.model.weights import load_weights

BUFFERS = {
    "entropy_estimation.beta": [1.5],
    "entropy_estimation.scale_lower_bound.bound": [0.12],
    "entropy_estimation.likelihood_lower_bound.bound": [1e-9],
    **{name: [] for name in ("scale_table", "quantized_cdf_z", "cdf_length_z", "offset_z")},
    **{name: [] for name in ("quantized_cdf_y", "cdf_length_y", "offset_y")},
}
"""What the public model's state dict holds beside its parameters, after training."""


def buffers() -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in BUFFERS.items()}


def command(function, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hpcm", *map(str, arguments)])
        function()


class Imported:
    """A reference, its file in one of the ways it could be saved, and the files that the commands made of it."""

    def __init__(self, shared: Path, folder: Path, variant: str) -> None:
        self.reference = Reference(shared / "reference", variant)
        self.state = self.reference.public_state()
        self.file, self.weights, self.exported = (folder / name for name in ("a.pth.tar", "a.safetensors", "b.pth.tar"))
        if variant == "base":
            saved = {"epoch": 3, "state_dict": self.state | buffers()}
        else:  # trained on several GPUs
            saved = {f"module.{name}": tensor for name, tensor in (self.state | buffers()).items()}
        torch.save(saved, self.file)
        command(import_weights, self.file, "--preset", PRESETS[variant], "--lmbda", 0.013, "--out", self.weights)
        command(export_weights, self.weights, "--out", self.exported)


@pytest.fixture(scope="module", params=[pytest.param("phi", marks=pytest.mark.launch)])
def imported(request, shared, tmp_path_factory):
    files = Imported(shared, tmp_path_factory.mktemp(request.param), request.param)
    yield files
    for path in (files.file, files.weights, files.exported):
        path.unlink()  # 270 MB each


@pytest.fixture(scope="module")
def loaded(imported):
    return load_weights(imported.weights)


def test_it_codes_as_the_public_implementation(imported, loaded):
    reference, (model, _) = imported.reference, loaded
    x, theirs = reference.image(), reference.facts["eval"]
    with torch.no_grad():
        coded = model(x)
    assert coded.bits_y.item() / x[0, 0].numel() == pytest.approx(theirs["y_bpp"], rel=5e-3)
    assert coded.bits_z.item() / x[0, 0].numel() == pytest.approx(theirs["z_bpp"], rel=5e-3)
    assert (coded.x_hat - x).square().mean().item() == pytest.approx(theirs["mse"], rel=1e-3)
    x_hat = reference.output("x_hat")
    assert (coded.x_hat - x_hat).abs().max() < 1e-3 * x_hat.abs().max()


def test_a_file_of_it_holds_what_the_public_implementation_computed(imported, loaded):
    reference, codec = imported.reference, Codec(loaded[0])
    pixels = torch.from_numpy(reference.outputs["image"]).permute(2, 0, 1)
    data = codec.compress(pixels)
    theirs = reference.facts["eval"]
    estimated = (theirs["y_bpp"] + theirs["z_bpp"]) * pixels[0].numel() / 8
    assert len(data) <= 1.005 * estimated + 64
    # These random weights estimate so badly that one symbol in fifty is beyond its table: the estimate has 29.9 bits
    # for each, the bound of the likelihood, and a file needs fewer.
    assert len(data) >= 0.98 * estimated
    decoded = codec.decompress(data)
    expected = (reference.output("x_hat")[0].clamp(0, 1) * 255).round()
    differing = (decoded.float() - expected).abs()
    assert differing.max() <= 1 and (differing > 0).float().mean() < 1e-3  # at halves of a grey level


def test_the_placement_that_it_was_trained_with_is_needed(imported, loaded):
    """The test above would not pass for weights imported as if they were our own."""
    config = replace(loaded[0].config, hyper_placement=HyperPlacement.aligned)
    model = on_meta(config)
    model.context.order = loaded[0].context.order
    model.load_state_dict(loaded[0].state_dict(), assign=True)
    reference = imported.reference
    with torch.no_grad():
        coded = model(reference.image())
    x_hat = reference.output("x_hat")
    assert (coded.x_hat - x_hat).abs().max() > 1e-2 * x_hat.abs().max()


def test_the_weights_file_tells_where_it_came_from(imported, loaded):
    model, facts = loaded
    preset = PRESETS[imported.reference.variant]
    assert model.config == replace(compose_model(preset), hyper_placement=HyperPlacement.upstream)
    assert facts == {
        "lmbda": 0.013,
        "distortion": "mse",
        "precision": "fp32",
        "step": None,
        "images": None,
        "pflops": None,
        "source": f"{PUBLISHED[preset]} of github.com/lyq133/LIC-HPCM, a.pth.tar",
    }


def test_there_and_back_bit_for_bit(imported):
    exported = torch.load(imported.exported, weights_only=True)
    expected = imported.state | buffers()
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name].dtype == torch.float32 and torch.equal(exported[name], tensor), name


NAMES_AND_SHAPES = {
    "68m": "d681b4e1e9c5f131866622be2688da97dd9a91222168a4bc509072b952164e9d",
    "64m_phi": "87ede64fd7d64e8ac003b087e66b13d6120b40de3d5315ce07ab15ee2a3b3231",
    "90m": "0f0c9edc429c52ec0a9a6cdf3f8751498525a09046fa9b174014c93934321436",
    "1b": "01f67eabd915bc5dcc75d093721feb6f0d8d43e8fdd6ee35f6ac476527f20192",
}
"""SHA-256 of the names and shapes of the public parameters, by the preset of the same structure."""


def digest(shapes: Mapping[str, Iterable[int]]) -> str:
    """Of the parameters of a state dict."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def light_state(preset: str) -> dict[str, Tensor]:
    """The parameters of the public state dict; each tensor is one number."""
    config = published_config(preset)
    exported = export_state(on_meta(config).state_dict(), config)
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in exported.items() if name not in BUFFERS}


@pytest.fixture(params=NAMES_AND_SHAPES)
def light(request):
    return request.param, light_state(request.param)


def test_names_and_shapes_are_those_of_the_public_implementation(light):
    preset, public = light
    assert digest({name: tensor.shape for name, tensor in public.items()}) == NAMES_AND_SHAPES[preset]


@pytest.mark.parametrize("variant", PRESETS)
def test_the_digests_are_of_the_reference(variant, shared):
    entries = json.loads((shared / "reference" / f"{variant}.json").read_text())["parameters"]
    assert digest({entry["name"]: entry["shape"] for entry in entries}) == NAMES_AND_SHAPES[PRESETS[variant]]


def test_every_published_model_there_and_back(light):
    preset, public = light
    ours = import_state(public | buffers(), preset)
    model = on_meta(published_config(preset))
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    exported = export_state(ours, model.config)
    assert exported.keys() == public.keys() | BUFFERS.keys()
    assert all(exported[name] is tensor for name, tensor in public.items())


def test_channel_scales_that_were_never_saved_are_ones(light):
    preset, public = light
    kept = {name: tensor for name, tensor in public.items() if not name.startswith("adaptive_params_list.")}
    assert len(public) - len(kept) == 10
    ours = import_state(kept, preset)
    scales = {name: tensor for name, tensor in ours.items() if name.startswith("context.q.")}
    assert len(scales) == 10
    for name, tensor in scales.items():
        assert torch.equal(tensor, torch.ones(1, tensor.shape[1], 1, 1)), name
    assert all(ours[name] is tensor for name, tensor in import_state(public, preset).items() if name not in scales)


def test_another_model_is_named(light):
    preset, public = light
    other = "64m_phi" if preset == "68m" else "68m"
    code, message = refusal(import_state, public | buffers(), other)
    assert code == "other-preset" and message.endswith(f"; give --preset {preset}")


def refusal(action, *arguments) -> tuple[str, str]:
    """Code and sentence of the error."""
    with pytest.raises(UserError) as refused:
        action(*arguments)
    assert "\n" not in str(refused.value)
    return refused.value.code, str(refused.value)


@pytest.mark.parametrize(
    ("name", "tensor", "code", "detail"),
    [
        ("h_s.branch.0.bias", None, "checkpoint-mismatch", "it lacks h_s.branch.0.bias;"),
        ("adaptive_params_list.3", None, "checkpoint-mismatch", "it lacks adaptive_params_list.3;"),
        ("h_s.branch.99.bias", torch.zeros(3), "checkpoint-mismatch", "it holds h_s.branch.99.bias,"),
        ("entropy_bottleneck._offset", torch.zeros(3), "checkpoint-mismatch", "it holds entropy_bottleneck._offset,"),
        ("g_a.branch.0.weight", torch.zeros(96, 3, 2, 2), "checkpoint-mismatch", "is 96×3×2×2 instead of 96×3×4×4;"),
        ("g_a.branch.0.bias", torch.tensor(0.0), "checkpoint-mismatch", "is one number instead of 96;"),
        ("g_a.branch.0.bias", torch.zeros(96).half(), "checkpoint-dtype", "torch.float16 instead of torch.float32"),
        ("entropy_estimation.beta", torch.tensor([2.0]), "checkpoint-constant", "is not 1.5"),
        ("entropy_estimation.beta", torch.zeros(0), "checkpoint-constant", "is not 1.5"),
    ],
)
def test_what_does_not_fit_is_named(name, tensor, code, detail):
    state = light_state("68m") | buffers()
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    refused, message = refusal(import_state, state, "68m")
    assert refused == code and name in message and detail in message


@pytest.mark.parametrize("preset", ["68m", "nano"])
def test_only_what_the_public_code_computes_is_exported(preset):
    config = compose_model(preset)
    state = on_meta(config).state_dict()
    upstream = replace(config, name="mine", hyper_placement=HyperPlacement.upstream)
    assert needs_placement(config) == (preset in PUBLISHED)
    assert not needs_placement(replace(config, hyper_placement=HyperPlacement.upstream))
    if preset in PUBLISHED:
        assert refusal(export_state, state, config)[0] == "export-placement"
        assert len(export_state(state, upstream)) == len(state) + len(BUFFERS)
    else:
        assert refusal(export_state, state, upstream)[0] == "export-structure"


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "module", "parameters", "legacy"])
def test_ways_to_save_a_state_dict(wrap, tmp_path):
    state = {"a.weight": torch.rand(2, 3), "b": torch.rand(4)}
    saved = {
        "state_dict": {"epoch": 1, "state_dict": state},
        "module": {f"module.{name}": tensor for name, tensor in state.items()},
        "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
    }.get(wrap, state)
    torch.save(saved, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=wrap != "legacy")
    read = read_checkpoint(tmp_path / "a.pth.tar")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("saved", "code", "detail"),
    [
        ([torch.zeros(1)], "no-state-dict", ""),
        ({}, "no-state-dict", ""),
        ({"state_dict": 1}, "no-state-dict", ""),
        ({"a": torch.zeros(1), "b": 1}, "not-a-tensor", "holds b,"),
        ({"a": torch.zeros(1), 5: torch.zeros(1)}, "not-a-tensor", "holds 5,"),
        ({"a": torch.zeros(3).to_sparse()}, "not-a-tensor", "holds a,"),
        ({"a": torch.zeros(3, device="meta")}, "not-a-tensor", "holds a,"),
    ],
)
def test_what_is_no_state_dict(saved, code, detail, tmp_path):
    torch.save(saved, tmp_path / "a.pth.tar")
    refused, message = refusal(read_checkpoint, tmp_path / "a.pth.tar")
    assert refused == code and detail in message
