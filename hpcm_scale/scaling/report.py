"""The results of a fit for people: report.md and the terminal summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hpcm_scale.formatting import (
    DASH,
    count,
    decimal,
    escaped,
    markdown_table,
    percent,
    significant,
    terminal,
    terminal_table,
    with_error,
)
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.diagnostics import Bootstrap, HeldOut
from hpcm_scale.scaling.figures import FIGURES
from hpcm_scale.scaling.filters import TRAINING
from hpcm_scale.scaling.findings import (
    SOURCES,
    TITLES,
    caveats,
    expected,
    headline,
    improvement,
    no_optimum,
    parameter_law,
    summary,
)
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.observations import LOSSES, Observation

REPORT = "report.md"
FACTORS = (2, 10)
"""Multiples of the largest size (or compute) at which laws are evaluated."""
SYMBOLS = {"alpha": "α", "beta": "β", "kappa": "κ"}
NOTE_ON_R = (
    "Pearson's r proves nothing here: for curves with irreducible loss and without noise, five points have |r| above "
    "0.99 while the power law overestimates the gain of ten times the size up to twofold. AICc measures whether "
    "the additional parameter E improves the fit enough."
)


def report(analysis: Analysis, figures: Sequence[str]) -> str:
    """report.md, in Markdown; `figures` are the names of the figures beside it (keys of `figures.FIGURES`)."""
    sections = [
        f"# Scaling laws of {_sizes(analysis)}, λ = {analysis.lmbda:g}",
        _opening(analysis),
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
        "## Warnings",
        _warnings(analysis),
        "## Excluded",
        "\n".join(f"- {escaped(sentence)}." for sentence in analysis.excluded) or "Nothing.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def print_summary(analysis: Analysis) -> None:
    """Print runs, laws, headline, caveats, refused laws and excluded runs."""
    console = terminal()
    runs = _table(map(_run_cells, analysis.observations), ("run", "parameters", "pixels", "PFLOPs", "loss", "annealed"))
    console.print(terminal_table(*runs, title=f"{analysis.metric}, λ = {analysis.lmbda:g}"))
    if analysis.laws:
        ahead = f"10 × ({analysis.level * 100:g} %)"
        cells = [_law_cells(law, analysis) for law in analysis.laws.values()]
        console.print(terminal_table(*_table(cells, ("law", "AICc", "held out", ahead))))
        console.print(
            "← preferred. Held out: error at the largest size or compute of the law fitted without it. 10 ×: loss at "
            "ten times the largest.",
            soft_wrap=True,
        )
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
    errors = law.standard_errors or {}
    parameters = [
        f"{SYMBOLS.get(name, name)} = {with_error(value, errors.get(name))}" for name, value in law.parameters.items()
    ]
    diagnostics = analysis.diagnostics.get(law.name)
    held = max((each.error for each in diagnostics.largest), key=abs) if diagnostics and diagnostics.largest else None
    ahead = DASH
    if len(law.variables) == 1:
        ahead = expected(law.predict(10 * law.observed[law.variables[0]][1], analysis.level), analysis.level)
    return {
        "law": TITLES[law.name] + (" ←" if law.name in analysis.preferred.values() else ""),
        "formula": law.formula,
        "trainings": str(law.points),
        "parameters ± standard errors": ", ".join(parameters),
        "deviation of log L": DASH if law.residual_deviation is None else f"{law.residual_deviation * 100:.2g} %",
        "AICc": decimal(law.aicc, 2),
        "r": decimal(law.r, 5),
        "held out": DASH if held is None else percent(held),
        f"10 × ({analysis.level * 100:g} %)": ahead,
    }


def _opening(analysis: Analysis) -> str:
    if parameter_law(analysis) is None:
        return f"**{headline(analysis)}**"
    found = caveats(analysis)
    return f"**Caveats:**\n{_bullets(found)}\n\n{headline(analysis)}" if found else headline(analysis)


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
    annealed, whole = analysis.frontier_annealed, analysis.frontier
    text = (
        f"The whole frontier has {len(whole)} points of {len({point.run for point in whole})} runs, the annealed "
        f"frontier {len(annealed)} of {len({point.run for point in annealed})}. Points of the same run are not "
        "independent."
    )
    if not annealed:
        return f"{text} No run was annealed: a decay of the learning rate would lower the frontier."
    headings = ["run", "parameters", "pixels", "PFLOPs", "loss"]
    rows = [
        [escaped(run), count(point.parameters), count(point.pixels), significant(point.pflops), f"{point.loss:.4f}"]
        for run, point in {point.run: point for point in annealed}.items()
    ]
    return f"{text} Last point of each run on the annealed frontier:\n\n{markdown_table(headings, rows)}"


def _laws(analysis: Analysis) -> str:
    refused = _bullets(f"No {TITLES[name]}: {why}" for name, why in sorted(analysis.refused.items()))
    if not analysis.laws:
        return f"No law could be fitted.\n\n{refused}"
    cells = [_law_cells(law, analysis) for law in analysis.laws.values()]
    headings, rows = _table(cells, list(cells[0])[:-2])
    note = (
        "L: loss, N: parameters, D: training pixels, C: training compute in PFLOPs, E: irreducible loss. ← preferred. "
        "Fitted to:"
    )
    data = _grouped((law.data, TITLES[law.name]) for law in analysis.laws.values())
    fitted = _bullets(f"{points} ({'; '.join(titles)})" for points, titles in data.items())
    reasons = _bullets(f"Law of {SOURCES[of]}: {each.reason}" for of, each in analysis.comparisons.items())
    table = markdown_table(headings, [[*map(escaped, row)] for row in rows], 2)
    return "\n\n".join(
        part for part in (table, note, fitted, reasons and f"Comparison:\n\n{reasons}", NOTE_ON_R, refused) if part
    )


def _predictions(analysis: Analysis) -> str:
    level = f"{analysis.level * 100:g} %"
    rows = []
    for law in analysis.laws.values():
        if len(law.variables) != 1:
            continue
        (variable,) = law.variables
        for factor in FACTORS:
            x = factor * law.observed[variable][1]
            change, low, high = improvement(law, factor, variable, analysis.level)
            where = f"{count(x)} parameters" if variable == "N" else f"{significant(x)} PFLOPs"
            gain = percent(change) if math.isnan(low) else f"{percent(change)} ({percent(low)}…{percent(high)})"
            ahead = expected(law.predict(x, analysis.level), analysis.level)
            rows.append([TITLES[law.name], f"{factor} ×", where, ahead, gain])
    if not rows:
        return "There is no law."
    table = markdown_table(["law", "largest", "at", f"loss ({level})", f"change ({level})"], rows, 3)
    note = (
        "Prediction intervals (Student's t) of one new training with the same recipe. They include the deviation of "
        "these runs, but not a change of the law beyond them or repeated data. Change: relative to the law's loss at "
        "the largest. Every line is an extrapolation."
    )
    if not analysis.rate_gains:
        return f"{table}\n\n{note}"
    gains = _bullets(f"By the {TITLES[name]}, {gain.sentence}" for name, gain in analysis.rate_gains.items())
    gain = next(iter(analysis.rate_gains.values()))
    rate = (
        f"Bitrate at equal quality, relative to {escaped(gain.model)} at {gain.bpp:.4f} bpp: ΔR/R ≈ ΔL/R at fixed λ, "
        "to first order. Differences between the laws show how much depends on their form."
    )
    return f"{table}\n\n{note}\n\n{rate}\n\n{gains}"


def _split(analysis: Analysis) -> str:
    law = analysis.laws.get("compute_optimal")
    if not isinstance(law, ComputeOptimal):
        return f"Unknown: {no_optimum(analysis)}."
    a, b = law.growth
    cost = f"{significant(law.parameters['k'], 3)}·N^{significant(law.parameters['kappa'], 3)}"
    rows = []
    for factor in (1, *FACTORS):
        pflops = factor * law.observed["C"][1]
        best = law.optimum(pflops)
        size, data = (
            count(value) + ("" if law.observed[name][0] <= value <= law.observed[name][1] else " (extrapolated)")
            for name, value in (("N", best.parameters), ("D", best.pixels))
        )
        ahead = expected(law.predict(pflops, analysis.level), analysis.level)
        rows.append([significant(pflops), size, data, ahead])
    table = markdown_table(["PFLOPs", "N*", "D* (pixels)", "predicted loss"], rows, 0)
    return (
        f"A training pixel costs {cost} FLOP in these runs. With L(N, D), N* grows as C^{a:.3f} and D* as C^{b:.3f}."
        f"\n\n{table}"
    )


def _diagnostics(analysis: Analysis) -> str:
    rows, notes = [], []
    for name, found in analysis.diagnostics.items():
        rows.append([TITLES[name], _errors(found.leave_one_out), _errors(found.largest)])
        if found.largest_refused:
            notes.append(f"{TITLES[name]}, without the largest: {found.largest_refused}")
        if found.bootstrap:
            notes.append(_bootstrap(TITLES[name], found.bootstrap))
        if found.bootstrap_refused:
            notes.append(f"{TITLES[name]}, bootstrap: {found.bootstrap_refused}")
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


def _bootstrap(title: str, bootstrap: Bootstrap) -> str:
    ranges = [
        f"{SYMBOLS.get(name, name)} {significant(low)}…{significant(high)}"
        for name, (low, high) in bootstrap.parameters.items()
    ]
    low, high = bootstrap.at_ten_times
    failed = f", {bootstrap.failed} of them without a law" if bootstrap.failed else ""
    return (
        f"{title}, bootstrap over {bootstrap.unit} ({bootstrap.resamples} resamples{failed}), "
        f"{bootstrap.level * 100:g} %: {', '.join(ranges)}; loss at ten times the largest {low:.4f}…{high:.4f}, "
        "without the noise of a new training; too narrow for few runs"
    )


def _warnings(analysis: Analysis) -> str:
    of_laws = _grouped((warning, TITLES[law.name]) for law in analysis.laws.values() for warning in law.warnings)
    parameters, pixels, pflops = (
        max(getattr(point, name) for point in analysis.observations) for name in ("parameters", "pixels", "pflops")
    )
    return _bullets(
        [
            *analysis.warnings,
            *(f"{warning} ({'; '.join(titles)})" for warning, titles in of_laws.items()),
            f"nothing was observed beyond {count(parameters)} parameters, {count(pixels)} pixels and "
            f"{significant(pflops)} PFLOPs",
        ]
    )


def _figure(name: str, figures: Sequence[str]) -> str:
    if name not in figures:
        return ""
    caption = FIGURES[name].caption
    return f"![{caption.split('.')[0]}.]({name}.png)\n\n*{caption}*"


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(text[0].upper() + text[1:])}." for text in sentences)
