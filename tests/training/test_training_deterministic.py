"""engine.deterministic: its settings, and that all operations of networks and losses have deterministic algorithms."""

from __future__ import annotations

import copy
import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.hpcm import Noise
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.training.signals import WORKSPACE, deterministic
from hpcm_scale.training.task import task_of

RAISING = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_ctc_loss_backward",
    "_embedding_bag_dense_backward",
    "_upsample_bicubic2d_aa_backward",
    "_upsample_bilinear2d_aa_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "cumsum",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "histc",
    "max_unpool2d",
    "max_unpool3d",
    "median",
    "nll_loss2d_forward",
    "nll_loss_forward",
    "put",
    "put_",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "scatter_reduce",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}
"""Operations of aten that raise on CUDA in the deterministic mode: the second list in the documentation of
torch.use_deterministic_algorithms (2.13), and the antialiased interpolations, which it does not name."""


class Operations(TorchDispatchMode):
    """Notes the names of all operations within."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def settings() -> tuple:
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    mode = torch.get_deterministic_debug_mode()
    inductor = torch._inductor.config.deterministic
    environment = os.environ.get(WORKSPACE)
    return mode, cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory, inductor, environment


@pytest.mark.parametrize(("workspace", "benchmark"), [(None, False), (":16:8", True)])
def test_settings_hold_within_and_are_restored_even_after_an_error(workspace, benchmark, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    if workspace:
        monkeypatch.setenv(WORKSPACE, workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    before = settings()
    with pytest.raises(ZeroDivisionError), deterministic(True):
        assert settings() == (2, True, False, False, True, ":4096:8")
        raise ZeroDivisionError
    assert settings() == before
    with deterministic(False):
        assert settings() == before


def names_of_a_step(*overrides: str) -> set[str]:
    """The operations of a forward and backward pass over one crop, in the deterministic mode; on `meta`."""
    config = compose_sized([*overrides, "model.size=100k"])
    receivers = {name: receiver(name) for name in config.machine.receivers}
    task = task_of(config, None, {name: copy.deepcopy(of).to("meta") for name, of in receivers.items()})
    task.module.to("meta")
    images = torch.empty(2, 3, 256, 256, device="meta")
    noise = Noise(*(torch.empty(2, *shape, device="meta") for shape in task.codec.latent_shapes(256, 256)))
    level = torch.empty(2, device="meta") if config.model.rate.levels > 1 else None
    with deterministic(True), Operations() as seen:
        task.objective(images, task.forward(task.module, images, noise, level), level).loss.mean().backward()
    return seen.names


@pytest.mark.parametrize(
    ("family", "distortion", "levels"),
    [("hpcm", "mse", 1), ("hpcm", "ms_ssim", 3), ("swin", "mse", 1), ("convnext", "mse", 1)],
)
def test_every_operation_of_a_step_has_a_deterministic_algorithm(family, distortion, levels):
    names = names_of_a_step(f"model={family}", f"objective={distortion}", f"model.rate.levels={levels}")
    assert "convolution_backward" in names and not names & RAISING


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet-lite0",
        pytest.param(
            "pp-ocrv4", marks=pytest.mark.skipif(sys.version_info >= (3, 13), reason="its package refuses it")
        ),
        "pp-ocrv6",
        "random-vit",
    ],
)
def test_so_has_every_operation_of_a_machine_receiver(name):
    """Of lines of text and of pages, for they are resized and padded, respectively."""
    extractor = copy.deepcopy(receiver(name)).to("meta")
    with deterministic(True), Operations() as seen:
        for height in (32, 100):
            x = torch.empty(1, 3, height, 100, device="meta", requires_grad=True)
            sum(tokens.sum() for tokens in extractor(x).values()).backward()
    # Of replicate padding torch has a deterministic form, which F.pad takes on CUDA alone.
    assert len(seen.names) > 10 and not seen.names & RAISING


@pytest.mark.launch
def test_a_resumed_deterministic_run_equals_an_unbroken_one(train, launch):
    """Twice 2 steps against 4, on two processes."""
    common = ("engine=zero2", "engine.deterministic=true", "train.steps=4")
    unbroken = train("deterministic", *common)
    train("deterministic_twice", *common, "train.stop_after=2")
    resumed = train("deterministic_twice", *common)
    losses = [
        [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in run] for run in (unbroken, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    files = [launch.folder / run / "weights.safetensors" for run in ("deterministic", "deterministic_twice")]
    assert torch.equal(*(nn.utils.parameters_to_vector(load_file(file).values()) for file in files))
