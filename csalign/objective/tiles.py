"""Sums over all pairs of unit rows and their gradients, tile by tile.

Tables of cosines are made a tile at a time in buffers that are used again, so that memory grows
with the rows and not with their square. Nothing here is seen by autograd.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from csalign.objective.matmul import Products

# Cosines times so much neither overflow nor underflow in float32, whatever they are.
_TAME = 35.0
# Exponents below it are nothing beside the largest; left alone, the exponentials would be
# subnormal numbers, which are slow.
_LEAST = -80.0


@dataclass(frozen=True)
class Plan:
    """How to go through the tables.

    Attributes:
        pairs: so many rows at the start of both sides are matched, row by row.
        seen: rows at the start of each side that InfoNCE sees: the pairs, and negatives.
        factors: 1 / sigma^2 of each Gaussian kernel; the kernels see all rows.
        smoothing: label smoothing of InfoNCE.
        products: by which route.
        tile: rows and columns of a tile, at most.
        turn: of how many processes this does which part of the tiles, counted from 0.
    """

    pairs: int
    seen: tuple[int, int]
    factors: tuple[float, ...]
    smoothing: float
    products: Products
    tile: int
    turn: tuple[int, int] = (0, 1)

    def spans(self, count: int, seen: int, times: int = 1) -> list[slice]:
        """Rows 0 to count in tiles of like size, none over the end of the pairs or of the seen.

        Args:
            count: rows.
            seen: of them, by InfoNCE.
            times: the number of tiles is to be a multiple of it.
        """
        spans = []
        for start, stop in pairwise((0, self.pairs, seen, *((count,) if self.factors else ()))):
            count = -(-(stop - start) // (self.tile * times)) * times
            edges = [start + (stop - start) * k // max(count, 1) for k in range(count + 1)]
            spans += [slice(*edge) for edge in pairwise(edges) if edge[0] < edge[1]]
        return spans

    def tiles(self, x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice]]:
        """The tiles of the table of x and y, those of this process."""
        number, of = self.turn
        rows = self.spans(len(x), self.seen[0], of)[number::of]
        return product(rows, self.spans(len(y), self.seen[1]))

    def upper(self, x: Tensor) -> Iterator[tuple[slice, slice]]:
        """The tiles on and above the diagonal of the table of x and x, those of this process."""
        number, of = self.turn
        # Of so many rows of tiles half the table divides evenly.
        spans = self.spans(len(x), self.pairs, 1 if of == 1 else 2 * of)
        pairs = ((rows, columns) for k, rows in enumerate(spans) for columns in spans[k:])
        return islice(pairs, number, None, of)

    def directions(self, rows: slice, columns: slice) -> tuple[bool, bool]:
        """Whether InfoNCE compares a tile's rows with its columns, and the other way round."""
        return (
            rows.stop <= self.pairs and columns.stop <= self.seen[1],
            columns.stop <= self.pairs and rows.stop <= self.seen[0],
        )


class Buffers:
    """Three tables, made once for all tiles: fresh memory costs more than what is done in it."""

    def __init__(self, x: Tensor, y: Tensor, plan: Plan) -> None:
        cells = min(max(len(x), len(y)), plan.tile) ** 2
        self._flat = [x.new_empty(cells) for _ in range(3)]

    def of(self, rows: slice, columns: slice) -> list[Tensor]:
        """As tables of the shape of a tile."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        return [flat[: math.prod(shape)].view(shape) for flat in self._flat]


class CrossSums(NamedTuple):
    """What all pairs of two sets sum to.

    Attributes:
        rows: (pairs,), log-sum-exp of the logits of each row of x.
        columns: (pairs,), of each row of y.
        kernels: (s,), log of the sum of each kernel over all rows.
    """

    rows: Tensor
    columns: Tensor
    kernels: Tensor


def cross_sums(x: Tensor, y: Tensor, scale: float, plan: Plan, buffers: Buffers) -> CrossSums:
    """The sums over the table of cosines of x (n, d) and y (m, d), logits being scale times it.

    Of the tiles of this process; what it saw nothing of is -inf.
    """
    rows, columns = (x.new_full((plan.pairs,), -torch.inf) for _ in range(2))
    kernels = []
    for i, j in plan.tiles(x, y):
        table, spare, _ = buffers.of(i, j)
        cosines = plan.products.table(x[i], y[j], table)
        forth, back = plan.directions(i, j)
        if forth or back:
            along, down = _log_sums(cosines, scale, spare)
            if forth:
                torch.logaddexp(rows[i], along, out=rows[i])
            if back:
                torch.logaddexp(columns[j], down, out=columns[j])
        for factor in plan.factors:
            kernels.append(_log_sum(cosines, factor, spare) - factor)
    if not kernels:
        return CrossSums(rows, columns, x.new_full((len(plan.factors),), -torch.inf))
    return CrossSums(
        rows, columns, torch.stack(kernels).reshape(-1, len(plan.factors)).logsumexp(0)
    )


def add_cross_gradients(
    gradients: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    y: Tensor,
    scale: float,
    sums: CrossSums,
    upstream: tuple[float, Sequence[float]],
    plan: Plan,
    buffers: Buffers,
    *,
    with_scale: bool,
) -> Tensor:
    """Add the gradient of InfoNCE and of the kernels' log-sums.

    Args:
        gradients: (n, d) and (m, d), added to in place; None where it is not wanted.
        x: (n, d), unit rows.
        y: (m, d).
        scale: of the logits.
        sums: `cross_sums` of the same arguments.
        upstream: of InfoNCE, and of each log-sum.
        plan: as then.
        buffers: to work in.
        with_scale: whether the scale's gradient is wanted.

    Returns:
        The scale's gradient, () tensor; 0 where it is not wanted.
    """
    to_x, to_y = gradients
    to_infonce, to_kernels = upstream
    share = to_infonce / (2 * max(plan.pairs, 1))
    to_scale = x.new_zeros(())
    never = x.new_full((), torch.inf)  # as a log-sum: its line has no part in InfoNCE
    for i, j in plan.tiles(x, y):
        table, weights, spare = buffers.of(i, j)
        cosines = plan.products.table(x[i], y[j], table)
        forth, back = plan.directions(i, j)
        if forth or back:
            lines = (
                sums.rows[i, None] if forth else never.expand(len(cosines), 1),
                sums.columns[j] if back else never.expand(cosines.shape[1]),
            )
            _probabilities(cosines, scale, lines, share * scale, (weights, spare))
            _subtract_targets(weights, plan, share * scale, (i, j))
            if with_scale:
                to_scale += torch.dot(weights.flatten(), cosines.flatten())
        else:
            weights.zero_()
        for factor, log_sum, to_kernel in zip(plan.factors, sums.kernels, to_kernels, strict=True):
            kernel = _kernel(cosines, factor, log_sum, spare)
            weights.add_(kernel, alpha=to_kernel * factor)
        if to_x is not None:
            plan.products.add(to_x[i], weights, y[j])
        if to_y is not None:
            plan.products.add(to_y[j], weights.T, x[i])
    return to_scale / scale


def own_sums(
    x: Tensor, plan: Plan, buffers: Buffers, weights: Sequence[float] | None
) -> tuple[Tensor, Tensor | None]:
    """The kernels between the rows of one set, of which half the table is computed.

    Of the tiles of this process.

    Args:
        x: (n, d), unit rows.
        plan: the kernels.
        buffers: to work in.
        weights: of each kernel in what is summed besides; None where that is not wanted.

    Returns:
        Log of the sum of each kernel over all rows, (s,), and the weighted sum over the kernels k
        of sum_j k(x_i, x_j) x_j, (n, d), of which the gradient is a multiple.
    """
    pulled = None if weights is None else torch.zeros_like(x)
    sums = x.new_zeros(len(plan.factors))
    no_shift = x.new_zeros(())
    for i, j in plan.upper(x):
        table, total, spare = buffers.of(i, j)
        cosines = plan.products.table(x[i], x[j], table)
        times = 1 if i == j else 2
        for k, factor in enumerate(plan.factors):
            # No kernel underflows as a whole, since each row is at no distance from itself.
            kernel = _kernel(cosines, factor, no_shift, spare if k else total)
            sums[k] += times * kernel.sum()
            if weights is not None and k:
                total.add_(spare, alpha=weights[k])
            elif weights is not None and weights[0] != 1:
                total.mul_(weights[0])
        if pulled is not None:
            plan.products.add(pulled[i], total, x[j])
            if i != j:
                plan.products.add(pulled[j], total.T, x[i])
    return sums.log(), pulled


def _log_sums(cosines: Tensor, scale: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits of a tile, along its rows and down its columns."""
    logits = torch.mul(cosines, scale, out=spare)
    if scale > _TAME:
        return logits.logsumexp(1), logits.logsumexp(0)
    logits.exp_()
    return logits.sum(1).log_(), logits.sum(0).log_()


def _log_sum(cosines: Tensor, factor: float, spare: Tensor) -> Tensor:
    exponents = torch.mul(cosines, factor, out=spare)
    if factor > _TAME:
        return exponents.flatten().logsumexp(0)
    return exponents.exp_().sum().log_()


def _probabilities(
    cosines: Tensor,
    scale: float,
    log_sums: tuple[Tensor, Tensor],
    share: float,
    out: tuple[Tensor, Tensor],
) -> None:
    """Share times the softmax along rows plus that down columns, into the first of `out`."""
    found, spare = out
    if scale <= _TAME:
        rows, columns = (share * (-sums).exp() for sums in log_sums)
        torch.mul(cosines, scale, out=found).exp_()
        found.mul_(torch.add(rows, columns, out=spare))
        return
    for sums, tensor in zip(log_sums, out, strict=True):
        torch.add(-sums, cosines, alpha=scale, out=tensor).clamp_(min=_LEAST).exp_()
    found.add_(spare).mul_(share)


def _subtract_targets(
    weights: Tensor, plan: Plan, share: float, place: tuple[slice, slice]
) -> None:
    """Take share times the targets of both directions off the tile of some rows and columns."""
    rows, columns = place
    if plan.smoothing:
        for is_compared, seen in zip(plan.directions(*place), reversed(plan.seen), strict=True):
            if is_compared:
                weights.sub_(share * plan.smoothing / seen)
    start = max(rows.start, columns.start)
    stop = min(rows.stop, columns.stop, plan.pairs)
    if start < stop:
        matched = weights[start - rows.start : stop - rows.start]
        matched = matched[:, start - columns.start : stop - columns.start]
        matched.diagonal().sub_(2 * share * (1 - plan.smoothing))


def _kernel(cosines: Tensor, factor: float, log_sum: Tensor, out: Tensor) -> Tensor:
    """The Gaussian kernel of unit rows by their cosines, over exp(log_sum)."""
    torch.add(-factor - log_sum, cosines, alpha=factor, out=out)
    if factor > _TAME:
        out.clamp_(min=_LEAST)
    return out.exp_()
