"""Alternating runs of baseline and candidates: their order, the samples kept, and the ratios of their times."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from bench.timing import Stopwatch, alternate, quartiles, ratio, seconds, timed

CPU = torch.device("cpu")


def test_runs_alternate_and_those_of_the_warm_up_are_dropped(capsys):
    ran = []

    def candidate(name):
        def run():
            assert not gc.isenabled()
            ran.append(name)
            return len(ran)

        return run

    samples = alternate({name: candidate(name) for name in "abc"}, 3, CPU, warm_up=1)
    assert "".join(ran) == "cba" + "abc" + "cba" + "abc"
    assert {name: [sample.result for sample in kept] for name, kept in samples.items()} == {
        "a": [4, 9, 10],
        "b": [5, 8, 11],
        "c": [6, 7, 12],
    }
    assert gc.isenabled()
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err  # no bar where there is no terminal; lines if it takes long


def test_garbage_is_collected_again_after_a_candidate_that_fails():
    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        alternate({"a": fail}, 1, CPU)
    assert gc.isenabled()


def test_ratios_are_taken_round_by_round():
    """The second round was disturbed, both alike: the ratios do not see it."""
    found = ratio([2.0, 40.0, 2.2], [1.0, 20.0, 1.0])
    assert (found.median, found.low, found.high) == pytest.approx((2.0, 2.0, 2.1))
    assert tuple(quartiles([3.0])) == (3.0, 3.0, 3.0)


def test_seconds_are_those_of_the_work():
    began = time.perf_counter()
    sample = timed(lambda: time.sleep(0.05), CPU)
    assert 0.05 <= sample.seconds <= time.perf_counter() - began
    assert seconds([sample]) == [sample.seconds]


def test_a_stopwatch_counts_watched_functions_once_and_lets_them_go_again():
    class Work:
        def outer(self):
            time.sleep(0.02)
            return self.inner()

        def inner(self):
            time.sleep(0.02)
            return "done"

    before, watch = Work.outer, Stopwatch(CPU)
    with watch.on([(Work, "outer"), (Work, "inner")]):
        began = time.perf_counter()
        assert Work().outer() == "done"
        assert 0.04 <= watch.take() <= time.perf_counter() - began
        assert watch.take() == 0
    assert Work.outer is before
