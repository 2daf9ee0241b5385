"""Rate-distortion points that others measured: CompressAI's JSON, or a CSV file with a header."""

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

from hpcm_scale.errors import UserError, shown
from hpcm_scale.evaluation.bd_rate import RateCurve
from hpcm_scale.files import read_file

GIVEN = "given"
"""`RateCurve.rate` of such points."""
RATES = ("bpp", "rate", "bitrate", "ratebpp", "bitratebpp", "bppbitspx", "bitsperpixel")
PSNRS = ("psnrrgb", "psnr", "psnrdb", "psnrrgbdb")
SIMILARITIES = ("msssimrgb", "msssim", "msssimdb", "msssimrgbdb")
"""Names of columns in small letters and digits, in the order in which they are looked for. What was measured on luma
alone (psnr-y) is another measure, and is not read."""
_MEAN = re.compile(r"[^a-z0-9]|^(mean|average|avg)|(mean|average|avg)[^a-z0-9]*$")
_NUMBER = re.compile(r"(^|[\s,;\"])\.?\d")
"""The first digit of a cell that begins with one."""
_BEYOND = 1000.0
"""More bpp, or dB, than anything has."""
_MOST = 60.0
"""dB of MS-SSIM, more than any lossy codec reaches."""


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, or of a UTF-16 one with a byte order mark. Raises UserError."""
    try:
        data = read_file(file)
        utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if utf_16 else "utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); mend that, or name another file") from error
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8 text; save it as UTF-8, or name another file") from None


def read_json(text: str, file: Path) -> Any:
    """The value of a JSON text that begins with a bracket; None for another text. Raises UserError."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no whole JSON ({error}); write it again, or name another file") from None


def json_curves(value: Any, file: Path) -> list[RateCurve]:
    """A curve of each object that is like those of CompressAI; `value` is one, or a list of them.

    `{"name": …, "description": …, "results": {"bpp": […], "psnr-rgb": […], "ms-ssim-rgb": […]}}`; all but bpp and one
    of the qualities may be missing. Points may also be listed one by one: `[{"bpp": …, "psnr": …}, …]`, alone or as
    results. Raises UserError.
    """
    value = _columns(value)
    entries = value if isinstance(value, list) else [value]
    columns = [_columns(entry.get("results", entry)) if isinstance(entry, dict) else None for entry in entries]
    if not entries or not all(isinstance(each, dict) for each in columns):
        raise UserError(f'{file} holds no points; write {{"results": {{"bpp": […], "psnr": […]}}}}, or a list of such')
    curves, times = [], Counter[str]()
    for entry, each in zip(entries, columns, strict=True):
        name, description = (" ".join(str(entry.get(key) or "").split()) for key in ("name", "description"))
        name = name or file.stem
        times[name] += 1
        listed = {key: values if isinstance(values, list) else [values] for key, values in each.items()}
        curves.append(_curve(listed, name if times[name] == 1 else f"{name} ({times[name]})", description, file))
    return curves


def csv_curve(text: str, file: Path) -> RateCurve:
    """The one curve of a CSV text, called as the file.

    Its first line names the columns: bpp or rate, psnr, ms-ssim, in capitals or not, with units or not; others are
    passed over, and so are lines that begin with #, unless that is the line of the names. Cells are separated by
    commas, semicolons, tabs or spaces; beside all but commas, decimal commas are read, too. Raises UserError.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty; name a file of rate-distortion points")
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
        raise UserError(f"{file} is no CSV ({error}); write it again, or name another file") from None
    columns: dict[str, list[str]] = {}
    for index, name in enumerate(names):
        columns.setdefault(name.strip(), [row[index].strip() if index < len(row) else "" for row in rows])
    return _curve(columns, file.stem, "", file)


def _columns(value: Any) -> Any:
    """Points that are listed one by one, objects without lists and names, as columns; anything else as it is."""

    def is_point(item: Any) -> bool:
        cells = item.items() if isinstance(item, dict) else [("name", "")]
        return not any(key == "name" or isinstance(cell, dict | list) for key, cell in cells)

    if not isinstance(value, list) or not value or not all(map(is_point, value)):
        return value
    return {key: [point.get(key) for point in value] for point in value for key in point}


def _curve(columns: dict[str, list[Any]], name: str, description: str, file: Path) -> RateCurve:
    """The points sorted by rate, each once."""
    known = {_MEAN.sub("", key.lower()): key for key in reversed(columns)}
    if {"image", "codec"} <= known.keys():
        raise UserError(f"{file} holds images, not means over them; name the evaluation.json beside it")
    keys = [next((known[key] for key in named if key in known), None) for named in (RATES, PSNRS, SIMILARITIES)]
    rates, *qualities = [key and _numbers(columns[key], key, file, positive=key == keys[0]) for key in keys]
    if not rates or not any(qualities):
        needed = "rates (bpp)" if not rates else "qualities (psnr or ms-ssim)"
        there = ", ".join(filter(None, columns)) or "nothing"
        raise UserError(f"{file} has no {needed} of {name}, but {there}; add them, or name the columns so")
    for key, values in zip(keys[1:], qualities, strict=True):
        if values and len(values) != len(rates):
            raise UserError(f"{file} has {len(rates)} rates of {name}, but {len(values)} {key}; complete them")
    psnr, similarity = qualities
    similarity = similarity and _fractions(similarity, file)
    points = sorted({*zip(rates, psnr or rates, similarity or rates, strict=True)})
    bpp, psnrs, similarities = zip(*points, strict=True)
    return RateCurve(
        name=shown(name),
        codec=shown(description) or "not described",
        source=str(file),
        rate=GIVEN,
        bpp=bpp,
        psnr=psnrs if psnr else None,
        ms_ssim=similarities if similarity else None,
    )


def _numbers(values: list[Any], key: str, file: Path, *, positive: bool) -> list[float]:
    """A column as numbers; none where nothing in it was measured."""
    if all(value in (None, "") for value in values):
        return []
    numbers = []
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (0 <= number < _BEYOND) or (positive and not number):
            told = f"has {value!r}" if value not in (None, "") else "lacks a value"
            raise UserError(f"{key} in {file} {told}, which cannot be; mend it, or leave out the point")
        numbers.append(number)
    return numbers


def _fractions(values: Sequence[float], file: Path) -> list[float]:
    """MS-SSIM as fractions: as it is where no value is above 1, from dB where all are."""
    if max(values) <= 1:
        return [*values]
    if min(values) > 1 and max(values) < _MOST:
        return [1 - 10 ** (-value / 10) for value in values]
    raise UserError(
        f"MS-SSIM in {file} goes from {min(values):g} to {max(values):g}, neither fractions (all at most 1) nor dB "
        f"(all above 1 and below {_MOST:g}); write one of them"
    )


# Curves to compare: those that ship with the package, of an evaluation, or of a file of points.


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
