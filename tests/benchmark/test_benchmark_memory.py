"""The most bytes held at a time, where it is known how many they are."""

from __future__ import annotations

import torch
from bench.timing import peak_bytes

CPU = torch.device("cpu")
MEGABYTE = 250_000
"""fp32 numbers in it."""


def test_what_is_held_at_a_time_counts_and_what_was_there_before_does_not():
    there = [torch.zeros(5 * MEGABYTE)]

    def work():
        kept = torch.ones(4 * MEGABYTE)
        passing = torch.ones(3 * MEGABYTE)
        del passing
        there.clear()
        return kept + torch.ones(1)  # as much again

    assert 8_000_000 <= peak_bytes(work, CPU) < 8_010_000


def test_activations_are_those_that_the_backward_pass_needs():
    weight = torch.ones(MEGABYTE, requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def chain(length):
        def work():
            value = weight
            for _ in range(length):
                value = value.sin()  # keeps its argument
            value.sum().backward()

        return work

    chain(2)()
    short, long = (peak_bytes(chain(length), CPU) for length in (5, 25))
    assert abs(long - short - 20_000_000) < 10_000
    assert peak_bytes(chain(5), CPU) == short


def test_temporary_memory_of_kernels_counts():
    """A matrix in columns is copied by the kernel, not by an operation that anybody sees."""
    square = torch.rand(500, 500)
    assert peak_bytes(lambda: square.sort(dim=1), CPU) >= 4 * 250_000 + 8 * 250_000
