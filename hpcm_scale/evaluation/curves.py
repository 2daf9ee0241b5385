"""Rate-distortion curves: one per model or other codec, a point per λ or quality setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpcm_scale import __version__
from hpcm_scale.config.schema import ModelConfig, Precision
from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.coders import Coder, Watcher, code_images, estimate_coder, file_coder, other_coder
from hpcm_scale.evaluation.measures import Measured, mean
from hpcm_scale.evaluation.other_codecs import OtherCodec
from hpcm_scale.model.shapes import forward_flops_per_image, kmac_per_pixel, on_meta, parameter_count
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


class Weights(NamedTuple):
    """A weights file that was read and found sound; the tensors themselves are not kept."""

    path: str
    config: ModelConfig
    facts: dict[str, Any]

    @property
    def setting(self) -> str:
        """What sets it apart from others of its architecture."""
        lmbda = self.facts.get("lmbda")
        return Path(self.path).stem if lmbda is None else f"λ = {lmbda:g}"


def read_weights(paths: Sequence[str]) -> list[list[Weights]]:
    """The weights grouped by architecture, both in the order named.

    Raises UserError if a file cannot be used, or if a curve through the files of one model name would mean nothing.
    """
    groups: dict[str, list[Weights]] = {}
    for path in paths:
        model, facts = load_weights(path)
        weights = Weights(path, model.config, facts)
        group = groups.setdefault(model.config.name, [])
        for other in group:
            if Path(other.path).resolve() == Path(path).resolve():
                raise UserError(f"--weights names {path} twice; name it once")
            same = f"{other.path} and {path} are both called {model.config.name}"
            if other.config != model.config:
                raise UserError(f"{same} but are built differently; evaluate them one at a time, each with its --out")
            if other.setting == weights.setting:
                raise UserError(f"{same} with {weights.setting}; evaluate them one at a time, each with its --out")
        group.append(weights)
    return list(groups.values())


def model_curve(
    group: Sequence[Weights],
    images: ImageSet,
    *,
    device: torch.device,
    estimate: bool,
    watch: Watch | None = None,
) -> Curve:
    """Code the images with every one of a group of weights (`read_weights`).

    Real files are made in fp32; an estimate is made in the precision of the training, so that the numbers of
    its journal come again. `watch` looks on while the first of the weights are at work.
    """
    config = group[0].config
    shapes = on_meta(config)
    parameters, kmac = parameter_count(shapes), kmac_per_pixel(forward_flops_per_image(shapes, 256), 256)
    versions = f"hpcm_scale {__version__}, torch {version('torch')}"
    if not estimate:
        versions += f", constriction {version('constriction')}, fp32"
    points = []
    for weights in group:
        model, _ = load_weights(weights.path)
        if estimate:
            model.precision = Precision(weights.facts["precision"])
            coder = estimate_coder(model, device, weights.facts.get("lmbda"))
        else:
            coder = file_coder(model, device)
        measured = _coded(coder, images, watch, f"hpcm {config.name} {weights.setting}")
        points.append(Point(weights.setting, measured, weights.path, weights.facts, kmac))
        watch = None
    name = f"hpcm {config.name}"
    codec = f"HPCM {config.name}, {parameters:,} parameters; {versions}, on {device.type}"
    return Curve(name, codec, ESTIMATED if estimate else FILES, _in_order(points))


def other_curve(codec: OtherCodec, images: ImageSet, watch: Watch | None = None) -> Curve:
    """Code the images with another codec at each of its settings."""
    points = []
    for setting in codec.settings:
        label = codec.label(setting)
        name = f"{labelled(codec.name, codec.description)} {label}"
        measured = _coded(other_coder(codec, setting), images, watch, name)
        points.append(Point(label, measured))
    return Curve(codec.name, codec.description, FILES, _in_order(points))


def labelled(name: str, description: str) -> str:
    """A codec's name; with the chroma format where its description says that colours are halved."""
    return f"{name} 4:2:0" if "4:2:0" in description else name


def _coded(coder: Coder, images: ImageSet, watch: Watch | None, name: str) -> list[Measured]:
    bar = partial(progress, description=name, unit="image")
    return code_images(coder, images, watch=watch and watch(name), progress=bar)


def _in_order(points: list[Point]) -> list[Point]:
    return sorted(points, key=lambda point: point.mean["bpp"])
