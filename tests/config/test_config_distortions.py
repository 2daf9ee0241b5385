"""What does not go with objective=ms_ssim, and what does."""

from __future__ import annotations

import pytest

from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose
from hpcm_scale.errors import UserError

RANGE = ("model.rate.lowest=2.4", "model.rate.highest=60.5", "model.rate.reference=8.73")


@pytest.mark.parametrize(
    ("overrides", "code", "key"),
    [
        (["model.fusion=none", "data.crop=128"], "ms-ssim-crop", "data.crop"),
        (
            ["model.fusion=none", "schedule.crops=[128]", "schedule.crop_boundaries=[0.5]"],
            "ms-ssim-crop",
            "schedule.crops",
        ),
        (["objective.lmbda=0.013"], "mse-lmbda-with-ms-ssim", "objective.lmbda"),
        (["model.rate.levels=6"], "mse-rates-with-ms-ssim", "model.rate"),
        (["model.rate.levels=6", *RANGE[:2]], "mse-rates-with-ms-ssim", "model.rate"),
        (
            ["objective.target=vision_model", "machine.receivers=[random-vit]"],
            "ms-ssim-for-vision-model",
            "objective.distortion",
        ),
    ],
)
def test_refused(overrides, code, key):
    with pytest.raises(UserError) as error:
        check(compose(["model=nano", "objective=ms_ssim", *overrides]), 1)
    assert (error.value.code, error.value.key) == (code, key) and "\n" not in str(error.value)


def test_the_public_lambdas_are_accepted():
    fixed, variable = (
        compose(["model=nano", "objective=ms_ssim", *more]) for more in ([], ["model.rate.levels=6", *RANGE])
    )
    for config in (fixed, variable):
        for config.objective.lmbda in (2.4, 4.58, 8.73, 16.64, 31.73, 60.5):
            check(config, 1)
