"""Results of the campaign: a JSON file, and a Markdown page made from it."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from fault_campaign.elastic import START, Cell, ElasticCampaign
from fault_campaign.kills import FAULTS, MOMENTS, Kill, KillCampaign
from fault_campaign.soak import Soak, Window, flat, growth
from hpcm_scale.data.processes import available_cores
from hpcm_scale.files import write_json, write_text
from hpcm_scale.formatting import markdown_table

SAMPLES = 100
"""Samples of a soak that the JSON file keeps."""
_MOMENTS = {"step": "a step", "evaluation": "an evaluation", "checkpoint": "a checkpoint write", "export": "the export"}


def circumstances(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Date, machine, versions and command of a part of the campaign."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "accelerate")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round(seconds / 60, 1),
        "command": shlex.join(["python", "benchmarks/faults.py", *arguments]),
        "machine": f"{available_cores()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def kill_result(campaign: KillCampaign) -> tuple[dict[str, Any], bool]:
    """Results of a campaign of kills, and whether no data was lost."""
    kills, endings = campaign.kills, campaign.endings
    whole = all(ending.same_journal and ending.same_weights for ending in endings)
    rows = []
    for moment in MOMENTS:
        for fault in FAULTS:
            chosen = [kill for kill in kills if (kill.fault, kill.moment) == (fault, moment)]
            if chosen:
                rows.append([f"{fault}, during {_MOMENTS.get(moment, moment)}", *_row(chosen)])
    rows.append(["**all**", *_row(kills)])
    header = ["kill -9 of", "injected", "survived", "data lost", "steps repeated", "steps recomputed, at most"]
    header += ["s until all processes ended, at most", "s until the next step, median"]
    engines = [
        [
            engine,
            len(chosen := [ending for ending in endings if ending.engine == engine]),
            sum(ending.kills for ending in chosen),
            f"{sum(ending.same_journal for ending in chosen)} of {len(chosen)}",
            f"{sum(ending.same_weights for ending in chosen)} of {len(chosen)}",
        ]
        for engine in dict.fromkeys(ending.engine for ending in endings)
    ]
    shape = campaign.shape
    text = [
        f"Runs of `nano` on two processes, {shape.steps} steps each, a checkpoint every {shape.checkpoint_every} and "
        f"an evaluation every {shape.evaluate_every} steps. After each kill the same command was run again. "
        "Data lost: journal lines that are missing, or differ from the uninterrupted run in any digit; steps repeated: "
        "lines that occur twice.",
        table(header, rows),
        "Compared with the uninterrupted runs:",
        table(["engine", "runs", "kills", "identical journal", "identical weights"], engines),
    ]
    if litter := sorted({name for ending in endings for name in ending.litter}):
        text.append(f"Unfinished files that were not removed: {', '.join(litter)}.")
    failures = [f"- {kill.run}, {kill.fault}, {kill.moment}: {kill.failure}" for kill in kills if kill.failure]
    text += ["\n".join(failures)] if failures else []
    details = {"kills": [asdict(kill) for kill in kills], "runs": [asdict(ending) for ending in endings]}
    good = whole and all(kill.survived for kill in kills)
    return {"title": "Kills", "text": "\n\n".join(text), **details}, good


def elastic_result(campaign: ElasticCampaign) -> tuple[dict[str, Any], bool]:
    """Results of the transitions of processes and engines, and whether all losses equal the uninterrupted run's."""
    cells = campaign.cells
    of = {(cell.before, cell.after, cell.processes): cell for cell in cells}
    befores, afters = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("before", "after"))
    numbers = sorted({cell.processes for cell in cells} - {START})
    same = [[before, *(_shown(of.get((before, after, START))) for after in afters)] for before in befores]
    other = [
        [f"{before} → {after}", *(_shown(of.get((before, after, n))) for n in numbers)]
        for before in befores
        for after in afters
        if any((before, after, n) in of for n in numbers)
    ]
    done = [cell for cell in cells if cell.loss is not None]
    text = [
        f"Runs of `nano`, {campaign.first} steps on {START} processes with one engine, stopped, and {campaign.more} "
        "more with another engine or number of processes, by the same command. Values: the largest relative difference "
        "of `train/loss` in those steps from the uninterrupted run with the first engine on two processes. Steps, "
        "images, learning rates and PFLOPs are identical.",
        f"On {START} processes, from (rows) to (columns):",
        table(["", *afters], same),
    ]
    if other:
        text += [f"From {START} processes to", table(["", *map(str, numbers)], other)]
    if done:
        text.append(
            f"Over all {len(cells)}: `train/loss` {max(cell.loss for cell in done):.1e}, `train/grad_norm` "
            f"{max(cell.grad_norm for cell in done):.1e}, `eval/loss` {max(cell.evaluation for cell in done):.1e}."
        )
    good = all(cell.good for cell in cells)
    return {"title": "Elastic", "text": "\n\n".join(text), "cells": [asdict(cell) for cell in cells]}, good


def soak_result(soak: Soak) -> tuple[dict[str, Any], bool]:
    """Results of a soak, and whether the run survived without growing."""
    early = soak.window(min(600.0, soak.seconds / 3))
    longest, first, last = soak.longest_start()
    inside = soak.window(first + 120.0, start=longest), soak.window(last, start=longest)
    end = soak.window(soak.samples[-1].seconds)
    windows = {
        f"after {_minutes(early)} min": early,
        f"start {longest}, after {_minutes(inside[0])} min": inside[0],
        f"start {longest}, at its end, after {_minutes(inside[1])} min": inside[1],
        f"at the end, after {_minutes(end)} min (start {soak.starts})": end,
    }
    held = [
        [
            name,
            f"{window.total:.0f}",
            " + ".join(f"{value:.0f}" for value in window.ranks),
            f"{window.tree:.0f}",
            f"{window.files:.0f}",
            f"{window.processes:.0f}",
        ]
        for name, window in windows.items()
        if window
    ]
    faults = [
        [
            f"{fault.seconds / 60:.0f}: {fault.fault}",
            "yes" if fault.survived else "**no**",
            "" if fault.exit_code is None else fault.exit_code,
            "" if fault.seconds_to_end is None else f"{fault.seconds_to_end:.1f}",
            "" if fault.seconds_to_step is None else f"{fault.seconds_to_step:.1f}",
        ]
        for fault in soak.injected
    ]
    good = not soak.failures and all(fault.survived for fault in soak.injected)
    good = good and flat([early, end]) and flat(inside)
    survived = sum(fault.survived for fault in soak.injected)
    verdicts = [
        f"{len(soak.injected)} faults in {soak.seconds / 60:.0f} minutes, {survived} survived; {soak.starts} starts, "
        f"{soak.steps} steps, each once in the journal. Start {longest} ran for {(last - first) / 60:.0f} minutes.",
        f"Memory of the training processes: {_percent(growth(early, end))} from {_minutes(early)} minutes to the end; "
        f"{_percent(growth(*inside))} within start {longest}.",
        *(f"**{failure}**" for failure in soak.failures),
    ]
    text = [
        "A run of `nano` on two processes, with one corrupt sample.",
        " ".join(verdicts),
        table(
            [
                "medians of the last twelve samples",
                "MiB of the training processes",
                "each",
                "MiB of all processes",
                "open files",
                "processes",
            ],
            held,
        ),
        table(["minute: fault", "survived", "exit code", "s until the end", "s until the next step"], faults),
    ]
    failures = [f"- {fault.fault}: {' '.join(fault.failure.split())}" for fault in soak.injected if fault.failure]
    text += ["\n".join(failures)] if failures else []
    kept = soak.samples[:: max(1, len(soak.samples) // SAMPLES)]
    details = {"faults": [asdict(fault) for fault in soak.injected], "samples": [asdict(sample) for sample in kept]}
    return {"title": "Soak", "text": "\n\n".join(text), **details}, good


def _minutes(window: Window | None) -> str:
    return "?" if window is None else f"{window.seconds / 60:.0f}"


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:+.1f} %"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.failure or not cell.exact:
        return "**failed**" if cell.failure else "**other steps**"
    return f"{cell.loss:.0e}" if cell.good else f"**{cell.loss:.0e}**"


def _row(kills: Sequence[Kill]) -> list[Any]:
    waits = [kill.seconds_to_step for kill in kills if kill.seconds_to_step is not None]
    return [
        len(kills),
        sum(kill.survived for kill in kills),
        sum(kill.lost + kill.differing for kill in kills),
        sum(kill.repeated for kill in kills),
        max(kill.recomputed or 0 for kill in kills),
        f"{max(kill.seconds_to_end or 0 for kill in kills):.1f}",
        f"{median(waits):.1f}" if waits else "",
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; its cells may be numbers."""
    return markdown_table(header, [[*map(str, row)] for row in rows])


def write(out: Path, part: str, result: dict[str, Any]) -> Path:
    """Store one part's result in `out`.json beside those of other parts, and rewrite `out`.md from all.

    A result holds `title`, `text` (Markdown with tables), `circumstances` and further values.
    """
    file = out.with_suffix(".json")
    parts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    parts[part] = result
    write_json(file, parts)
    write_text(out.with_suffix(".md"), page(parts))
    return out.with_suffix(".md")


def page(parts: dict[str, Any]) -> str:
    """The Markdown page of all parts."""
    sections = ["# Fault campaign"]
    for result in parts.values():
        where = result["circumstances"]
        packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
        facts = (
            f"{where['date']}; {where['machine']}; Python {where['python']}, {packages}; {where['minutes']} minutes."
        )
        sections += [f"## {result['title']}", facts, f"    {where['command']}", result["text"]]
    return "\n\n".join(sections) + "\n"
