"""The gradient rule of the lower bound."""

from __future__ import annotations

import torch

from hpcm_scale.entropy.generalized_gaussian import lower_bound


def test_value_is_the_larger_of_value_and_bound():
    value = torch.tensor([-1.0, 0.0, 0.12, 0.5, 3.0])
    assert torch.equal(lower_bound(value, 0.12), torch.tensor([0.12, 0.12, 0.12, 0.5, 3.0]))


def test_gradient_passes_above_the_bound_and_back_towards_it():
    value = torch.tensor([0.05, 0.05, 0.12, 0.12, 1.0, 1.0], requires_grad=True)
    gradient = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    lower_bound(value, 0.12).backward(gradient)
    assert value.grad.tolist() == [0.0, -2.0, 2.0, -2.0, 2.0, -2.0]


def test_descent_returns_from_below():
    value = torch.tensor([-0.5], requires_grad=True)
    for _ in range(20):
        value.grad = None
        (lower_bound(value, 0.12) - 1).square().sum().backward()
        value.data -= 0.1 * value.grad
    assert value.item() > 0.12


def test_dtype_is_kept():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        value = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
        bounded = lower_bound(value, 0.25)
        bounded.sum().backward()
        assert bounded.dtype == value.grad.dtype == dtype
