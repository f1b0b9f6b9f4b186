"""Differentiable gathering of rows from the processes of a job."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csalign.core import distributed


def all_gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Concatenate the rows of all processes, (sum of counts, d).

    All processes must compute the same from the result: each keeps the gradient of its own rows.

    Args:
        rows: (n, d), of this process.
        counts: how many each process has.
    """
    found: Tensor = _AllGatherRows.apply(rows, counts)
    return found


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
        before = sum(counts[: distributed.world().rank])
        ctx.own = slice(before, before + len(rows))
        return torch.cat(distributed.all_gather_rows(rows.contiguous(), counts))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own], None
