"""What processes send each other: counted in a real step of two, and the times that follow from it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small_training import ALL_SHARDED, FEW_BLOCKS

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Checkpointing, Config, Precision
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.training.dry_run import GatherCost, LayerUse, dry_run, gather_cost
from hpcm_scale.training.estimate import Communication, communication
from hpcm_scale.training.matrix_optimizers import cost

CHEAP = ["model=nano", "model.fusion=none", *FEW_BLOCKS, "data.crop=128", "train.batch_size=2"]
SMALL = "+engine.options.zero_optimization.stage3_"
SOME_STAYS = [f"{SMALL}param_persistence_threshold=1000", f"{SMALL}max_reuse_distance=60000"]
ACCUMULATE = ["train.batch_size=4", "train.micro_batch_size=1"]


CASES = {
    "zero0": ["engine=zero0", *ACCUMULATE],
    "zero1": ["engine=zero1", *ACCUMULATE],
    "zero2": ["engine=zero2", *ACCUMULATE],
    "zero3": ["engine=zero3", *ACCUMULATE],
    "nothing stays": ["engine=zero3", *ALL_SHARDED, f"{SMALL}prefetch_bucket_size=0"],
    "some stays": [
        *("engine=zero3", "engine.precision=bf16", *SOME_STAYS),
        *(f"{SMALL}prefetch_bucket_size=20000", f"{SMALL}max_live_parameters=60000"),
    ],
    "computed again": [
        "engine=zero3",
        "engine.activation_checkpointing=steps",
        *SOME_STAYS,
        f"{SMALL}prefetch_bucket_size=0",
    ],
    "accelerate": ["engine=accelerate", *ACCUMULATE],
    "muon": ["engine=zero2", "optimizer=muon"],
    "muon, zero3": ["engine=zero3", "optimizer=muon"],
}


def overrides(case: list[str]) -> list[str]:
    return [*CHEAP, *case]


def computed(config: Config, world_size: int) -> Communication:
    gathered, spec, model = None, RunSpec.of(config, world_size), on_meta(config.model)
    if config.engine.zero_stage == 3:
        uses = dry_run(config.model, Precision.fp32, config.engine.activation_checkpointing, config.data.crop, 1).uses
        gathered = gather_cost(uses, spec.deepspeed["zero_optimization"])
    exchanged = cost(model, config.optimizer, world_size).exchanged
    return communication(config.engine, spec, parameter_count(model), gathered, exchanged)


@pytest.fixture(scope="module")
def counted(fork_server, tmp_path_factory):
    """Bytes per collective operation, summed over one step of two processes, by case."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    cases = json.dumps([overrides(case) for case in CASES.values()])
    folder = tmp_path_factory.mktemp("traffic")
    process = fork_server.start("traffic_probe", [cases], cwd=folder, env=environment, processes=2)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return dict(zip(CASES, map(json.loads, out.splitlines()), strict=True))


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_two_processes_send_what_is_computed(case, counted):
    """A ring of two sends half of what is gathered or scattered, and all of what is all-reduced."""
    measured, expected = counted[case], computed(compose(overrides(CASES[case])), world_size=2)
    reduced = measured.get("allreduce_", 0) + measured.get("_reduce_scatter_base_", 0) / 2
    assert reduced == pytest.approx(expected.gradients, abs=64)  # flags, and what fills up the last part
    assert measured.get("_allgather_base_", 0) / 2 == pytest.approx(expected.weights, rel=0.015, abs=64)
    # Half of it stays with the process: gradients of its own matrices, updates of its own parts.
    assert measured.get("alltoall_base_", 0) / 2 == pytest.approx(expected.matrices, rel=0.2)


@pytest.mark.launch
def test_traffic_by_engine_and_processes():
    whole = 4 * parameter_count(on_meta(compose(CHEAP).model)) * 7 / 8
    for engine, gradients, weights in (
        ("zero0", 2, 0),
        ("zero1", 2, 1),
        ("zero2", 2, 1),
        ("accelerate", 2, 0),
        ("zero3", 1, 1),
    ):
        found = computed(compose(overrides([f"engine={engine}", "train.batch_size=8"])), world_size=8)
        assert (found.gradients / whole, found.weights / whole) == pytest.approx((gradients, weights), rel=1e-6)
        alone = computed(compose(overrides([f"engine={engine}"])), world_size=1)
        assert alone.gradients == alone.weights == 0


LAYERS = [LayerUse(False, ((name, 10),)) for name in "ababab"]
STEP = LAYERS + [LayerUse(True, use.weights) for use in reversed(LAYERS)]


def test_what_is_used_again_soon_stays():
    """Backward, DeepSpeed gives back a layer only once."""

    def cost(kept: int, reuse: int) -> GatherCost:
        limits = {"param_persistence_threshold": kept, "max_reuse_distance": reuse}
        limits |= {"max_live_parameters": 1000, "prefetch_bucket_size": 0}
        return gather_cost(STEP, {f"stage3_{name}": limit for name, limit in limits.items()})

    assert cost(kept=0, reuse=0) == GatherCost(elements=100, most=20, always=0)
    assert cost(kept=0, reuse=30) == GatherCost(elements=20, most=20, always=0)
    assert cost(kept=10, reuse=0) == GatherCost(elements=0, most=0, always=20)


@pytest.mark.launch
@pytest.mark.parametrize(
    "network", [pytest.param(FEW_BLOCKS, id="few blocks"), pytest.param((), id="1b", marks=pytest.mark.long)]
)
def test_the_largest_preset_is_not_gathered_at_every_step_of_the_coding_order(network):
    """Nor is a network of its widths."""
    config = compose(["model=1b", *network, "engine=zero3"])
    uses = dry_run(config.model, Precision.bf16, Checkpointing.steps, 256, 1).uses
    gathered = gather_cost(uses, RunSpec.of(config, 8).deepspeed["zero_optimization"])
    assert gathered.always + gathered.elements < 2 * parameter_count(on_meta(config.model))


def test_times_of_a_step():
    """Weights after the step never hide, gradients behind the backward pass, with ZeRO-3 all behind all."""
    compute, bandwidth = 3.0, 1e9
    times = Communication(gradients=1e9, weights=5e8, overlap=2 / 3, weights_overlap=False).times(compute, bandwidth)
    assert times.communication == pytest.approx(1.5) and times.sequential == pytest.approx(4.5)
    assert times.overlapped == pytest.approx(3.5) and times.efficiency == pytest.approx(3 / 3.5)
    times = Communication(gradients=2.5e9, weights=0, overlap=2 / 3, weights_overlap=False).times(compute, bandwidth)
    assert times.overlapped == pytest.approx(3.5)
    times = Communication(gradients=1e9, weights=0, overlap=0, weights_overlap=False).times(compute, bandwidth)
    assert times.overlapped == times.sequential == pytest.approx(4)
    sharded = Communication(gradients=1e9, weights=1.5e9, overlap=1, weights_overlap=True)
    assert sharded.times(compute, bandwidth).overlapped == pytest.approx(3)
    assert sharded.times(compute, bandwidth / 2).overlapped == pytest.approx(5)
    assert sharded.times(compute, bandwidth).efficiency == 1
