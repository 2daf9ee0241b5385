"""Memory, FLOPs, communication and time of a run."""

from __future__ import annotations

import pytest
from small_training import FEW_BLOCKS

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Checkpointing, OptimizerConfig, Precision
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.training import estimate as estimates
from hpcm_scale.training.costs import optimizer_flops, training_flops_per_image
from hpcm_scale.training.engines.accelerate import AccelerateEngine


@pytest.fixture(autouse=True, scope="module")
def worked_out_once():
    """The same step is rehearsed for many tests below, and takes seconds each time."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("dry_run", "training_flops_per_image"):
            patched.setattr(estimates, name, remembering(getattr(estimates, name)))
        yield


def remembering(function):
    known = {}

    def answer(*arguments):
        key = repr(arguments)
        if key not in known:
            known[key] = function(*arguments)
        return known[key]

    return answer


NETWORK = ["model=2m", "model.fusion=none", *FEW_BLOCKS]
MODEL = compose(NETWORK).model


def needs(*overrides: str, world_size: int = 1) -> estimates.Estimate:
    """The estimate of a run of a small network."""
    config = compose([*NETWORK, "train.batch_size=8", *overrides])
    spec = RunSpec.of(config, world_size)
    return estimates.estimate(spec, config.model, config.engine, config.optimizer, len(config.train.ema))


# Bytes per parameter: weights, gradients, optimizer. Measured as tensors alive after a step of a real engine of
# DeepSpeed 0.19.8 on one process, which shards nothing away: stages 1 and 2 keep a second, flat copy of the weights
# for the optimizer; stage 3 a flat copy beside the gathered ones.
ONE_PROCESS = {
    "accelerate": (4, 4, 8),
    "zero0": (4, 4, 8),
    "zero1": (4, 4, 12),
    "zero2": (4, 4, 12),
    "zero3": (8, 4, 8),
}


@pytest.mark.parametrize("engine_name", ONE_PROCESS)
def test_memory_on_one_process(engine_name):
    result = needs(f"engine={engine_name}")
    memory, expected = result.memory, ONE_PROCESS[engine_name]
    measured = memory.weights, memory.gradients, memory.optimizer
    assert [value / result.parameters for value in measured] == pytest.approx(expected)
    assert memory.host == 0
    rehearsed = estimates.dry_run(MODEL, Precision.fp32, Checkpointing.none, 256, 8, True)
    assert memory.activations == rehearsed.activations
    assert result.launches_per_step == rehearsed.launches
    assert memory.device >= sum(measured) + memory.activations


# What is divided over the processes: nothing, the optimizer, also the gradients, also the weights.
@pytest.mark.parametrize(("engine_name", "shared"), [("zero0", ""), ("zero1", "o"), ("zero2", "og"), ("zero3", "ogw")])
def test_memory_on_eight_processes(engine_name, shared):
    alone, memory = needs(f"engine={engine_name}").memory, needs(f"engine={engine_name}", world_size=8).memory
    assert memory.gradients == pytest.approx(alone.gradients / (8 if "g" in shared else 1), rel=1e-5)
    assert memory.optimizer == pytest.approx(alone.optimizer / (8 if "o" in shared else 1), rel=1e-5)
    if "w" in shared:  # a share, and the layers gathered at a time: all of them for so small a model
        assert memory.weights == pytest.approx(alone.weights / 2 * (1 + 1 / 8), rel=1e-5)
    else:
        assert memory.weights == alone.weights
    assert memory.activations == pytest.approx(alone.activations / 8, rel=0.05)


@pytest.mark.parametrize(("engine_name", "processes"), [("accelerate", 1), ("zero0", 1), ("zero1", 8), ("zero3", 8)])
def test_averages_are_shared_out_as_the_optimizer_is(engine_name, processes):
    """Two of them, fp32; the whole checkpoint holds them beside weights and moments."""
    result = needs(f"engine={engine_name}", "train.ema=[0.05,0.1]", world_size=8)
    without = needs(f"engine={engine_name}", world_size=8)
    assert result.memory.averages == pytest.approx(8 * result.parameters / processes, rel=1e-5)
    assert result.memory.device - without.memory.device == result.memory.averages
    assert result.checkpoint == 5 * 4 * result.parameters
    hosted = needs("engine=zero3_offload", "train.ema=[0.05]").memory.host
    assert hosted - needs("engine=zero3_offload").memory.host == 4 * result.parameters


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_state_and_work_of_matrices_are_shared_where_state_is_sharded(optimizer):
    chosen = f"optimizer={optimizer}"
    alone, adam = needs(chosen), needs()
    assert alone.checkpoint - adam.checkpoint == alone.memory.optimizer - adam.memory.optimizer
    assert (alone.memory.optimizer < adam.memory.optimizer) == (optimizer == "muon")  # one tensor, not two
    products = alone.flops_per_step - adam.flops_per_step
    assert products == optimizer_flops(on_meta(MODEL), compose([chosen]).optimizer)
    assert alone.flops - adam.flops == products * compose([chosen]).train.steps
    whole, shared = needs(chosen, "engine=zero0", world_size=8), needs(chosen, world_size=8)
    assert (
        whole.flops == shared.flops == alone.flops
        and whole.memory.optimizer == needs(chosen, "engine=zero0").memory.optimizer
    )
    assert whole.flops_per_step - adam.flops_per_step // 8 == products
    assert shared.flops_per_step - adam.flops_per_step // 8 < products / 6
    assert shared.communication.matrices > 0 == whole.communication.matrices


def test_offload_keeps_the_state_in_host_memory():
    memory = needs("engine=zero3_offload", world_size=2).memory
    assert memory.gradients == memory.optimizer == 0
    assert memory.host == pytest.approx((4 + 4 + 12) * needs().parameters / 2, rel=1e-5)


def test_sharded_weights_are_made_layer_by_layer():
    whole, sharded, hosted = (needs(f"engine={name}", world_size=8) for name in ("zero2", "zero3", "zero3_offload"))
    assert whole.building == 4 * whole.parameters
    assert sharded.building == hosted.building < whole.building / 4


def test_accumulation_costs_no_memory():
    whole, parts = needs(), needs("train.micro_batch_size=1")
    assert parts.memory.activations < whole.memory.activations / 7
    assert parts.pflops == whole.pflops


@pytest.mark.launch
def test_less_is_kept_where_more_is_computed_again():
    model = compose(["model=micro", "model.fusion=none"]).model
    none, blocks, steps = (
        estimates.dry_run(model, Precision.fp32, checkpoint, 256, 8, True).activations for checkpoint in Checkpointing
    )
    assert steps < blocks < none / 2


def test_time_of_a_step_with_communication():
    result = needs(world_size=4)
    times = result.times(peak=1e12, mfu=0.5, bandwidth=1e9)
    assert times.compute == pytest.approx(result.flops_per_step / 0.5e12)  # two images per process
    sent = 4 * result.parameters * 3 / 4  # engine=zero2: all-reduced gradients, gathered weights
    assert times.communication == pytest.approx(3 * sent / 1e9)
    assert needs().times(peak=1e12, mfu=0.5, bandwidth=1e9).efficiency == 1


def test_a_step_takes_no_less_than_its_launches():
    result = needs("train.steps=1000")
    assert 850 < result.launches_per_step < 1100
    slow, fast = {"peak": 1e9, "mfu": 0.5}, {"peak": 1e18, "mfu": 0.5}
    assert result.seconds(**fast, launch=1e-5) == pytest.approx(1000 * result.launches_per_step * 1e-5)
    assert result.seconds(**slow, launch=1e-5) == result.seconds(**slow)
    assert result.times(**fast, bandwidth=1e9, launch=1e-5).compute == result.launches_per_step * 1e-5
    assert result.times(**slow, bandwidth=1e9, launch=1e-5).compute == result.flops_per_step / 0.5e9
    rounds = needs("train.steps=1000", "train.micro_batch_size=2")
    assert rounds.launches_per_step == pytest.approx(4 * result.launches_per_step, rel=0.01)


def test_flops_and_time_of_a_run():
    result = needs("train.steps=1000")
    flops = training_flops_per_image(on_meta(MODEL), 256)
    assert result.images == 8000 and result.flops == 8000 * flops and result.flops_per_step == 8 * flops
    assert result.pflops == pytest.approx(8000 * flops / 1e15)
    assert result.seconds(peak=1e15, mfu=0.5) == pytest.approx(2 * result.pflops)


def test_a_run_whose_crops_grow():
    result = needs("train.steps=10", "schedule.crops=[512]", "schedule.crop_boundaries=[0.8]")
    small, large = (estimates.training_flops_per_image(on_meta(MODEL), crop) for crop in (256, 512))
    assert result.images == 8 * 8 + 2 * 2 and result.flops == 64 * small + 4 * large
    assert result.flops_per_step == max(8 * small, 2 * large)
    steps = ((256, 8), (512, 2))
    model = MODEL, Precision.fp32, Checkpointing.none
    assert result.memory.activations == max(estimates.dry_run(*model, *step, True).activations for step in steps)


def test_bytes_of_a_checkpoint():
    engine = AccelerateEngine(OptimizerConfig(), accumulation=1, clip_norm=1.0)
    engine.prepare(HPCM(MODEL))
    assert sum(shard.values.nbytes for shard in engine.state_shards()) == needs().checkpoint
