"""Two recipes compared: efficiencies, the test of equal exponents, refusals, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from known_ladder import CROP, surface, write_run
from law_surfaces import training
from mistakes import mistake_in
from omegaconf import OmegaConf
from scipy import stats
from scipy.optimize import curve_fit, minimize_scalar

from hpcm_scale.commands.scaling import main
from hpcm_scale.errors import UserError
from hpcm_scale.scaling.compare import compare, differences, read_recipes
from hpcm_scale.scaling.laws.law import CannotFit
from hpcm_scale.scaling.laws.shared import fit_shared, p_equal_exponents
from hpcm_scale.scaling.runs import find_runs

SIZES, AMOUNTS = np.geomspace(2e5, 2e7, 4), np.geomspace(1e8, 1e10, 4)
DEARER = 1.1
"""Cost per pixel of the second recipe relative to the first."""
KAPPA = 0.79


def loss(size, pixels, by_size=1.0, by_data=1.0):
    return 0.5 + 0.3 * (size * by_size / 2e6) ** -0.25 + 0.2 * (pixels * by_data / 1e9) ** -0.4


def recipes(sizes, amounts, by_size=1.0, by_data=1.3, noise=0.0, seed=0, beta=0.0):
    """Trainings of two recipes; `beta` is added to that of the second."""
    draw = np.random.default_rng(seed).standard_normal
    places = list(product(sizes, amounts))
    first = [training(size, pixels, loss(size, pixels) * np.exp(noise * draw())) for size, pixels in places]
    second = [
        training(
            size, pixels, loss(size, pixels * (pixels / 1e9) ** (beta / 0.4), by_size, by_data) * np.exp(noise * draw())
        )
        for size, pixels in places
    ]
    return first, [replace(each, flops_per_pixel=DEARER * each.flops_per_pixel) for each in second]


def values(compared):
    return {each.of: each.value for each in compared.efficiencies}


def test_one_size_gives_the_efficiency_in_data_and_compute():
    compared = compare(*recipes(SIZES[:1], AMOUNTS))
    assert compared.formula == "L = E + B·(ρ_D·D)^−β"
    assert values(compared) == pytest.approx({"pixels (ρ_D)": 1.3, "compute at equal size": 1.3 / DEARER}, rel=1e-5)
    assert compared.law.parameters["exponent_D"] == pytest.approx(0.4, rel=1e-4)


def test_one_amount_of_data_gives_the_efficiency_in_size_and_compute():
    compared = compare(*recipes(SIZES, AMOUNTS[:1], by_size=0.8, by_data=1.0))
    expected = {"parameters (ρ_N)": 0.8, "compute at equal data": 0.8**KAPPA / DEARER}
    assert values(compared) == pytest.approx(expected, rel=1e-4)


def test_a_grid_gives_both_and_compute_is_that_of_the_best_split():
    """Against a search for the best size of each recipe at each budget."""
    by_size, by_data = 0.8, 1.3
    compared = compare(*recipes(SIZES, AMOUNTS, by_size, by_data))
    found = values(compared)
    assert found["parameters (ρ_N)"] == pytest.approx(by_size, rel=1e-4)
    assert found["pixels (ρ_D)"] == pytest.approx(by_data, rel=1e-4)

    def least(pflops, by_size=1.0, by_data=1.0, cost=1.0):
        def at(log_size):
            size = np.exp(log_size)
            return loss(size, 1e15 * pflops / (40 * cost * size**KAPPA), by_size, by_data)

        return minimize_scalar(at, bounds=(np.log(1e3), np.log(1e12)), method="bounded", options={"xatol": 1e-9}).fun

    ratio = found["compute at the optimal split"]
    for pflops in (0.1, 10.0, 1000.0):
        assert least(pflops / ratio, by_size, by_data, DEARER) == pytest.approx(least(pflops), rel=1e-6)


def test_data_at_equal_size_gives_the_same_loss():
    compared = compare(*recipes(SIZES, AMOUNTS, 0.8, 1.3))
    [equal] = [each.value for each in compared.efficiencies if "parameters, for" in each.of]
    size, pixels = np.exp(np.log(SIZES).mean()), np.exp(np.log(AMOUNTS).mean())
    assert loss(size, pixels / equal, 0.8, 1.3) == pytest.approx(loss(size, pixels), rel=1e-5)


def test_a_recipe_that_no_amount_of_data_helps_has_a_caveat():
    compared = compare(*recipes(SIZES, AMOUNTS, by_size=0.05))
    assert any("no amount of data" in warning for warning in compared.warnings)
    assert len(compared.efficiencies) == 3


def test_intervals_and_parameters_are_those_of_curve_fit():
    first, second = recipes(SIZES[:1], np.geomspace(1e8, 1e10, 6), noise=0.003)
    compared = compare(first, second)
    pixels = np.array([each.pixels for each in first + second])
    recipe = np.repeat([0.0, 1.0], len(first))

    def law(x, e, log_b, beta, log_rho):
        return np.log(e + np.exp(log_b - beta * (np.log(x / 1e9) + recipe * log_rho)))

    found, spread = curve_fit(law, pixels, np.log([each.loss for each in first + second]), (0.8, -1.6, 0.4, 0.0))
    half = stats.t.ppf(0.975, 8) * spread[3, 3] ** 0.5
    one = compared.efficiencies[0]
    np.testing.assert_allclose(np.log([one.value, one.low, one.high]), found[3] + [0, -half, half], rtol=1e-3)
    assert compared.law.degrees_of_freedom == 8


def test_coverage_and_level_in_simulations():
    """The long version is benchmarks/scaling_recipes.py."""
    held, rejected, found = [], [], []
    for seed in range(100):
        compared = compare(*recipes(SIZES[:1], AMOUNTS, noise=0.003, seed=seed))
        one = compared.efficiencies[0]
        held.append(one.low <= 1.3 <= one.high)
        found.append(one.value)
        rejected.append(p_equal_exponents(compared.law, compared.separate) < 0.05)
    assert sum(held) >= 88
    assert sum(rejected) <= 12
    assert np.quantile(found, [0.2, 0.8]) == pytest.approx([1.3, 1.3], abs=0.05)


def test_different_exponents_are_found():
    compared = compare(*recipes(SIZES, AMOUNTS, noise=0.003, beta=0.1))
    assert p_equal_exponents(compared.law, compared.separate) < 0.01
    change = np.log(compared.separate.interval(lambda p: p["difference_D"]))
    assert change[1] < 0.1 < change[2]


def test_two_amounts_have_no_irreducible_loss_and_no_test():
    compared = compare(*(runs * 2 for runs in recipes(SIZES[:1], AMOUNTS[:2], noise=0.003)))
    assert compared.law.parameters["E"] == 0
    assert compared.separate is None
    assert "two amounts of data" in compared.warnings[0]
    one = compared.efficiencies[0]
    assert one.low < 1.3 < one.high


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ((SIZES[:1], AMOUNTS[:1]), (SIZES[:1], AMOUNTS[:1]), "one size and one amount"),
        ((SIZES[:1], AMOUNTS), (SIZES[:2], AMOUNTS), "1 and 2 sizes"),
        ((SIZES[:1], AMOUNTS), (SIZES[1:2], AMOUNTS), "2 in all"),
        ((SIZES, AMOUNTS[:1]), (SIZES, AMOUNTS[1:2]), "1 and 1 amounts of data, 2 in all"),
        ((SIZES[:1], AMOUNTS[:2]), (SIZES[:1], AMOUNTS[2:3].repeat(2)), "2 and 1 amounts"),
        ((SIZES[:2], AMOUNTS[:2]), (SIZES[:2], AMOUNTS[:2]), "three of either"),
    ],
)
def test_what_the_trainings_cannot_tell_is_refused(first, second, reason):
    with pytest.raises(CannotFit, match=reason):
        compare(recipes(*first, noise=0.003)[0], recipes(*second, noise=0.003)[1])


def test_size_and_data_on_one_diagonal_are_refused():
    places = [(size, 500 * size) for size in np.geomspace(2e5, 2e7, 8)]
    draw = np.random.default_rng(0).standard_normal
    both = [[training(n, d, loss(n, d, 1, e) * np.exp(0.003 * draw())) for n, d in places] for e in (1.0, 1.3)]
    with pytest.raises(CannotFit, match="differ by less than a factor of 3"):
        compare(*both)


@pytest.mark.parametrize("values", [np.full(8, 0.7), 0.5 + 0.01 * np.arange(8.0) % 0.04])
def test_losses_that_do_not_fall_are_refused(values):
    with pytest.raises(CannotFit, match="no power law of D"):
        fit_shared({"D": np.tile(AMOUNTS, 2)}, np.arange(8) >= 4, values)


def write_recipe(folder: Path, steps: tuple[int, ...], **settings: object) -> Path:
    """Annealed runs of one size; the steps of an efficient recipe, `by_data`, count for more."""
    by_data, seed = settings.pop("by_data", 1.0), settings.pop("seed", 0)
    for number in steps:
        run = write_run(folder / f"{number}", "nano", number, decay=0.2, seed=seed)
        config = OmegaConf.load(run / "config.yaml")
        for key, value in settings.items():
            OmegaConf.update(config, key.replace("__", "."), value)
        OmegaConf.save(config, run / "config.yaml")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            pixels = line["train/images"] * CROP**2
            for key in ("train/loss", "eval/loss"):
                if key in line:
                    line[key] *= surface(1e6, pixels * by_data) / surface(1e6, pixels)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


mistake = partial(mistake_in, main)


@pytest.fixture(scope="module")
def two_recipes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_recipe(folder / "adam", (50, 100, 200, 400))
    write_recipe(folder / "soap", (50, 100, 200, 400), by_data=1.5, seed=1, optimizer__name="soap")
    write_recipe(folder / "elsewhere", (100,), seed=2, eval__images="other")
    return folder


def test_the_command(two_recipes, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    main(
        [
            "compare",
            f"adam={two_recipes / 'adam'}",
            *(f"new={two_recipes / 'soap' / str(n)}" for n in (50, 100, 200, 400)),
        ]
    )
    printed = capsys.readouterr().out
    assert "4 runs of adam, 4 of new" in printed
    assert "pixels (ρ_D)" in printed
    assert "Equal exponents: not rejected" in printed
    assert printed.splitlines()[-1].split() == ["optimizer.name", "adam", "soap"]


def test_mistakes(two_recipes, capsys):
    adam, soap, elsewhere = (two_recipes / name for name in ("adam", "soap", "elsewhere"))
    assert "LABEL=RUNS" in mistake(capsys, "compare", adam, soap)
    assert "LABEL=RUNS" in mistake(capsys, "compare", f"adam={adam}")
    assert "is in both" in mistake(capsys, "compare", f"adam={adam}", f"new={adam / '100'}")
    assert "eval.images" in mistake(capsys, "compare", f"adam={adam}", f"new={elsewhere}")
    assert "one size and one amount" in mistake(capsys, "compare", f"a={adam / '100'}", f"b={soap / '100'}")
    with pytest.raises(UserError) as error:
        read_recipes(["=x", "b=y"])
    assert error.value.code == "not-two-recipes"


def test_differences_are_those_of_sets_of_values(two_recipes):
    first, second = (find_runs([two_recipes / name]) for name in ("adam", "elsewhere"))
    assert [key for key, *_ in differences(first, second)] == ["eval.images"]
