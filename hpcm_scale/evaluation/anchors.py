"""Curves to compare: those that ship with the package, of an evaluation, or of a file of points."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import RateCurve
from hpcm_scale.evaluation.points import csv_curve, json_curves, read_json, read_text
from hpcm_scale.files import read_file

FORMAT = "hpcm_scale evaluation 1"
"""Of evaluation.json."""


@dataclass(frozen=True)
class Stated:
    """BD-rates that a paper prints, with its own run of the anchor."""

    codec: str
    against: str
    source: str
    bd_rate: dict[str, float]
    """Percent, by name of the image set."""


@cache
def shipped() -> dict[str, RateCurve]:
    """The published curves by name (`kodak/vtm-18`), from `anchors.json` beside this file."""
    return {entry["name"]: _published(entry) for entry in _data()["curves"]}


def stated() -> list[Stated]:
    """The BD-rates that the HPCM papers print."""
    return [Stated(**entry) for entry in _data()["stated"]]


def find_curves(name: str) -> list[RateCurve]:
    """The shipped curve of that name, or else the curves in that file or folder (`read_curves`).

    Raises UserError if there is neither.
    """
    if name in shipped():
        return [shipped()[name]]
    if Path(name).exists():
        return read_curves(name)
    near = difflib.get_close_matches(name, shipped(), n=1)
    hint = f"did you mean {near[0]}?" if near else "--list shows the shipped ones."
    raise UserError(f"there is neither a file or folder nor a shipped curve {name}; {hint}")


def read_curves(path: str | Path) -> list[RateCurve]:
    """The curves of a result of `hpcm evaluate` (its folder, or evaluation.json), or of a file of points (`points`).

    Raises UserError if it cannot be read, or is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return _evaluated(path / "evaluation.json")
    text = read_text(path)
    value = read_json(text, path)
    if isinstance(value, dict) and "format" in value:
        if not str(value["format"]).startswith(FORMAT.rstrip("0123456789")):
            raise UserError(f"{path} holds no rate-distortion points, but {value['format']}; name an evaluation.json")
        return _evaluated(path)
    return [csv_curve(text, path)] if value is None else json_curves(value, path)


def _evaluated(file: Path) -> list[RateCurve]:
    try:
        result = json.loads(read_file(file))
        if result["format"] != FORMAT:
            raise ValueError
        return [_measured(entry, result["images"]["set"], str(file)) for entry in result["curves"]]
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); `hpcm evaluate … --out FOLDER` writes one") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{file} is no evaluation.json of this version; run `hpcm evaluate` again") from error


def _measured(entry: dict[str, Any], image_set: str | None, source: str) -> RateCurve:
    points = entry["points"]
    means = [point["mean"] for point in points]
    psnr, similarity = ([mean[key] for mean in means] for key in ("psnr", "ms_ssim"))
    return RateCurve(
        name=entry["name"],
        codec=entry["codec"],
        source=source,
        rate=entry["rate"],
        bpp=tuple(math.nan if mean["bpp"] is None else float(mean["bpp"]) for mean in means),
        psnr=None if None in psnr else tuple(map(float, psnr)),
        ms_ssim=None if None in similarity else tuple(map(float, similarity)),
        set=image_set,
        images=tuple((image["name"], image["width"], image["height"]) for image in points[0]["images"]),
    )


def _published(entry: dict[str, Any]) -> RateCurve:
    columns = {key: tuple(entry[key]) for key in ("bpp", "psnr", "ms_ssim") if key in entry}
    return RateCurve(
        name=entry["name"],
        codec=entry["codec"],
        source=entry["source"],
        rate="published",
        set=entry["set"],
        recommended=entry.get("recommended", False),
        **columns,
    )


@cache
def _data() -> dict[str, Any]:
    return json.loads(files("hpcm_scale.evaluation").joinpath("anchors.json").read_text(encoding="utf-8"))
