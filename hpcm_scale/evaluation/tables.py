"""Results of an evaluation as files and as tables."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hpcm_scale import __version__, files
from hpcm_scale.errors import shown
from hpcm_scale.evaluation.bd_rate import RateCurve
from hpcm_scale.evaluation.curves import ESTIMATED, FILES, Curve, Point
from hpcm_scale.evaluation.points import FORMAT
from hpcm_scale.formatting import code, escaped
from hpcm_scale.formatting import markdown_table as table_of
from hpcm_scale.tracking.environment import environment

# The results of an evaluation, and evaluation.json, which holds all of them.


PACKAGES = ("torch", "numpy", "pillow", "pytorch-msssim")
"""What the measures depend on; the codecs name their own."""


@dataclass(frozen=True)
class Results:
    """Curves over one set of images."""

    folder: str
    set_name: str | None
    """Of the known set that the folder was found to be."""
    count: int
    """Of images."""
    curves: list[Curve]
    machine: dict[str, Any]
    """Versions and hardware (`machine`)."""
    given: tuple[RateCurve, ...] = ()
    """Points that others measured, to be shown beside the curves."""

    @property
    def title(self) -> str:
        """Set, or folder, and the number of images."""
        return f"{self.set_name or shown(Path(self.folder).resolve().name)}, {self.count} image{'s' * (self.count > 1)}"

    def points(self) -> Iterable[tuple[Curve, Point]]:
        """All points, curve after curve."""
        return ((curve, point) for curve in self.curves for point in curve.points)


def machine() -> dict[str, Any]:
    """Versions and hardware (`tracking.environment`), and how many threads torch uses."""
    packages = {"hpcm_scale": __version__} | {name: version(name) for name in PACKAGES}
    return environment() | {"packages": packages, "torch_threads": torch.get_num_threads()}


def write_json(results: Results, path: str | Path) -> None:
    """Write evaluation.json, which `hpcm bd-rate` reads; what is not finite is null."""
    files.write_json(path, _to_dict(results))


def _to_dict(results: Results) -> dict[str, Any]:
    images = {"folder": results.folder, "set": results.set_name, "count": results.count}
    curves = [
        {
            "name": curve.name,
            "codec": curve.codec,
            "rate": curve.rate,
            "points": [_point_to_dict(point) for point in curve.points],
        }
        for curve in results.curves
    ]
    given = {"given": [_given_to_dict(curve) for curve in results.given]} if results.given else {}
    return {"format": FORMAT, "images": images, "curves": curves, **given, "machine": results.machine}


def _given_to_dict(curve: RateCurve) -> dict[str, Any]:
    keys = ("name", "codec", "source", "rate", "set", "bpp", "psnr", "ms_ssim")
    return {key: getattr(curve, key) for key in keys}


def _point_to_dict(point: Point) -> dict[str, Any]:
    ours = {"weights": point.weights, "facts": point.facts, "kmac_per_pixel": point.kmac_per_pixel}
    return {
        "setting": point.setting,
        **(ours if point.weights else {}),
        "mean": point.mean,
        "images": [asdict(image) for image in point.images],
    }


# An evaluation as tables for people: images.csv and evaluation.md.


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
"""Headings of what is measured of an image; the last four are there for estimates only."""

HOW = (
    "Every mean is taken over images, each counting the same whatever its size: mean PSNR is the mean of the images' "
    "PSNRs, not the PSNR of the mean error. PSNR is that of all three RGB channels together, on pixels rounded to "
    "8 bits. MS-SSIM is on the same pixels, in float64, its channels averaged; in dB it is −10·log10(1 − MS-SSIM), "
    "that of the mean MS-SSIM in the table of means. bpp counts the image's own pixels. Transparent images are laid "
    "over white before they are coded."
)
RATES = {
    FILES: "Rates are those of real files, headers included: each image was coded to bytes, and what was measured "
    "was decoded from these bytes alone.",
    ESTIMATED: "Rates of hpcm are estimated: the bits that the model's likelihoods promise, without a file.",
}
TIMES = (
    "Seconds are wall-clock time per image from pixels to bytes and back, both in memory; comparable only between "
    "codecs that used the same processor."
)


COSTS = (
    "kMAC/px: thousands of multiply-accumulates per pixel of the model's forward pass at 256×256. "
    "loss: λ·255²·MSE + bpp, or λ·(1 − MS-SSIM) + bpp of weights trained for MS-SSIM, as in training; known for "
    "estimates only."
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
"""Headings in tables, the measure below each, and its decimals."""


def csv_table(results: Results) -> str:
    """images.csv: one row per image and point, columns that hold nothing left out."""
    rows = [
        {"codec": curve.name, "rate": curve.rate, "setting": point.setting, "image": image.name, **asdict(image)}
        for curve, point in results.points()
        for image in point.images
    ]
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    first = ["codec", "rate", "setting", "image"]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*first, *(COLUMNS[key] for key in keys)])
    writer.writerows([row.get(key) for key in [*first, *keys]] for row in rows)
    return text.getvalue()


def markdown(results: Results) -> str:
    """evaluation.md: how it was measured, a table of means, a table of images."""
    rates = [RATES[rate] for rate in dict.fromkeys(curve.rate for curve in results.curves)]
    known = f"checked to be the set `{results.set_name}`" if results.set_name else "not checked to be a known set"
    lines = [
        f"# {escaped(results.title)}",
        f"Folder {code(results.folder)} ({known}).",
        " ".join([*rates, HOW, *(TIMES for rate in rates if rate == RATES[FILES])]),
        "## Means",
        markdown_table(mean_rows(results)),
        COSTS,
        "## Codecs",
        "\n".join([*map(_codec, results.curves), *map(_given, results.given)]),
        measured_on(results.machine),
        "## Images",
        markdown_table(image_rows(results)),
    ]
    return "\n\n".join(lines) + "\n"


def _codec(curve: Curve) -> str:
    return f"- **{escaped(curve.label)}**: {escaped(curve.codec)}"


def _given(curve: RateCurve) -> str:
    told = f"{curve.codec}; {curve.rate} in {curve.source}, not measured here; image set {curve.set or 'not known'}"
    return f"- **{escaped(curve.label)}**: {escaped(told)}"


def console_table(results: Results) -> Table:
    """For a terminal of 80 columns: the images where there is one codec at one setting, else the means of each."""
    rows, caption = mean_rows(results), None
    ends = {row["codec"]: i for i, row in enumerate(rows)}.values()
    if len(rows) == 1:
        (mean,), ((curve, point),) = rows, results.points()
        rows = [*image_rows(results), mean | {"image": "mean"}]
        ends = (len(rows) - 2,)
        caption = f"{curve.name}, {point.setting}\n{mean['kMAC/px']} kMAC/px, rate {curve.rate}"
    alone = ("codec", "setting", "kMAC/px") if caption else ()
    headings = [heading for heading in _filled(rows) if heading not in (*alone, "MS-SSIM")]
    return narrow_table(rows, headings, title=results.title, caption=caption, ends=ends)


def narrow_table(
    rows: Sequence[dict[str, str]],
    headings: Sequence[str],
    *,
    title: str,
    caption: str | None = None,
    ends: Collection[int] = (),
) -> Table:
    """Rows by headings for a narrow terminal; a rule follows the rows numbered in `ends`."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, caption=caption)
    for heading in headings:
        justify = "left" if heading in WORDS else "right"
        table.add_column(heading.replace(" (", "\n("), justify=justify, overflow="fold")
    for i, row in enumerate(rows):
        table.add_row(*(row.get(heading, "") for heading in headings), end_section=i in ends)
    return table


def mean_rows(results: Results) -> list[dict[str, str]]:
    """One row per point, by headings: ours, then those that are given."""
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


def _measures(values: dict[str, Any]) -> dict[str, str]:
    """What is shown of an image or of a mean; "–" where there is nothing."""
    numbers = {heading: (values.get(key), digits) for heading, (key, digits) in MEASURES.items()}
    return {heading: "–" if value is None else f"{value:.{digits}f}" for heading, (value, digits) in numbers.items()}


def _filled(rows: Sequence[dict[str, str]]) -> list[str]:
    """The headings under which any row has something."""
    return [heading for heading in rows[0] if any(row.get(heading, "–") != "–" for row in rows)]


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Rows by headings, shown as they are; columns that hold nothing are left out."""
    headings = _filled(rows)
    cells = [[escaped(row[heading]) for heading in headings] for row in rows]
    return table_of([*map(escaped, headings)], cells, words=sum(heading in WORDS for heading in headings))


def measured_on(machine: dict[str, Any]) -> str:
    """One sentence about hardware and versions."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    gpus = "".join(f", {name}" for name in machine["gpus"])
    return f"Measured on {machine['cpu']}, {machine['torch_threads']} thread(s) of torch{gpus}; {packages}."
