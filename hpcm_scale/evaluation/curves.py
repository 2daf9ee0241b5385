"""Rate-distortion curves: one per model or baseline codec, one point per λ or quality setting."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcm_scale import __version__
from hpcm_scale.config.schema import Distortion, ModelConfig, Precision, RateConfig
from hpcm_scale.errors import UserError, printable
from hpcm_scale.evaluation.baselines import Baseline
from hpcm_scale.evaluation.bd_rate import METRICS, RateCurve, labelled
from hpcm_scale.evaluation.crops import Crops
from hpcm_scale.evaluation.measures import Measured, mean
from hpcm_scale.evaluation.runners import Images, Watcher, code_images, estimate_runner, file_runner
from hpcm_scale.model.parameters import forward_flops_per_image, kmac_per_pixel, on_meta, parameter_count
from hpcm_scale.model.variable_rate import byte_of, byte_of_quality, level_of_byte, lmbda_of, quality_of_byte
from hpcm_scale.model.weights import load_weights
from hpcm_scale.tasks import load_encoder
from hpcm_scale.tracking.environment import environment

FILES, ESTIMATED = "files", "estimated"
PACKAGES = ("torch", "numpy", "pillow", "pytorch-msssim")
"""Packages that measurements depend on; codecs list their own."""


@dataclass(frozen=True)
class Point:
    """A codec at one setting on a set of images, in the set's order."""

    setting: str
    images: list[Measured]
    weights: str | None = None
    """The weights file; like the three below, None for a baseline."""
    facts: dict[str, Any] | None = None
    kmac_per_pixel: float | None = None
    parameters: int | None = None

    @property
    def mean(self) -> dict[str, Any]:
        """Means over the images of each measure (`measures.mean`)."""
        return mean(self.images)


@dataclass(frozen=True)
class Curve:
    """One codec at several settings, points in order of mean bpp."""

    name: str
    codec: str
    """One line: library, version, fixed settings."""
    rate: str
    """`FILES`: bits of real files, which were decoded; or `ESTIMATED`."""
    points: list[Point]

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        return labelled(self.name, self.codec)


class Setting(NamedTuple):
    """The rate of one λ, or one level of a variable-rate model."""

    label: str
    lmbda: float | None
    level: int | None = None
    """Level byte of a variable-rate model's files."""


class Weights(NamedTuple):
    """A weights file that was read and checked; without its tensors."""

    path: str
    curve: str
    """Name of its curve."""
    config: ModelConfig
    facts: dict[str, Any]
    settings: list[Setting]

    @property
    def distortion(self) -> Distortion:
        """The distortion of the training; weights from before MS-SSIM do not record it."""
        return Distortion(self.facts.get("distortion", "mse"))


def read_weights(names: Sequence[str], qualities: Sequence[float] | None = None) -> list[list[Weights]]:
    """The weights grouped by curve, both in the order named.

    A name is PATH or CURVE=PATH. Fixed-rate files of one CURVE form a curve with a point for each λ; without a CURVE,
    those of one architecture and one distortion do. A variable-rate file forms its own curve, with a point at each
    of `qualities` (0 to 100), by default at each level of its training.

    Raises UserError if a file cannot be used, and if the files of one curve do not belong together.
    """
    groups: dict[str, list[Weights]] = {}
    for name in names:
        weights = _read(*_split(name), qualities)
        group = groups.setdefault(weights.curve, [])
        for other in group:
            _check_together(other, weights)
        group.append(weights)
    if qualities and all(weights.config.rate.levels == 1 for group in groups.values() for weights in group):
        raise UserError(
            "qualities-at-fixed-rate",
            "--qualities",
            "--qualities needs variable-rate weights, but these have a fixed rate; omit it",
        )
    return list(groups.values())


def _split(name: str) -> tuple[str | None, str]:
    """CURVE and PATH of `--weights`; paths, such as those of sweeps, may contain equals signs."""
    curve, equals, path = name.partition("=")
    named = equals and curve.strip() and "/" not in curve and not Path(name).exists()
    return (curve.strip(), path) if named else (None, name)


def _read(curve: str | None, path: str, qualities: Sequence[float] | None) -> Weights:
    model, facts = load_weights(path)
    config, lmbda = model.config, facts.get("lmbda")
    if config.rate.levels > 1:
        settings = _settings(config.rate, qualities)
    else:
        settings = [Setting(printable(Path(path).stem) if lmbda is None else f"λ = {lmbda:g}", lmbda)]
    usual = f"hpcm {config.name}" + " variable" * (config.rate.levels > 1)
    weights = Weights(path, printable(curve or usual), config, facts, settings)
    if curve is None and weights.distortion == Distortion.ms_ssim:
        return weights._replace(curve=f"{usual} ms-ssim")
    return weights


def _settings(rate: RateConfig, qualities: Sequence[float] | None) -> list[Setting]:
    """Those of a variable-rate model: at these qualities, or at all levels of the training."""
    trained = (byte_of(rate, level) for level in range(rate.levels))
    settings = []
    for level in dict.fromkeys(trained if qualities is None else map(byte_of_quality, qualities)):
        lmbda = lmbda_of(rate, torch.tensor(level_of_byte(rate, level), dtype=torch.float64)).item()
        settings.append(Setting(f"quality {quality_of_byte(level):g}", lmbda, level))
    return settings


def _check_together(one: Weights, other: Weights) -> None:
    """Raises UserError if the two do not form one curve."""
    if Path(one.path).resolve() == Path(other.path).resolve():
        raise UserError("duplicate-weights", "--weights", f"--weights lists {other.path} twice; remove one")
    differs = None
    if one.config != other.config:
        differs = "have different architectures"
    elif one.distortion != other.distortion:
        differs = "are trained for MSE and for MS-SSIM"
    elif other.config.rate.levels > 1:
        differs = "have several rates each"
    elif one.settings == other.settings:
        differs = f"both have {one.settings[0].label}"
    if differs:
        raise UserError(
            "weights-of-two-curves",
            "--weights",
            f"{one.path} and {other.path} have one curve name, {one.curve}, but {differs}; give them different names "
            "with --weights NAME=PATH",
        )


def model_curve(
    group: Sequence[Weights],
    images: Images,
    *,
    device: torch.device,
    estimate: bool,
    watch: Watcher | None = None,
    metrics: Collection[str] = tuple(METRICS),
) -> Curve:
    """Code the images with each of a group of weights (`read_weights`) at all its settings.

    Real files are encoded in fp32; estimates use the precision of the training, as in its journal. The facts of each
    point contain the λ of its level.
    """
    name, config = group[0].curve, group[0].config
    model = on_meta(config)
    kmac, parameters = kmac_per_pixel(forward_flops_per_image(model, 256), 256), parameter_count(model)
    points = []
    for weights in group:
        encoder = load_encoder(weights.path)
        if estimate:
            encoder.module.precision = Precision(weights.facts["precision"])  # pyright: ignore[reportArgumentType]
        for setting in weights.settings:
            runner = (
                estimate_runner(encoder, device, setting.lmbda, setting.level, weights.distortion)
                if estimate
                else file_runner(encoder, device, setting.level)
            )
            measured = code_images(f"{name} {setting.label}", runner, images, watch=watch, metrics=metrics)
            facts = weights.facts | {"lmbda": setting.lmbda}
            points.append(Point(setting.label, measured, weights.path, facts, kmac, parameters))
    described = _described(config, parameters, device, estimate)
    return Curve(name, described, ESTIMATED if estimate else FILES, _in_order(points))


def _described(config: ModelConfig, parameters: int, device: torch.device, estimate: bool) -> str:
    parts = [f"{parameters:,} parameters"]
    if config.rate.levels > 1:
        rate = config.rate
        parts.append(f"variable rate with {rate.levels} levels, λ = {rate.lowest:g} to {rate.highest:g}")
    versions = [f"hpcm_scale {__version__}", f"torch {version('torch')}"]
    if not estimate:
        versions += [f"constriction {version('constriction')}", "fp32"]
    return f"HPCM {config.name}, {', '.join(parts)}; {', '.join(versions)}, on {device.type}"


def baseline_curve(
    codec: Baseline, images: Images, watch: Watcher | None = None, metrics: Collection[str] = tuple(METRICS)
) -> Curve:
    """Code the images with a baseline codec at each of its settings."""
    points = []
    for setting in codec.settings:
        label = codec.label(setting)
        name = f"{labelled(codec.name, codec.description)} {label}"
        runner = partial(codec.code, setting=setting)
        points.append(Point(label, code_images(name, runner, images, watch=watch, metrics=metrics)))
    return Curve(codec.name, codec.description, FILES, _in_order(points))


def _in_order(points: list[Point]) -> list[Point]:
    return sorted(points, key=lambda point: point.mean["bpp"])


@dataclass(frozen=True)
class Results:
    """Curves over one set of images."""

    folder: str
    set_name: str | None
    """Name of the image set, if the folder was checked to be one."""
    count: int
    """Number of images."""
    curves: list[Curve]
    system: dict[str, Any]
    """Versions and hardware (`system_info`)."""
    given: tuple[RateCurve, ...] = ()
    """Points that others measured, shown beside the curves."""

    @property
    def title(self) -> str:
        """Set, or folder, and the number of images."""
        name = self.set_name or printable(Path(self.folder).resolve().name)
        return f"{name}, {self.count} image{'s' * (self.count > 1)}"

    def points(self) -> Iterable[tuple[Curve, Point]]:
        """All points, curve by curve."""
        return ((curve, point) for curve in self.curves for point in curve.points)


def system_info() -> dict[str, Any]:
    """Versions and hardware (`tracking.environment`), and torch's number of threads."""
    packages = {"hpcm_scale": __version__} | {name: version(name) for name in PACKAGES}
    return environment() | {"packages": packages, "torch_threads": torch.get_num_threads()}


@dataclass
class Section:
    """One set of images and its results; every codec codes each image once per setting."""

    results: Results
    images: Images

    def prepare(self) -> None:
        """Called before the first image is coded."""

    def observe(self, name: str, index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
        """Called after each image is decoded; a `Watcher`."""

    def code(
        self,
        models: Sequence[Sequence[Weights]],
        baselines: Sequence[Baseline],
        *,
        device: torch.device,
        estimate: bool = False,
        crops: Crops | None = None,
        metrics: Collection[str] = tuple(METRICS),
    ) -> Iterator[Curve]:
        """Code the images with every model (`read_weights`) and baseline; adds each curve to the results.

        `crops` are chosen from the first model and compared with the first baseline.
        """

        def watch(*image: Any) -> None:
            self.observe(*image)
            if crops:
                crops.watch(*image)

        options = {"watch": watch, "metrics": metrics}
        for group in models:
            self.results.curves.append(model_curve(group, self.images, device=device, estimate=estimate, **options))
            yield self.results.curves[-1]
        for codec in baselines:
            self.results.curves.append(baseline_curve(codec, self.images, **options))
            if crops and codec is baselines[0]:
                crops.compare(codec, self.images)
            yield self.results.curves[-1]
