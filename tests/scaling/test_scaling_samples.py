from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from law_surfaces import AMOUNTS, SIZES, ladder, training

from hpcm_scale.scaling import fit_data
from hpcm_scale.scaling.fit_data import FrontierPoint
from hpcm_scale.scaling.laws.law import CannotFit


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


def test_every_seed_is_a_training():
    points = fit_data.of_parameters(ladder(seeds=3))
    assert len(points) == 18
    assert points.different("N") == 6
    twice = [*ladder(), training(SIZES[0], AMOUNTS[-1], 5.0, run="zz again")]
    assert len(fit_data.of_parameters(twice)) == 6  # the same seed again is no other training
    twin = [*ladder(), replace(ladder()[2], run="twin", model="twin")]
    assert len(fit_data.of_parameters(twin)) == 7  # a model of the same size is


def test_a_frontier_counts_each_run_once():
    points = [
        FrontierPoint(run, "nano", 200_000, 1e8, pflops, loss, annealed)
        for run, pflops, loss, annealed in (
            ("b", 0.3, 1.2, False),
            ("a", 0.1, 1.5, False),
            ("a", 0.2, 1.3, True),
            ("b", 0.4, 1.1, True),
            ("b", 0.5, 1.0, False),
        )
    ]
    whole = fit_data.of_compute(points, whole=True)
    assert (whole.of, whole.runs) == ("compute_whole", ("a", "b"))
    np.testing.assert_array_equal(whole.variables["C"], [0.2, 0.5])
    np.testing.assert_array_equal(whole.loss, [1.3, 1.0])
    assert whole.data == "each run's last point on the whole frontier (5 points in all)"
    assert len(whole.warnings) == 3
    assert whole.warnings[-1].startswith("only nano is on the frontier")
    assert "points are dependent" in whole.warnings[0]
    assert len(fit_data.of_compute([point for point in points if point.annealed], whole=False).warnings) == 2
    with pytest.raises(CannotFit, match="no run is on the annealed frontier"):
        fit_data.of_compute([], whole=False)


def test_the_cost_is_one_number_for_each_size():
    parameters, cost = fit_data.costs(ladder())
    np.testing.assert_array_equal(parameters, np.round(SIZES))
    np.testing.assert_allclose(cost, 40 * parameters**0.79)
