"""What a distortion asks of crops and λ."""

from __future__ import annotations

from hpcm_scale.config.schema import Config, Distortion, Viewer
from hpcm_scale.errors import UserError

MS_SSIM_SMALLEST_SIDE = 161
"""Pixels. Five scales, four halvings apart, and a window of 11 pixels: MS-SSIM is not defined for shorter sides."""
MS_SSIM_LEAST_LMBDA = 0.24
"""A tenth of the lowest public λ; the highest of MSE, 0.0483, is far below."""


def check_distortion(config: Config) -> None:
    """Raise UserError for an objective.distortion that does not go with the rest."""
    objective, rate = config.objective, config.model.rate
    if objective.distortion != Distortion.ms_ssim:
        return
    if objective.viewer == Viewer.machine:
        raise UserError(
            "objective.viewer=machine weighs tokens against MSE (machine.mse), not objective.distortion=ms_ssim; "
            "leave one of the two out"
        )
    if rate.levels > 1 and min(rate.lowest, rate.highest, rate.reference) < MS_SSIM_LEAST_LMBDA:
        raise UserError(
            f"model.rate.lowest={rate.lowest:g}, highest={rate.highest:g} and reference={rate.reference:g} are not all "
            "λ of MS-SSIM, which objective.distortion=ms_ssim needs; use model.rate.lowest=2.4 model.rate.highest=60.5 "
            f"model.rate.reference={max(objective.lmbda, 2.4):g}"
        )
    if objective.lmbda < MS_SSIM_LEAST_LMBDA:
        raise UserError(
            f"objective.lmbda={objective.lmbda:g} is λ of MSE, and with objective.distortion=ms_ssim it would buy no "
            "picture; use 2.4 to 60.5, or objective=ms_ssim, which brings its own"
        )
    for side in (config.data.crop, *config.schedule.crops):
        if side < MS_SSIM_SMALLEST_SIDE:
            key = "data.crop" if side == config.data.crop else "schedule.crops"
            raise UserError(
                f"objective.distortion=ms_ssim needs crops with sides from {MS_SSIM_SMALLEST_SIDE} pixels, and {key} "
                f"has {side}; use 256"
            )
