"""Fine-tuning for MS-SSIM from weights that were trained for MSE."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from small_training import FEW_BLOCKS

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Distortion
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.curves import read_weights
from hpcm_scale.evaluation.runners import code_images, estimate_runner
from hpcm_scale.model.weights import read_weights_file
from hpcm_scale.tasks import load_encoder
from hpcm_scale.training.start import prepare
from hpcm_scale.training.task import task_of

LAMBDA = 8.73


@pytest.mark.launch
def test_from_a_model_trained_for_mse(train, launch, image_folder, tmp_path):
    torch.manual_seed(0)
    mse = task_of(compose(["model=nano", *FEW_BLOCKS]), None, {})
    mse.save(tmp_path / "mse.safetensors", mse.module.state_dict(), {"step": 1, "images": 4, "pflops": 0.25}, None)
    images = tmp_path / "images"
    images.mkdir()
    with Image.open(image_folder / "kodim04.png") as photo:
        photo.crop((200, 100, 200 + 250, 100 + 170)).save(images / "part.png")
    options = ("objective=ms_ssim", f"init_from={tmp_path}/mse.safetensors", f"eval.images={images}", "train.steps=1")
    whole = ("model.fusion=attention", "data.crop=256")  # that of the file, and MS-SSIM needs 161 pixels
    journal = train("ms_ssim", *options, *whole, "engine=accelerate", processes=1)
    assert "λ of MS-SSIM = 8.73" in train.output

    reported = {key: value for line in journal for key, value in line.items()}
    for kind in ("train", "eval"):
        distortion = LAMBDA * (1 - reported[f"{kind}/ms_ssim"])
        assert reported[f"{kind}/loss"] == pytest.approx(distortion + reported[f"{kind}/bpp"], rel=1e-5)

    weights = launch.folder / "ms_ssim" / "weights.safetensors"
    facts = read_weights_file(weights).facts
    assert (facts["distortion"], facts["lmbda"]) == ("ms_ssim", LAMBDA)
    assert facts["origin"]["facts"]["distortion"] == "mse"
    moved = read_weights_file(weights).state["g_a.0.weight"] - mse.module.state_dict()["g_a.0.weight"]
    assert 0 < moved.abs().max() < 2e-3  # one step of Adam from where it began

    ((read,),) = read_weights([str(weights)])
    assert (read.curve, read.distortion) == ("hpcm nano ms-ssim", Distortion.ms_ssim)
    coder = estimate_runner(load_encoder(str(weights)), torch.device("cpu"), LAMBDA, distortion=read.distortion)
    assert code_images("estimates", coder, ImageSet(images))[0].loss == pytest.approx(reported["eval/loss"], rel=1e-4)


def test_evaluation_images_that_are_too_small_are_refused(shards, tmp_path):
    Image.new("RGB", (300, 160)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small.png of eval.images=.* is 300×160 pixels, but MS-SSIM is defined for"):
        prepare(compose(["model=nano", "objective=ms_ssim", f"data.shards={shards}", f"eval.images={tmp_path}"]), 1)
