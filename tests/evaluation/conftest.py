"""A small model and what evaluations are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpcm_scale.config.compose import compose_model
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import save_weights


@pytest.fixture(scope="session")
def save_untrained(tmp_path_factory) -> Callable[..., str]:
    """`save_untrained(name, lmbda=…, seed=…, preset=…, **changes)`: an untrained model's weights file."""
    folder = tmp_path_factory.mktemp("weights")

    def save(name: str, *, lmbda: float | None = 0.013, seed: int = 0, preset: str = "nano", **changes: Any) -> str:
        torch.manual_seed(seed)
        model = HPCM(replace(compose_model(preset), **changes))
        facts = {"lmbda": lmbda, "precision": "fp32", "step": 5, "images": 40, "pflops": 0.5}
        path = folder / f"{name}.safetensors"
        save_weights(path, model.state_dict(), model.config, facts)
        return str(path)

    return save


@pytest.fixture(scope="session")
def small_images(tmp_path_factory) -> ImageSet:
    """Three images of odd sizes: noise, a gradient, one large enough for MS-SSIM."""
    folder: Path = tmp_path_factory.mktemp("small_images")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (21, 34, 3), dtype=np.uint8)).save(folder / "a_noise.png")
    ramp = np.linspace(0, 255, 90 * 70 * 3).reshape(90, 70, 3).astype(np.uint8)
    Image.fromarray(ramp).save(folder / "b_ramp.png")
    Image.effect_noise((170, 165), 60).convert("RGB").save(folder / "c|large.png")
    return ImageSet(folder)
