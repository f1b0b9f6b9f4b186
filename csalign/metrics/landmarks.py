"""Mean Gaussian kernels over all pairs of rows of large sets, in one pass over the rows.

Rows are compared with landmarks, not with each other. Some landmarks, the base, span a low-rank
kernel k'(a, b) = k(a, base) (k(base, base) + ridge)^-1 k(base, b) (Nystrom; Williams and Seeger
2001), whose mean over all pairs follows from the rows' mean kernels with the base. The mean of the
residual r = k - k' is estimated with other landmarks, the witnesses S, drawn from the rows:

    mean over x, x' of r  ~  2 (mean over x, s of r) - (mean over s != s' of r),

which is unbiased; its error, -|mu_x - mu_s|^2 in the space of r, falls with the number of
witnesses. Its spread with a block of witnesses left out gives the standard error (jackknife).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csalign.core.progress import track
from csalign.objective import kernels
from csalign.objective.products import product

BASE = 512  # rows per side
WITNESSES = 512  # rows per side
BLOCKS = 32
RIDGE = 1e-4  # of a kernel whose diagonal is 1; any is unbiased, a smaller one drowns in rounding
TILE_ROWS = 1_024  # tiles of distances that stay in the cache


class Estimate(NamedTuple):
    """A figure and its standard error; nan if the kernel means are smaller than their error."""

    value: float
    error: float


class MeanKernels(NamedTuple):
    """Log mean kernels within x and y and across, over all pairs, for sizes n and m.

    (r,) float64 each: of all landmarks, then without each block of witnesses; (1,) if exact.
    """

    xx: Tensor
    yy: Tensor
    xy: Tensor
    sizes: tuple[int, int]

    def cs_divergence(self) -> Estimate:
        """Estimate `csalign.objective.divergences.cs_divergence`."""
        return _estimate(self.xx + self.yy - 2 * self.xy, least=0)

    def mmd(self) -> Estimate:
        """Estimate `csalign.objective.divergences.mmd`."""
        return _estimate(self.xx.exp() + self.yy.exp() - 2 * self.xy.exp(), least=0)

    def uniformity(self) -> dict[str, Estimate]:
        """Estimate the log mean kernels: of pairs of different rows within x and y, and across."""
        x, y = (without_diagonal(*own) for own in zip((self.xx, self.yy), self.sizes, strict=True))
        return {"image": _estimate(x), "text": _estimate(y), "cross": _estimate(self.xy)}


def without_diagonal(log_means: Tensor, n: int) -> Tensor:
    """Log mean kernels over pairs of different rows, from those over all pairs of n unit rows."""
    if n == 1:
        return torch.zeros_like(log_means)
    return ((log_means.exp() * n - 1) / (n - 1)).log()


def exact_mean_kernels(x: Tensor, y: Tensor, *, sigmas: tuple[float, ...]) -> list[MeanKernels]:
    """Compute the mean kernels of two sets from all pairs of rows, for each bandwidth."""
    sets, sizes = ((x, x), (y, y), (x, y)), (len(x), len(y))
    means = torch.stack([kernels.tiled_log_mean_kernels(a, b, sigma=sigmas) for a, b in sets])
    return [MeanKernels(own[:1], own[1:2], own[2:], sizes) for own in means.T]


def estimate_mean_kernels(
    x: Tensor,
    y: Tensor,
    *,
    sigmas: tuple[float, ...],
    seed: int,
    base: int = BASE,
    witnesses: int = WITNESSES,
) -> list[MeanKernels]:
    """Estimate the mean kernels of x (n, d) and y (m, d), any float dtype, per bandwidth.

    Args:
        x: images; products are float32.
        y: texts.
        sigmas: bandwidths, > 0.
        seed: of the draw of landmarks.
        base: rows of each side in the base.
        witnesses: of each side; a smaller side is used whole, and its own mean is exact.
    """
    kernels.check_sets(x, y)
    kernels.bandwidths(sigmas)
    rng = np.random.default_rng(seed)

    def draw(rows: Tensor, count: int) -> Tensor:
        chosen = np.sort(rng.choice(len(rows), min(len(rows), count), replace=False))
        return rows[torch.from_numpy(chosen)].float()

    union = torch.cat([draw(x, base), draw(y, base)])
    drawn = draw(x, witnesses), draw(y, witnesses)
    points = torch.cat([union, *drawn])
    norms, twice = points.square().sum(1), -2 * points
    means = torch.zeros(len(sigmas), 2, len(points), dtype=torch.float64)
    for side, rows in enumerate((x, y)):
        # Products and sums of a tile in float32; only sums of tiles need more.
        tiles = torch.split(rows, TILE_ROWS)
        for tile in track(tiles, "mean kernels: blocks", len(tiles)):
            values = tile.float()
            squares = product(values, twice).add_(norms)
            squares.add_(values.square().sum(1, keepdim=True)).clamp_(min=0)
            for i, sigma in enumerate(sigmas):
                means[i, side] += squares.mul(-0.5 / sigma**2).exp_().sum(0)
        means[:, side] /= len(rows)
    union, *landmarks = (rows.double() for rows in (union, *drawn))
    return [
        _mean_kernels(own, union, landmarks, sigma, (len(x), len(y)))
        for own, sigma in zip(means, sigmas, strict=True)
    ]


def _mean_kernels(
    with_points: Tensor, base: Tensor, witnesses: list[Tensor], sigma: float, sizes: tuple[int, int]
) -> MeanKernels:
    """Combine the mean kernels of each side with all landmarks, (2, points), into estimates."""
    split = [len(base), *map(len, witnesses)]
    with_base, *with_witnesses = torch.split(with_points, split, dim=1)
    ridge = RIDGE * torch.eye(len(base), dtype=base.dtype)
    factor: Tensor = torch.linalg.cholesky(_kernel(base, base, sigma) + ridge)
    means = _project(factor, with_base)
    inside = [_project(factor, _kernel(rows, base, sigma)) for rows in witnesses]

    def residual(i: int, j: int) -> Tensor:
        """Return (k, l) between the witnesses of two sides."""
        return _kernel(witnesses[i], witnesses[j], sigma) - inside[i] @ inside[j].T

    def toward(i: int, j: int) -> Tensor:
        """Return (k,) the mean of each witness of a side with all rows of another."""
        return with_witnesses[i][j] - inside[i] @ means[j]

    masks = [_masks(len(rows), n) for rows, n in zip(witnesses, sizes, strict=True)]
    own = [
        means[i].square().sum() + _within(residual(i, i), toward(i, i), masks[i], sizes[i])
        for i in (0, 1)
    ]
    x, y = (mask / mask.sum(1, keepdim=True) for mask in masks)
    across = x @ toward(0, 1) + y @ toward(1, 0) - ((x @ residual(0, 1)) * y).sum(1)
    # The logarithm of an estimate below 0 is nan.
    return MeanKernels(own[0].log(), own[1].log(), (means[0] @ means[1] + across).log(), sizes)


def _project(factor: Tensor, table: Tensor) -> Tensor:
    """Map (n, b) kernels with the base to (n, b), whose products are k'."""
    solved: Tensor = torch.linalg.solve_triangular(factor, table.T, upper=False)
    return solved.T


def _within(residual: Tensor, toward: Tensor, mask: Tensor, n: int) -> Tensor:
    """Compute the mean of a residual kernel over all pairs of a side's n rows, for each mask.

    residual is (k, k) of the witnesses; toward (k,) the mean of each with all rows, itself among
    them; mask (1 + BLOCKS, k), 1 for the witnesses to use.
    """
    count = mask.sum(1)
    diagonal = residual.diagonal()
    others = (toward * n - diagonal) / max(n - 1, 1)
    pairs = ((mask @ residual) * mask).sum(1) - mask @ diagonal
    off = 2 * (mask @ others) / count - pairs / (count * (count - 1)).clamp(min=1)
    return (mask @ diagonal) / count / n + (1 - 1 / n) * off


def _masks(witnesses: int, rows: int) -> Tensor:
    """Mark all witnesses, then all but one block (unless they are all rows), (1 + BLOCKS, k)."""
    mask = torch.ones(1 + BLOCKS, witnesses, dtype=torch.float64)
    if witnesses < rows:
        mask[torch.arange(witnesses) % BLOCKS + 1, torch.arange(witnesses)] = 0
    return mask


def _estimate(figures: Tensor, least: float = -math.inf) -> Estimate:
    """Estimate a figure, never below `least`, from those with and without each block."""
    left_out = figures[1:]
    # The error is a sum over pairs of witnesses, of which leaving one block out takes each twice.
    spread = (left_out - left_out.mean()).square().sum() * (BLOCKS - 1) / BLOCKS / 2
    error = float(spread.sqrt())
    if not math.isfinite(error):
        return Estimate(math.nan, math.nan)
    return Estimate(max(least, float(figures[0])), error)


def _kernel(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    return kernels.squared_distances(x, y).mul_(-0.5 / sigma**2).exp_()
