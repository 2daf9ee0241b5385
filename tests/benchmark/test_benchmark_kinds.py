"""Where time goes: real operations, each profiled separately, and the kind that it counts as."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench.kinds import KINDS, seconds_by_kind
from bench.profiling import draw_profile
from bench.step import OPTIMIZER
from bench.timing import timed
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from hpcm_scale.entropy.generalized_gaussian import bits

CPU = torch.device("cpu")


def images(channels: int = 64, *, side: int = 64, last: bool = False) -> torch.Tensor:
    """A batch that wants a gradient."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.rand(2, channels, side, side).to(memory_format=memory_format).requires_grad_()


def optimize() -> torch.Tensor:
    """A step of Adam alone."""
    weight = torch.zeros(1_000_000, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    with record_function(OPTIMIZER):
        torch.optim.Adam([weight]).step()
    return weight


def attention() -> torch.Tensor:
    """Written out, as products of batches."""
    query, key, value = (torch.rand(64, 64, 64, requires_grad=True) for _ in range(3))
    return (query @ key.transpose(-1, -2)).softmax(dim=-1) @ value


def likelihood() -> torch.Tensor:
    """Of many elements."""
    return bits(*(torch.rand(100_000, requires_grad=True) for _ in range(2)))


WORK = {
    "1×1 convolution": (KINDS[0], lambda: nn.Conv2d(64, 128, 1)(images())),
    "1×1 convolution, channels-last": (KINDS[0], lambda: nn.Conv2d(64, 128, 1)(images(last=True))),
    "matrix product": (KINDS[0], lambda: nn.Linear(512, 512)(torch.rand(2048, 512))),
    "3×3 convolution": (KINDS[1], lambda: nn.Conv2d(64, 64, 3, padding=1)(images())),
    "3×3 convolution, channels-last": (KINDS[1], lambda: nn.Conv2d(64, 64, 3, padding=1)(images(last=True))),
    "depthwise": (KINDS[2], lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64)(images())),
    "halving": (KINDS[3], lambda: nn.Conv2d(64, 64, 2, stride=2)(images())),
    "doubling": (KINDS[3], lambda: nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1)(images())),
    "attention": (KINDS[4], attention),
    "attention of torch": (
        KINDS[4],
        lambda: F.scaled_dot_product_attention(*(torch.rand(8, 4, 64, 64, requires_grad=True) for _ in range(3))),
    ),
    "likelihood": (KINDS[5], likelihood),
    "element-wise": (KINDS[6], lambda: F.leaky_relu(images() * 2)),
    "cast": (KINDS[7], lambda: images().to(torch.bfloat16)),
    "gather": (KINDS[7], lambda: images().index_select(0, torch.arange(2).repeat(20))),
    "optimizer": (KINDS[9], optimize),
}


@pytest.mark.parametrize("name", WORK)
def test_most_of_the_time_of_an_operation_goes_to_its_kind(name):
    kind, work = WORK[name]

    def forward_and_backward():
        result = work()
        if kind != KINDS[9]:
            result.backward(torch.empty_like(result))

    forward_and_backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        wall = timed(forward_and_backward, CPU).seconds
    spent = seconds_by_kind(trace.events(), wall, CPU)
    assert list(spent) == list(KINDS)
    assert sum(spent.values()) == pytest.approx(wall)
    reported = {other: seconds for other, seconds in spent.items() if other != KINDS[-1]}
    # Making of numbers at random and of weights counts as element-wise.
    foreign = sum(seconds for other, seconds in reported.items() if other not in (kind, KINDS[6], KINDS[7]))
    assert reported[kind] > 5 * foreign
    assert reported[kind] > 0


def test_the_image_holds_both_profiles(tmp_path):
    spent = {
        "slow": dict.fromkeys(KINDS, 0.2) | {KINDS[8]: 0.0},
        "fast": dict.fromkeys(KINDS, 0.1) | {KINDS[8]: 0.0},
    }
    draw_profile(spent, tmp_path / "profile.svg", "one step")
    text = (tmp_path / "profile.svg").read_text()
    for word in ("slow: 2 s", "fast: 1 s", "time in one step (s)", KINDS[0], "10.0 %"):
        assert f"<!-- {word}" in text, word
    assert KINDS[8] not in text  # nobody spent anything on it
