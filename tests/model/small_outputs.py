"""What small networks of every kind compute from seeded weights and a drawn image.

`python tests/model/small_outputs.py` writes it to small_outputs.json, with benchmarks/ on PYTHONPATH. Run it only after
tests/model/test_model_parity.py has passed: that our network is the published one is shown there.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from drawn_images import drawn_image
from seeded_models import small_1b
from small_models import small
from torch import Tensor

from hpcm_scale.config.schema import Fusion, HyperPlacement, ModelConfig, RateConfig
from hpcm_scale.model.hpcm import HPCM, Coded, Noise
from hpcm_scale.objective import RateDistortion, rate_distortion_loss

FILE = Path(__file__).with_suffix(".json")
NETWORKS: dict[str, Callable[[], ModelConfig]] = {
    "68m": small,
    "68m, upstream placement": lambda: small(placement=HyperPlacement.upstream),
    "64m_phi": lambda: small(Fusion.none),
    "1b": small_1b,
    "variable rate": lambda: replace(small(), rate=RateConfig(levels=3)),
    "swin": lambda: replace(small(), family="swin"),
    "convnext": lambda: replace(small(), family="convnext"),
}


def outputs(name: str) -> dict[str, float]:
    """Rates and mse of an evaluation, and a training step without noise: its loss and gradient norms by module.

    In float64, so that no symbol rounds to another integer on another machine.
    """
    model = HPCM(NETWORKS[name]()).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_filled(key, parameter))
    x = torch.from_numpy(drawn_image(0, 256, 256)).permute(2, 0, 1)[None].double() / 255
    level = torch.ones(1) if model.config.rate.levels > 1 else None
    with torch.no_grad():
        evaluated = _loss(x, model(x, level=level))
    noise = Noise(*(torch.zeros(1, *shape, dtype=x.dtype) for shape in model.latent_shapes(256, 256)))
    training = _loss(x, model(x, noise, level))
    training.loss.backward()
    found = {key: getattr(evaluated, key).item() for key in ("bpp_y", "bpp_z", "mse")}
    squares: dict[str, float] = defaultdict(float)
    for key, parameter in model.named_parameters():
        squares[key.split(".")[0]] += parameter.grad.square().sum().item()
    return found | {"loss": training.loss.item()} | {f"grad {part}": total**0.5 for part, total in squares.items()}


def _filled(name: str, parameter: Tensor) -> Tensor:
    """Random values from a seed of the parameter's name; around the start where that is a constant: gains, scales."""
    values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith(".bias"):
        return 0.1 * values
    if parameter.dim() == 4 and len(parameter) > 1:
        return values / parameter[0].numel() ** 0.5
    return parameter + 0.1 * values


def _loss(x: Tensor, coded: Coded) -> RateDistortion:
    return rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).mean()


if __name__ == "__main__":
    text = json.dumps({name: outputs(name) for name in NETWORKS}, indent=1)
    FILE.write_text(f"{text}\n", encoding="utf-8")
