"""The mean Gaussian kernel between sets of rows, in the log domain, and its bandwidth.

k(a, b) = exp(-|a - b|^2 / (2 sigma^2)). Means run over all pairs of rows, diagonals included.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from csalign.core.errors import ShapeError

# One bandwidth or several; a tensor, () or (s,), is not read on the host, so it is not checked.
Sigma = float | tuple[float, ...] | Tensor


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute all squared Euclidean distances, (n, m), between the rows of x (n, d) and y (m, d).

    Accurate to rounding of the squared norms, and >= 0.

    Raises:
        ShapeError: either is not 2-D or empty, or the widths differ.
    """
    check_sets(x, y)
    x2 = x.square().sum(1, keepdim=True)  # (n, 1)
    y2 = y.square().sum(1)  # (m,)
    return torch.addmm(y2.expand(len(x), -1), x, y.T, alpha=-2).add(x2).clamp(min=0)


def log_mean_kernels(x: Tensor, y: Tensor, *, sigma: Sigma) -> Tensor:
    """Compute the log mean kernel over all pairs of rows, for one or several bandwidths.

    log mean_ij exp(-|x_i - y_j|^2 / (2 sigma^2)), finite where every kernel value underflows.

    Args:
        x: (n, d), float, any norm.
        y: (m, d), same dtype and device.
        sigma: bandwidth or bandwidths, > 0, distances between rows and not their squares.

    Returns:
        (s,), one per bandwidth, <= 0 up to rounding, differentiable in both.

    Raises:
        ShapeError: see `squared_distances`.
        ValueError: a sigma is not a positive finite number, or there is none.
    """
    sigmas = bandwidths(sigma)
    squares = squared_distances(x, y)
    sums = [torch.logsumexp(squares.mul(-0.5 / s**2).flatten(), dim=0) for s in sigmas]
    return torch.stack(sums) - math.log(squares.numel())


def masked_log_mean_kernels(
    x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, *, sigma: Sigma
) -> Tensor:
    """Compute `log_mean_kernels`, (s, b), of the masked rows of each sample of a batch.

    Args:
        x: (b, n, d), float; rows outside of the mask may contain anything, even NaN.
        y: (b, m, d), same dtype and device.
        x_mask: (b, n), bool; at least one row of each sample.
        y_mask: (b, m), bool.
        sigma: bandwidth or bandwidths, > 0.
    """
    x, y = x.masked_fill(~x_mask[..., None], 0), y.masked_fill(~y_mask[..., None], 0)
    norms = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :]  # (b, n, m)
    squares = torch.baddbmm(norms, x, y.mT, alpha=-2).clamp(min=0)
    absent = ~(x_mask[:, :, None] & y_mask[:, None, :])
    counts = (x_mask.sum(1) * y_mask.sum(1)).to(x.dtype)
    sums = [
        squares.mul(-0.5 / s**2).masked_fill(absent, -torch.inf).flatten(1).logsumexp(1)
        for s in bandwidths(sigma)
    ]
    return torch.stack(sums) - counts.log()


def tiled_log_mean_kernels(x: Tensor, y: Tensor, *, sigma: Sigma, tile: int = 2_048) -> Tensor:
    """Compute `log_mean_kernels` in float64, without gradient, in tiles of `tile` rows."""
    check_sets(x, y)
    sigmas, sums = bandwidths(sigma), []
    for rows in torch.split(x.detach(), tile):
        for columns in torch.split(y.detach(), tile):
            squares = squared_distances(rows.double(), columns.double())
            sums += [squares.mul(-0.5 / s**2).flatten().logsumexp(0) for s in sigmas]
    total = torch.stack(sums).reshape(-1, len(sigmas)).logsumexp(0)
    return total - math.log(len(x)) - math.log(len(y))


def median_distance(x: Tensor, y: Tensor, *, max_rows: int = 2_048) -> Tensor:
    """Compute the median distance over all pairs of distinct rows of the union of two sets.

    The median heuristic for a kernel's bandwidth, a () tensor; 0 where more than half of the pairs
    coincide. Not differentiated.

    Args:
        x: (n, d), float.
        y: (m, d).
        max_rows: larger unions are thinned to this many rows, evenly spaced.

    Raises:
        ShapeError: the widths differ, a set is not 2-D or empty.
    """
    check_sets(x, y)
    union = _thin(torch.cat([x, y]).detach(), max_rows)
    squares = squared_distances(union, union)
    one, other = torch.triu_indices(len(union), len(union), 1, device=union.device)
    return squares[one, other].median().sqrt()


def diagonal_share(x: Tensor, *, sigma: Sigma, max_rows: int = 2_048) -> Tensor:
    """Share of a set's kernel mass that lies on the diagonal, sum_i k_ii / sum_ij k_ij.

    Near 1/n the kernel sees the whole set; near 1 the matrix is nearly diagonal, and a divergence
    built on it only pulls the nearest cross pairs together.

    Args:
        x: (n, d), float.
        sigma: bandwidth, > 0; the widest of several is used.
        max_rows: for larger sets the kernel between distinct rows is estimated from this many
            rows, evenly spaced.

    Returns:
        () tensor in [1/n, 1].
    """
    some = _thin(x.detach(), max_rows)
    mass = len(some) * log_mean_kernels(some, some, sigma=sigma).max().exp()  # of a row
    if len(some) == len(x):
        return 1 / mass
    return 1 / (1 + (mass - 1).clamp(min=0) * (len(x) - 1) / (len(some) - 1))


def _thin(x: Tensor, max_rows: int) -> Tensor:
    """Take at most this many rows, evenly spaced."""
    if len(x) <= max_rows:
        return x
    return x[torch.linspace(0, len(x) - 1, max_rows, device=x.device).long()]


def check_sets(x: Tensor, y: Tensor) -> None:
    """Raise ShapeError unless both are 2-D, not empty, and of one width."""
    if x.ndim != 2 or y.ndim != 2 or not len(x) or not len(y) or x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"two sets of rows of one width are needed, got shapes {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )


def bandwidths(sigma: Sigma) -> Sequence[float] | Sequence[Tensor]:
    """Return one or several bandwidths as a sequence.

    Raises:
        ValueError: a sigma is not a positive finite number, or there is none.
    """
    if isinstance(sigma, Tensor):
        return sigma.flatten().unbind()
    sigmas = sigma if isinstance(sigma, tuple) else (sigma,)
    if not sigmas:
        raise ValueError("at least one sigma is needed")
    for value in sigmas:
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"sigma must be positive and finite, got {value}")
    return sigmas
