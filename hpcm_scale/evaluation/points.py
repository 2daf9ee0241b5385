"""Rate-distortion points: shipped curves, results of `hpcm evaluate`, and files in CompressAI's JSON or in CSV."""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hpcm_scale.errors import UserError, printable
from hpcm_scale.evaluation.bd_rate import RateCurve
from hpcm_scale.files import read_file

GIVEN = "given"
"""`RateCurve.rate` of a file of points."""
RATES = ("bpp", "rate", "bitrate", "ratebpp", "bitratebpp", "bppbitspx", "bitsperpixel")
PSNRS = ("psnrrgb", "psnr", "psnrdb", "psnrrgbdb")
SIMILARITIES = ("msssimrgb", "msssim", "msssimdb", "msssimrgbdb")
"""Names of columns, lower-case letters and digits, by priority. Luma-only measures (psnr-y) are not read."""
_MEAN = re.compile(r"[^a-z0-9]|^(mean|average|avg)|(mean|average|avg)[^a-z0-9]*$")
_NUMBER = re.compile(r"(^|[\s,;\"])\.?\d")
"""A cell that starts with a digit."""
_MOST = 1000.0
"""bpp or dB; larger values are refused."""
_MOST_SIMILARITY = 60.0
"""dB of MS-SSIM, likewise."""


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark. Raises UserError."""
    try:
        data = read_file(file)
        utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if utf_16 else "utf-8-sig")
    except OSError as error:
        raise UserError(
            "unreadable-points",
            "",
            f"cannot read {file} ({error.strerror}); check its permissions, or give another file",
        ) from error
    except UnicodeDecodeError:
        raise UserError(
            "points-not-text", "", f"{file} is not text in UTF-8; save it as UTF-8, or give another file"
        ) from None


def read_json(text: str, file: Path) -> Any:
    """The value of a JSON object or list; None for other text. Raises UserError."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            "damaged-json", "", f"{file} is not valid JSON ({error}); write it again, or give another file"
        ) from None


def json_curves(value: Any, file: Path) -> list[RateCurve]:
    """The curves in CompressAI's format; `value` is an object, or a list of them.

    `{"name": …, "description": …, "results": {"bpp": […], "psnr-rgb": […], "ms-ssim-rgb": […]}}`; only bpp and one
    quality are required. Points may also be objects: `[{"bpp": …, "psnr": …}, …]`, at the top or as results. Raises
    UserError.
    """
    value = _columns(value)
    entries = value if isinstance(value, list) else [value]
    columns: list[Any] = [
        _columns(entry.get("results", entry)) if isinstance(entry, dict) else None for entry in entries
    ]
    if not entries or not all(isinstance(each, dict) for each in columns):
        raise UserError(
            "no-points",
            "",
            f'{file} has no points; write {{"results": {{"bpp": […], "psnr": […]}}}}, or a list of such',
        )
    curves, times = [], Counter[str]()
    for entry, each in zip(entries, columns, strict=True):
        name, description = (" ".join(str(entry.get(key) or "").split()) for key in ("name", "description"))
        name = name or file.stem
        times[name] += 1
        listed = {key: values if isinstance(values, list) else [values] for key, values in each.items()}
        curves.append(_curve(listed, name if times[name] == 1 else f"{name} ({times[name]})", description, file))
    return curves


def csv_curve(text: str, file: Path) -> RateCurve:
    """The curve of a CSV text; its name is that of the file.

    The first line names the columns: bpp or rate, psnr, ms-ssim, in any case, with or without units. Other columns are
    ignored, as are lines that start with #, except the line of names. Separators are commas, semicolons, tabs or
    spaces; with the last three, decimals may have commas. Raises UserError.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError("empty-points", "", f"{file} is empty; give a file of rate-distortion points")
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
    if first and _NUMBER.search(lines[first]):
        first -= 1
    lines = [lines[first].lstrip("# "), *(line for line in lines[first + 1 :] if not line.startswith("#"))]
    separator = max(";\t,", key=lines[0].count)
    if separator not in lines[0]:
        lines, separator = [re.sub(r"\s+", ";", line) for line in lines], ";"
    if separator != ",":
        lines = [line.replace(",", ".") for line in lines]
    try:
        names, *rows = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    except csv.Error as error:
        raise UserError(
            "damaged-csv", "", f"{file} is not valid CSV ({error}); write it again, or give another file"
        ) from None
    columns: dict[str, list[str]] = {}
    for index, name in enumerate(names):
        columns.setdefault(name.strip(), [row[index].strip() if index < len(row) else "" for row in rows])
    return _curve(columns, file.stem, "", file)


def _columns(value: Any) -> Any:
    """Columns of a list of points, which are objects without lists and names; any other value unchanged."""

    def is_point(item: Any) -> bool:
        cells = item.items() if isinstance(item, dict) else [("name", "")]
        return not any(key == "name" or isinstance(cell, dict | list) for key, cell in cells)

    if not isinstance(value, list) or not value or not all(map(is_point, value)):
        return value
    return {key: [point.get(key) for point in value] for point in value for key in point}


def _curve(columns: dict[str, list[Any]], name: str, description: str, file: Path) -> RateCurve:
    """A curve of the points, sorted by rate, without duplicates."""
    known = {_MEAN.sub("", key.lower()): key for key in reversed(columns)}
    if {"image", "codec"} <= known.keys():
        raise UserError(
            "points-per-image", "", f"{file} has values per image, not means; give the evaluation.json beside it"
        )
    keys = [next((known[key] for key in named if key in known), None) for named in (RATES, PSNRS, SIMILARITIES)]
    rates, *qualities = [_numbers(columns[key], key, file, positive=key == keys[0]) if key else [] for key in keys]
    if not rates or not any(qualities):
        needed = "rates (bpp)" if not rates else "qualities (psnr or ms-ssim)"
        there = ", ".join(filter(None, columns)) or "nothing"
        raise UserError(
            "missing-column", "", f"{file} lacks {needed} of {name} and has {there}; add them, or rename the columns"
        )
    for key, values in zip(keys[1:], qualities, strict=True):
        if values and len(values) != len(rates):
            raise UserError(
                "uneven-columns", "", f"{file} has {len(rates)} rates of {name}, but {len(values)} {key}; complete them"
            )
    psnr, similarity = qualities
    similarity = similarity and _fractions(similarity, file)
    points = sorted({*zip(rates, psnr or rates, similarity or rates, strict=True)})
    bpp, psnrs, similarities = zip(*points, strict=True)
    return RateCurve(
        name=printable(name),
        codec=printable(description) or "not described",
        source=str(file),
        rate=GIVEN,
        bpp=bpp,
        psnr=psnrs if psnr else None,
        ms_ssim=similarities if similarity else None,
    )


def _numbers(values: list[Any], key: str, file: Path, *, positive: bool) -> list[float]:
    """A column as numbers; empty if all its cells are."""
    if all(value in (None, "") for value in values):
        return []
    numbers = []
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (0 <= number < _MOST) or (positive and not number):
            wrong = f"the value {value!r}" if value not in (None, "") else "an empty value"
            raise UserError("impossible-value", "", f"{key} in {file} has {wrong}; correct it, or omit the point")
        numbers.append(number)
    return numbers


def _fractions(values: Sequence[float], file: Path) -> list[float]:
    """MS-SSIM as fractions; values are dB if all are above 1."""
    if max(values) <= 1:
        return [*values]
    if min(values) > 1 and max(values) < _MOST_SIMILARITY:
        return [1 - 10 ** (-value / 10) for value in values]
    raise UserError(
        "mixed-ms-ssim",
        "",
        f"MS-SSIM in {file} ranges from {min(values):g} to {max(values):g}, neither fractions (all at most 1) "
        f"nor dB (all above 1 and below {_MOST_SIMILARITY:g}); use one of the two",
    )


# Curves by name or by path.


FORMAT = "hpcm_scale evaluation 1"
"""Format of evaluation.json."""


@dataclass(frozen=True)
class Stated:
    """BD-rates that a paper reports, against its own run of the anchor."""

    codec: str
    against: str
    source: str
    bd_rate: dict[str, float]
    """Percent, by name of the image set."""


@cache
def shipped() -> dict[str, RateCurve]:
    """The published curves by name (`kodak/vtm-18`), from `anchors.json`."""
    curves = {}
    for entry in _data()["curves"]:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        curves[entry["name"]] = RateCurve(rate="published", **fields)
    return curves


def stated() -> list[Stated]:
    """The BD-rates that the HPCM papers report."""
    return [Stated(**entry) for entry in _data()["stated"]]


def find_curves(name: str) -> list[RateCurve]:
    """The shipped curve of that name, or the curves in that file or folder (`read_curves`). Raises UserError."""
    if name in shipped():
        return [shipped()[name]]
    if Path(name).exists():
        return read_curves(name)
    near = difflib.get_close_matches(name, shipped(), n=1)
    hint = f"did you mean {near[0]}?" if near else "--list shows the shipped curves"
    raise UserError("unknown-curve", "", f"there is no file, folder or shipped curve {name}; {hint}")


def read_curves(path: str | Path) -> list[RateCurve]:
    """The curves of a result of `hpcm evaluate` (its folder, or evaluation.json), or of a file of points.

    Raises UserError for a file that cannot be read or is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return _evaluated(path / "evaluation.json")
    text = read_text(path)
    value = read_json(text, path)
    if isinstance(value, dict) and "format" in value:
        if not str(value["format"]).startswith(FORMAT.rstrip("0123456789")):
            raise UserError(
                "points-of-another-kind",
                "",
                f"{path} is of kind {value['format']} and has no rate-distortion points; give an evaluation.json",
            )
        return _evaluated(path)
    return [csv_curve(text, path)] if value is None else json_curves(value, path)


def _evaluated(file: Path) -> list[RateCurve]:
    try:
        result = json.loads(read_file(file))
        if result["format"] != FORMAT:
            raise ValueError
        return [_measured(entry, result["images"]["set"], str(file)) for entry in result["curves"]]
    except OSError as error:
        raise UserError(
            "unreadable-evaluation",
            "",
            f"cannot read {file} ({error.strerror}); `hpcm evaluate … --out FOLDER` writes one",
        ) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            "evaluation-of-another-version",
            "",
            f"{file} is not an evaluation.json of this version; run `hpcm evaluate` again",
        ) from error


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


def _data() -> dict[str, Any]:
    return json.loads(files("hpcm_scale.evaluation").joinpath("anchors.json").read_text(encoding="utf-8"))
