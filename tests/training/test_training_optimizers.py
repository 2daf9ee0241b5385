"""Muon and SOAP: against plain versions of one matrix at a time, cut over ranks anyhow, and with every engine."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import ALL_SHARDED, TINY
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import OptimizerConfig, OptimizerName, Precision
from hpcm_scale.model.families import names
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.layers import set_arithmetic
from hpcm_scale.model.parameters import Matrix, matrices, on_meta, parameter_count, parametrise, spectral_factor
from hpcm_scale.training.costs import optimizer_flops, training_flops_per_image
from hpcm_scale.training.matrix_optimizers import (
    Layout,
    MatrixGroup,
    Member,
    Muon,
    Soap,
    cost,
    orthogonalized,
    rule_of,
    soap_sides,
    spread_evenly,
)
from hpcm_scale.training.optimizer import create_optimizer, set_learning_rate

MUON = OptimizerConfig(name=OptimizerName.muon)
SOAP = OptimizerConfig(name=OptimizerName.soap, basis_every=3)
BOTH_SIDES = replace(SOAP, max_state=1000.0, basis_every=2)
RATE, STEPS = 1e-2, 16
FULL_RANK = 7
"""Steps whose gradients of `model` have covariances of full rank: of zero eigenvalues, rounding decides the order."""


# Plain versions, as published, of one matrix.


def plain_muon(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.95 * momentum + 0.05 * gradient
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        weight = weight - RATE * 0.2 * math.sqrt(max(weight.shape)) * x
    return weight


def plain_soap(weight: Tensor, gradients: list[Tensor], config: OptimizerConfig) -> Tensor:
    sides = soap_sides(*weight.shape, config)
    left, right, mean, squared = (torch.zeros(()) for _ in range(4))
    rows, columns = (torch.eye(size) for size in weight.shape)
    for step, gradient in enumerate(gradients, start=1):
        left, right = 0.95 * left + 0.05 * gradient @ gradient.T, 0.95 * right + 0.05 * gradient.T @ gradient
        mean, squared = 0.95 * mean + 0.05 * gradient, 0.95 * squared + 0.05 * (rows.T @ gradient @ columns) ** 2
        correction = 1 - 0.95**step
        normalized = (rows.T @ mean @ columns) / correction / ((squared / correction).sqrt() + 1e-8)
        weight = weight - RATE * rows @ normalized @ columns.T
        if step % config.basis_every == 0 and "left" in sides:
            rows, order = plain_basis(left, rows)
            squared = squared[order]
        if step % config.basis_every == 0 and "right" in sides:
            columns, order = plain_basis(right, columns)
            squared = squared[:, order]
    return weight


def plain_basis(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    order = (basis.T @ factor @ basis).diagonal().argsort(descending=True)
    shifted = factor + 0.01 * factor.trace() / len(factor) * torch.eye(len(factor))
    return torch.linalg.qr(shifted @ basis[:, order])[0], order


def model() -> nn.Module:
    """Matrices of all kinds, two of one shape, and parameters that are none."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 5, 2), nn.Conv2d(5, 8, 1)]
    return nn.Sequential(*layers, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def gradients_of(network: nn.Module) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    parameters = dict(network.named_parameters())
    return [{name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()} for _ in range(STEPS)]


def trained(network: nn.Module, config: OptimizerConfig, gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    optimizer = create_optimizer(network, config)
    set_learning_rate(optimizer, RATE)
    for given_ in gradients:
        for name, parameter in network.named_parameters():
            parameter.grad = given_[name].clone()
        optimizer.step()
    assert optimizer.updates == len(gradients)
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize(
    "config", [MUON, SOAP, replace(BOTH_SIDES, basis_every=FULL_RANK)], ids=["muon", "soap", "both sides"]
)
def test_updates_are_those_of_plain_versions(config):
    """Matrices by Muon or SOAP, of convolutions outputs × (inputs·k·k); all other parameters by Adam."""
    network = model()
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    gradients = gradients_of(network)
    after, adam = trained(network, config, gradients), trained(model(), OptimizerConfig(), gradients)
    views: dict[str, Callable[[Tensor], Tensor]] = {f"{layer}.weight": lambda w: w.flatten(1) for layer in (0, 3, 4, 5)}
    views["2.weight"] = lambda w: w.permute(1, 0, 2, 3).flatten(1)
    assert {name for name in after if not torch.equal(after[name], adam[name])} == set(views)
    for name, view in views.items():
        sequence = [view(each[name]) for each in gradients]
        plain = plain_muon if config is MUON else lambda w, g: plain_soap(w, g, config)
        torch.testing.assert_close(view(after[name]), plain(view(before[name]), sequence), rtol=1e-4, atol=1e-5)


def test_the_precision_of_training_does_not_change_soap():
    def updates() -> Tensor:
        rule, generator = Soap(2, 40, 64, BOTH_SIDES, torch.device("cpu")), torch.Generator().manual_seed(0)
        gradients = [torch.randn(2, 40, 64, generator=generator) for _ in range(5)]
        return torch.stack([rule.update(each, step) for step, each in enumerate(gradients)])

    in_fp32 = updates()
    try:
        set_arithmetic(Precision.bf16)
        assert torch.equal(updates(), in_fp32)
    finally:
        set_arithmetic(Precision.fp32)


def test_steps_are_counted_without_parameters_of_adam():
    network = nn.Sequential(nn.Linear(8, 8, bias=False))
    gradients = [{"0.weight": torch.ones(8, 8)} for _ in range(3)]
    trained(network, MUON, gradients)  # asserts the number


def test_singular_values_become_about_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 30), (3, 30, 20), (2, 16, 16)):
        found = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert found.min() > 0.3 and found.max() < 1.3


def test_weight_decay_shrinks_matrices_alone_and_whatever_muP_does():
    gradients = [{name: torch.zeros_like(each) for name, each in model().named_parameters()}]
    for name in OptimizerName:
        network = model()
        for parameter in network.parameters():
            parameter.learning_rate_factor = parameter.spectral_factor = 0.25
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        after = trained(network, OptimizerConfig(name=name, weight_decay=0.5), gradients)
        for key, value in after.items():
            shrunk = 1 - RATE * 0.5 if key in matrices(network) else 1
            torch.testing.assert_close(value, before[key] * shrunk)


# Which weights are matrices.


@pytest.mark.parametrize("family", names())
def test_all_weights_of_a_codec_but_its_ends_and_kernels_per_channel_are_matrices(family):
    codec = on_meta(replace(compose_model("nano"), family=family))
    found, parameters = matrices(codec), dict(codec.named_parameters())
    last = f"g_s.{len(codec.g_s) - 1}.weight"
    assert found and not {"g_a.0.weight", last} & found.keys()
    for name, matrix in found.items():
        assert matrix.rows * matrix.columns == parameters[name].numel() and min(matrix.rows, matrix.columns) > 1
    left_out = {name: each for name, each in parameters.items() if each.dim() > 1 and name not in found}
    assert sum(each.numel() for each in left_out.values()) < 0.15 * parameter_count(codec)
    flat = torch.arange(6 * 4 * 9.0)
    for matrix in (Matrix((6, 4, 3, 3)), Matrix((6, 4, 3, 3), transposed=True)):
        assert torch.equal(matrix.flat(matrix.of(flat)), flat)
    assert torch.equal(Matrix((6, 4, 3, 3), transposed=True).of(flat)[1, 9:18], flat.view(6, 4, 3, 3)[1, 1].flatten())


def test_muons_rates_are_inverse_to_the_root_of_the_width():
    """Relative to the base, where everything doubles; Adam's are inverse to the width."""
    base = compose_model("450k")
    wide = {key: 2 * getattr(base, key) for key in ("latent_channels", "hyper_latent_channels", "hyper_channels")}
    codec = HPCM(replace(base, channels=[2 * each for each in base.channels], partial_ratio=base.partial_ratio, **wide))
    parametrise(codec)
    weights = dict(codec.named_parameters())
    for name in matrices(codec):
        assert spectral_factor(weights[name]) == pytest.approx(2**-0.5)


# Matrices cut into parts.


class Threads:
    """Ranks as threads of one process: `exchange` of each is an all-to-all among them."""

    def __init__(self, ranks: int) -> None:
        self.sent: list[list[Tensor]] = [[] for _ in range(ranks)]
        self.barrier = Barrier(ranks)

    def exchange(self, rank: int, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        self.sent[rank] = parts
        self.barrier.wait()
        received = [each[rank].clone() for each in self.sent]
        self.barrier.wait()
        assert [len(each) for each in received] == sizes
        return received


SHAPES = [Matrix((6, 4, 3, 3)), Matrix((6, 5, 2, 2), transposed=True), Matrix((8, 8)), Matrix((8, 8)), Matrix((12, 8))]


def updated(cuts: list[tuple[int, ...]], config: OptimizerConfig) -> list[Tensor]:
    """The matrices SHAPES after a few steps of threads that hold the parts between `cuts`."""
    ranks = len(cuts[0]) - 1
    threads = Threads(ranks)
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(matrix.size, generator=generator) for matrix in SHAPES]
    gradients = [[torch.randn(matrix.size, generator=generator) for matrix in SHAPES] for _ in range(3)]

    def work(rank: int) -> list[Tensor]:
        spans = [(cut[rank], cut[rank + 1]) for cut in cuts]
        held = torch.cat([whole[first:last] for whole, (first, last) in zip(wholes, spans, strict=True)])
        offsets = [sum(last - first for first, last in spans[:number]) for number in range(len(spans))]
        members = [
            Member(str(number), matrix, Layout(held, offsets[number], cuts[number]), 1.0 + number)
            for number, matrix in enumerate(SHAPES)
        ]
        exchange = None if ranks == 1 else lambda parts, sizes: threads.exchange(rank, parts, sizes)
        group = MatrixGroup(members, config, rank, exchange)
        for of_step in gradients:
            held.grad = torch.cat([each[first:last] for each, (first, last) in zip(of_step, spans, strict=True)])
            group.step(RATE, weight_decay=0.1)
        return list(held.split([last - first for first, last in spans]))

    with ThreadPoolExecutor(ranks) as pool:
        parts = list(pool.map(work, range(ranks)))
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


@given(data=st.data(), ranks=st.integers(2, 4), config=st.sampled_from([MUON, SOAP, BOTH_SIDES]))
@settings(max_examples=25)
def test_any_cut_gives_the_updates_of_whole_matrices(data, ranks, config):
    def cut(matrix: Matrix) -> tuple[int, ...]:
        places = st.lists(st.integers(0, matrix.size), min_size=ranks - 1, max_size=ranks - 1)
        return (0, *sorted(data.draw(places)), matrix.size)

    whole = updated([(0, matrix.size) for matrix in SHAPES], config)
    for ours, theirs in zip(updated([cut(matrix) for matrix in SHAPES], config), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(1, 9))
def test_owners_have_about_the_same_work(costs, ranks):
    owners = spread_evenly(costs, ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(loads) <= sum(costs) / ranks + max(costs)


# Costs.


def test_soap_has_the_eigenbases_that_its_state_has_room_for():
    assert soap_sides(8, 8, SOAP) == soap_sides(8, 16, SOAP) == ("left",)
    assert soap_sides(16, 8, SOAP) == ("right",)
    assert soap_sides(8, 8, replace(SOAP, max_state=6)) == ("left", "right")
    assert soap_sides(8, 8, replace(SOAP, max_state=3)) == soap_sides(16, 16, replace(SOAP, max_dimension=15)) == ()
    assert rule_of(Matrix((16, 16)), replace(SOAP, max_dimension=15)) is None
    for size in ("nano", "68m", "1b"):
        codec = on_meta(compose_model(size))
        assert cost(codec, SOAP).state < 4 * parameter_count(codec)
        assert cost(codec, MUON).state < 2 * parameter_count(codec) == cost(codec, OptimizerConfig()).state


@pytest.mark.parametrize(("size", "of_32", "of_2"), [("68m", 0.11, 1.78), ("1b", 0.34, 5.4)])
def test_newton_schulz_relative_to_a_step(size, of_32, of_2):
    codec = on_meta(compose_model(size))
    of_image = training_flops_per_image(codec, 256)
    assert optimizer_flops(codec, MUON) / (32 * of_image) == pytest.approx(of_32, rel=0.03)
    assert optimizer_flops(codec, MUON) / (2 * of_image) == pytest.approx(of_2, rel=0.03)
    assert optimizer_flops(codec, OptimizerConfig()) == 0


@pytest.mark.parametrize(("rows", "columns"), [(16, 48), (48, 16)])
def test_flops_of_products_are_those_that_torch_counts(rows, columns):
    """But for SOAP's QR decomposition, 8/3·d³ of the 14/3·d³ of an update of a basis."""
    config = replace(BOTH_SIDES, basis_every=1)
    for rule, left_out in ((Muon, 0), (Soap, 8 * (rows**3 + columns**3) / 3)):
        updating = rule(1, rows, columns, config, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            updating.update(torch.randn(1, rows, columns), 0)
        expected = rule.flops(rows, columns, config) - left_out
        assert counter.get_total_flops() == pytest.approx(expected, abs=2)


def test_ranks_share_state_and_work():
    codec = on_meta(compose_model("small"))
    for config in (MUON, SOAP):
        whole, shared = cost(codec, config), cost(codec, config, ranks=4)
        assert (
            (whole.state, whole.flops) == (shared.state, shared.flops) == (whole.state_per_rank, whole.flops_per_rank)
        )
        assert shared.flops_per_rank < 0.3 * whole.flops and shared.state_per_rank < 0.35 * whole.state
        assert whole.exchanged == 0


# Engines.

ENGINES = ("accelerate", "zero0", "zero1", "zero2", "zero3")


@pytest.mark.launch
@pytest.mark.parametrize("steps", [10, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_engines_have_the_same_losses_and_continue_each_others_state(optimizer, steps, fork_server, tmp_path):
    """As two processes find them (optimizer_probe.py); the bases of SOAP change in both halves."""
    common = [*TINY, "train.batch_size=2", f"train.steps={steps}", f"optimizer={optimizer}", "optimizer.basis_every=3"]
    cases = [[*common, f"engine={engine}", *(ALL_SHARDED if engine == "zero3" else [])] for engine in ENGINES]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    process = fork_server.start("optimizer_probe", [json.dumps(cases)], cwd=tmp_path, env=environment, processes=2)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    trainings = dict(zip(ENGINES, map(json.loads, out.splitlines()), strict=True))
    expected = trainings[ENGINES[0]]["whole"]
    for engine in ENGINES:
        assert trainings[engine]["whole"] == pytest.approx(expected, rel=1e-5), engine
        continued = trainings[engine]["continued"]
        assert continued == pytest.approx(expected[steps // 2 :][: len(continued)], rel=1e-5), engine


@pytest.mark.launch
def test_a_killed_training_goes_on_with_another_engine_and_number_of_processes(train, launch, shards):
    """But not with another optimizer."""
    common = (*TINY, "data.workers=0", "log.wandb=disabled", "optimizer.basis_every=2", "train.steps=6")
    unbroken = train("soap_unbroken", "optimizer=soap", "engine=accelerate", *common, processes=1)
    checkpoints = ("train.checkpoint_every=1", "train.stop_after=4")
    train("soap_killed", "optimizer=soap", "engine=zero3", *common, *checkpoints)
    newest = max((launch.folder / "soap_killed" / "checkpoints").iterdir())
    shutil.rmtree(newest)  # as if the processes were killed while they wrote it
    other = (*common, f"data.shards={shards}", "train.batch_size=4", "schedule.learning_rate=1e-3")
    refused = launch(*other, "optimizer=muon", "engine=zero1", "run.dir=soap_killed", processes=1)
    assert refused.returncode == 2 and "optimizer.name=soap, not muon" in refused.stderr
    records = train("soap_killed", "optimizer=soap", "engine=zero1", *common)
    losses = [[record["train/loss"] for record in each if record["step"] > 3] for each in (records, unbroken)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
