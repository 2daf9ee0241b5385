"""The learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest

from hpcm_scale.config.schema import ScheduleConfig
from hpcm_scale.training.optimizer import decay_start, learning_rate


def test_the_papers_schedule_at_its_own_length():
    schedule, steps = ScheduleConfig(), 2_000_000
    expected = {0: 1e-4, 1_599_999: 1e-4, 1_600_000: 3e-5, 1_799_999: 3e-5, 1_800_000: 1e-5, 1_900_000: 1e-6}
    for step, rate in (expected | {1_999_999: 1e-6}).items():
        assert learning_rate(schedule, step, steps) == pytest.approx(rate, rel=1e-12), step


@pytest.mark.parametrize("steps", [20, 240, 1000, 12_345, 999_983])
def test_fractions_drop_at_the_first_step_at_or_after_them(steps):
    schedule = ScheduleConfig(1.0, [0.1, 0.7, 0.9], [4.0, 3.0, 2.0, 1.0])
    drops = [
        step
        for step in range(1, steps)
        if learning_rate(schedule, step, steps) != learning_rate(schedule, step - 1, steps)
    ]
    assert drops == [math.ceil(steps / 10), math.ceil(7 * steps / 10), math.ceil(9 * steps / 10)]


def test_boundaries_in_steps_do_not_move_with_the_length():
    schedule = ScheduleConfig(1.0, [10, 20], [1.0, 0.5, 0.25])
    for steps in (15, 30, 1000):
        rates = [learning_rate(schedule, step, steps) for step in (0, 9, 10, 19, 20, 29)]
        assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_warm_up_is_linear_and_multiplies():
    schedule = ScheduleConfig(2.0, [0.5], [1.0, 0.1], warmup=4)
    assert [learning_rate(schedule, step, 100) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(ScheduleConfig(2.0, [2], [1.0, 0.1], warmup=4), 2, 100) == pytest.approx(0.15)
    assert learning_rate(ScheduleConfig(2.0, [], [1.0]), 99, 100) == 2.0


@pytest.mark.parametrize(("decay", "start"), [(0.25, 30), (12.0, 28), (1.0, 0), (40.0, 0)])
def test_the_decay_ends_the_run(decay, start):
    schedule = ScheduleConfig(2e-3, [], [1.0], decay=decay)
    rates = [learning_rate(schedule, step, 40) for step in range(40)]
    assert decay_start(schedule, 40) == start
    assert rates[: start + 1] == [2e-3] * (start + 1)
    for step in range(start, 40):
        assert rates[step] == pytest.approx(2e-3 * (1 - math.sqrt((step - start) / (40 - start))), rel=1e-12)
    assert all(later < earlier for earlier, later in zip(rates[start:], rates[start + 1 :], strict=False))
    assert 0 < rates[-1] < 2e-3 / (40 - start)


def test_no_decay_unless_asked():
    schedule = ScheduleConfig(1.0, [], [1.0], warmup=4)
    assert decay_start(schedule, 10) == 10
    assert [learning_rate(schedule, step, 10) for step in range(10)] == [0.25, 0.5, 0.75] + [1.0] * 7
