"""Models with seeded weights that give scales of every table, and images to code with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from seeded_models import spread_nano
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.objective import rate_distortion_loss


@pytest.fixture(scope="session")
def model() -> HPCM:
    """`spread_nano`, on the CPU, in evaluation mode. Do not change it."""
    return spread_nano(3)


@pytest.fixture(scope="session")
def other_model() -> HPCM:
    """The same with other weights."""
    return spread_nano(4)


@pytest.fixture(scope="session")
def codec(model) -> Codec:
    """Codes with `model`."""
    return Codec(model)


@pytest.fixture(scope="session")
def photo(image_folder) -> Tensor:
    """An image, uint8 (3, 512, 768)."""
    return pixels(image_folder / "kodim05.png")


def pixels(path: Path) -> Tensor:
    """A file's image, uint8 (3, H, W)."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())


@pytest.fixture(scope="session")
def trained_model(training_images) -> HPCM:
    """A nano after a second or two of learning, so that its estimated rates mean something."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = HPCM(compose_model("nano"))
    crop = pixels(training_images[0])[None, :, :256, :256].float() / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(20):
        noise = Noise(*(torch.rand(1, *shape, generator=generator) - 0.5 for shape in model.latent_shapes(256, 256)))
        coded = model(crop, noise)
        loss = rate_distortion_loss(crop, *coded, lmbda=0.013).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
