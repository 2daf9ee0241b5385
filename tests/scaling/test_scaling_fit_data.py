"""The points of the laws: the frontier, with known answers and true envelopes, and trainings."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from law_surfaces import AMOUNTS, SIZES, ladder, training
from scipy.stats import linregress

from hpcm_scale.scaling import fit_data
from hpcm_scale.scaling.filters import smoothed
from hpcm_scale.scaling.fit_data import FrontierPoint, frontier, losses_at, running_minimum
from hpcm_scale.scaling.laws.law import CannotFit
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


def test_a_point_needs_to_be_below_all_curves_and_all_points_before() -> None:
    small = make_curve("small", [1, 2, 4, 8], [4.0, 3.0, 2.8, 2.75])
    large = make_curve("large", [2, 4, 16], [5.0, 2.9, 2.0])  # 2.41 at 8 PFLOPs: below small there
    stuck = make_curve("stuck", [5, 6], [3.5, 2.9])
    points = frontier([small, large, stuck])
    assert [(point.run, point.pflops) for point in points] == [("small", 1), ("small", 2), ("small", 4), ("large", 16)]
    assert [point.loss for point in points] == [4.0, 3.0, 2.8, 2.0]
    assert points[-1].pixels == 16e15 / 6e6
    assert frontier([]) == []


def test_points_are_tagged_as_annealed() -> None:
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
    beaten = make_curve("beaten", [4.1, 4.2], [2.75, 2.65], annealed_from=4)  # by the trunk, which is not annealed
    assert frontier([trunk, branch, late, beaten]) == points


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


def test_the_losses_of_each_size_at_one_compute():
    """Interpolated in log-log; the lowest run of a size, and whether it is annealed there."""
    compute = np.geomspace(0.1, 10, 30)
    curves = [
        make_curve(f"{size} {lift}", compute, lift * size**-0.1 * compute**-0.2, parameters=size, annealed_from=start)
        for size, lift, start in ((1000, 1.0, 5.0), (1000, 1.1, 0.0), (2000, 1.0, 0.0), (4000, 1.0, np.inf))
    ]
    late = make_curve("late", [3, 4], [1.0, 0.9], parameters=8000)
    found = losses_at([late, *curves[::-1]], 2.0)
    assert [(size, annealed) for size, _, annealed in found] == [(1000, False), (2000, True), (4000, False)]
    assert [loss for _, loss, _ in found] == pytest.approx([size**-0.1 * 2**-0.2 for size in (1000, 2000, 4000)])
    assert losses_at(curves, 10.1) == losses_at([], 1.0) == []


def test_sizes_are_compared_at_the_most_data_that_all_share():
    observations = ladder()
    cut = [each for each in observations if each.parameters < SIZES[-1] - 1 or each.pixels < AMOUNTS[-1]]
    points = fit_data.of_parameters(cut)
    assert len(points) == SIZES.size
    assert points.data == "annealed trainings on 1.00 B pixels, the most that all sizes share"
    assert all(run.endswith("-d1000000000-s0") for run in points.runs)
    assert points.warnings == ()
    full = fit_data.of_parameters(observations[::-1])
    assert full.data == "annealed trainings on 10.0 B pixels"
    assert list(full.variables["N"]) == sorted(full.variables["N"])


def test_a_batch_more_or_less_is_the_same_amount_of_data():
    observations = [replace(each, pixels=each.pixels * (1 + 0.001 * at)) for at, each in enumerate(ladder()[2::3])]
    assert fit_data.of_parameters(observations).warnings == ()


def test_without_shared_data_each_size_comes_with_its_longest_training():
    observations = [training(size, (1 + at) * 1e8, 1 / (1 + at)) for at, size in enumerate(SIZES)]
    observations.append(training(SIZES[0], 5e7, 2.0))
    points = fit_data.of_parameters(observations)
    assert list(points.loss) == [1 / (1 + at) for at in range(6)]
    assert points.warnings[0].startswith(
        "the sizes share no amount of training data (n200000 had 100 M pixels, n20000000"
    )


def test_unannealed_trainings_count_only_if_there_are_no_others():
    observations = ladder()
    mixed = [replace(each, annealed=each.pixels < AMOUNTS[-1]) for each in observations]
    assert fit_data.of_parameters(mixed).data == "annealed trainings on 1.00 B pixels"
    assert len(fit_data.of_parameters_and_data(mixed)) == 12
    hot = [replace(each, annealed=False) for each in observations]
    for points in (fit_data.of_parameters(hot), fit_data.of_parameters_and_data(hot)):
        assert "not annealed" in points.data
        assert points.warnings[0].startswith("no learning rate had decayed at the end of training")
    one_hot = [replace(each, annealed=each.parameters > SIZES[0]) for each in observations]
    points = fit_data.of_parameters(one_hot)
    assert "excluded from L(N), since their learning rate had not decayed: n200000" in points.warnings
    assert len(points) == 5


def test_every_training_of_a_size_is_a_point():
    points = fit_data.of_parameters(ladder(seeds=3))
    assert len(points) == 18
    assert points.different("N") == 6
    twice = [*ladder(), training(SIZES[0], AMOUNTS[-1], 5.0, run="zz again")]
    assert len(fit_data.of_parameters(twice)) == 7
    assert {"zz again", f"n200000-d{AMOUNTS[-1]:.0f}-s0"} <= set(fit_data.of_parameters(twice).runs)


def test_l_of_c_counts_each_run_once_at_its_last_annealed_point():
    points = [
        FrontierPoint(run, "nano", 200_000, 1e8, pflops, loss, annealed)
        for run, pflops, loss, annealed in (
            ("b", 0.3, 1.2, False),
            ("a", 0.1, 1.5, False),
            ("a", 0.2, 1.3, True),
            ("b", 0.4, 1.1, True),
            ("b", 0.5, 1.0, False),
            ("c", 0.6, 0.9, False),
        )
    ]
    found = fit_data.of_compute(points)
    assert (found.of, found.runs) == ("compute", ("a", "b"))
    np.testing.assert_array_equal(found.variables["C"], [0.2, 0.4])
    np.testing.assert_array_equal(found.loss, [1.3, 1.1])
    assert found.data == "each run's last point on the annealed frontier (2 points in all)"
    assert "points are dependent" in found.warnings[0] and found.warnings[1].startswith("only nano is on the frontier")
    hot = fit_data.of_compute([replace(point, annealed=False) for point in points])
    np.testing.assert_array_equal(hot.variables["C"], [0.2, 0.5, 0.6])
    assert any("no learning rate had decayed on the frontier" in warning for warning in hot.warnings)
    with pytest.raises(CannotFit, match="there is no frontier"):
        fit_data.of_compute([])


def test_the_cost_is_one_number_for_each_size():
    parameters, cost = fit_data.costs(ladder())
    np.testing.assert_array_equal(parameters, np.round(SIZES))
    np.testing.assert_allclose(cost, 40 * parameters**0.79)
