"""Sweeps designed from a compute budget: sizes and amounts of data that determine L(N, D)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import stats

from hpcm_scale.compute.tracker import PETA
from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import preset_names
from hpcm_scale.errors import UserError
from hpcm_scale.formatting import counted, significant
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.scaling.analysis import PARAMETERS_AND_DATA, Analysis
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal, Cost, compute_optimal, fit_cost
from hpcm_scale.scaling.laws.fits import FEWEST, HUBER, WORST_CONDITION, condition, covariance
from hpcm_scale.scaling.laws.law import CannotFit, Law, SumOfPowers
from hpcm_scale.scaling.plan import recipe_overrides
from hpcm_scale.tracking.progress import progress
from hpcm_scale.training.costs import optimizer_flops, training_flops_per_image

ASSUMED = {"E": 0.5, "A": 8.0, "alpha": 0.2, "B": 150.0, "beta": 0.25}
"""L(N, D), D in pixels, where no law is given: an assumption. It has the size of HPCM's losses at λ = 0.013 (0.82 for
68m after the training of arXiv 2508.09075; published on Kodak: 0.73), exponents similar to those of arXiv 2203.15556,
and is the law that the coverage of the intervals was simulated with (benchmarks/scaling_coverage.py)."""
NOISE = 0.003
"""Standard deviation of log L between seeds, where neither an option nor a law gives it: an assumption."""
RECIPE = ("train.parametrisation=mup", "schedule.learning_rate=3.0e-3", "schedule.warmup=50", "engine.precision=bf16")
"""Without a law, that of `experiment=best` (docs/results/ablations.md): one learning rate for all sizes."""
CHOSEN = {"model", "model.size", "schedule", *(f"schedule.{key}" for key in ("boundaries", "factors", "decay"))}
CHOSEN |= {f"train.{key}" for key in ("steps", "stop_after", "keep_at", "seed")} | {"experiment", "stage", "debug"}
"""Keys that the design sets."""
PARTS = 5
"""Parts of an annealed training; in the last one the learning rate decays (`hpcm cooldown --decay 0.2`)."""
SPANS = (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""Ratios of the largest to the smallest amount of data of a size, from `laws.fits.SPAN` on."""
AMOUNTS = (3, 4, 5, 6)
"""Numbers of amounts of data of a size."""
WARM_UPS = 4
"""Least length of the constant-rate part of a training, in warm-ups."""
AHEAD = 10.0
"""Multiple of the budget at which the error of log N* is minimised."""


class Size(NamedTuple):
    """A model size and its costs."""

    overrides: dict[str, str]
    """Overrides that choose it: {"model": "68m"}, or {"model": "hpcm", "model.size": "30m"}."""
    name: str
    parameters: int
    pflops_per_step: float
    """Of a batch, with the operations of the optimizer."""


class Settings(NamedTuple):
    """What all trainings share; their whole configuration follows from `Design.overrides`."""

    batch_size: int
    crop: int
    learning_rate: float
    parametrisation: str
    precision: str
    lmbda: float

    @property
    def pixels_per_step(self) -> int:
        """Training pixels of an optimizer step."""
        return self.batch_size * self.crop**2


@dataclass(frozen=True)
class Design:
    """Sizes and amounts of data for one budget."""

    sizes: tuple[Size, ...]
    """In ascending order."""
    steps: np.ndarray
    """Steps of each annealed training, ascending multiples of `PARTS`, int64 (sizes, amounts of data)."""
    spread: str
    """How the amounts of data differ between sizes."""
    seeds: int
    settings: Settings
    overrides: tuple[str, ...]
    law: Law
    """The assumed L(N, D), with the covariance that its fit to these trainings has on average (`predicted`)."""
    optimal: ComputeOptimal
    """The compute-optimal law that follows, at the known cost of the sizes; `observed` has the range of compute."""
    condition: float
    """See `laws.fits.condition`."""

    @property
    def cooldowns(self) -> np.ndarray:
        """Steps at which the cooldowns begin, shape of `steps`; the last ones are those of the constant-rate runs."""
        return self.steps * (PARTS - 1) // PARTS

    @property
    def pflops(self) -> np.ndarray:
        """Cost of the constant-rate runs and cooldowns of each size, all seeds, float64 (sizes,)."""
        return self.seeds * _price(self.sizes, self.steps)

    @property
    def largest(self) -> float:
        """PFLOPs of the most expensive annealed training, with its part of the constant-rate run."""
        return self.optimal.observed["C"][1]

    def error_of_size(self, pflops: float) -> float:
        """Predicted standard error of log N* at a budget."""
        one_error = 2 * float(stats.t.cdf(1, self.optimal.degrees_of_freedom)) - 1
        size, _ = self.optimal.optimum_intervals(pflops, one_error)
        return math.log(size.high / size.value)


def design(
    pflops: float,
    sizes: Sequence[str],
    *,
    analysis: Analysis | None = None,
    noise: float | None = None,
    seeds: int = 1,
    overrides: Sequence[str] = (),
) -> Design:
    """The sweep with the least predicted standard error of log N* at `AHEAD` times the budget.

    Each size has one constant-rate run per seed, and a cooldown for each of its amounts of data, a geometric
    progression. Sizes have equal amounts of data, equal compute, or amounts ∝ D*(N), at which the size is
    compute-optimal. These three, `SPANS` and `AMOUNTS` are searched; the budget sets the lengths. Residuals of log L
    count as independent, those of cooldowns of the same run included, and costs as known.

    Args:
        pflops: budget of the constant-rate runs and cooldowns of all seeds.
        sizes: presets, or numbers of parameters (`model.size`) if one of them is no preset; in any order.
        analysis: laws whose L(N, D), residual deviation and recipe are used; else ASSUMED, NOISE and RECIPE.
        noise: standard deviation of log L.
        seeds: trainings of each size and amount of data.
        overrides: Hydra overrides that change the recipe.

    Raises:
        UserError: fewer than three sizes, sizes that do not determine the law, a budget that is too small, laws without
            an optimum or a recipe for all sizes, or overrides of `CHOSEN`.
    """
    if len(set(sizes)) < max(FEWEST, len(sizes)):
        raise UserError(
            "too-few-design-sizes",
            "--sizes",
            f"--sizes has {counted(len(set(sizes)), 'different size')}; give {FEWEST} or more, each once",
        )
    recipe = _recipe(analysis, overrides)
    law = analysis.laws[PARAMETERS_AND_DATA] if analysis else None
    values = law.parameters if law else ASSUMED
    deviation = noise or (law.residual_deviation if law else None) or NOISE
    config = compose_sized(recipe)
    found = _sizes(sizes, analysis.family if analysis else "hpcm", recipe)
    parameters = np.array([float(size.parameters) for size in found])
    per_step = np.array([size.pflops_per_step for size in found])
    settings = Settings(
        config.train.batch_size,
        config.data.crop,
        config.schedule.learning_rate,
        config.train.parametrisation.value,
        config.engine.precision.value,
        config.objective.lmbda,
    )
    pixels_per_step = float(settings.pixels_per_step)
    try:
        fitted = fit_cost(parameters, per_step * PETA / pixels_per_step)
    except CannotFit as refusal:
        raise _no_optimum(refusal) from None
    cost = Cost.exact(fitted.k, fitted.kappa)
    shortest = PARTS * max(2, math.ceil(WARM_UPS * config.schedule.warmup / (PARTS - 1)))  # a decay takes two steps
    exponents = {"equal data": 0.0, "equal compute": -cost.kappa, "data ∝ D*(N)": values["alpha"] / values["beta"]}

    def made(spread: str, span: float, amounts: int, least_compute: float = 0.0) -> Design:
        """At the budget; beyond it if trainings would be too short, or N* below all sizes."""
        relative = np.outer((parameters / parameters[0]) ** exponents[spread], np.geomspace(1, span, amounts))
        scale = max(
            pflops / (seeds * _price(found, relative).sum()),
            shortest / relative.min(),
            least_compute / (per_step[:, None] * relative).max(),
        )
        steps = PARTS * np.floor(scale * relative / PARTS + 1e-9).astype(np.int64)
        compute = per_step[:, None] * steps
        n, d = np.repeat(parameters, amounts), (steps * pixels_per_step).ravel()
        law, number = predicted(values, np.tile(n, seeds), np.tile(d, seeds), deviation)
        optimal = compute_optimal(law, cost, (float(compute.min()), float(compute.max())))
        return Design(found, steps, spread, seeds, settings, tuple(recipe), law, optimal, number)

    try:
        optimal = made("equal data", SPANS[-1], AMOUNTS[-1]).optimal
        # The compute at which N* is the smallest size.
        least_compute = (parameters[0] / optimal.optimum(1.0).parameters) ** (1 / optimal.growth[0])
        candidates = [
            made(spread, span, amounts, least_compute)
            for spread, (span, amounts) in product(exponents, product(SPANS, AMOUNTS))
        ]
        candidates = [each for each in candidates if np.all(np.diff(each.steps) > 0)]
    except CannotFit as refusal:
        raise _no_optimum(refusal) from None
    lowest = min(each.condition for each in candidates)
    if lowest > WORST_CONDITION:
        raise UserError(
            "design-does-not-identify",
            "--sizes",
            f"--sizes {','.join(sizes)} do not separate the effects of N and D (condition number "
            f"{significant(lowest, 2)}, at most {WORST_CONDITION:g}); give sizes that differ more",
        )
    candidates = [each for each in candidates if each.condition <= WORST_CONDITION]
    affordable = [each for each in candidates if each.pflops.sum() <= pflops]
    if not affordable:
        least = 1.01 * min(each.pflops.sum() for each in candidates)
        raise UserError(
            "design-budget-too-small",
            "--pflops",
            f"with {pflops:g} PFLOPs trainings would be shorter than {shortest} steps, or N* smaller than all sizes; "
            f"give --pflops {least:.3g}, or smaller sizes",
        )
    return min(affordable, key=lambda each: each.error_of_size(AHEAD * pflops))


def _no_optimum(refusal: CannotFit) -> UserError:
    return UserError(
        "no-optimum-for-design",
        "--sizes",
        f"no design follows: {refusal}; give sizes that differ more, or other laws",
    )


def predicted(
    values: Mapping[str, float], parameters: np.ndarray, pixels: np.ndarray, noise: float
) -> tuple[Law, float]:
    """L(N, D) with the covariance that its fit to trainings at these points has on average, and the condition number.

    σ²(JᵀJ)⁻¹ with the Jacobian of the true law, times the inflation of Huber's estimate (`laws.fits.covariance`).
    Compared with simulated fits: benchmarks/results/scaling_design.md.

    Args:
        values: E, A, alpha, B, beta of the true law, in this order.
        parameters: N of each training, float64 (n,).
        pixels: D of each training, float64 (n,).
        noise: standard deviation of log L.
    """
    variables = np.stack([parameters, pixels])
    law = Law(
        name=PARAMETERS_AND_DATA,
        formula="L = E + A·N^−α + B·D^−β",
        data="a design",
        runs=(),
        parameters=dict(values),
        standard_errors=None,
        covariance=None,
        residual_deviation=noise,
        degrees_of_freedom=max(parameters.size - len(values), 0),
        points=parameters.size,
        observed={name: (float(each.min()), float(each.max())) for name, each in zip("ND", variables, strict=True)},
        converged=True,
        r=None,
        warnings=(),
    )
    centres, exponents = np.exp(np.log(variables).mean(axis=1)), np.array([values["alpha"], values["beta"]])
    a, b = np.array([values["A"], values["B"]]) * centres**-exponents
    centred = replace(law, parameters=law.parameters | {"A": a, "B": b})
    jacobian = centred.log_loss(tuple(variables / centres[:, None]))[1].T
    fit = SumOfPowers(values["E"], np.array([a, b]), exponents, centres, 0 * pixels, jacobian, 0.0, True)
    spread = covariance(fit, noise, HUBER)
    if spread is not None:
        errors = dict(zip(values, np.sqrt(np.diag(spread)).tolist(), strict=True))
        law = replace(law, covariance=tuple(map(tuple, spread.tolist())), standard_errors=errors)
    return law, condition(fit)


def _recipe(analysis: Analysis | None, overrides: Sequence[str]) -> list[str]:
    """The overrides of all runs, one of each key."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in CHOSEN or key.startswith(("run.", "hydra")):
            raise UserError("design-sets-key", key, f"the design sets {key}; omit --set {override}")
    given = [*RECIPE]
    if analysis:
        if PARAMETERS_AND_DATA not in analysis.laws:
            reason = analysis.refused[PARAMETERS_AND_DATA]
            raise UserError("no-law-for-design", "--laws", f"these laws have no L(N, D) ({reason}); omit --laws")
        given = [f"objective={analysis.distortion}", f"objective.lmbda={analysis.lmbda:g}"]
        given += [each for each in recipe_overrides(analysis.recipe) if each.partition("=")[0] not in CHOSEN]
    given += ["schedule=wsd", "schedule.decay=0", *overrides]
    recipe = {each.partition("=")[0].lstrip("+"): each for each in given}
    if "schedule.learning_rate" not in recipe:
        raise UserError(
            "no-learning-rate-for-design",
            "--set",
            "the runs of these laws share no learning rate; give --set schedule.learning_rate=X, that of all sizes",
        )
    return [*recipe.values()]


def _sizes(names: Sequence[str], family: str, recipe: Sequence[str]) -> tuple[Size, ...]:
    """The sizes with their costs, ascending. Raises UserError for a size, or a configuration, that is not valid."""
    presets = set(names) <= set(preset_names("model"))
    sizes = []
    for name in progress(names, description="costs of sizes", unit="size"):
        overrides = {"model": name} if presets else {"model": family, "model.size": name}
        chosen = (f"{key}={value}" for key, value in overrides.items())
        config = compose_sized([*recipe, *chosen, "data.shards=shards"])
        check(config, 1)
        model = on_meta(config.model)
        flops = config.train.batch_size * training_flops_per_image(model, config.data.crop)
        flops += optimizer_flops(model, config.optimizer)
        sizes.append(Size(overrides, config.model.name, parameter_count(model), flops / PETA))
    return tuple(sorted(sizes, key=lambda size: size.parameters))


def _price(sizes: Sequence[Size], steps: np.ndarray) -> np.ndarray:
    """PFLOPs of the constant-rate run and the cooldowns of each size; `steps` as in `Design`."""
    trained = ((PARTS - 1) * steps[:, -1] + steps.sum(axis=1)) / PARTS
    return trained * [size.pflops_per_step for size in sizes]
