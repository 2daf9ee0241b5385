"""Phases of crops: as many pixels in every step, images without gaps, boundaries where they are asked for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcm_scale.config.checks import accumulation, check, micro_batch_size
from hpcm_scale.config.deepspeed import deepspeed_dictionary
from hpcm_scale.config.phases import Phase, crop_starts, described, images_at, phase_at, phases
from hpcm_scale.config.schema import Config, Fusion
from hpcm_scale.errors import UserError
from hpcm_scale.training.optimizer import learning_rate


def configured(
    crops: list[int],
    boundaries: list[float],
    *,
    crop: int = 256,
    batch_size: int = 32,
    micro_batch_size: int | None = None,
    steps: int = 100,
) -> Config:
    """The defaults, of which most do not matter here, for a model whose inputs are multiples of 128 pixels."""
    config = Config()
    config.model.fusion = Fusion.none
    config.data.crop, config.schedule.crops, config.schedule.crop_boundaries = crop, crops, boundaries
    config.train.batch_size, config.train.micro_batch_size, config.train.steps = batch_size, micro_batch_size, steps
    return config


def test_the_example():
    config = configured([512], [0.8])
    assert phases(config) == [Phase(0, 80, 256, 32, 0), Phase(80, 100, 512, 8, 2560)]
    assert [phase_at(config, step).crop for step in (0, 79, 80, 100)] == [256, 256, 512, 512]
    assert [images_at(config, step) for step in (0, 79, 80, 81, 100)] == [0, 2528, 2560, 2568, 2720]
    assert described(config) == "32 crops of 256² (8 of 512² from step 80 on)"


def test_without_crops_there_is_one_phase():
    config = configured([], [], steps=7)
    assert phases(config) == [Phase(0, 7, 256, 32, 0)] and described(config) == "32 images"
    assert [images_at(config, step) for step in range(8)] == [32 * step for step in range(8)]


def test_a_crop_may_shrink_and_a_boundary_never_come():
    assert phases(configured([512, 128, 256], [3.0, 50, 200])) == [
        Phase(0, 3, 256, 32, 0),
        Phase(3, 50, 512, 8, 96),
        Phase(50, 100, 128, 128, 96 + 47 * 8),
    ]
    assert phases(configured([512], [0.8], steps=1)) == [Phase(0, 1, 256, 32, 0)]


@st.composite
def schedules(draw) -> tuple[Config, int]:
    """Configurations whose micro-batch comes out whole, and processes."""
    crop, *crops = draw(st.lists(st.sampled_from([128, 256, 384, 512, 640, 768]), min_size=1, max_size=5))
    steps = draw(st.integers(1, 3000))
    one = st.floats(0.001, 0.999) if draw(st.booleans()) else st.floats(1, 1.2 * steps + 1)
    boundaries = sorted(draw(st.lists(one, min_size=len(crops), max_size=len(crops))))
    unit = math.lcm(*(side**2 // math.gcd(side**2, crop**2) for side in crops))
    micro, processes, rounds = unit * draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    given_micro = micro if rounds > 1 or draw(st.booleans()) else None
    sizes = {"crop": crop, "batch_size": micro * processes * rounds, "micro_batch_size": given_micro, "steps": steps}
    return configured(crops, boundaries, **sizes), processes


@given(schedules())
def test_phases_cover_the_run_at_equal_cost(schedule):
    config, processes = schedule
    check(config, processes)
    found = phases(config)
    assert found[0].first_step == found[0].first_image == 0 and found[-1].last_step == config.train.steps
    assert (found[0].crop, found[0].batch_size) == (config.data.crop, config.train.batch_size)
    for phase, following in pairwise(found):
        assert phase.last_step == following.first_step
        steps = phase.last_step - phase.first_step
        assert following.first_image == phase.first_image + steps * phase.batch_size
    rounds = accumulation(config, processes)
    assert deepspeed_dictionary(config, processes)["gradient_accumulation_steps"] == rounds
    for phase in found:
        assert phase.first_step < phase.last_step
        assert phase.batch_size * phase.crop**2 == config.train.batch_size * config.data.crop**2
        micro = micro_batch_size(config, processes, phase)
        assert micro >= 1 and micro * processes * rounds == phase.batch_size
    for step in {0, *(edge for phase in found for edge in phase[:2]), config.train.steps // 2}:
        phase = phase_at(config, step)
        assert phase.first_step <= step < phase.last_step or step == phase.last_step == config.train.steps
        if step < config.train.steps:
            assert images_at(config, step + 1) - images_at(config, step) == phase.batch_size


@given(st.integers(1, 10**6), st.floats(0.001, 0.999))
def test_a_fraction_is_the_step_at_which_the_learning_rate_drops(steps, boundary):
    config = configured([512], [boundary], steps=steps)
    config.schedule.boundaries, config.schedule.factors, config.schedule.learning_rate = [boundary], [1.0, 0.5], 1.0
    [start] = crop_starts(config)
    assert learning_rate(config.schedule, start - 1, steps) == 1.0
    assert start == steps or learning_rate(config.schedule, start, steps) == 0.5


REFUSED = [
    (configured([512], []), "schedule.crops has 1 entries and schedule.crop_boundaries 0; give one boundary for each"),
    (configured([], [0.5]), "schedule.crops has 0 entries and schedule.crop_boundaries 1"),
    (configured([512, 768], [0.9, 0.8]), "schedule.crop_boundaries=[0.9, 0.8] must rise"),
    (configured([512], [0.0]), "schedule.crop_boundaries=[0.0] must be greater than 0"),
    (configured([512], [math.nan]), "schedule.crop_boundaries=[nan] must be greater than 0"),
    (configured([512], [math.inf]), "schedule.crop_boundaries=[inf] must be greater than 0"),
    (configured([512, 768], [0.5, 80]), "schedule.crop_boundaries=[0.5, 80] mixes fractions (< 1) and steps (≥ 1)"),
    (configured([500], [0.5]), "whose inputs are multiples of 128 pixels; use 512 instead of 500"),
    (configured([0], [0.5]), "schedule.crops=[0] must be at least 128"),
    (configured([512], [0.5], batch_size=2), "cannot replace the 2 crops of 256² of a forward pass by as many pixels"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(config, message):
    with pytest.raises(UserError) as refused:
        check(config, 1)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_with_attention_takes_multiples_of_256():
    config = configured([384], [0.5], batch_size=36)
    check(config, 1)
    config.model.fusion = Fusion.attention
    with pytest.raises(UserError, match=r"schedule\.crops=\[384\] does not fit .* multiples of 256 .* use 512 instead"):
        check(config, 1)


@pytest.mark.parametrize("crops", [[512], [384], [512, 384], [640]])
@pytest.mark.parametrize(("world_size", "micro"), [(1, None), (3, None), (2, 2), (2, 10)])
def test_the_mends_in_the_messages_mend(crops, world_size, micro):
    for batch_size in range(1, 60, 7):
        config = configured(crops, [0.5, 0.7][: len(crops)], batch_size=batch_size, micro_batch_size=micro)
        for _ in range(3):
            try:
                check(config, world_size)
            except UserError as error:  # noqa: PERF203
                key, value = str(error).rpartition("use ")[2].removeprefix("train.").split("=")
                setattr(config.train, key, int(value))
        check(config, world_size)
        rounds = accumulation(config, world_size)
        assert all(phase.batch_size % (world_size * rounds) == 0 for phase in phases(config))
