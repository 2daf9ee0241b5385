"""report.md: a fit as a result, with its caveats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpcm_scale.formatting import escaped, markdown_table
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.figures import FIGURES
from hpcm_scale.scaling.filters import TRAINING
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.trust import Bootstrap, HeldOut
from hpcm_scale.scaling.verdict import FACTORS, doubts, headline, improvement, no_best_split, parameter_law
from hpcm_scale.scaling.wording import (
    DASH,
    LOSSES,
    TITLES,
    count,
    expected,
    percent,
    significant,
    with_error,
)

REPORT = "report.md"
R_PROVES_NOTHING = (
    "Pearson's r proves nothing here: on curves with a floor and without noise five points give |r| above 0.99 while "
    "the straight line overstates the gain of ten times the size up to twofold. AICc asks whether a floor pays for its "
    "extra parameter."
)
PREFERRED = {
    "parameters": "Of parameters",
    "compute": "Of compute, annealed frontier",
    "compute_whole": "Of compute, whole frontier",
}
SYMBOLS = {"alpha": "α", "beta": "β", "kappa": "κ"}


def report(analysis: Analysis, figures: Sequence[str]) -> str:
    """The report in Markdown; `figures` are the names drawn beside it (keys of `figures.FIGURES`)."""
    sections = [
        f"# What scale buys: {_sizes(analysis)}, λ = {analysis.lmbda:g}",
        _opening(analysis),
        "## What was run",
        _runs(analysis),
        "## Loss against compute",
        _figure("learning_curves", figures),
        _frontier(analysis),
        "## Laws",
        _laws(analysis),
        _figure("loss_against_parameters", figures),
        "### What they promise",
        _promises(analysis),
        "### Best split of a budget",
        _split(analysis),
        _figure("isoflop", figures),
        "## How far to trust them",
        _trust(analysis),
        _figure("residuals", figures),
        *_parts(analysis, figures),
        "## Caveats",
        _caveats(analysis),
        "## Left out",
        "\n".join(f"- {escaped(sentence)}." for sentence in analysis.left_out) or "Nothing.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _opening(analysis: Analysis) -> str:
    found = doubts(analysis)
    if parameter_law(analysis) is None:
        return f"**{headline(analysis)}** What there is to see is below."
    if found:
        reasons = _bullets(found)
        return f"**Reasons to doubt what follows:**\n{reasons}\n\n{headline(analysis)}"
    return headline(analysis)


def _sizes(analysis: Analysis) -> str:
    sizes = sorted({point.parameters for point in analysis.observations})
    if len(sizes) == 1:
        return f"one size ({count(sizes[0])})"
    return f"{len(sizes)} sizes from {count(sizes[0])} to {count(sizes[-1])} parameters"


def _runs(analysis: Analysis) -> str:
    headings = ["run", "model", "parameters", "pixels", "images", "PFLOPs", "loss", "bpp", "PSNR (dB)", "annealed"]
    rows = [
        [
            escaped(point.run),
            escaped(point.model),
            f"{point.parameters:,}",
            count(point.pixels),
            f"{point.images:,}",
            significant(point.pflops),
            f"{point.loss:.4f}",
            _or_dash(point.bpp, 4),
            _or_dash(point.psnr, 2),
            ("yes" if point.annealed else "no") + ("" if point.finished else ", unfinished"),
        ]
        for point in analysis.observations
    ]
    kind = "smoothed training" if analysis.metric == TRAINING else "evaluation"
    note = (
        f"Loss: {kind} loss at the end of the run, {LOSSES[analysis.distortion]} (bits per pixel). Pixels: images × "
        "crop². PFLOPs: 1e15 floating-point operations of training, forward and backward; a branch counts its trunk's, "
        "too. Annealed: the learning rate had fallen to a tenth of its peak or less."
    )
    return f"{markdown_table(headings, rows, 2)}\n\n{note}"


def _frontier(analysis: Analysis) -> str:
    annealed, whole = analysis.frontier_annealed, analysis.frontier
    text = (
        f"The whole frontier has {len(whole)} points of {len({point.run for point in whole})} runs, the annealed one "
        f"{len(annealed)} of {len({point.run for point in annealed})}. Points of one run are one training seen several "
        "times, not independent of each other."
    )
    if not annealed:
        return f"{text} No run was annealed, so the frontier shows losses that a decay would still lower."
    ends = {point.run: point for point in annealed}
    headings = ["run", "parameters", "pixels", "PFLOPs", "loss"]
    rows = [
        [escaped(run), count(point.parameters), count(point.pixels), significant(point.pflops), f"{point.loss:.4f}"]
        for run, point in ends.items()
    ]
    return f"{text} Where each run leaves the annealed frontier:\n\n{markdown_table(headings, rows)}"


def _laws(analysis: Analysis) -> str:
    if not analysis.laws:
        return f"None could be fitted.\n\n{_refused(analysis)}"
    headings = ["law", "fitted", "trainings", "parameters ± standard errors", "scatter of log L", "AICc", "r"]
    rows = [_law_row(law, analysis) for law in analysis.laws.values()]
    preferred = _bullets(f"{PREFERRED[key]}: {analysis.reasons[key]}" for key in PREFERRED if key in analysis.reasons)
    note = "L: loss, N: parameters, D: training pixels, C: training compute in PFLOPs. Bold: preferred. Fitted to:"
    data: dict[str, list[str]] = {}
    for law in analysis.laws.values():
        data.setdefault(law.data, []).append(TITLES[law.name])
    fitted = "\n".join(f"- {what} ({'; '.join(titles)})." for what, titles in data.items())
    return "\n\n".join(
        part
        for part in (markdown_table(headings, rows, 2), note, fitted, preferred, R_PROVES_NOTHING, _refused(analysis))
        if part
    )


def _law_row(law: Law, analysis: Analysis) -> list[str]:
    errors = law.standard_errors or {}
    parameters = [
        f"{SYMBOLS.get(name, name)} = {with_error(value, errors.get(name))}" for name, value in law.parameters.items()
    ]
    title = TITLES[law.name]
    return [
        f"**{title}**" if law.name in analysis.preferred.values() else title,
        f"`{law.formula}`",
        str(law.points),
        ", ".join(parameters),
        DASH if law.residual_deviation is None else f"{law.residual_deviation * 100:.2g} %",
        _or_dash(law.aicc, 2),
        _or_dash(law.r, 5),
    ]


def _refused(analysis: Analysis) -> str:
    return _bullets(f"No {TITLES[name]}: {why}." for name, why in sorted(analysis.refused.items()))


def _promises(analysis: Analysis) -> str:
    level = f"{analysis.level * 100:g} %"
    rows = []
    for law in analysis.laws.values():
        if len(law.variables) > 1:
            continue
        (variable,) = law.variables
        largest = law.observed[variable][1]
        for factor in FACTORS:
            x = factor * largest
            change, low, high = improvement(law, factor, variable, analysis.level)
            where = f"{count(x)} parameters" if variable == "N" else f"{significant(x)} PFLOPs"
            gain = percent(change) if math.isnan(low) else f"{percent(change)} ({percent(low)}…{percent(high)})"
            rows.append(
                [TITLES[law.name], f"{factor} ×", where, expected(law.predict(x, analysis.level), analysis.level), gain]
            )
    if not rows:
        return "Nothing: there is no law."
    table = markdown_table(["law", "largest", "at", f"loss ({level})", f"change ({level})"], rows, 3)
    note = (
        "Intervals are for one new training by the same recipe, with Student's t; they know the scatter of these runs "
        "and nothing of a law that ceases to hold, nor of data that run out. Change: from the loss that the law "
        "itself gives the largest. Every line here is an extrapolation."
    )
    if not analysis.rate_gains:
        return f"{table}\n\n{note}"
    gains = _bullets(f"By the {TITLES[name]}, {gain.sentence}" for name, gain in analysis.rate_gains.items())
    gain = next(iter(analysis.rate_gains.values()))
    rate = (
        f"In bits, from {escaped(gain.model)} at {gain.bpp:.4f} bpp: at fixed λ, ΔR/R ≈ ΔL/R, for a loss lower by ΔL "
        "is worth as many bits per pixel at equal quality, to first order. Where the laws differ, so much hangs on "
        "their form."
    )
    return f"{table}\n\n{note}\n\n{rate}\n\n{gains}"


def _split(analysis: Analysis) -> str:
    law = analysis.laws.get("compute_optimal")
    if not isinstance(law, ComputeOptimal):
        return f"Not known: {no_best_split(analysis)}."
    a, b = law.growth
    cost = f"{significant(law.parameters['k'], 3)}·N^{significant(law.parameters['kappa'], 3)}"
    largest = law.observed["C"][1]
    rows = []
    for factor in (1, *FACTORS):
        best = law.optimum(factor * largest)
        loss = expected(law.predict(factor * largest, analysis.level), analysis.level)
        size, data = (
            count(value) + ("" if law.observed[name][0] <= value <= law.observed[name][1] else " (never trained)")
            for name, value in (("N", best.parameters), ("D", best.pixels))
        )
        rows.append([significant(factor * largest), size, data, loss])
    table = markdown_table(["PFLOPs", "N*", "D* (pixels)", "expected loss"], rows, 0)
    return (
        f"A training pixel costs {cost} FLOP, as counted in these runs. With the joint law the best size grows as "
        f"C^{a:.3f} and the pixels as C^{b:.3f}.\n\n{table}"
    )


def _trust(analysis: Analysis) -> str:
    rows, notes = [], []
    for name, trust in analysis.trust.items():
        largest = _misses(trust.largest) if trust.largest else DASH
        rows.append([TITLES[name], _misses(trust.leave_one_out), largest])
        if trust.largest_refused:
            notes.append(f"{TITLES[name]}, without the largest: {trust.largest_refused}.")
        if trust.bootstrap:
            notes.append(_bootstrap(TITLES[name], trust.bootstrap))
        if trust.bootstrap_refused:
            notes.append(f"{TITLES[name]}, bootstrap: {trust.bootstrap_refused}")
    if not rows:
        return "There is no law to trust."
    headings = ["law", "each run left out", "the largest held out"]
    words = (
        "Error of the law at trainings it was not fitted to (predicted / observed − 1), and how many lie inside its "
        f"{analysis.level * 100:g} % interval."
    )
    return "\n\n".join(part for part in (markdown_table(headings, rows, 3), words, _bullets(notes)) if part)


def _misses(held: Sequence[HeldOut]) -> str:
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
        "without the noise of a new training. Narrower than it should be for few runs."
    )


def _parts(analysis: Analysis, figures: Sequence[str]) -> list[str]:
    breakdown = analysis.breakdown
    if breakdown is None:
        return []
    names = list(breakdown.sizes[0].parts)
    rows = [
        [
            escaped(size.model),
            f"{size.parameters:,}",
            *(f"{100 * size.parts[name] / size.parameters:.1f} %" for name in names),
            f"{size.loss:.4f}",
        ]
        for size in breakdown.sizes
    ]
    found = breakdown.exponents
    rows.append(
        [
            "exponent α",
            "",
            *(with_error(found[n].exponent, found[n].standard_error) if n in found else DASH for n in names),
            "",
        ]
    )
    table = markdown_table(["model", "parameters", *names, "loss"], rows)
    return ["## Where the parameters sit", table, _sentence(breakdown.caveat), _figure("parts", figures)]


def _caveats(analysis: Analysis) -> str:
    told = [*analysis.warnings]
    warned: dict[str, list[str]] = {}
    for law in analysis.laws.values():
        for warning in law.warnings:
            warned.setdefault(warning, []).append(TITLES[law.name])
    told += [f"{warning} ({'; '.join(titles)})" for warning, titles in warned.items() if warning not in told]
    parameters, pixels, pflops = (
        max(getattr(point, name) for point in analysis.observations) for name in ("parameters", "pixels", "pflops")
    )
    told.append(
        f"beyond {count(parameters)} parameters, {count(pixels)} pixels and {significant(pflops)} PFLOPs nothing was "
        "observed"
    )
    return _bullets(dict.fromkeys(told))


def _figure(name: str, figures: Sequence[str]) -> str:
    if name not in figures:
        return ""
    caption = FIGURES[name].CAPTION
    return f"![{caption.split('.')[0]}.]({name}.png)\n\n*{caption}*"


def _bullets(sentences) -> str:
    return "\n".join(f"- {_sentence(sentence)}" for sentence in sentences)


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
    return escaped(text)


def _or_dash(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}".replace("-", "−")
