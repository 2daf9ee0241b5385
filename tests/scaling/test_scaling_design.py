"""Sweeps designed from a budget: predicted errors, costs, refusals, and the experiment that trains them."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context

import numpy as np
import pytest
from mistakes import mistake_in
from omegaconf import OmegaConf

from hpcm_scale.commands import cooldown as cooldown_command
from hpcm_scale.commands.scaling import main
from hpcm_scale.compute.tracker import TRAINING_FACTOR
from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose_model, config_folder
from hpcm_scale.config.schema import OptimizerConfig, OptimizerName
from hpcm_scale.errors import UserError
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.model.parameters import forward_flops_per_image, on_meta
from hpcm_scale.scaling import design as design_module
from hpcm_scale.scaling.design import ASSUMED, NOISE, design, predicted
from hpcm_scale.scaling.design_experiment import commands, describe, write_experiment
from hpcm_scale.scaling.filters import TRAINING
from hpcm_scale.scaling.laws.compute_optimal import Cost, compute_optimal
from hpcm_scale.scaling.laws.fits import HUBER, SPAN, WORST_CONDITION, fit_parameters_and_data, huber_inflation
from hpcm_scale.scaling.laws.law import Points
from hpcm_scale.scaling.runs import find_runs
from hpcm_scale.train import main as train_main
from hpcm_scale.training.matrix_optimizers import cost

SIZES = ("nano", "450k", "micro", "2m", "mini")


@pytest.fixture(scope="module", autouse=True)
def costs_are_counted_once():
    """Counting the operations of a size takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        counted = cache(design_module._sizes)
        patch.setattr(
            design_module, "_sizes", lambda names, family, recipe: counted(tuple(names), family, tuple(recipe))
        )
        yield


@pytest.fixture
def made():
    return design(5, SIZES)


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """A copy of conf/ that experiments can be written to."""
    folder = tmp_path / "conf"
    shutil.copytree(config_folder(), folder)
    for name, module in sys.modules.copy().items():
        if name.startswith("hpcm_scale.") and hasattr(module, "config_folder"):
            monkeypatch.setattr(module, "config_folder", lambda: folder)
    return folder / "experiment"


def points_of(made) -> tuple[np.ndarray, np.ndarray]:
    pixels = made.steps * made.settings.pixels_per_step
    return np.repeat([float(size.parameters) for size in made.sizes], made.steps.shape[1]), pixels.ravel().astype(float)


def test_predicted_errors_are_those_of_numerical_derivatives(made) -> None:
    parameters, pixels = points_of(made)
    names = list(ASSUMED)
    theta = np.array(list(ASSUMED.values()))

    def log_loss(theta: np.ndarray) -> np.ndarray:
        e, a, alpha, b, beta = theta
        return np.log(e + a * parameters**-alpha + b * pixels**-beta)

    def log_optimum(theta: np.ndarray, pflops: float) -> float:
        """log N* by a search over sizes."""
        _, a, alpha, b, beta = theta
        logs = np.linspace(np.log(1e3), np.log(1e10), 2_000_001)
        data = 1e15 * pflops / made.optimal.parameters["k"] * np.exp(-made.optimal.parameters["kappa"] * logs)
        return logs[np.argmin(a * np.exp(-alpha * logs) + b * data**-beta)]

    def derivatives(function) -> np.ndarray:
        steps = 1e-3 * np.diag(theta)
        return np.stack([(function(theta + step) - function(theta - step)) / (2 * step.sum()) for step in steps])

    jacobian = derivatives(log_loss).T
    covariance = NOISE**2 * huber_inflation(HUBER, NOISE) * np.linalg.inv(jacobian.T @ jacobian)
    assert [made.law.standard_errors[name] for name in names] == pytest.approx(np.sqrt(np.diag(covariance)), rel=0.01)
    for budget in (made.largest, 10 * made.largest):
        gradient = derivatives(partial(log_optimum, pflops=budget))
        assert made.error_of_size(budget) == pytest.approx(np.sqrt(gradient @ covariance @ gradient), rel=0.02)


@pytest.mark.launch
def test_predicted_errors_are_those_of_simulated_fits(made) -> None:
    """More, and longer: benchmarks/scaling_design.py."""
    parameters, pixels = points_of(made)
    names = tuple(map(str, range(pixels.size)))
    truth, _ = made.law.log_loss((parameters, pixels))
    generator = np.random.default_rng(3)
    fits = [
        fit_parameters_and_data(
            Points("parameters_and_data", {"N": parameters, "D": pixels}, np.exp(losses), names, names, "simulated")
        ).parameters
        for losses in truth + NOISE * generator.standard_normal((60, truth.size))
    ]
    for name in ("alpha", "beta"):
        low, high = np.percentile([fit[name] for fit in fits], [16, 84])
        assert (high - low) / 2 == pytest.approx(made.law.standard_errors[name], rel=0.3)  # Monte-Carlo error: 10 %


def test_it_is_within_the_budget_and_can_be_fitted(made) -> None:
    assert 0.95 * 5 < made.pflops.sum() <= 5
    assert np.all(made.steps[:, -1] >= made.steps[:, 0] * SPAN) and np.all(np.diff(made.steps) > 0)
    assert np.all(made.cooldowns[:, 0] >= 4 * compose_sized(made.overrides).schedule.warmup)
    assert np.all(np.round(made.cooldowns / 0.8) == made.steps)  # as `hpcm cooldown --decay 0.2` counts
    assert made.condition < WORST_CONDITION
    assert made.sizes[0].parameters < made.optimal.optimum(made.largest).parameters < made.sizes[-1].parameters
    parameters, pixels = points_of(made)
    names = tuple(map(str, range(pixels.size)))
    losses = np.exp(made.law.log_loss((parameters, pixels))[0])
    law = fit_parameters_and_data(
        Points("parameters_and_data", {"N": parameters, "D": pixels}, losses, names, names, "exact")
    )
    assert law.parameters == pytest.approx(ASSUMED, rel=1e-3)


def test_its_cost_is_that_of_training_and_optimizer() -> None:
    made = design(5, SIZES, overrides=["optimizer=muon", "train.batch_size=16"], seeds=2)
    for size, cooldowns, steps, pflops in zip(made.sizes, made.cooldowns, made.steps, made.pflops, strict=True):
        model = on_meta(compose_model(size.overrides["model"]))
        per_step = 16 * TRAINING_FACTOR * forward_flops_per_image(model, 256)
        per_step += cost(model, OptimizerConfig(name=OptimizerName.muon)).flops
        trained = cooldowns[-1] + np.sum(steps - cooldowns)
        assert pflops == pytest.approx(2 * per_step * trained / 1e15)


def test_more_budget_and_more_seeds_determine_more(made) -> None:
    more = design(20, SIZES)
    assert more.error_of_size(50) < made.error_of_size(50)
    twice = predicted(ASSUMED, *(np.tile(each, 2) for each in points_of(made)), NOISE)[0]
    assert twice.standard_errors["beta"] == pytest.approx(made.law.standard_errors["beta"] / np.sqrt(2))


def test_no_other_grid_for_the_budget_is_better() -> None:
    made = design(20, SIZES)
    cost = Cost.exact(made.optimal.parameters["k"], made.optimal.parameters["kappa"])
    sizes, compared = np.array([float(size.parameters) for size in made.sizes]), 0
    for exponent, span, amounts in product((0.0, -0.9, 0.8), (3, 8, 24), (3, 6)):
        steps = np.outer((sizes / sizes[0]) ** exponent, np.geomspace(1, span, amounts))
        steps *= 20 / design_module._price(made.sizes, steps).sum()
        if steps.min() >= 5 * compose_sized(made.overrides).schedule.warmup:
            other = replace(made, steps=steps)
            law, _ = predicted(ASSUMED, *points_of(other), NOISE)
            other = replace(other, optimal=compute_optimal(law, cost, (1, 1)))
            assert other.error_of_size(200) > 0.995 * made.error_of_size(200)
            compared += 1
    assert compared >= 8


def test_sizes_that_are_not_all_presets_follow_the_rule() -> None:
    by_rule = design(5, ("800k", "100k", "300k"))
    assert [size.name for size in by_rule.sizes] == ["hpcm_100k", "hpcm_300k", "hpcm_800k"]
    assert [size.name for size in design(5, ("2m", "450k", "800k")).sizes] == ["450k", "800k", "2m"]


def test_a_fitted_law_gives_parameters_noise_and_recipe(ladder_analysis) -> None:
    law = ladder_analysis.laws["law_of_parameters_and_data"]
    made = design(5, SIZES, analysis=ladder_analysis, overrides=["schedule.learning_rate=2e-3"])
    assert made.law.parameters == law.parameters
    assert made.law.residual_deviation == law.residual_deviation
    assert made.settings.batch_size == ladder_analysis.recipe["train.batch_size"]
    assert made.settings.learning_rate == 2e-3 and made.settings.lmbda == ladder_analysis.lmbda
    assert compose_sized(made.overrides).schedule.decay == 0 and compose_sized(made.overrides).schedule.boundaries == []
    noisier = design(5, SIZES, analysis=ladder_analysis, noise=0.01, overrides=["schedule.learning_rate=2e-3"])
    assert noisier.law.residual_deviation == 0.01
    without = {key: value for key, value in ladder_analysis.recipe.items() if key != "schedule.learning_rate"}
    with pytest.raises(UserError) as refused:
        design(5, SIZES, analysis=replace(ladder_analysis, recipe=without))
    assert (refused.value.code, refused.value.key) == ("no-learning-rate-for-design", "--set")
    laws = {name: law for name, law in ladder_analysis.laws.items() if name != "law_of_parameters_and_data"}
    refusals = {"law_of_parameters_and_data": "the reason"}
    with pytest.raises(UserError, match="the reason") as refused:
        design(5, SIZES, analysis=replace(ladder_analysis, laws=laws, refused=refusals))
    assert (refused.value.code, refused.value.key) == ("no-law-for-design", "--laws")


REFUSED = {
    "two sizes": (5, SIZES[:2], (), "too-few-design-sizes", "--sizes"),
    "a size twice": (5, (*SIZES[:3], SIZES[0]), (), "too-few-design-sizes", "--sizes"),
    "no size": (5, ("nano", "450k", "middling"), (), "malformed-size", "model.size"),
    "near sizes": (5, ("1m", "1.25m", "1.5m"), (), "design-does-not-identify", "--sizes"),
    "one size": (5, ("1m", "1.001m", "1.002m"), (), "no-optimum-for-design", "--sizes"),
    "costs that do not grow": (5, ("1m", "1.03m", "1.06m"), (), "no-optimum-for-design", "--sizes"),
    "small budget": (0.1, SIZES, (), "design-budget-too-small", "--pflops"),
    "chosen key": (5, SIZES, ("train.steps=80",), "design-sets-key", "train.steps"),
    "folder": (5, SIZES, ("run.dir=here",), "design-sets-key", "run.dir"),
    "unknown key": (5, SIZES, ("train.stepz=80",), "unknown-key", "train.stepz"),
    "crop": (5, SIZES, ("data.crop=384",), "crop-multiple", "data.crop"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=[*REFUSED])
def test_a_design_that_does_not_determine_the_law_is_refused(case) -> None:
    pflops, sizes, overrides, code, key = case
    with pytest.raises(UserError) as refused:
        design(pflops, sizes, overrides=overrides)
    assert (refused.value.code, refused.value.key) == (code, key)


def test_the_least_budget_that_a_refusal_names_is_enough() -> None:
    with pytest.raises(UserError) as refused:
        design(0.1, SIZES)
    least = float(re.search(r"--pflops ([\d.]+)", str(refused.value)).group(1))
    assert 0.9 * least < design(least, SIZES).pflops.sum() <= least
    with pytest.raises(UserError):
        design(0.97 * least, SIZES)


def test_every_run_of_the_experiment_composes(experiments) -> None:
    overrides = ("optimizer=muon", "engine=accelerate", "train.batch_size=16", "optimizer.momentum=0.9")
    made = design(5, SIZES, overrides=overrides, seeds=2)
    write_experiment(made, experiments / "five.yaml")
    grids = OmegaConf.load(experiments / "five.yaml").hydra.sweeper.grids
    jobs = [
        ["experiment=five", *(f"{key}={value}" for key, value in (dict(grid) | {"train.seed": seed}).items())]
        for grid in grids
        for seed in grid["train.seed"].split(",")
    ]
    configs = [compose_sized([*job, "data.shards=shards"]) for job in jobs]
    assert len(configs) == 2 * len(SIZES)
    for config, size, cooldowns, seed in zip(
        configs, np.repeat(SIZES, 2), np.repeat(made.cooldowns, 2, axis=0), [0, 1] * len(SIZES), strict=True
    ):
        check(config, 1)
        assert (config.model.name, config.train.seed) == (size, seed)
        assert config.train.keep_at == list(cooldowns) and config.train.steps == cooldowns[-1]
        assert config.run.dir == f"runs/five/{size},seed={seed}"
        assert config.optimizer == compose_sized(made.overrides).optimizer and config.optimizer.momentum == 0.9
        assert (config.schedule, config.engine) == (
            compose_sized(made.overrides).schedule,
            compose_sized(made.overrides).engine,
        )
        assert (
            config.train.batch_size == 16
            and config.train.parametrisation == compose_sized(made.overrides).train.parametrisation
        )
    _, *cooldown_commands, _ = commands(made, "five")
    folders = [word for line in cooldown_commands for word in shlex.split(line) if word.startswith("runs/")]
    assert folders == [config.run.dir for config in configs]
    text = (experiments / "five.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n") and all(line in text for line in describe(made))


def test_a_file_that_launchers_do_not_find_is_refused(made, experiments, tmp_path) -> None:
    for path, code in (
        (tmp_path / "design.yaml", "design-not-among-experiments"),
        (experiments / "design.txt", "design-not-among-experiments"),
        (experiments / "ladder.yaml", "design-exists"),
    ):
        with pytest.raises(UserError) as refused:
            write_experiment(made, path)
        assert (refused.value.code, refused.value.key) == (code, "--out")


def test_the_command(experiments, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main(["design", "--pflops", "5", "--sizes", ",".join(SIZES), "--gpus", "1", "--out", str(experiments / "x.yaml")])
    printed = capsys.readouterr().out
    assert "mini" in printed and "log N* ±" in printed and "hpcm train experiment=x" in printed
    assert "Caveat" not in printed and "on 1 × H100 at 40%" in printed
    assert "too few" not in mistake_in(main, capsys, "design", "--pflops", "0", "--sizes", "nano")
    new = experiments / "y.yaml"
    chosen = ("--pflops", "5", "--sizes", ",".join(SIZES), "--gpu", "abacus", "--out", str(new))
    assert "abacus" in mistake_in(main, capsys, "design", *chosen)
    assert not new.exists()


@pytest.mark.launch
def test_a_small_design_trains(experiments, shards, two_images, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setitem(ASSUMED, "A", 800.0)  # N* of so little compute is large
    small = ("train.batch_size=2", "schedule.warmup=1", "data.crop=128", "model.fusion=none", "data.workers=0")
    made = design(8e-5, ("100k", "200k", "400k"), overrides=(*small, "engine=accelerate", "log.wandb=disabled"))
    write_experiment(made, experiments / "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    train, *cooldowns, _ = map(shlex.split, commands(made, "tiny"))
    arguments = [*train[1:-2], f"data.shards={shards}", f"eval.images={two_images}"]
    monkeypatch.setattr(sys, "argv", arguments)

    def run() -> None:
        train_main()
        for command in cooldowns:
            cooldown_command.main(command[2:])

    # A training sets RANK and MASTER_PORT in the environment of its process, which other tests start theirs from.
    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
    ends = {run.name: (run.step, run.curve(TRAINING)[0][-1]) for run in find_runs(["runs/tiny"])}
    for size, starts, steps in zip(made.sizes, made.cooldowns, made.steps, strict=True):
        assert ends[size.name][0] == starts[-1]
        for start, end in zip(starts, steps, strict=True):
            assert ends[f"{size.name},cooldown_at={start},decay=0.2"] == (
                end,
                pytest.approx(end * size.pflops_per_step),
            )
    assert len(ends) == made.steps.size + len(made.sizes)
    assert max(pflops for _, pflops in ends.values()) == pytest.approx(made.largest)
