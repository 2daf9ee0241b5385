"""One step computed in several variants: the same loss, the same weights, the same tensors."""

from __future__ import annotations

import pytest
import torch
from bench.arguments import configuration
from bench.step import REFERENCE, Steps, Variant
from bench.train import variants

from hpcm_scale.config.schema import Checkpointing, Precision

VARIANTS = variants([Precision.fp32, Precision.bf16], list(Checkpointing), compiled=False)


@pytest.fixture(scope="module")
def steps() -> Steps:
    """A batch of one crop for `nano`."""
    return Steps(configuration("nano"), 1, torch.device("cpu"))


def test_candidates_are_every_precision_and_the_rest_with_the_last():
    assert [
        Variant(Precision.fp32),
        Variant(Precision.bf16),
        Variant(Precision.bf16, Checkpointing.blocks),
        Variant(Precision.bf16, Checkpointing.steps),
    ] == VARIANTS
    compiled = variants([Precision.bf16], [Checkpointing.none, Checkpointing.steps], compiled=True)
    assert [variant.name for variant in compiled] == [
        "bf16, channels-last",
        "bf16, channels-last, compiled",
        "bf16, channels-last, checkpoint=steps",
        "bf16, channels-last, compiled, checkpoint=steps",
    ]
    assert variants([Precision.bf16], [Checkpointing.steps], compiled=True)[1:] == compiled[2:]
    assert REFERENCE.name == "fp32, plain NCHW"


@pytest.mark.launch
def test_every_way_gives_the_loss_of_the_baseline_again_and_again(steps):
    baseline = steps.of(REFERENCE)
    expected = baseline()
    assert baseline() == expected  # a step leaves the weights as they were
    for variant in VARIANTS:
        step = steps.of(variant)
        tolerance = 2e-2 if variant.precision == Precision.bf16 else 1e-5
        torch.testing.assert_close(step(), expected, rtol=tolerance, atol=0)
    assert baseline() == expected
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # exact products again


def test_all_ways_share_weights_and_gradients(steps):
    first, second = steps.of(REFERENCE), steps.of(VARIANTS[0])
    places = [{weight.data_ptr() for weight in step._model.parameters()} for step in (first, second)]
    assert places[0] == places[1] and len(places[0]) == len(list(first._model.parameters()))
    steps.make_gradients()
    first.gradients()
    once = {name: weight.grad.clone() for name, weight in second._model.named_parameters()}
    second.gradients()
    twice = sum((weight.grad - 2 * once[name]).norm() for name, weight in second._model.named_parameters())
    assert twice < 1e-3 * sum(gradient.norm() for gradient in once.values())
    steps.drop_gradients()
    assert all(weight.grad is None for weight in first._model.parameters())
