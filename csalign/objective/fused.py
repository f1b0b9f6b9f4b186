"""InfoNCE and the means of Gaussian kernels in one go through the batch's similarities.

The same numbers as `infonce` and `log_mean_kernels` give, without a table of all pairs: cosines are
computed tile by tile, once for the values and once more for the gradients, and shared by InfoNCE's
rows and columns and by the kernels; within a set half of the table is enough. Several processes
that have the same rows can divide the tiles, and come to the same values and gradients.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from csalign.core import distributed
from csalign.core.enums import Precision
from csalign.objective.infonce import check_smoothing
from csalign.objective.kernels import Sigma, bandwidths, check_sets
from csalign.objective.matmul import pick_products
from csalign.objective.tiles import (
    Buffers,
    CrossSums,
    Plan,
    add_cross_gradients,
    cross_sums,
    own_sums,
)

# Of like speed on a CPU from 512 on; a GPU wants larger pieces of work.
_TILES = {"cpu": 1024}
_OTHER_TILE = 4096


class FusedTerms(NamedTuple):
    """What the tables of similarities sum to.

    Attributes:
        infonce: of the matched rows, () tensor; 0 without any.
        log_means: log of the mean kernel within x, within y and across, (3, s) for s bandwidths;
            empty without any.
    """

    infonce: Tensor
    log_means: Tensor


def fused_terms(
    x: Tensor,
    y: Tensor,
    *,
    pairs: int,
    logit_scale: Tensor | float,
    sigma: Sigma | None,
    negatives: tuple[int, int] = (0, 0),
    label_smoothing: float = 0.0,
    precision: Precision = Precision.FLOAT32,
    tile: int | None = None,
    divided: bool = False,
) -> FusedTerms:
    """Symmetric InfoNCE of matched rows and the mean kernels of two sets that begin with them.

    Args:
        x: (n, d), float, unit rows.
        y: (m, d), unit rows.
        pairs: so many rows at the start of both are matched, row by row; 0 for no InfoNCE.
        logit_scale: factor on the cosines, > 0; may carry a gradient.
        sigma: bandwidth or bandwidths, > 0; None for no kernels.
        negatives: so many rows of x and of y after the pairs are negatives of InfoNCE.
        label_smoothing: of InfoNCE, in [0, 1).
        precision: of the factors of products; values and sums stay in float32.
        tile: rows and columns of a tile (default: 1,024, or 4,096 off the CPU).
        divided: whether each process of the job computes a part, all having the same arguments.

    Returns:
        Both, differentiable once in x, y and logit_scale.

    Raises:
        ShapeError: the sets are not 2-D of one width.
        ValueError: pairs and negatives are more than a set has, sigma is not positive and finite,
            or label_smoothing is not in [0, 1).
    """
    check_sets(x, y)
    check_smoothing(label_smoothing)
    seen = pairs + negatives[0], pairs + negatives[1]
    if not (0 <= pairs <= min(seen) and seen[0] <= len(x) and seen[1] <= len(y)):
        raise ValueError(
            f"{pairs} pairs and {negatives} negatives are not to be had of {len(x)} and {len(y)} "
            "rows"
        )
    factors = () if sigma is None else tuple(s**-2 for s in bandwidths(sigma))
    if x.dtype not in (torch.float32, torch.float64):
        x, y = x.float(), y.float()
    tile = tile or _TILES.get(x.device.type, _OTHER_TILE)
    known = distributed.world()
    turn = (known.rank, known.size) if divided else (0, 1)
    plan = Plan(pairs, seen, factors, label_smoothing, pick_products(x, precision), tile, turn)
    scale = torch.as_tensor(logit_scale, dtype=x.dtype, device=x.device)
    return FusedTerms(*_Fused.apply(x, y, scale, plan))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        x, y = x.contiguous(), y.contiguous()
        buffers = Buffers(x, y, plan)
        with plan.products.rounded():
            sums = cross_sums(x, y, float(scale), plan, buffers)
            # The gradient within a set is the same up to a factor for any one bandwidth, so it is
            # taken from the tiles that are at hand; that of several is left for later.
            early = len(plan.factors) == 1
            owns = [
                own_sums(side, plan, buffers, (1.0,) if early and wanted else None)
                for side, wanted in zip((x, y), ctx.needs_input_grad, strict=False)
                if plan.factors
            ]
        logs = [own[0] for own in owns]
        sums, logs = _joined(sums, logs, plan)
        ctx.save_for_backward(x, y, scale, *sums, *logs)
        ctx.plan, ctx.buffers = plan, buffers
        ctx.early = [own[1] for own in owns]
        return _infonce(x, y, scale, sums, plan), _log_means(x, y, [*logs, sums.kernels])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_infonce: Tensor, to_means: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, y, scale, *saved = ctx.saved_tensors
        plan, buffers, early = ctx.plan, ctx.buffers, ctx.early
        ctx.early = []  # changed below, so of use but once
        gradients: list[Tensor | None] = [None, None]
        with plan.products.rounded():
            for k, side in enumerate((x, y)):
                if not ctx.needs_input_grad[k]:
                    continue
                if not plan.factors:
                    gradients[k] = torch.zeros_like(side)
                    continue
                factors = 2 * to_means.new_tensor(plan.factors)
                weights = (factors * to_means[k] / saved[3 + k].exp()).tolist()
                if early and early[k] is not None:
                    gradients[k] = early[k].mul_(weights[0])
                else:
                    gradients[k] = own_sums(side, plan, buffers, weights)[1]
            to_scale = add_cross_gradients(
                (gradients[0], gradients[1]),
                x,
                y,
                float(scale),
                CrossSums(*saved[:3]),
                (float(to_infonce), to_means[-1].tolist()),
                plan,
                buffers,
                with_scale=ctx.needs_input_grad[2],
            )
        if plan.turn[1] > 1:
            for gradient in (*gradients, to_scale if ctx.needs_input_grad[2] else None):
                if gradient is not None:
                    distributed.all_reduce_sum(gradient)
        return gradients[0], gradients[1], to_scale, None


def _joined(sums: CrossSums, logs: list[Tensor], plan: Plan) -> tuple[CrossSums, list[Tensor]]:
    """The log-sums over the tiles of all processes."""
    if plan.turn[1] == 1:
        return sums, logs
    parts = [*sums, *logs]
    whole = torch.cat(parts)
    distributed.all_reduce_log_sum_exp(whole)
    rows, columns, kernels, *logs = torch.split(whole, [len(part) for part in parts])
    return CrossSums(rows, columns, kernels), logs


def _infonce(x: Tensor, y: Tensor, scale: Tensor, sums: CrossSums, plan: Plan) -> Tensor:
    if not plan.pairs:
        return scale.new_zeros(())
    all_x, all_y = x[: plan.seen[0]].mean(0), y[: plan.seen[1]].mean(0)
    x, y = x[: plan.pairs], y[: plan.pairs]
    matched = (1 - plan.smoothing) * (x * y).sum(1).mean()
    if plan.smoothing:
        even = ((x.mean(0) * all_y).sum() + (all_x * y.mean(0)).sum()) / 2
        matched = matched + plan.smoothing * even
    return (sums.rows.mean() + sums.columns.mean()) / 2 - scale * matched


def _log_means(x: Tensor, y: Tensor, logs: list[Tensor]) -> Tensor:
    """(3, s), or (1, 0) without a bandwidth."""
    n, m = math.log(len(x)), math.log(len(y))
    sums = torch.stack(logs)
    return sums - sums.new_tensor([2 * n, 2 * m, n + m])[-len(logs) :, None]
