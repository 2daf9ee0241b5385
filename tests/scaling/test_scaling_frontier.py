"""The frontier: known answers of published runs, and surfaces whose true envelope is known."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import linregress

from hpcm_scale.scaling.filters import smoothed
from hpcm_scale.scaling.fit_data import frontier, isoflop_slices, running_minimum
from hpcm_scale.scaling.observations import Curve


def make_curve(
    run: str,
    pflops: np.ndarray,
    loss: np.ndarray,
    *,
    parameters: int = 1_000_000,
    annealed_from: float = np.inf,
    smooth: bool = False,
) -> Curve:
    """A curve whose learning rate is a hundredth from `annealed_from` PFLOPs on."""
    pflops, loss = np.asarray(pflops, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    rate = np.where(pflops >= annealed_from, 1e-5, 1e-3)
    return Curve(
        run=run,
        model=f"{parameters}",
        parameters=parameters,
        pflops=pflops,
        pixels=pflops * 1e15 / (6.0 * parameters),
        loss=loss,
        smoothed=smoothed(pflops, loss, rate) if smooth else loss,
        learning_rate=rate,
        annealed=pflops >= annealed_from,
    )


def envelope(curves: list[Curve]) -> list[tuple[str, float, float]]:
    """The definition, one point at a time: no curve lower here, no point as low before."""
    points = [(c, x, y) for c in curves for x, y in zip(c.pflops, c.smoothed, strict=True)]

    def interpolated(curve: Curve, at: float) -> float:
        for left, right in zip(range(curve.pflops.size - 1), range(1, curve.pflops.size), strict=True):
            if curve.pflops[left] <= at <= curve.pflops[right]:
                part = np.log(at / curve.pflops[left]) / np.log(curve.pflops[right] / curve.pflops[left])
                return curve.smoothed[left] * (curve.smoothed[right] / curve.smoothed[left]) ** part
        return np.inf

    return sorted(
        (
            (c.run, x, y)
            for c, x, y in points
            if not any(interpolated(other, x) < y * (1 - 1e-12) for other in curves if other is not c)
            and not any(before <= x and low <= y for _, before, low in points if (before, low) != (x, y))
        ),
        key=lambda point: point[1],
    )


@pytest.mark.parametrize(("finals", "number", "slope"), [(False, 181, -0.06745), (True, 40, -0.08854)])
def test_the_frontier_of_published_checkpoints(shared: Path, finals: bool, number: int, slope: float) -> None:
    with (shared / "known_answers" / "misfit_scaling_results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if not finals or row["current_steps"] == row["total_steps"]]
    compute, loss = (np.array([float(row[key]) for row in rows]) for key in ("C", "loss"))
    chosen = running_minimum(compute, loss)
    assert chosen.size == number
    assert linregress(np.log(compute[chosen]), np.log(loss[chosen])).slope == pytest.approx(slope, abs=5e-6)
    shuffled = np.random.default_rng(0).permutation(compute.size)
    again = shuffled[running_minimum(compute[shuffled], loss[shuffled])]  # some runs are in the table twice
    assert np.array_equal(compute[again], compute[chosen]) and np.array_equal(loss[again], loss[chosen])


@pytest.mark.parametrize("growth", [1.0, 1.3, 2.0])
def test_the_frontier_of_published_curves(shared: Path, growth: float) -> None:
    """Ten models after the same numbers of tokens; compute is tokens times `growth` a model."""
    with (shared / "known_answers" / "toy_wikitext_curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    tokens = np.array([float(row["Step"]) for row in rows])
    curves = [
        make_curve(f"k{k}", tokens * growth**k, [float(row[f"Group: k_is_{k} - test-tokens/avg_loss"]) for row in rows])
        for k in range(1, 11)
    ]
    points = frontier(curves)
    assert [(point.run, point.pflops, point.loss) for point in points] == envelope(curves)
    if growth == 1.0:  # the largest is lowest after any number of tokens
        lowest = np.min([curve.loss for curve in curves], axis=0)
        assert [(point.run, point.loss) for point in points] == [("k10", loss) for loss in lowest]
    else:
        assert len({point.run for point in points}) > 2


def test_isoflop_argmins_of_published_runs(shared: Path) -> None:
    runs = json.loads((shared / "known_answers" / "cs336_isoflops_curves.json").read_text())
    curves = [
        make_curve(f"{index}", [run["compute_budget"] / 1e15], [run["final_loss"]], parameters=run["parameters"])
        for index, run in enumerate(runs)
    ]
    curves = [replace(curve, model=curve.run) for curve in curves]  # or sizes were interpolated between budgets
    slices = isoflop_slices(curves, sorted({curve.pflops[0] for curve in curves}))
    assert len(slices) == 9 and sum(one.loss.size for one in slices) == len(runs)
    compute = np.array([one.pflops * 1e15 for one in slices])
    fit = linregress(np.log(compute), np.log([one.parameters[np.argmin(one.loss)] for one in slices]))
    assert fit.slope == pytest.approx(0.46868, abs=5e-6)
    assert np.exp(fit.intercept + fit.slope * np.log(1e23)) == pytest.approx(70.05e9, abs=0.005e9)
    for one in slices:  # the parabola's lowest point is near that of the points
        step = np.diff(np.log(one.parameters)).max()
        assert abs(np.log(one.best_parameters / one.parameters[np.argmin(one.loss)])) < 1.5 * step


def test_a_point_needs_to_be_below_all_curves_and_all_points_before() -> None:
    small = make_curve("small", [1, 2, 4, 8], [4.0, 3.0, 2.8, 2.75])
    large = make_curve("large", [2, 4, 16], [5.0, 2.9, 2.0])  # 2.41 at 8 PFLOPs: below small there
    stuck = make_curve("stuck", [5, 6], [3.5, 2.9])
    points = frontier([small, large, stuck])
    assert [(point.run, point.pflops) for point in points] == [("small", 1), ("small", 2), ("small", 4), ("large", 16)]
    assert [point.loss for point in points] == [4.0, 3.0, 2.8, 2.0]
    assert points[-1].pixels == 16e15 / 6e6
    assert frontier([]) == []


def test_points_are_tagged_and_the_annealed_frontier_is_its_own() -> None:
    trunk = make_curve("trunk", [1, 2, 3, 4, 5], [4.0, 3.0, 2.7, 2.6, 2.55])
    branch = make_curve("branch", [2.2, 2.5], [2.9, 2.5], annealed_from=2.4)
    late = make_curve("late", [4.5, 4.8], [2.5, 2.3], annealed_from=4.6)
    points = frontier([trunk, branch, late])
    assert [(point.run, point.annealed) for point in points] == [
        ("trunk", False),
        ("trunk", False),
        ("branch", False),
        ("branch", True),
        ("late", True),
    ]
    decayed = frontier([trunk, branch, late], annealed_only=True)
    assert [(point.run, point.loss) for point in decayed] == [("branch", 2.5), ("late", 2.3)]
    assert frontier([trunk], annealed_only=True) == []


def test_neither_order_nor_length_of_journals_matters() -> None:
    compute = np.geomspace(0.01, 10, 50_000)
    curves = [
        make_curve(f"r{size}", compute * size, 1 + 2 / size + 0.5 * compute**-0.4, parameters=size * 1000)
        for size in (1, 2, 4)
    ]
    points = frontier(curves)
    assert frontier(curves[::-1]) == points
    assert len(points) < 80 * np.log10(points[-1].pflops / points[0].pflops) + 3
    assert points[-1].pflops == compute[-1] * 4  # every run's end takes part
    arrays = ("pflops", "pixels", "loss", "smoothed", "learning_rate", "annealed")
    thinned = replace(curves[1], **{key: getattr(curves[1], key)[9::10] for key in arrays})
    for one, other in zip(points, frontier([curves[0], thinned, curves[2]]), strict=True):
        assert (one.run, one.loss) == (other.run, pytest.approx(other.loss, rel=1e-3))


@pytest.mark.parametrize(("number", "bias"), [(10, -1.54), (100, -2.51)])
def test_a_running_minimum_of_noise_is_low(number: int, bias: float) -> None:
    """Where nothing is to be gained, it still finds 1.5 and 2.5 standard deviations."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        loss = 2 + 0.01 * generator.standard_normal(number)
        found.append((loss[running_minimum(np.arange(1.0, number + 1), loss)[-1]] - 2) / 0.01)
    assert np.mean(found) == pytest.approx(bias, abs=0.04)


@pytest.mark.parametrize("deviation", [0.01, 0.1])
def test_smoothing_first_leaves_little_bias(deviation: float) -> None:
    """Means over the frontier of eight sizes, in standard deviations of one line."""

    def surface(parameters: float, pflops: np.ndarray) -> np.ndarray:
        return 0.5 + 30 * parameters**-0.3 + 400 * (pflops * 1e15 / (60 * parameters**0.8)) ** -0.35

    left, raw = [], []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        curves = []
        for size in np.geomspace(2e5, 2e7, 8):
            compute = np.arange(1, 4001) / 4000 * 4800 * size**1.8 / 1e15
            loss = surface(size, compute) * (1 + deviation * generator.standard_normal(4000))
            curves.append(make_curve(f"{size}", compute, loss, parameters=int(size), smooth=True))
        first = np.quantile(curves[0].pflops, 0.05)  # before, the loss falls within a window

        def excess(compute: np.ndarray, loss: np.ndarray, curves=curves, first=first) -> float:
            compute, loss = compute[compute > first], loss[compute > first]
            spans = [(curve.pflops[0] <= compute) & (compute <= curve.pflops[-1]) for curve in curves]
            true = np.min(
                [
                    np.where(span, surface(curve.parameters, compute), np.inf)
                    for curve, span in zip(curves, spans, strict=True)
                ],
                axis=0,
            )
            return np.mean(loss / true - 1) / deviation

        points = frontier(curves)
        left.append(excess(np.array([p.pflops for p in points]), np.array([p.loss for p in points])))
        compute, loss = (np.concatenate([getattr(c, key) for c in curves]) for key in ("pflops", "loss"))
        chosen = running_minimum(compute, loss)
        raw.append(excess(compute[chosen], loss[chosen]))
    assert abs(np.mean(left)) < 0.05
    assert np.mean(raw) < -2


def test_a_slice_gives_the_best_size() -> None:
    """Losses that are a parabola in log N around 3e6·C^0.5 are taken apart exactly."""
    compute = np.geomspace(0.1, 10, 400)
    sizes = (1_000_000, 2_000_000, 4_000_000, 8_000_000)

    def loss(size: float, pflops: np.ndarray) -> np.ndarray:
        return (1 + pflops**-0.2) * np.exp(0.02 * np.log(size / (3e6 * pflops**0.5)) ** 2)

    curves = [make_curve(f"{size}", compute, loss(size, compute), parameters=size) for size in sizes]
    budgets = [0.5, 1.0, 2.0, 100.0]
    slices = isoflop_slices(curves[::-1], budgets)
    assert [one.pflops for one in slices] == budgets[:3]
    for one in slices:
        assert one.parameters.tolist() == list(sizes)
        assert one.loss == pytest.approx(loss(one.parameters, one.pflops), rel=1e-3)
        assert one.best_parameters == pytest.approx(3e6 * one.pflops**0.5, rel=0.02)
        assert one.best_loss == pytest.approx(1 + one.pflops**-0.2, rel=1e-3)
        assert one.curvature == pytest.approx(0.02, rel=0.05)
    assert isoflop_slices(curves[:2], [1.0])[0].best_parameters is None
    outside = isoflop_slices(curves, [9.9])[0]  # N* = 9.4e6, beyond the largest size
    assert (outside.best_parameters, np.argmin(outside.loss)) == (None, 3)
