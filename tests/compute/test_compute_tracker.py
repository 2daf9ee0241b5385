"""The tracker's arithmetic, against a clock that is moved by hand."""

from __future__ import annotations

import json

import pytest
import torch

from hpcm_scale.compute import tracker as module
from hpcm_scale.compute.tracker import ComputeTracker, peak_memory

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass on request."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def started(flops_per_image: float) -> ComputeTracker:
    """A tracker whose clock runs."""
    tracker = ComputeTracker({0: flops_per_image}, CPU)
    tracker.start_clock()
    return tracker


def test_counts_and_rates(clock):
    tracker = ComputeTracker(costs={0: 2e12}, device=CPU, peak=1e14)
    clock.now += 50  # the model is built, workers start
    tracker.start_clock()
    for _ in range(4):
        clock.now += 0.5
        tracker.step(32, waited=0.1)
    assert tracker.position() == {"time": 2.0, "train/images": 128, "compute/pflops": pytest.approx(0.256)}
    rates = tracker.rates()
    assert rates.pop("perf/memory_gb") > 0.05
    assert rates == pytest.approx(
        {
            "perf/step_seconds": 0.5,
            "perf/images_per_second": 64.0,
            "perf/data_seconds": 0.1,
            "perf/mfu": 64 * 2e12 / 1e14,  # 1.28e14 FLOP/s of 1e14
        }
    )


def test_rates_are_those_since_the_last_line(clock):
    tracker = started(1e12)
    clock.now += 1
    tracker.step(8, waited=0.9)
    tracker.rates()
    clock.now += 4
    tracker.step(8, waited=0.0)
    clock.now += 2
    tracker.step(8, waited=1.0)
    rates = tracker.rates()
    assert rates["perf/step_seconds"] == pytest.approx(3.0)
    assert rates["perf/images_per_second"] == pytest.approx(16 / 6)
    assert tracker.rates("log")["perf/images_per_second"] == pytest.approx(24 / 7)  # all of it
    assert rates["perf/data_seconds"] == pytest.approx(0.5)


def test_no_figure_on_hardware_whose_peak_is_unknown(clock):
    tracker = started(1e12)
    clock.now += 1
    tracker.step(8, waited=0.0)
    assert "perf/mfu" not in tracker.rates()


def test_evaluation_and_checkpoints_pass_but_are_not_rated(clock):
    tracker = started(1e12)
    clock.now += 1
    tracker.step(8, waited=0.0)
    clock.now += 100
    tracker.restart_clock()
    clock.now += 1
    tracker.step(8, waited=0.0)
    assert tracker.rates()["perf/step_seconds"] == pytest.approx(1.0)
    assert tracker.position()["time"] == pytest.approx(102.0)


def test_a_resumed_run_counts_on(clock):
    whole, first = started(3e12), started(3e12)
    for _ in range(4):
        clock.now += 1
        whole.step(16, waited=0.0)
        first.step(16, waited=0.0)
    state = json.loads(json.dumps(first.state()))
    clock.now += 3600  # between the two starts
    resumed = ComputeTracker({0: 3e12}, CPU)
    resumed.load_state(state)
    assert resumed.position() == first.position()
    resumed.start_clock()
    whole.restart_clock()
    for _ in range(4):
        clock.now += 1
        whole.step(16, waited=0.0)
        resumed.step(16, waited=0.0)
    assert resumed.pflops == whole.pflops == 8 * 16 * 3e12 / 1e15
    assert resumed.position()["time"] == pytest.approx(8.0)
    assert resumed.rates()["perf/step_seconds"] == pytest.approx(1.0)


def test_a_long_run_loses_no_image():
    """2 M steps of 32 images of the largest model, to the last digit."""
    tracker = ComputeTracker(costs={0: 3_016_201_175_040}, device=CPU)
    for _ in range(2000):
        tracker.step(32_000, waited=0.0)
    assert tracker.images == 64_000_000
    assert tracker.pflops == 64_000_000 * 3_016_201_175_040 / 1e15


def test_peak_memory_is_in_bytes():
    before = peak_memory(CPU)
    block = torch.ones(100_000_000, dtype=torch.uint8)
    assert 20e6 < before <= peak_memory(CPU) < 100e9
    assert peak_memory(CPU) >= block.nbytes
