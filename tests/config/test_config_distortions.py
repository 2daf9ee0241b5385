"""What does not go with objective=ms_ssim, and what does."""

from __future__ import annotations

import pytest

from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose
from hpcm_scale.errors import UserError

RANGE = ("model.rate.lowest=2.4", "model.rate.highest=60.5", "model.rate.reference=8.73")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.fusion=none", "data.crop=128"], "data.crop has 128; use 256"),
        (
            ["model.fusion=none", "schedule.crops=[128]", "schedule.crop_boundaries=[0.5]"],
            "schedule.crops has 128; use 256",
        ),
        (["objective.lmbda=0.013"], "objective.lmbda=0.013 is λ of MSE"),
        (["model.rate.levels=6"], "use model.rate.lowest=2.4 model.rate.highest=60.5 model.rate.reference=8.73"),
        (["model.rate.levels=6", *RANGE[:2]], "reference=0.013 are not all λ of MS-SSIM"),
        (["objective.target=vision_model", "machine.receivers=[random-vit]"], "leave one of the two out"),
    ],
)
def test_refused(overrides, told):
    with pytest.raises(UserError) as error:
        check(compose(["model=nano", "objective=ms_ssim", *overrides]), 1)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_public_lambdas_are_accepted():
    fixed, variable = (
        compose(["model=nano", "objective=ms_ssim", *more]) for more in ([], ["model.rate.levels=6", *RANGE])
    )
    for config in (fixed, variable):
        for config.objective.lmbda in (2.4, 4.58, 8.73, 16.64, 31.73, 60.5):
            check(config, 1)
