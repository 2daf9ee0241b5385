"""The Karhunen–Loève start."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import small

from hpcm_scale.config.compose import compose, compose_model, from_yaml, model_from_dict, to_dict, to_yaml
from hpcm_scale.config.schema import Distortion, Fusion, ModelConfig, ObjectiveConfig, RateConfig, Start
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.model.families import names
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.model.parameters import parametrise
from hpcm_scale.model.start import (
    CORRELATION,
    SMALLEST_SCALE,
    karhunen_loeve_start,
    linear_stages,
    lmbda_of_start,
    scale_layers,
)
from hpcm_scale.model.weights import digest
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.task import task_of

LMBDA = 0.013


def started(config: ModelConfig, lmbda: float = LMBDA, mup: bool = False) -> HPCM:
    """An untrained model."""
    torch.manual_seed(0)
    model = HPCM(config).eval()
    if mup:
        parametrise(model)
    karhunen_loeve_start(model, lmbda)
    return model


def block_variances() -> np.ndarray:
    """Eigenvalues of the covariance of 16×16 blocks, in falling order, from the definition."""
    axes = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
    colours = axes.T @ np.diag([0.165, 0.009, 0.006]) @ axes
    place = np.arange(16)
    vertical, horizontal = (base ** np.abs(place[:, None] - place) for base in CORRELATION)
    return np.linalg.eigvalsh(np.kron(colours, np.kron(vertical, horizontal)))[::-1]


def test_four_complete_stages_are_the_transform_of_blocks_of_16():
    stages = linear_stages([12, 48, 192, 768])
    for stage in stages:
        rows = stage.basis.reshape(len(stage.basis), -1)
        assert np.allclose(rows @ rows.T, np.eye(len(rows)))
    assert np.allclose(stages[-1].deviations ** 2, block_variances())


@pytest.mark.parametrize("widths", [[16, 24, 48, 40], [96, 192, 384, 320], [12, 48, 192, 768]])
def test_eigenvectors_do_not_depend_on_rounding(widths, monkeypatch):
    """No two eigenvalues of a colour coincide: otherwise the library would choose the eigenvectors."""
    before = linear_stages(widths)
    noise = np.random.default_rng(0)
    exact = np.linalg.eigh

    def perturbed(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        error = 1e-15 * np.abs(matrix).max() * noise.standard_normal(matrix.shape)
        return exact(matrix + error + error.T)

    monkeypatch.setattr(np.linalg, "eigh", perturbed)
    for ours, theirs in zip(before, linear_stages(widths), strict=True):
        assert np.allclose(ours.basis, theirs.basis, atol=1e-6)


@pytest.mark.parametrize("widths", [[1, 1, 1, 8], [2, 3, 4, 8], [16, 24, 4, 8]])
def test_narrow_stages_may_have_no_channel_of_a_colour(widths):
    stages = linear_stages(widths)
    outputs = [len(stage.basis) for stage in stages]
    assert outputs == [min(width, 4 * before) for width, before in zip(widths, [3, *outputs], strict=False)]
    assert stages[-1].deviations[0] > 0.5  # that of the mean of a block


def test_it_is_a_pure_function():
    for ours, again in zip(linear_stages([16, 24, 48, 40]), linear_stages([16, 24, 48, 40]), strict=True):
        assert np.array_equal(ours.basis, again.basis)
        rows = ours.basis.reshape(len(ours.basis), -1)
        first = [row[np.abs(row) > 1e-6][0] for row in rows]
        assert min(first) > 0


@pytest.mark.parametrize("mup", [False, True])
@pytest.mark.parametrize("stem", [2, 4])
def test_complete_transforms_are_inverse(stem, mup):
    """With enough channels and without blocks, g_s inverts g_a; muP's factor of the last layer is left out."""
    widths = {"channels": [14, 48, 192], "latent_channels": 768}
    config = replace(small(Fusion.none), **widths, g_a_blocks=[0] * 4, g_s_blocks=[0] * 4, stem_kernel=stem)
    model = started(config, mup=mup)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model.g_s(model.g_a(x)), x, atol=1e-5)


def test_scales_are_the_deviations_of_y():
    """On samples of the model of images the channels have the standard deviations that the scales start from."""
    generator = np.random.default_rng(0)
    side = 64
    axes = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
    place = np.arange(side)
    roots = [np.linalg.cholesky(base ** np.abs(place[:, None] - place)) for base in CORRELATION]
    colours = axes.T @ np.diag(np.sqrt([0.165, 0.009, 0.006]))
    white = generator.standard_normal((400, 3, side, side))
    images = 0.5 + np.einsum("cd,ij,kl,bdjl->bcik", colours, *roots, white, optimize=True)
    config = replace(compose_model("micro"), g_a_blocks=[0, 0, 0, 0])
    model = started(config)
    with torch.no_grad():
        deviations = model.g_a(torch.from_numpy(images).float()).std(dim=(0, 2, 3))
    for layer in scale_layers(model):
        scales = layer.bias.detach()[: config.latent_channels]
        assert torch.allclose(scales, (0.9 * deviations).clamp(min=SMALLEST_SCALE), rtol=0.1)


@pytest.mark.launch
@pytest.mark.parametrize("family", names())
def test_every_family_starts_as_a_codec(family, held_out_images):
    """A model of 0.4 million parameters."""
    config = compose_sized([f"model={family}", "model.size=400k"]).model
    torch.manual_seed(0)
    assert loss(started(config), held_out_images) < loss(HPCM(config).eval(), held_out_images) / 8


@pytest.mark.parametrize(("name", "most"), [("450k", 3.3), ("small", 2.5)])
def test_presets_start_as_codecs(name, most, held_out_images):
    assert loss(started(compose_model(name)), held_out_images) < most


@pytest.fixture(scope="module")
def held_out_images(image_folder) -> ImageSet:
    return ImageSet(image_folder, limit=2)


@torch.no_grad()
def loss(model: HPCM, images: ImageSet) -> float:
    """At λ = 0.013, of two crops of 256×256."""
    crops = torch.stack([images.load(index)[:, 128:384, 128:384] for index in range(2)]).float() / 255
    coded = model(crops.contiguous(memory_format=torch.channels_last))
    return rate_distortion_loss(crops, coded.x_hat, coded.bits_y, coded.bits_z, LMBDA).loss.mean().item()


def test_lmbda_of_the_gain():
    fixed, variable = RateConfig(), RateConfig(levels=4, reference=0.0067)
    assert lmbda_of_start(fixed, ObjectiveConfig(lmbda=0.025)) == 0.025
    assert lmbda_of_start(variable, ObjectiveConfig(lmbda=0.025)) == 0.0067
    for lmbda, expected in ((8.73, 0.0067), (math.sqrt(8.73 * 16.64), math.sqrt(0.0067 * 0.013)), (1000, 0.0483)):
        objective = ObjectiveConfig(lmbda=lmbda, distortion=Distortion.ms_ssim)
        assert lmbda_of_start(fixed, objective) == pytest.approx(expected)


def test_the_gain_of_y_follows_lmbda():
    low, high = (started(small(), lmbda).g_a[-1].weight.detach() for lmbda in (0.0067, 4 * 0.0067))
    assert torch.allclose(2 * low, high)


def test_new_runs_have_it_and_stored_configurations_do_not(tmp_path):
    config = compose(["model=nano"])
    assert config.model.start == Start.klt
    codec = task_of(config, None, {}).codec
    assert torch.equal(scale_layers(codec)[0].bias, scale_layers(started(config.model))[0].bias)
    stored = to_dict(config.model)
    del stored["start"]
    assert model_from_dict(stored).start == Start.random
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config).replace("  start: klt\n", ""))
    assert from_yaml(file).model.start == Start.random


def test_the_digest_does_not_depend_on_it():
    """Files of a model are decoded with its weights, whatever they started from."""
    torch.manual_seed(0)
    model = HPCM(small())
    before = digest(model)
    model.config = replace(model.config, start=Start.klt)
    assert digest(model) == before


def test_a_meta_model_stays_as_it_is():
    with torch.device("meta"):
        karhunen_loeve_start(HPCM(small()), LMBDA)
