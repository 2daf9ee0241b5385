"""Phases of crops: as many pixels in every step, images without gaps, boundaries where they are asked for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcm_scale.config.checks import check
from hpcm_scale.config.schema import Config, Fusion
from hpcm_scale.config.spec import Phase, RunSpec, crop_starts
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
    spec = RunSpec.of(configured([512], [0.8]), world_size=2)
    assert spec.phases == (Phase(0, 80, 256, 32, 0, 16), Phase(80, 100, 512, 8, 2560, 4))
    assert [spec.phase_at(step).crop for step in (0, 79, 80, 100)] == [256, 256, 512, 512]
    assert [spec.images_at(step) for step in (0, 79, 80, 81, 100)] == [0, 2528, 2560, 2568, 2720]
    assert spec.images == 2720 and spec.steps == 100
    assert spec.batch == "32 crops of 256² (8 of 512² from step 80 on)"


def test_without_crops_there_is_one_phase():
    spec = RunSpec.of(configured([], [], steps=7), world_size=1)
    assert spec.phases == (Phase(0, 7, 256, 32, 0, 32),) and spec.batch == "32 images"
    assert [spec.images_at(step) for step in range(8)] == [32 * step for step in range(8)]


def test_a_crop_may_shrink_and_a_boundary_never_come():
    assert RunSpec.of(configured([512, 128, 256], [3.0, 50, 200]), world_size=1).phases == (
        Phase(0, 3, 256, 32, 0, 32),
        Phase(3, 50, 512, 8, 96, 8),
        Phase(50, 100, 128, 128, 96 + 47 * 8, 128),
    )
    assert RunSpec.of(configured([512], [0.8], steps=1), world_size=1).phases == (Phase(0, 1, 256, 32, 0, 32),)


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
    spec = RunSpec.of(config, processes)
    found = spec.phases
    assert found[0].first_step == found[0].first_image == 0 and found[-1].last_step == config.train.steps
    assert (found[0].crop, found[0].batch_size) == (config.data.crop, config.train.batch_size)
    for phase, following in pairwise(found):
        assert phase.last_step == following.first_step
        steps = phase.last_step - phase.first_step
        assert following.first_image == phase.first_image + steps * phase.batch_size
    rounds = spec.accumulation
    assert spec.deepspeed["gradient_accumulation_steps"] == rounds
    for phase in found:
        assert phase.first_step < phase.last_step
        assert phase.batch_size * phase.crop**2 == config.train.batch_size * config.data.crop**2
        micro = phase.micro_batch_size
        assert micro >= 1 and micro * processes * rounds == phase.batch_size
    for step in {0, *(edge for phase in found for edge in phase[:2]), config.train.steps // 2}:
        phase = spec.phase_at(step)
        assert phase.first_step <= step < phase.last_step or step == phase.last_step == config.train.steps
        if step < config.train.steps:
            assert spec.images_at(step + 1) - spec.images_at(step) == phase.batch_size


@given(st.integers(1, 10**6), st.floats(0.001, 0.999))
def test_a_fraction_is_the_step_at_which_the_learning_rate_drops(steps, boundary):
    config = configured([512], [boundary], steps=steps)
    config.schedule.boundaries, config.schedule.factors, config.schedule.learning_rate = [boundary], [1.0, 0.5], 1.0
    [start] = crop_starts(config.schedule, steps)
    assert learning_rate(config.schedule, start - 1, steps) == 1.0
    assert start == steps or learning_rate(config.schedule, start, steps) == 0.5


REFUSED = [
    (configured([512], []), "crop-boundaries-length", "schedule.crop_boundaries"),
    (configured([], [0.5]), "crop-boundaries-length", "schedule.crop_boundaries"),
    (configured([512, 768], [0.9, 0.8]), "descending-boundaries", "schedule.crop_boundaries"),
    (configured([512], [0.0]), "out-of-range", "schedule.crop_boundaries"),
    (configured([512], [math.nan]), "out-of-range", "schedule.crop_boundaries"),
    (configured([512], [math.inf]), "out-of-range", "schedule.crop_boundaries"),
    (configured([512, 768], [0.5, 80]), "mixed-boundaries", "schedule.crop_boundaries"),
    (configured([500], [0.5]), "crop-multiple", "schedule.crops"),
    (configured([0], [0.5]), "out-of-range", "schedule.crops"),
    (configured([512], [0.5], batch_size=2), "crop-pixels", "train.batch_size"),
]


@pytest.mark.parametrize(("config", "code", "key"), REFUSED)
def test_refused(config, code, key):
    with pytest.raises(UserError) as refused:
        check(config, 1)
    assert (refused.value.code, refused.value.key) == (code, key) and "\n" not in str(refused.value)


def test_a_model_with_attention_takes_multiples_of_256():
    config = configured([384], [0.5], batch_size=36)
    check(config, 1)
    config.model.fusion = Fusion.attention
    with pytest.raises(UserError, match=r"a side of 384 .* multiples of 256; use 512$") as refused:
        check(config, 1)
    assert refused.value.key == "schedule.crops"


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
        spec = RunSpec.of(config, world_size)
        assert all(phase.batch_size % (world_size * spec.accumulation) == 0 for phase in spec.phases)
