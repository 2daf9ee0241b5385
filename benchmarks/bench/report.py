"""Reports of benchmarks: tables on the terminal, JSON and Markdown files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from bench.timing import Quartiles
from hpcm_scale.files import write_json, write_text, writing
from hpcm_scale.formatting import markdown_table

WIDTH_OF_A_PIPE = 200


@dataclass(frozen=True)
class Table:
    """Rows of text below headings; the first column holds names, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]
    """Sentences below the table that explain the columns."""


@dataclass(frozen=True)
class Report:
    """Tables and numbers of one benchmark."""

    name: str
    """Name of the benchmark and of its files."""
    title: str
    machine: dict[str, Any]
    """See `machine.machine`."""
    tables: list[Table]
    results: dict[str, Any]
    """All numbers of all rounds, as plain JSON values."""
    figures: tuple[str, ...] = ()
    """Names of image files beside the report."""


def publish(report: Report, folder: Path | None) -> None:
    """Print the report, and write it to `folder` unless that is None. Raises UserError if it cannot be written."""
    show(report)
    if folder:
        written = [*write(report, folder), *(folder / name for name in report.figures)]
        print(f"\nwritten: {', '.join(map(str, written))}")


def show(report: Report) -> None:
    """Print tables, as wide as the terminal, and notes."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_OF_A_PIPE)
    console.print(report.title)
    console.print(measured_on(report.machine), soft_wrap=True)
    for table in report.tables:
        grid = RichTable(
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title=table.title or None, title_justify="left"
        )
        for index, heading in enumerate(table.headings):
            grid.add_column(heading, justify="right" if index else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*row)
        console.print()
        console.print(grid)
        for note in table.notes:
            console.print(note, soft_wrap=True)


def write(report: Report, folder: str | Path) -> list[Path]:
    """Write NAME.json and NAME.md into the folder and return their paths. Raises UserError if that fails."""
    paths = [Path(folder) / f"{report.name}{suffix}" for suffix in (".json", ".md")]
    content = {"benchmark": report.name, "machine": report.machine, **report.results}
    with writing(folder):
        write_json(paths[0], content)
        write_text(paths[1], markdown(report))
    return paths


def markdown(report: Report) -> str:
    """The report as Markdown."""
    date, command = report.machine["date"], report.machine["command"]
    parts = [f"# {report.title}", f"{date}. {measured_on(report.machine)}", f"    {command}"]
    for table in report.tables:
        parts += [f"## {table.title}"] if table.title else []
        parts += [markdown_table(table.headings, table.rows), *table.notes]
    parts += [f"![{Path(name).stem}]({name})" for name in report.figures]
    return "\n\n".join(parts) + "\n"


def measured_on(machine: dict[str, Any]) -> str:
    """Hardware and versions in one sentence."""
    flags = f" ({', '.join(machine['cpu_flags'])})" if machine["cpu_flags"] else ""
    gpu = f"{machine['device']}, beside it " if machine["device"] != "cpu" else ""
    packages = ", ".join(f"{name} {version}" for name, version in _versions(machine).items() if version)
    return (
        f"Measured on {gpu}{machine['cpu']}{flags}, {machine['cpu_threads']} hardware threads, "
        f"{machine['torch_threads']} in use by torch; {packages}."
    )


def _versions(machine: dict[str, Any]) -> dict[str, str | None]:
    packages = {name: machine["packages"].get(name) for name in ("hpcm_scale", "torch", "deepspeed")}
    git = machine["git"]
    commit = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else None
    return packages | {"Python": machine["python"], "commit": commit}


def with_quartiles(value: Quartiles | None, decimals: int, unit: str = "", factor: float = 1.0) -> str:
    """A median with its quartiles, such as "1.93× (1.90…1.95)"; a dash for None."""
    if value is None:
        return "–"
    median, low, high = (f"{factor * number:,.{decimals}f}" for number in value)
    return f"{median}{unit} ({low}…{high})"
