"""Two training recipes compared by one law with shared exponents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from hpcm_scale.errors import UserError, printable
from hpcm_scale.formatting import count, counted, percent, significant, terminal, terminal_table
from hpcm_scale.scaling.filters import TRAINING
from hpcm_scale.scaling.fit_data import usable
from hpcm_scale.scaling.laws.law import CannotFit
from hpcm_scale.scaling.laws.shared import SharedLaw, different, fit_shared, p_equal_exponents
from hpcm_scale.scaling.observations import RECIPE, Observation, study
from hpcm_scale.scaling.runs import Run, find_runs

SIGNIFICANT = 0.05
"""p value below which the exponents of two recipes count as different."""
SECTIONS = ("model", "objective", "schedule", "optimizer")
"""Sections of the configuration that are compared, beside the keys of RECIPE."""
NAMES = {"N": ("sizes", "parameters", "α"), "D": ("amounts of data", "pixels", "β")}
TERMS = {"N": "A·(ρ_N·N)^−α", "D": "B·(ρ_D·D)^−β"}


class Efficiency(NamedTuple):
    """Need of the first recipe divided by that of the second, with its 95 % confidence interval."""

    of: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The second of two recipes against the first."""

    formula: str
    law: SharedLaw
    separate: SharedLaw | None
    """The law with separate exponents; None if the trainings do not determine it."""
    efficiencies: tuple[Efficiency, ...]
    warnings: tuple[str, ...]


def compare(first: Sequence[Observation], second: Sequence[Observation]) -> Comparison:
    """Efficiencies of the second recipe in size, data and compute, and a test of equal exponents.

    The law is that of `fit_shared`. With costs of k₁·N^κ and k₂·N^κ FLOP per pixel, the efficiency in compute along the
    compute-optimal path is ρ_N^κ·ρ_D·k₁/k₂, the same for each loss (minimise the law over N and D at a budget). k and κ
    come from the journals, with the optimizer's operations, and count as known.

    Args:
        first: trainings of the first recipe; of one size, with one amount of data, or neither.
        second: those of the second recipe.

    Raises:
        CannotFit: the trainings determine no efficiency.
    """
    trained, warnings = [*first, *second], []
    recipe = np.arange(len(trained)) >= len(first)
    both = {"N": [float(each.parameters) for each in trained], "D": [each.pixels for each in trained]}
    variables = {name: np.array(values) for name, values in both.items() if _varies(name, np.array(values), recipe)}
    if not variables:
        raise CannotFit("they have one size and one amount of data: train other amounts of data")
    law, separate = fit_shared(variables, recipe, np.array([each.loss for each in trained]))
    ratio, kappa = _cost(trained, recipe)
    found: dict[str, Callable[[Mapping[str, float]], float]] = {
        f"{NAMES[name][1]} (ρ_{name})": itemgetter(f"log_rho_{name}") for name in variables
    }
    if len(variables) == 2:
        size, data = (count(float(np.exp(np.log(values).mean()))) for values in variables.values())
        if math.isfinite(_data_at_equal_size(law.parameters)):
            found[f"pixels at {size} parameters, for the loss at {data} pixels"] = _data_at_equal_size
        else:
            warnings.append(f"at {size} parameters, no amount of data gives the second recipe the loss of the first")
    at = {"N": "equal data", "D": "equal size"}.get("".join(variables), "the optimal split")
    found[f"compute at {at}"] = lambda p: ratio + kappa * p.get("log_rho_N", 0) + p.get("log_rho_D", 0)
    if not law.covariance[0, 0]:
        what = NAMES[next(iter(variables))][0]
        warnings.append(f"two {what} determine no irreducible loss: E is 0, and the values hold between them")
    formula = f"L = E + {' + '.join(TERMS[name] for name in variables)}"
    efficiencies = tuple(Efficiency(of, *law.interval(function)) for of, function in found.items())
    return Comparison(formula, law, separate, efficiencies, tuple(warnings))


def _varies(name: str, values: np.ndarray, second: np.ndarray) -> bool:
    """Whether a variable has several values in each recipe; False if it has one, the same in both."""
    numbers = [different(values[second == which]) for which in (False, True)]
    if min(numbers) == 1 and different(values) > 1:
        raise CannotFit(
            f"they have {numbers[0]} and {numbers[1]} {NAMES[name][0]}, {different(values)} in all: give runs with "
            "several in each recipe, or with one and the same"
        )
    return min(numbers) > 1


def _data_at_equal_size(values: Mapping[str, float]) -> float:
    """Log of D₁/D₂ of equal loss at the geometric means of N and D₁; −inf if no D₂ is enough."""
    gain = values["N"] / values["D"] * (1 - math.exp(-values["exponent_N"] * values["log_rho_N"]))
    return values["log_rho_D"] + math.log1p(gain) / values["exponent_D"] if gain > -1 else -math.inf


def _cost(trained: Sequence[Observation], second: np.ndarray) -> tuple[float, float]:
    """log k₁/k₂ and κ of the training cost per pixel, by least squares of its logarithm; κ is 0 with one size."""
    logs = np.log([each.parameters for each in trained])
    columns = np.stack([np.ones(logs.size), -1.0 * second, logs - logs.mean()], axis=1)
    (_, ratio, kappa), *_ = np.linalg.lstsq(columns, np.log([each.flops_per_pixel for each in trained]))
    return float(ratio), float(kappa)


# The command.


def read_recipes(arguments: Sequence[str]) -> dict[str, list[Run]]:
    """Runs by recipe from arguments LABEL=PATH; a label may come several times. Run names begin with the label."""
    paths: dict[str, list[str]] = {}
    for argument in arguments:
        label, _, path = argument.partition("=")
        paths.setdefault(label, []).append(path)
    if len(paths) != 2 or not all(label and all(of_label) for label, of_label in paths.items()):
        example = "adam=runs/adam soap=runs/soap"
        raise UserError("not-two-recipes", "", f"give two recipes as LABEL=RUNS, such as {example}; a label may repeat")
    found = {label: [replace(run, name=f"{label}/{run.name}") for run in find_runs(paths[label])] for label in paths}
    first, second = ({run.folder for run in runs} for runs in found.values())
    if first & second:
        raise UserError("run-of-two-recipes", "", f"{min(first & second)} is in both recipes; give it to one")
    return found


def print_comparison(
    recipes: Mapping[str, Sequence[Run]], metric: str | None = None, lmbda: float | None = None
) -> None:
    """Print what `compare` says of two recipes, and the configuration keys in which they differ.

    Args:
        recipes: runs of each label, the reference first; run names begin with the label (`read_recipes`).
        metric: see `observations.study`, which chooses the runs.
        lmbda: see `observations.study`.

    Raises:
        UserError: the runs cannot be compared.
    """
    found = study([run for runs in recipes.values() for run in runs], metric, lmbda)
    other = [key for key in RECIPE if key.startswith("eval.") and key not in found.recipe]
    if other and found.metric != TRAINING:
        raise UserError("recipes-evaluated-differently", other[0], f"the runs differ in {other[0]}; evaluate all alike")
    chosen, warnings = usable(found.observations)
    trained = [[each for each in chosen if each.run.startswith(f"{label}/")] for label in recipes]
    first, second = map(printable, recipes)
    try:
        if not all(trained):
            raise CannotFit("; ".join(["one has no run, or none whose learning rate has decayed", *found.excluded]))
        compared = compare(*trained)
    except CannotFit as refusal:
        raise UserError("cannot-compare-recipes", "", f"{first} and {second} cannot be compared; {refusal}") from None
    law, console = compared.law, terminal()
    console.print(f"{compared.formula}; {found.metric}, λ = {found.lmbda:g}; ρ = 1 for {first}")
    names = {"E": "E", "exponent_N": "α", "exponent_D": "β"}
    fitted = [
        f"{names[key]} = {significant(value, 3) if value > 1e-9 else 0}"
        for key, value in law.parameters.items()
        if key in names
    ]
    numbers = f"{counted(len(trained[0]), 'run')} of {first}, {len(trained[1])} of {second}"
    noise = percent(math.sqrt(law.squares / law.degrees_of_freedom)).lstrip("+")
    console.print(f"{', '.join(fitted)}; {numbers}, residual standard deviation {noise}\n")
    rows = [
        (of, f"{significant(value, 3)}×", f"{significant(low, 3)}–{significant(high, 3)}", percent(1 / value - 1, 1))
        for of, value, low, high in compared.efficiencies
    ]
    console.print(terminal_table(["efficiency", second, "95 % interval", f"need of {second}"], rows))
    console.print(f"\n{_test(compared)}")
    for caveat in (*warnings, *compared.warnings, *found.excluded):
        console.print(f"Caveat: {caveat}.")
    used = {each.run for each in chosen}
    rows = differences(*([run for run in runs if run.name in used] for runs in recipes.values()))
    console.print()
    console.print(terminal_table(["key", first, second], rows, words=3) if rows else "No key differs.")


def _test(compared: Comparison) -> str:
    if compared.separate is None:
        return "Equal exponents: not tested, which takes three sizes (or amounts of data of one size) and more runs."
    changes = []
    for name, (*_, symbol) in NAMES.items():
        if (key := f"difference_{name}") in compared.separate.parameters:
            value, low, high = np.log(compared.separate.interval(itemgetter(key)))
            changes.append(f"{symbol} of the second recipe is higher by {value:+.3f} ({low:+.3f}…{high:+.3f})")
    p = p_equal_exponents(compared.law, compared.separate)
    verdict = (
        "rejected: the efficiencies change with scale, and these values are not to be used"
        if p < SIGNIFICANT
        else "not rejected, which does not prove them equal"
    )
    return f"Equal exponents: {verdict} (p = {significant(p, 2)}). {'; '.join(changes)}.".replace("-", "−")


def differences(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Configuration keys in which two sets of runs differ, and their values; keys of RECIPE and of SECTIONS."""
    names = {f"{name}.{key}" for run in (*first, *second) for name in SECTIONS for key in run.config.get(name) or ()}

    def values(key: str, runs: Sequence[Run]) -> str:
        found = [RECIPE.get(key) if run.setting(key) is None else run.setting(key) for run in runs]
        paths = key in ("data.shards", "eval.images")  # may differ between machines
        return ", ".join(sorted({printable(PurePath(str(value)).name if paths else value) for value in found}))

    rows = [(key, values(key, first), values(key, second)) for key in sorted(names | RECIPE.keys())]
    return [row for row in rows if row[1] != row[2]]
