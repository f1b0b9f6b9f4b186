"""InfoNCE and the means of Gaussian kernels in one pass over the batch's similarities.

The same numbers as `infonce` and `log_mean_kernels`, without a table of all pairs: cosines are
computed tile by tile, once for the values and once more for the gradients.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from csalign.core import distributed
from csalign.core.enums import Precision
from csalign.objective.kernels import Sigma, bandwidths, check_sets
from csalign.objective.pairwise import check_smoothing
from csalign.objective.tiles import SAFE_FACTOR, CrossSums, TilePlan, Tiles

# Equally fast on a CPU from 512 on; a GPU needs larger pieces of work.
CPU_TILE, DEVICE_TILE = 1_024, 4_096


class FusedTerms(NamedTuple):
    """InfoNCE, () tensor, 0 without pairs, and log mean kernels within x, within y and across.

    log_means are (3, s) for s bandwidths; empty without any.
    """

    infonce: Tensor
    log_means: Tensor


def fused_terms(
    x: Tensor,
    y: Tensor,
    *,
    pairs: int,
    logit_scale: Tensor | float,
    max_scale: float | None = None,
    sigma: Sigma | None,
    negatives: tuple[int, int] = (0, 0),
    label_smoothing: float = 0.0,
    precision: Precision = Precision.FLOAT32,
    compiled: bool = False,
    tile: int | None = None,
    divided: bool = False,
) -> FusedTerms:
    """Compute symmetric InfoNCE of matched rows and the mean kernels of two sets.

    Args:
        x: (n, d), float, unit rows: pairs first, then negatives, then others.
        y: (m, d), unit rows.
        pairs: number of rows at the start of both that are matched, row by row; 0: no InfoNCE.
        logit_scale: factor on the cosines, > 0; may carry a gradient.
        max_scale: bound of logit_scale, by default itself if it is a float; up to 35 exponentials
            need no shift and take less time. Unknown if None.
        sigma: bandwidth or bandwidths, > 0; None for no kernels.
        negatives: number of rows of x and of y after the pairs that are negatives of InfoNCE.
        label_smoothing: of InfoNCE, in [0, 1).
        precision: of the factors of products, see `tiles.supports_bfloat16`; sums are float32.
        compiled: fuse what is done to a tile with torch.compile.
        tile: rows and columns of a tile (default: 1,024 on the CPU, 4,096 elsewhere).
        divided: share the tiles among the processes of the job, all of which must pass the same
            arguments; values and gradients are those of the whole, in each process.

    Returns:
        Both, differentiable once in x, y and logit_scale.

    Raises:
        ShapeError: the sets are not 2-D of one width.
        ValueError: pairs and negatives exceed a set, or sigma or label_smoothing is out of range.
    """
    check_sets(x, y)
    check_smoothing(label_smoothing)
    compared = pairs + negatives[0], pairs + negatives[1]
    if not (0 <= pairs <= min(compared) and compared[0] <= len(x) and compared[1] <= len(y)):
        raise ValueError(
            f"{pairs} pairs and {negatives} negatives do not fit into {len(x)} and {len(y)} rows"
        )
    if x.dtype not in (torch.float32, torch.float64):
        x, y = x.float(), y.float()
    if max_scale is None:
        max_scale = math.inf if isinstance(logit_scale, Tensor) else logit_scale
    sigmas = () if sigma is None else bandwidths(sigma)
    job = distributed.world() if divided else distributed.World()
    tile = tile or (CPU_TILE if x.device.type == "cpu" else DEVICE_TILE)
    plan = TilePlan(
        pairs,
        compared,
        kernels=len(sigmas),
        small_scale=max_scale <= SAFE_FACTOR,
        smoothing=label_smoothing,
        tile=min(tile, -(-max(len(x), len(y)) // job.size)),
        precision=precision,
        compiled=compiled,
        rank=job.rank,
        processes=job.size,
    )
    scale, factors = _vector([logit_scale], x)[0], _vector([s**-2 for s in sigmas], x)
    return FusedTerms(*_Fused.apply(x.contiguous(), y.contiguous(), scale, factors, plan))


def _vector(values: Sequence[Tensor | float], like: Tensor) -> Tensor:
    """Stack numbers, (k,), in the dtype and on the device of a tensor, without waiting for it."""
    found = [v.to(like) if isinstance(v, Tensor) else like.new_full((), v) for v in values]
    return torch.stack(found) if found else like.new_empty(0)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, factors: Tensor, plan: TilePlan
    ) -> tuple[Any, ...]:
        tiles, owns = Tiles(plan, x, y, scale, factors), []
        with tiles.settings():
            sums = tiles.cross_sums()
            if plan.kernels:
                owns = [
                    tiles.own_sums(side, with_gradient=needed)
                    for side, needed in zip((x, y), ctx.needs_input_grad, strict=False)
                ]
        logs = [log_sums for log_sums, _ in owns]
        if plan.processes > 1:
            parts = [*sums, *logs]
            whole = torch.cat(parts)
            distributed.all_reduce_log_sum_exp(whole)
            rows, columns, kernels, *logs = torch.split(whole, [len(part) for part in parts])
            sums = CrossSums(rows, columns, kernels)
        ctx.save_for_backward(x, y, scale, factors)
        # Within a set the gradient is a multiple of what came with the sums.
        ctx.tiles, ctx.sums, ctx.logs, ctx.pulled = tiles, sums, logs, [own[1] for own in owns]
        n, m = math.log(len(x)), math.log(len(y))
        counts = (2 * n, 2 * m, n + m)[-len(logs) - 1 :]  # logarithms
        log_means = torch.stack([*logs, sums.kernels]) - _vector(counts, x)[:, None]
        return _infonce(x, y, scale, sums, plan), log_means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_infonce: Tensor, to_means: Tensor) -> tuple[Tensor | None, ...]:
        (x, y, _, factors), tiles, plan = ctx.saved_tensors, ctx.tiles, ctx.tiles.plan
        gradients: list[Tensor | None] = [None, None]
        for k, side in enumerate((x, y)):
            if ctx.needs_input_grad[k] and not plan.kernels:
                gradients[k] = torch.zeros_like(side)
            elif ctx.needs_input_grad[k]:
                weights = 2 * factors * to_means[k] / ctx.logs[k].exp()
                gradients[k] = torch.einsum("s,snd->nd", weights, ctx.pulled[k])
        with tiles.settings():
            to_scale = tiles.add_cross_gradients(
                (gradients[0], gradients[1]), ctx.sums, (to_infonce, to_means[-1])
            )
        if plan.processes > 1:
            for gradient in (*gradients, to_scale):
                if gradient is not None:
                    distributed.all_reduce_sum(gradient)
        return gradients[0], gradients[1], to_scale, None, None


def _infonce(x: Tensor, y: Tensor, scale: Tensor, sums: CrossSums, plan: TilePlan) -> Tensor:
    if not plan.pairs:
        return scale.new_zeros(())
    all_x, all_y = x[: plan.compared[0]].mean(0), y[: plan.compared[1]].mean(0)
    x, y = x[: plan.pairs], y[: plan.pairs]
    matched = (1 - plan.smoothing) * (x * y).sum(1).mean()
    if plan.smoothing:
        even = ((x.mean(0) * all_y).sum() + (all_x * y.mean(0)).sum()) / 2
        matched = matched + plan.smoothing * even
    return (sums.rows.mean() + sums.columns.mean()) / 2 - scale * matched
