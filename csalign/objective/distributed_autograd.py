"""Terms that each process computes a part of, though each has all of the rows.

Values and gradients come out as those of the whole, the same in each process: what a divided term
is made from goes through `shared`, and its parts' sum through `summed`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csalign.core import distributed


def shared(values: Tensor) -> Tensor:
    """Values that all processes have alike, of which each uses a part: gradients are summed."""
    found: Tensor = _Shared.apply(values)
    return found


def summed(part: Tensor) -> Tensor:
    """The sum of what each process has, where all go on with the sum alike."""
    found: Tensor = _Summed.apply(part)
    return found


def gathered(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes in order, (sum of counts, d), where all go on with them alike.

    Args:
        rows: (n, d), of this process; it gets the gradient of these.
        counts: how many each process has.
    """
    found: Tensor = _Gathered.apply(rows, counts)
    return found


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce_sum(gradient)
        return gradient


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        part = part.contiguous().clone()
        distributed.all_reduce_sum(part)
        return part

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
        before = sum(counts[: distributed.world().rank])
        ctx.own = slice(before, before + len(rows))
        return torch.cat(distributed.all_gather_rows(rows.contiguous(), counts))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own], None
