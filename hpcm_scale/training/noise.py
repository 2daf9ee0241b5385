"""Uniform noise of the training likelihoods, seeded per image so that it does not depend on who trains it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpcm_scale.model.hpcm import HPCM, Noise


def image_noise(model: HPCM, images: Tensor, image_index: Tensor, seed: int) -> Noise:
    """Noise in [−½, ½) for a batch of images (b, 3, H, W) with global indices (b,), fp32.

    The same (seed, global image index) gives the same noise on any number of processes.
    """
    shape_y, shape_z = model.latent_shapes(*images.shape[2:])
    generator = torch.Generator(images.device)
    ys, zs = [], []
    for index in image_index.tolist():
        generator.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1))
        ys.append(torch.rand(shape_y, generator=generator, device=images.device))
        zs.append(torch.rand(shape_z, generator=generator, device=images.device))
    return Noise(torch.stack(ys) - 0.5, torch.stack(zs) - 0.5)


def image_levels(levels: int, image_index: Tensor, seed: int) -> Tensor:
    """A level of a variable-rate model for each of a batch of images with global indices (b,): (b,) fp32.

    Every run of as many images as there are levels has each level once, in an order of its own. The same (seed, global
    image index) gives the same level on any number of processes.
    """
    chosen = []
    for index in image_index.tolist():
        run, place = divmod(index, levels)
        order = np.random.default_rng((seed, run, _LEVELS)).permutation(levels)
        chosen.append(float(order[place]))
    return torch.tensor(chosen)


_LEVELS = 1
"""Sets the draws of levels apart from other draws of the same seed and index."""
