"""Rate-distortion curves: one per model or other codec, a point per λ or quality setting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpcm_scale import __version__
from hpcm_scale.config.schema import Distortion, ModelConfig, Precision, RateConfig
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError, shown
from hpcm_scale.evaluation.baselines import OtherCodec
from hpcm_scale.evaluation.bd_rate import METRICS, labelled
from hpcm_scale.evaluation.coders import Coder, Watcher, code_images, estimate_coder, file_coder, other_coder
from hpcm_scale.evaluation.measures import Measured, mean
from hpcm_scale.machine.codec import load_machine_codec
from hpcm_scale.model.parameters import forward_flops_per_image, kmac_per_pixel, on_meta, parameter_count
from hpcm_scale.model.variable_rate import byte_of, byte_of_quality, level_of_byte, lmbda_of, quality_of_byte
from hpcm_scale.model.weights import load_weights
from hpcm_scale.tracking.progress import progress

Watch = Callable[[str], Watcher]
"""Asked for a watcher of a codec at a setting, by their names."""
FILES, ESTIMATED = "files", "estimated"


@dataclass(frozen=True)
class Point:
    """A codec at one setting on a set of images, in the set's order."""

    setting: str
    images: list[Measured]
    weights: str | None = None
    """The file they came from; like the two below, of a model of ours only."""
    facts: dict[str, Any] | None = None
    kmac_per_pixel: float | None = None

    @property
    def mean(self) -> dict[str, float | None]:
        """Means over the images of each measure (`measures.mean`)."""
        return mean(self.images)


@dataclass(frozen=True)
class Curve:
    """One codec at several settings, points in order of mean bpp."""

    name: str
    codec: str
    """One line: library, version, fixed settings."""
    rate: str
    """`FILES`: bits are those of files made and decoded again; or `ESTIMATED`."""
    points: list[Point]

    @property
    def label(self) -> str:
        """The name as figures show it."""
        return labelled(self.name, self.codec)


class Setting(NamedTuple):
    """What weights code at: the one rate of their λ, or a level of several."""

    label: str
    lmbda: float | None
    level: int | None = None
    """The byte of its files, of a variable-rate model."""


class Weights(NamedTuple):
    """A weights file that was read and found sound; the tensors themselves are not kept."""

    path: str
    curve: str
    """Name of the curve that it is of."""
    config: ModelConfig
    facts: dict[str, Any]
    settings: list[Setting]

    @property
    def distortion(self) -> Distortion:
        """What they were trained for; facts that do not say it are older than MS-SSIM."""
        return Distortion(self.facts.get("distortion", "mse"))


def read_weights(names: Sequence[str], qualities: Sequence[float] | None = None) -> list[list[Weights]]:
    """The weights grouped by curve, both in the order named.

    A name is PATH or CURVE=PATH. Files of fixed rate make a curve together, a point for each λ: those called the same,
    or, where none is called anything, those of one architecture and one distortion. A file of variable rate makes a
    curve alone, with a point at each of `qualities` (0 to 100), by default at each level that it has learned.

    Raises UserError if a file cannot be used, or if a curve through the files of one name would mean nothing.
    """
    groups: dict[str, list[Weights]] = {}
    for name in names:
        weights = _read(*_split(name), qualities)
        group = groups.setdefault(weights.curve, [])
        for other in group:
            _check_together(other, weights)
        group.append(weights)
    if qualities and all(weights.config.rate.levels == 1 for group in groups.values() for weights in group):
        raise UserError("--qualities is for variable-rate weights, and these have one rate each; leave it out")
    return list(groups.values())


def _split(name: str) -> tuple[str | None, str]:
    """CURVE and PATH of `--weights`; paths may have equals signs, too, as those of sweeps do."""
    curve, equals, path = name.partition("=")
    called = equals and curve.strip() and "/" not in curve and not Path(name).exists()
    return (curve.strip(), path) if called else (None, name)


def _read(curve: str | None, path: str, qualities: Sequence[float] | None) -> Weights:
    model, facts = load_weights(path)
    config, lmbda = model.config, facts.get("lmbda")
    if config.rate.levels > 1:
        settings = [_at_level(config.rate, level) for level in _levels(config.rate, qualities)]
    else:
        settings = [Setting(shown(Path(path).stem) if lmbda is None else f"λ = {lmbda:g}", lmbda)]
    usual = f"hpcm {config.name}" + " variable" * (config.rate.levels > 1)
    weights = Weights(path, shown(curve or usual), config, facts, settings)
    if curve is None and weights.distortion == Distortion.ms_ssim:
        return weights._replace(curve=f"{usual} ms-ssim")
    return weights


def _levels(rate: RateConfig, qualities: Sequence[float] | None) -> list[int]:
    """The bytes of files at these qualities, or at all rows of the model's tables."""
    if qualities is None:
        return [byte_of(rate, level) for level in range(rate.levels)]
    return list(dict.fromkeys(byte_of_quality(quality) for quality in qualities))


def _at_level(rate: RateConfig, level: int) -> Setting:
    lmbda = lmbda_of(rate, torch.tensor(level_of_byte(rate, level), dtype=torch.float64)).item()
    return Setting(f"quality {quality_of_byte(level):g}", lmbda, level)


def _check_together(one: Weights, other: Weights) -> None:
    """Raises UserError if a curve through both would mean nothing."""
    mend = "tell their curves apart with --weights NAME=PATH"
    same = f"{one.path} and {other.path} are both called {one.curve}"
    if Path(one.path).resolve() == Path(other.path).resolve():
        raise UserError(f"--weights names {other.path} twice; name it once")
    if one.config != other.config:
        raise UserError(f"{same} but are built differently; {mend}")
    if one.distortion != other.distortion:
        raise UserError(f"{same}, one trained for MSE and one for MS-SSIM; {mend}")
    if other.config.rate.levels > 1:
        raise UserError(f"{same}, and each has a range of rates; {mend}")
    if one.settings == other.settings:
        raise UserError(f"{same} with {one.settings[0].label}; {mend}")


def model_curve(
    group: Sequence[Weights],
    images: ImageSet,
    *,
    device: torch.device,
    estimate: bool,
    watch: Watch | None = None,
    metrics: Collection[str] = tuple(METRICS),
) -> Curve:
    """Code the images with every one of a group of weights (`read_weights`), at all its settings.

    Real files are made in fp32; an estimate is made in the precision of the training, so that the numbers of
    its journal come again. `watch` is asked for a watcher of each setting, `metrics` are measured. The facts of a point
    tell the λ of its level.
    """
    name, config = group[0].curve, group[0].config
    kmac = kmac_per_pixel(forward_flops_per_image(on_meta(config), 256), 256)
    points = []
    for weights in group:
        model = load_machine_codec(weights.path)
        if estimate:
            model.set_precision(Precision(weights.facts["precision"]))
        for setting in weights.settings:
            coder = (
                estimate_coder(model, device, setting.lmbda, setting.level, weights.distortion)
                if estimate
                else file_coder(model, device, setting.level)
            )
            measured = _coded(coder, images, watch, f"{name} {setting.label}", metrics)
            facts = weights.facts | {"lmbda": setting.lmbda}
            points.append(Point(setting.label, measured, weights.path, facts, kmac))
    return Curve(name, _described(config, device, estimate), ESTIMATED if estimate else FILES, _in_order(points))


def _described(config: ModelConfig, device: torch.device, estimate: bool) -> str:
    """A model in one line."""
    parts = [f"{parameter_count(on_meta(config)):,} parameters"]
    if config.rate.levels > 1:
        rate = config.rate
        parts.append(f"variable rate with {rate.levels} levels, λ = {rate.lowest:g} to {rate.highest:g}")
    versions = [f"hpcm_scale {__version__}", f"torch {version('torch')}"]
    if not estimate:
        versions += [f"constriction {version('constriction')}", "fp32"]
    return f"HPCM {config.name}, {', '.join(parts)}; {', '.join(versions)}, on {device.type}"


def other_curve(
    codec: OtherCodec, images: ImageSet, watch: Watch | None = None, metrics: Collection[str] = tuple(METRICS)
) -> Curve:
    """Code the images with another codec at each of its settings."""
    points = []
    for setting in codec.settings:
        label = codec.label(setting)
        name = f"{labelled(codec.name, codec.description)} {label}"
        measured = _coded(other_coder(codec, setting), images, watch, name, metrics)
        points.append(Point(label, measured))
    return Curve(codec.name, codec.description, FILES, _in_order(points))


def _coded(coder: Coder, images: ImageSet, watch: Watch | None, name: str, metrics: Collection[str]) -> list[Measured]:
    bar = partial(progress, description=name, unit="image", report=True)
    return code_images(coder, images, watch=watch and watch(name), progress=bar, metrics=metrics)


def _in_order(points: list[Point]) -> list[Point]:
    return sorted(points, key=lambda point: point.mean["bpp"])
