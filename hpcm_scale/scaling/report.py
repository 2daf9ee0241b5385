"""The results of a fit for people: the terminal summary and report.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hpcm_scale.formatting import (
    DASH,
    count,
    counted,
    decimal,
    escaped,
    markdown_table,
    percent,
    significant,
    terminal,
    terminal_table,
    with_error,
)
from hpcm_scale.scaling.analysis import COMPUTE_LAWS, COMPUTE_OPTIMAL, PARAMETER_LAWS, TITLES, Analysis
from hpcm_scale.scaling.diagnostics import HeldOut
from hpcm_scale.scaling.figures import FIGURES
from hpcm_scale.scaling.filters import TRAINING
from hpcm_scale.scaling.findings import AHEAD, caveats, expected, headline, loss, percent_1, summary
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.observations import LOSSES, Observation

REPORT = "report.md"
FACTORS = (2, AHEAD)
"""Multiples of the largest size (or compute) at which laws are evaluated."""
SYMBOLS = {"alpha": "α", "beta": "β", "kappa": "κ", "R": "R*"}


def report(analysis: Analysis, figures: Sequence[str]) -> str:
    """report.md, in Markdown; `figures` are the names of the figures beside it (keys of `figures.FIGURES`)."""
    sections = [
        f"# Scaling laws of {_sizes(analysis)}, λ = {analysis.lmbda:g}",
        " ".join(map(escaped, headline(analysis))),
        _caveats(analysis),
        "## Runs",
        _runs(analysis),
        "## Loss against compute",
        _figure("learning_curves", figures),
        _frontier(analysis),
        "## Laws",
        _laws(analysis),
        _figure("loss_against_parameters", figures),
        "### Predictions",
        _predictions(analysis),
        "### Compute-optimal split",
        _split(analysis),
        _figure("isoflop", figures),
        "## Diagnostics",
        _diagnostics(analysis),
        _figure("residuals", figures),
        "## Excluded",
        "\n".join(f"- {escaped(sentence)}." for sentence in analysis.excluded) or "Nothing.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def print_summary(analysis: Analysis) -> None:
    """Print runs, laws, headline, caveats, refused laws and excluded runs."""
    console = terminal()
    runs = _table(map(_run_cells, analysis.observations), ("run", "parameters", "pixels", "PFLOPs", "loss", "annealed"))
    console.print(terminal_table(*runs, title=f"{analysis.metric}, λ = {analysis.lmbda:g}"))
    for law in analysis.laws.values():
        cells = _law_cells(law, analysis)
        held = "" if cells["held out"] == DASH else f"; largest held out: {cells['held out']}"
        console.print(f"{cells['law']}: {cells['parameters ± standard errors']}{held}", soft_wrap=True)
    for sentence in summary(analysis):
        console.print(sentence, soft_wrap=True)
    for reason, names in _grouped((why, TITLES[name]) for name, why in sorted(analysis.refused.items())).items():
        console.print(f"Not fitted, {'; '.join(names)}: {reason}.", soft_wrap=True)
    for sentence in analysis.excluded:
        console.print(f"Excluded: {sentence}.", soft_wrap=True)


def _table(cells: Iterable[dict[str, str]], headings: Sequence[str]) -> tuple[Sequence[str], list[list[str]]]:
    """Headings and rows of a table with these columns."""
    return headings, [[row[heading] for heading in headings] for row in cells]


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Second members by their first."""
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _run_cells(point: Observation) -> dict[str, str]:
    return {
        "run": point.run,
        "model": point.model,
        "parameters": f"{point.parameters:,}",
        "pixels": count(point.pixels),
        "images": f"{point.images:,}",
        "PFLOPs": significant(point.pflops),
        "loss": f"{point.loss:.4f}",
        "bpp": decimal(point.bpp, 4),
        "PSNR (dB)": decimal(point.psnr, 2),
        "annealed": ("yes" if point.annealed else "no") + ("" if point.finished else ", unfinished"),
    }


def _law_cells(law: Law, analysis: Analysis) -> dict[str, str]:
    diagnostics = analysis.diagnostics.get(law.name)
    held = max((each.error for each in diagnostics.largest), key=abs) if diagnostics and diagnostics.largest else None
    return {
        "law": TITLES[law.name],
        "formula": law.formula,
        "trainings": str(law.points),
        "parameters ± standard errors": ", ".join(_parameter(law, name) for name in law.parameters),
        "deviation of log L": DASH if law.residual_deviation is None else f"{law.residual_deviation * 100:.2g} %",
        "r": decimal(law.r, 5),
        "held out": DASH if held is None else percent(held),
    }


def _parameter(law: Law, name: str) -> str:
    """ "α = 0.25 ± 0.03"; of a coefficient, which is positive, with a factor instead: "A = 24 ×÷ 1.4"."""
    value, error = law.parameters[name], (law.standard_errors or {}).get(name)
    if name in ("A", "B", "k") and error and value:
        factor = math.exp(min(error / value, 700))
        return f"{name} = {significant(value, 3)} ×÷ {significant(factor, 3)}"
    return f"{SYMBOLS.get(name, name)} = {with_error(value, error)}"


def _caveats(analysis: Analysis) -> str:
    found = caveats(analysis)
    return f"**Caveats:**\n\n{_bullets(found)}" if found else ""


def _sizes(analysis: Analysis) -> str:
    sizes = sorted({point.parameters for point in analysis.observations})
    if len(sizes) == 1:
        return f"one size ({count(sizes[0])})"
    return f"{len(sizes)} sizes from {count(sizes[0])} to {count(sizes[-1])} parameters"


def _runs(analysis: Analysis) -> str:
    cells = [_run_cells(point) for point in analysis.observations]
    headings, rows = _table(cells, list(cells[0]))
    kind = "smoothed training" if analysis.metric == TRAINING else "evaluation"
    note = (
        f"Loss: {kind} loss at the end of the run, {LOSSES[analysis.distortion]} (bits per pixel). Pixels: images × "
        "crop². PFLOPs: 1e15 floating-point operations of training: forward, backward, optimizer; "
        "a cooldown includes those of its constant-rate run. Annealed: the learning rate has decayed to a tenth of its "
        "peak or less."
    )
    return f"{markdown_table(headings, [[*map(escaped, row)] for row in rows], 2)}\n\n{note}"


def _frontier(analysis: Analysis) -> str:
    whole = analysis.frontier
    annealed = [point for point in whole if point.annealed]
    text = (
        f"The frontier has {counted(len(whole), 'point')} of {counted(len({point.run for point in whole}), 'run')}; "
        f"annealed: {counted(len(annealed), 'point')} of {counted(len({point.run for point in annealed}), 'run')}. "
        "Points of the same run are not independent."
    )
    if not annealed:
        return f"{text} A decay of the learning rate would lower it."
    headings = ["run", "parameters", "pixels", "PFLOPs", "loss"]
    rows = [
        [escaped(run), count(point.parameters), count(point.pixels), significant(point.pflops), f"{point.loss:.4f}"]
        for run, point in {point.run: point for point in annealed}.items()
    ]
    return f"{text} Last annealed point of each run:\n\n{markdown_table(headings, rows)}"


def _laws(analysis: Analysis) -> str:
    refused = _bullets(f"No {TITLES[name]}: {why}" for name, why in sorted(analysis.refused.items()))
    if not analysis.laws:
        return f"No law could be fitted.\n\n{refused}"
    cells = [_law_cells(law, analysis) for law in analysis.laws.values()]
    headings, rows = _table(cells, list(cells[0])[:-1])
    note = (
        "L: loss, N: parameters, D: training pixels, C: training compute in PFLOPs, E: irreducible loss. ×÷: factor of "
        "one standard error. Pearson's r proves nothing here: with an irreducible loss and without noise, five points "
        "have |r| above 0.99 while the power law overestimates the gain of ten times the size up to twofold."
    )
    data = _grouped((law.data, TITLES[law.name]) for law in analysis.laws.values())
    fitted = _bullets(f"{points} ({'; '.join(titles)})" for points, titles in data.items())
    warnings = _grouped((warning, TITLES[law.name]) for law in analysis.laws.values() for warning in law.warnings)
    warned = _bullets(f"{warning} ({'; '.join(titles)})" for warning, titles in warnings.items())
    table = markdown_table(headings, [[*map(escaped, row)] for row in rows], 2)
    parts = (table, note, f"Fitted to:\n\n{fitted}", warned and f"Warnings:\n\n{warned}", refused)
    return "\n\n".join(part for part in parts if part)


def _predictions(analysis: Analysis) -> str:
    level = f"{analysis.level * 100:g} %"
    rows = []
    for names, variable, at in ((PARAMETER_LAWS, "N", analysis.at_size), (COMPUTE_LAWS, "C", analysis.at_compute)):
        if names[0] not in analysis.laws:
            continue
        for factor in FACTORS:
            x = factor * analysis.laws[names[0]].observed[variable][1]
            where = f"{count(x)} parameters" if variable == "N" else f"{significant(x)} PFLOPs"
            rate = DASH
            if variable == "N" and (change := analysis.change_of_rate(analysis.loss_ratio(x))):
                rate = expected(change, analysis.level, percent_1)
            alone = [
                loss(analysis.laws[name].predict(x).value) if name in analysis.laws else DASH for name in names[::-1]
            ]
            rows.append([f"{factor} × {variable}", where, expected(at(x), analysis.level), *alone, rate])
    if not rows:
        return "There is no law."
    headings = ["largest", "at", f"loss ({level})", "with E", "E = 0", f"bitrate ({level})"]
    note = (
        "Prediction intervals of one new training with the same recipe (Student's t): the value and the upper bound "
        "are those of the law with irreducible loss, the lower bound is the greater one of both laws. They include the "
        "deviation of these runs, but not a change of the law beyond them. Bitrate: (L₂/L₁)^(L₁/R₁) − 1 at fixed λ "
        "and equal quality. Every line is an extrapolation."
    )
    return f"{markdown_table(headings, rows, 2)}\n\n{note}"


def _split(analysis: Analysis) -> str:
    law = analysis.laws.get(COMPUTE_OPTIMAL)
    if not isinstance(law, ComputeOptimal):
        return f"Unknown: {analysis.refused[COMPUTE_OPTIMAL]}."
    cost = f"{significant(law.parameters['k'], 3)}·N^{significant(law.parameters['kappa'], 3)}"
    rows = []
    for factor in (1, *FACTORS):
        pflops = factor * law.observed["C"][1]
        size, data = (
            expected(value, analysis.level, count)
            + ("" if law.observed[name][0] <= value.value <= law.observed[name][1] else ", extrapolated")
            for name, value in zip("ND", law.optimum_intervals(pflops, analysis.level), strict=True)
        )
        ahead = expected(law.predict(pflops, analysis.level), analysis.level)
        rows.append([significant(pflops), size, data, ahead])
    table = markdown_table(["PFLOPs", "N*", "D* (pixels)", "predicted loss"], rows, 0)
    a, b = (
        expected(each, analysis.level, lambda value: f"{value:.3f}") for each in law.growth_intervals(analysis.level)
    )
    return (
        f"A training pixel costs {cost} FLOP in these runs. With L(N, D), N* grows as C^a with a = {a}, and D* as C^b "
        f"with b = {b}.\n\n{table}"
    )


def _diagnostics(analysis: Analysis) -> str:
    rows, notes = [], []
    for name, found in analysis.diagnostics.items():
        rows.append([TITLES[name], _errors(found.leave_one_out), _errors(found.largest)])
        if found.largest_refused:
            notes.append(f"{TITLES[name]}, without the largest: {found.largest_refused}")
    if not rows:
        return "There is no law."
    table = markdown_table(["law", "each run held out", "the largest held out"], rows, 3)
    note = (
        "Error of the law at trainings that were held out of the fit (predicted / observed − 1), and how many are "
        f"inside its {analysis.level * 100:g} % interval."
    )
    return "\n\n".join(part for part in (table, note, _bullets(notes)) if part)


def _errors(held: Sequence[HeldOut]) -> str:
    if not held:
        return DASH
    errors = sorted((each.error for each in held), key=abs)
    judged = [each for each in held if each.inside is not None]
    inside = f", {sum(bool(each.inside) for each in judged)} of {len(judged)} inside" if judged else ", no interval"
    if len(errors) == 1:
        return f"{percent(errors[0])}{inside}"
    mean = sum(map(abs, errors)) / len(errors)
    return f"mean {mean * 100:.2f} %, worst {percent(errors[-1])}{inside}"


def _figure(name: str, figures: Sequence[str]) -> str:
    if name not in figures:
        return ""
    caption = FIGURES[name].caption
    return f"![{caption.split('.')[0]}.]({name}.png)\n\n*{caption}*"


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(text[0].upper() + text[1:])}." for text in sentences)
