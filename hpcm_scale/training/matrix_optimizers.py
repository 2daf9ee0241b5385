"""Muon and SOAP: update rules of matrices, and the exchange of matrices that are cut into parts over ranks.

All matrices of one shape are updated together, in batched products: one by one, launching their operations would take
longer than the rest of a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import OptimizerConfig, OptimizerName
from hpcm_scale.model.parameters import Matrix, matrices, parameter_count
from hpcm_scale.training.state_shards import StateShard

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a, b, c of x ↦ a·x + b·x³ + c·x⁵, which moves singular values towards 1 (Jordan et al., 2024)."""
ITERATIONS = 5
"""Applications of that polynomial."""
_STACKED = 2**26
"""Most elements of a batch, to bound the memory of temporary tensors."""
_EPSILON = 1e-8
"""As Adam's."""
_SHIFT = 0.01
"""Added to SOAP's preconditioners in power iterations, times the mean eigenvalue and the identity: directions without
gradients keep their basis, whatever the rounding errors."""


class Rule(ABC):
    """The update of `count` matrices of one shape, and its state; all tensors are fp32 (count, …)."""

    state: dict[str, Tensor]
    """By kind of state shard."""

    @abstractmethod
    def __init__(self, count: int, rows: int, columns: int, config: OptimizerConfig, device: torch.device) -> None:
        """Allocate the state, zeros or identities, on `device`."""

    @abstractmethod
    def update(self, gradients: Tensor, step: int) -> Tensor:
        """Update the state with gradients (count, rows, columns) of update number `step`, from 0.

        Returns the update, of the same shape: the weights change by −learning rate × update.
        """

    @staticmethod
    @abstractmethod
    def flops(rows: int, columns: int, config: OptimizerConfig) -> int:
        """FLOPs of products per matrix and step (2 per multiply-accumulate), averaged over steps."""


class Muon(Rule):
    """Nesterov momentum, orthogonalized (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

    Updates are multiplied by 0.2·√max(rows, columns): an update of full rank then has the root mean square of Adam's,
    and Adam's learning rates can be used (arXiv 2502.16982, section 2.2).
    """

    def __init__(self, count: int, rows: int, columns: int, config: OptimizerConfig, device: torch.device) -> None:
        self._momentum, self._scale = config.momentum, 0.2 * max(rows, columns) ** 0.5
        self.state = {"momentum": torch.zeros(count, rows, columns, device=device)}

    def update(self, gradients: Tensor, step: int) -> Tensor:
        momentum = self.state["momentum"].lerp_(gradients, 1 - self._momentum)
        return orthogonalized(gradients.lerp(momentum, self._momentum)).mul_(self._scale)

    @staticmethod
    def flops(rows: int, columns: int, config: OptimizerConfig) -> int:
        short, long = sorted((rows, columns))
        return ITERATIONS * (4 * short**2 * long + 2 * short**3)


def orthogonalized(x: Tensor) -> Tensor:
    """Approximately U·Vᵀ of each matrix U·S·Vᵀ of (count, rows, columns), fp32.

    Newton-Schulz iterations, in bf16 on GPUs, and elsewhere in the precision of matrix products that
    `model.layers.set_arithmetic` set. Singular values above about 0.002 of the Frobenius norm become 0.7 to 1.2;
    smaller ones grow by a factor of at most 490, and 0 stays 0.
    """
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


@contextmanager
def _fp32_products() -> Iterator[None]:
    """Context in which products of fp32 matrices are computed in fp32, not in TF32 or bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Soap(Rule):
    """Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321, algorithm 3).

    A side without an eigenbasis is not rotated (the paper's one-sided version, section 7.1). Eigenbases begin as the
    identity, not as those of the first gradient: its Gram matrices are singular, so most of their eigenvectors are
    arbitrary, and training would depend on rounding errors. The first `basis_every` updates are therefore those of Adam
    with both β equal to `momentum`. All products are in fp32, whatever the precision of training.
    """

    def __init__(self, count: int, rows: int, columns: int, config: OptimizerConfig, device: torch.device) -> None:
        self._decay, self._basis_every = config.momentum, config.basis_every
        self._sides = soap_sides(rows, columns, config)
        lengths = {"left": rows, "right": columns}
        self.state = {kind: torch.zeros(count, rows, columns, device=device) for kind in ("exp_avg", "exp_avg_sq")}
        for side in self._sides:
            identity = torch.eye(lengths[side], device=device).repeat(count, 1, 1)
            self.state |= {side: torch.zeros_like(identity), f"{side}_basis": identity}

    @_fp32_products()
    def update(self, gradients: Tensor, step: int) -> Tensor:
        for side in self._sides:
            self.state[side].lerp_(_gram(gradients, side), 1 - self._decay)
        mean = self.state["exp_avg"].lerp_(gradients, 1 - self._decay)
        squared = self.state["exp_avg_sq"].lerp_(self._rotated(gradients).square_(), 1 - self._decay)
        correction = 1 - self._decay ** (step + 1)
        deviation = (squared / correction).sqrt_().add_(_EPSILON)
        update = self._rotated(self._rotated(mean).div_(deviation).div_(correction), back=True)
        if (step + 1) % self._basis_every == 0:
            self._update_bases()
        return update

    def _rotated(self, x: Tensor, back: bool = False) -> Tensor:
        """QLᵀ·x·QR, or QL·x·QRᵀ if `back`."""
        for side in self._sides:
            basis = self.state[f"{side}_basis"]
            rotation = basis if back == (side == "left") else basis.mT
            x = rotation @ x if side == "left" else x @ rotation
        return x

    def _update_bases(self) -> None:
        """One power iteration, orthonormalized by QR, with directions in the order of falling eigenvalues."""
        squared = self.state["exp_avg_sq"]
        for side in self._sides:
            basis = self.state[f"{side}_basis"]
            factor = self.state[side]
            shift = _SHIFT * factor.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            product = torch.baddbmm(shift * basis, factor, basis)
            order = (basis * product).sum(-2).argsort(dim=-1, descending=True)
            basis.copy_(torch.linalg.qr(product.gather(-1, order[:, None].expand_as(product))).Q)
            index = order[:, :, None] if side == "left" else order[:, None]
            squared.copy_(squared.gather(-2 if side == "left" else -1, index.expand_as(squared)))

    @staticmethod
    def flops(rows: int, columns: int, config: OptimizerConfig) -> int:
        """Gram matrix and three rotations per side, and a share of a product and a QR decomposition (8/3·d³)."""
        flops = 0
        for side in soap_sides(rows, columns, config):
            length = rows if side == "left" else columns
            flops += 8 * length * rows * columns + 14 * length**3 // (3 * config.basis_every)
        return flops


def soap_sides(rows: int, columns: int, config: OptimizerConfig) -> tuple[str, ...]:
    """The sides with an eigenbasis within `max_state` and `max_dimension`: both, the shorter one, or none."""
    short = "left" if rows <= columns else "right"
    for sides in (("left", "right"), (short,)):
        lengths = [rows if side == "left" else columns for side in sides]
        state = 2 * rows * columns + 2 * sum(length**2 for length in lengths)
        if state <= config.max_state * rows * columns and max(lengths) <= config.max_dimension:
            return sides
    return ()


def _gram(x: Tensor, side: str) -> Tensor:
    return x @ x.mT if side == "left" else x.mT @ x


def rule_of(matrix: Matrix, config: OptimizerConfig) -> type[Rule] | None:
    """The update rule of a matrix; None for Adam."""
    if config.name == OptimizerName.muon:
        return Muon
    if config.name == OptimizerName.soap and soap_sides(matrix.rows, matrix.columns, config):
        return Soap
    return None


def spread_evenly(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each item, so that sums of costs are about equal: the largest first, each to the rank with least."""
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        owners[item] = min(range(ranks), key=loads.__getitem__)
        loads[owners[item]] += costs[item]
    return owners


class Cost(NamedTuple):
    """Costs of the optimizer in one step, and its state."""

    state: int
    """Elements of the whole state: Adam's moments, and the state of matrices."""
    state_per_rank: int
    """Elements on the rank with most."""
    flops: int
    """FLOPs of the products of matrices, each matrix counted once."""
    flops_per_rank: int
    """Those of the rank with most."""
    exchanged: float
    """Elements that a rank sends to the owners of matrices, and as many back to the holders."""


def cost(model: nn.Module, config: OptimizerConfig, ranks: int = 1) -> Cost:
    """The costs for a model, which may be on meta or sharded by ZeRO-3, with the state of the optimizer on `ranks`."""
    found, flops, state = [], [], []
    for matrix in matrices(model).values():
        if rule := rule_of(matrix, config):
            found.append(matrix)
            flops.append(rule.flops(matrix.rows, matrix.columns, config))
            kept = rule(1, matrix.rows, matrix.columns, config, torch.device("meta")).state.values()
            state.append(sum(values.numel() for values in kept))
    of_matrices = sum(matrix.size for matrix in found)
    moments = 2 * (parameter_count(model) - of_matrices)
    owners = spread_evenly(flops, ranks)

    def most(values: Sequence[int]) -> int:
        shares = [0] * ranks
        for owner, value in zip(owners, values, strict=True):
            shares[owner] += value
        return max(shares)

    return Cost(
        state=moments + sum(state),
        state_per_rank=-(-moments // ranks) + most(state),
        flops=sum(flops),
        flops_per_rank=most(flops),
        exchanged=of_matrices * (ranks - 1) / ranks**2,
    )


# Matrices on several ranks.

Exchange = Callable[[list[Tensor], list[int]], list[Tensor]]
"""All-to-all of flat tensors, called by all ranks: one for each rank, and the number of elements from each rank, to
the tensors from each rank."""


class Layout(NamedTuple):
    """Where an engine keeps a parameter."""

    held: Tensor
    """The optimized tensor with this rank's part of it."""
    offset: int
    """First element of that part in `held`, flattened."""
    cuts: tuple[int, ...]
    """Rank r has the elements cuts[r] … cuts[r + 1] − 1 of the flattened parameter."""

    def size(self, rank: int) -> int:
        """Number of elements that a rank has."""
        return self.cuts[rank + 1] - self.cuts[rank]

    def part(self, values: Tensor, rank: int) -> Tensor:
        """This rank's part of `values`, which has the shape of `held`; flattened (n,). `rank`: this rank, no other."""
        return values.reshape(-1)[self.offset : self.offset + self.size(rank)]


class Member(NamedTuple):
    """A parameter in a `MatrixGroup`."""

    name: str
    matrix: Matrix
    layout: Layout
    factor: float
    """Of the learning rate."""


class MatrixGroup:
    """Matrices that are updated together, each by its owner among the ranks, which has the whole state.

    The owners get the gradients from all ranks, and return to each its part of the updates: two all-to-all operations
    of all matrices, which send less than the gradients' reduction by a factor of the number of ranks. Owners are chosen
    for equal work, whichever ranks have the parts.
    """

    def __init__(
        self, members: Sequence[Member], config: OptimizerConfig, rank: int = 0, exchange: Exchange | None = None
    ) -> None:
        """`members`: the same on all ranks, in the same order, except `Layout.held` and `offset`.

        `exchange`: None if the only rank has all matrices whole.
        """
        self._members, self._rank, self._exchange = members, rank, exchange
        self._ranks = range(len(members[0].layout.cuts) - 1)
        self.updates = 0
        """Number of updates so far."""
        rules = [rule for member in members if (rule := rule_of(member.matrix, config))]
        shapes = [(member.matrix.rows, member.matrix.columns) for member in members]
        costs = [rule.flops(*shape, config) for rule, shape in zip(rules, shapes, strict=True)]
        owners = spread_evenly(costs, len(self._ranks))
        self._owned = [[item for item, owner in enumerate(owners) if owner == rank] for rank in self._ranks]
        self._stacks: list[tuple[list[int], Rule]] = []
        for items in _of_equal(self._owned[rank], shapes):
            (rows, columns), rule = shapes[items[0]], rules[items[0]]
            self._stacks.append((items, rule(len(items), rows, columns, config, members[items[0]].layout.held.device)))

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        """Update this rank's part of the weights from their gradients; all ranks call it."""
        gradients = self._to_owners([self._part(member, member.layout.held.grad) for member in self._members])
        updates: dict[int, Tensor] = {}
        for items, rule in self._stacks:
            members = [self._members[item] for item in items]
            whole = [member.matrix.of(gradients.pop(item)) for item, member in zip(items, members, strict=True)]
            changes = rule.update(torch.stack(whole), self.updates)
            for item, member, update in zip(items, members, changes, strict=True):
                updates[item] = member.matrix.flat(update if member.factor == 1 else update * member.factor)
        self.updates += 1
        parts = self._to_holders(updates)
        weights = [self._part(member, member.layout.held.detach().view(-1)) for member in self._members]
        if weight_decay:
            torch._foreach_mul_(weights, 1 - learning_rate * weight_decay)
        torch._foreach_add_(weights, parts, alpha=-learning_rate)

    def _part(self, member: Member, values: Tensor | None) -> Tensor:
        assert values is not None, f"{member.name} has no gradient"
        return member.layout.part(values, self._rank)

    def _to_owners(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """The whole flattened tensors of this rank's own items, from every rank's part of every item."""
        if self._exchange is None:
            return dict(enumerate(parts))
        mine = self._owned[self._rank]
        sizes = [[self._members[item].layout.size(rank) for item in mine] for rank in self._ranks]
        sent = [torch.cat([parts[item] for item in owned]) if owned else parts[0][:0] for owned in self._owned]
        pieces = [part.split(size) for part, size in zip(self._exchange(sent, [*map(sum, sizes)]), sizes, strict=True)]
        return {item: torch.cat(whole) for item, *whole in zip(mine, *pieces, strict=True)}

    def _to_holders(self, wholes: dict[int, Tensor]) -> list[Tensor]:
        """The inverse: this rank's part of every item, from the whole tensors at their owners."""
        if self._exchange is None:
            return [wholes[item] for item in range(len(self._members))]
        layouts = [member.layout for member in self._members]
        mine = self._owned[self._rank]
        sent = [
            torch.cat([wholes[item][layouts[item].cuts[rank] : layouts[item].cuts[rank + 1]] for item in mine])
            if mine
            else layouts[0].held.detach().view(-1)[:0]
            for rank in self._ranks
        ]
        sizes = [[layouts[item].size(self._rank) for item in owned] for owned in self._owned]
        changes: dict[int, Tensor] = {}
        for items, size, part in zip(self._owned, sizes, self._exchange(sent, [*map(sum, sizes)]), strict=True):
            changes |= zip(items, part.split(size), strict=True)
        return [changes[item] for item in range(len(layouts))]

    def state_shards(self) -> Iterator[StateShard]:
        """The state of the matrices that this rank owns."""
        for items, rule in self._stacks:
            for position, item in enumerate(items):
                for kind, values in rule.state.items():
                    yield StateShard(kind, self._members[item].name, 0, values[position].view(-1))


def _of_equal(items: Sequence[int], shapes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """The items of each shape, in batches of at most _STACKED elements."""
    by_shape = defaultdict(list)
    for item in items:
        by_shape[shapes[item]].append(item)
    for (rows, columns), alike in by_shape.items():
        most = max(1, _STACKED // (rows * columns))
        yield from (alike[first : first + most] for first in range(0, len(alike), most))
