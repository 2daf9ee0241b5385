"""A step on fake CUDA tensors, for every family and objective: devices, dtypes, layouts, and how much is launched.

Nothing here runs on a GPU. The fake tensors know what torch would do on one: which device and dtype results have, what
autocast casts, and that tensors of two devices cannot meet. Each file of results comes from a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import fake_cuda
import pytest

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import Checkpointing, Precision
from hpcm_scale.training.dry_run import dry_run

pytestmark = pytest.mark.launch
MOST = {"68m": 2_600, "swin": 3_150, "convnext": 2_700, "544m": 7_150, "1b": 6_050}
"""Presets, and the most operations that a step of 4 crops may launch, forward and backward: as `compute.launches`
counts them, views and allocations left out. docs/performance.md has the table by kind. nano has as many as 68m."""
STEPS = sorted(set(fake_cuda.CASES) - set(MOST))
TELLING = ("fp32", "hpcm", "pre-editor", "steps computed again", "swin blocks")
"""Both precisions, levels, a receiver, an edited image, windows, and recomputation; the others are longer checks."""
OTHERS = tuple(case for case in STEPS if case not in TELLING)
ALWAYS_FP32 = {"g_a", "g_s", "h_a", "h_s", "hyper_prior", "loss", "rate", "scales, means and coded"}


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    if not fake_cuda.has_cuda_build():
        return fake_cuda.build_guard(tmp_path_factory.mktemp("guard"))
    if not fake_cuda.sees_a_gpu():
        pytest.skip("a CUDA build of torch wants a GPU for this, and there is none")
    return "-"


@pytest.fixture(scope="module")
def step(guard, tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """What was found in a step, by its case; those of a group come from one process."""

    @cache
    def group(*cases: str) -> dict[str, Any]:
        return fake_cuda.report(tmp_path_factory.mktemp("steps"), guard, *cases)

    return lambda case: group(*(TELLING if case in TELLING else OTHERS))[case]


@pytest.fixture(params=[*TELLING, *(pytest.param(case, marks=pytest.mark.long) for case in OTHERS)])
def case(request) -> str:
    return request.param


def test_nothing_of_a_step_waits_for_the_host(step, case):
    """No tensor is copied from one device to the other, and that none of both meet, fake tensors see to."""
    assert step(case)["copies"] == {}


def test_what_must_be_fp32_is(step, case):
    found = step(case)
    assert set(found["places"]) >= ALWAYS_FP32
    assert found["not_fp32"] == []
    assert found["reduced"] == (["torch.float32"] if case == "fp32" else ["torch.bfloat16"])


def test_channels_stay_last(step, case):
    """At the inputs and outputs of every block, every fusion and every 1×1 convolution."""
    assert step(case)["plain"] == []


def test_every_parameter_gets_a_gradient_of_its_own_kind(step, case):
    assert step(case)["gradients"] == ["cuda:0 torch.float32"]
    assert step(case)["without"] == []


def test_a_step_launches_no_more_than_it_did(step):
    assert sum(step("hpcm")["launches"]["all"].values()) <= MOST["68m"]


@pytest.mark.long
def test_a_step_of_a_preset_launches_no_more_than_it_did(guard, tmp_path):
    for preset, found in fake_cuda.report(tmp_path, guard, *MOST).items():
        assert sum(found["launches"]["all"].values()) <= MOST[preset], preset


def test_each_weight_of_a_product_is_cast_once(step):
    """All of them in one operation; what else is cast are activations, and weights of convolutions by autocast. Cast
    at each use, as autocast does it, there would be 640 more."""
    launches = step("hpcm")["launches"]["all"]
    assert launches["_foreach_copy_"] == 1
    assert launches["_to_copy"] <= 310


def test_recomputation_takes_the_casts_that_are_there(step):
    """It adds operations of the forward pass, but not the casts of weights."""
    once, again = step("hpcm")["launches"], step("steps computed again")["launches"]
    assert again["all"]["_foreach_copy_"] == 1
    recomputed = again["all"]["addmm"] - once["all"]["addmm"]
    assert recomputed > 100
    assert again["all"]["_to_copy"] - once["all"]["_to_copy"] < recomputed


def test_an_estimate_counts_the_same_launches(step):
    """`hpcm estimate` counts them on fake tensors of the CPU, which any machine has: to 5 %."""
    counted = dry_run(compose_model("nano"), Precision.bf16, Checkpointing.none, 256, 4, True).launches
    assert counted == pytest.approx(sum(step("hpcm")["launches"]["all"].values()), rel=0.05)
