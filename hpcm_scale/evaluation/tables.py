"""Reports of an evaluation: evaluation.json, images.csv, evaluation.md and the terminal."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hpcm_scale import files
from hpcm_scale.evaluation.bd_rate import RateCurve
from hpcm_scale.evaluation.curves import ESTIMATED, FILES, Curve, Point, Results
from hpcm_scale.evaluation.equal_psnr import equal_psnr
from hpcm_scale.evaluation.points import FORMAT
from hpcm_scale.formatting import code, decimal, escaped
from hpcm_scale.formatting import markdown_table as table_of


def write_json(results: Results, path: str | Path) -> None:
    """Write evaluation.json, which `hpcm bd-rate` reads; numbers that are not finite are null."""
    keys = ("name", "codec", "source", "rate", "set", "bpp", "psnr", "ms_ssim")
    given = {"given": [{key: getattr(curve, key) for key in keys} for curve in results.given]} if results.given else {}
    curves = [curve_to_dict(curve) for curve in results.curves]
    images = images_to_dict(results)
    files.write_json(path, {"format": FORMAT, "images": images, "curves": curves, **given, "machine": results.system})


def images_to_dict(results: Results) -> dict[str, Any]:
    """The set of images, as JSON values."""
    return {"folder": results.folder, "set": results.set_name, "count": results.count}


def curve_to_dict(curve: Curve) -> dict[str, Any]:
    """A curve as JSON values."""
    points = [point_to_dict(point) for point in curve.points]
    return {"name": curve.name, "codec": curve.codec, "rate": curve.rate, "points": points}


def point_to_dict(point: Point) -> dict[str, Any]:
    """A point as JSON values."""
    model = {"weights": point.weights, "facts": point.facts, "kmac_per_pixel": point.kmac_per_pixel}
    return {
        "setting": point.setting,
        **(model if point.weights else {}),
        "mean": point.mean,
        "images": [asdict(image) for image in point.images],
    }


COLUMNS = {
    "width": "width (px)",
    "height": "height (px)",
    "bits": "bits",
    "bpp": "bpp (bits/px)",
    "psnr": "PSNR (dB)",
    "ms_ssim": "MS-SSIM",
    "ms_ssim_db": "MS-SSIM (dB)",
    "encode_seconds": "encode (s)",
    "decode_seconds": "decode (s)",
    "loss": "loss",
    "bpp_y": "bpp of y",
    "bpp_z": "bpp of z",
    "mse": "MSE (values in [0, 1])",
}
"""Headings of the measurements of an image; the last four are of estimates only."""

HOW = (
    "Means are over images, with equal weights: mean PSNR is the mean of the images' PSNRs. PSNR is over the three RGB "
    "channels, on pixels rounded to 8 bits. MS-SSIM is on the same pixels, in float64, averaged over channels; in dB "
    "it is −10·log10(1 − MS-SSIM), in the table of means that of the mean MS-SSIM. bpp counts image pixels, without "
    "padding. Transparent images are composited over white before coding."
)
RATES = {
    FILES: "Rates are those of real files, headers included, and every measured image was decoded from its file.",
    ESTIMATED: "Rates of hpcm are estimated from the model's likelihoods, without a file.",
}
TIMES = (
    "Seconds are wall-clock time per image from pixels to bytes and back, in memory; they compare only between codecs "
    "on the same processor."
)


COSTS = (
    "kMAC/px: thousands of multiply-accumulates per pixel of the forward pass at 256×256. loss: λ·255²·MSE + bpp, or "
    "λ·(1 − MS-SSIM) + bpp of weights trained for MS-SSIM; for estimates only."
)
EQUAL_PSNR = (
    "Bits relative to those of a baseline at the same PSNR (negative: fewer), interpolated on its curve of the same "
    "image, or of means: log rate over PSNR, by pchip. –: outside its curve."
)
WORDS = ("codec", "setting", "image", "metric")
MEASURES = {
    "loss": ("loss", 4),
    "bpp": ("bpp", 4),
    "PSNR (dB)": ("psnr", 2),
    "MS-SSIM": ("ms_ssim", 4),
    "MS-SSIM (dB)": ("ms_ssim_db", 2),
    "encode (s)": ("encode_seconds", 3),
    "decode (s)": ("decode_seconds", 3),
}
"""Measurement and decimals of each heading of the tables."""


def csv_table(results: Results) -> str:
    """images.csv: one row per image and point, without empty columns."""
    rows = [
        {"codec": curve.name, "rate": curve.rate, "setting": point.setting, "image": image.name, **asdict(image)}
        for curve, point in results.points()
        for image in point.images
    ]
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    first = ["codec", "rate", "setting", "image"]
    headings = [*first, *(COLUMNS[key] for key in keys)]
    return csv_text([headings, *([row.get(key) for key in [*first, *keys]] for row in rows)])


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV."""
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def markdown(results: Results) -> str:
    """evaluation.md: methods, a table of means and a table of images."""
    rates = [RATES[rate] for rate in dict.fromkeys(curve.rate for curve in results.curves)]
    checked = f"checked to be the set `{results.set_name}`" if results.set_name else "not checked to be a known set"
    compared = equal_psnr_rows(results)
    lines = [
        f"# {escaped(results.title)}",
        f"Folder {code(results.folder)} ({checked}).",
        " ".join([*rates, HOW, *(TIMES for rate in rates if rate == RATES[FILES])]),
        "## Means",
        markdown_table(mean_rows(results)),
        COSTS,
        *(["## Bits at equal PSNR", EQUAL_PSNR, markdown_table(compared)] if compared else ()),
        "## Codecs",
        "\n".join([*(described(each.label, each.codec) for each in results.curves), *map(_given, results.given)]),
        measured_on(results.system),
        "## Images",
        markdown_table(image_rows(results)),
    ]
    return "\n\n".join(lines) + "\n"


def described(label: str, codec: str) -> str:
    """A line of Markdown about a codec."""
    return f"- **{escaped(label)}**: {escaped(codec)}"


def _given(curve: RateCurve) -> str:
    codec = f"{curve.codec}; {curve.rate} in {curve.source}, not measured here; image set {curve.set or 'unknown'}"
    return described(curve.label, codec)


def console_table(results: Results) -> Table:
    """A table for 80 columns: the images of a single point, or else the means of all points."""
    rows, caption = mean_rows(results), None
    ends = {row["codec"]: i for i, row in enumerate(rows)}.values()
    if len(rows) == 1:
        (mean,), ((curve, point),) = rows, results.points()
        rows = [*image_rows(results), mean | {"image": "mean"}]
        ends = (len(rows) - 2,)
        caption = f"{curve.name}, {point.setting}\n{mean['kMAC/px']} kMAC/px, rate {curve.rate}"
    in_caption = ("codec", "setting", "kMAC/px") if caption else ()
    headings = [heading for heading in _filled(rows) if heading not in (*in_caption, "MS-SSIM")]
    return narrow_table(rows, headings, title=results.title, caption=caption, ends=ends)


def narrow_table(
    rows: Sequence[dict[str, str]],
    headings: Sequence[str],
    *,
    title: str,
    caption: str | None = None,
    ends: Collection[int] = (),
) -> Table:
    """A table for a narrow terminal; a rule follows the rows numbered in `ends`."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, caption=caption)
    for heading in headings:
        justify = "left" if heading in WORDS else "right"
        table.add_column(heading.replace(" (", "\n("), justify=justify, overflow="fold")
    for i, row in enumerate(rows):
        table.add_row(*(row.get(heading, "") for heading in headings), end_section=i in ends)
    return table


def mean_rows(results: Results) -> list[dict[str, str]]:
    """One row per point, by headings; measured points first, then those of others."""
    rows = [
        {"codec": curve.label, "setting": point.setting, **_measures(point.mean)}
        | {"kMAC/px": "–" if point.kmac_per_pixel is None else f"{point.kmac_per_pixel:,.1f}"}
        for curve, point in results.points()
    ]
    for curve in results.given:
        columns = {"bpp": curve.bpp, "psnr": curve.psnr, "ms_ssim": curve.ms_ssim}
        columns["ms_ssim_db"] = curve.ms_ssim and curve.quality("ms-ssim")
        for index in range(len(curve.bpp)):
            values = {key: values[index] for key, values in columns.items() if values}
            rows.append({"codec": curve.label, "setting": curve.rate, **_measures(values), "kMAC/px": "–"})
    return rows


def image_rows(results: Results) -> list[dict[str, str]]:
    """One row per point and image, by headings."""
    return [
        {"codec": curve.label, "setting": point.setting, "image": image.name}
        | {"size": f"{image.width}×{image.height}", **_measures(asdict(image))}
        for curve, point in results.points()
        for image in point.images
    ]


def equal_psnr_rows(results: Results) -> list[dict[str, str]]:
    """One row per point of a model and image, and one of its means, by headings; none without a comparison."""
    compared = [*equal_psnr(results)]
    if all(value is None for row in compared for value in row.relative.values()):
        return []
    return [
        {"codec": row.curve.label, "setting": row.point.setting, "image": row.image}
        | _measures({"bpp": row.bpp, "psnr": row.psnr})
        | {label: "–" if value is None else f"{value:+.1%}" for label, value in row.relative.items()}
        for row in compared
    ]


def _measures(values: dict[str, Any]) -> dict[str, str]:
    """Formatted measurements by heading; "–" if missing."""
    return {heading: decimal(values.get(key), digits) for heading, (key, digits) in MEASURES.items()}


def _filled(rows: Sequence[dict[str, str]]) -> list[str]:
    """The headings of columns that are not empty."""
    return [heading for heading in rows[0] if any(row.get(heading, "–") != "–" for row in rows)]


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table without empty columns; cells are plain text."""
    headings = _filled(rows)
    cells = [[escaped(row[heading]) for heading in headings] for row in rows]
    return table_of([*map(escaped, headings)], cells, words=sum(heading in WORDS for heading in headings))


def measured_on(system: dict[str, Any]) -> str:
    """One sentence about hardware and versions."""
    packages = ", ".join(f"{name} {version}" for name, version in system["packages"].items())
    gpus = "".join(f", {name}" for name in system["gpus"])
    return f"Measured on {system['cpu']}, {system['torch_threads']} thread(s) of torch{gpus}; {packages}."
