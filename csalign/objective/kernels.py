"""The Gaussian kernel between two sets of rows, in the log domain."""

import math

import torch
from torch import Tensor

from csalign.core.errors import ShapeError

Sigma = float | tuple[float, ...]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """All squared Euclidean distances between the rows of two sets.

    Args:
        x: (n, d), float.
        y: (m, d), same dtype and device.

    Returns:
        (n, m), >= 0, accurate to rounding of the squared norms.

    Raises:
        ShapeError: either is not 2-D or empty, or the widths differ.
    """
    check_sets(x, y)
    x2 = x.square().sum(1, keepdim=True)  # (n, 1)
    y2 = y.square().sum(1)  # (m,)
    return torch.addmm(y2.expand(len(x), -1), x, y.T, alpha=-2).add(x2).clamp(min=0)


def log_mean_kernel(x: Tensor, y: Tensor, *, sigma: float) -> Tensor:
    """Logarithm of the mean Gaussian kernel over all pairs of rows, diagonal included.

    log mean_ij exp(-|x_i - y_j|^2 / (2 sigma^2)), finite where every kernel value underflows.

    Args:
        x: (n, d), float, any norm.
        y: (m, d), same dtype and device.
        sigma: bandwidth, > 0, a distance between rows and not its square.

    Returns:
        () tensor, <= 0 up to rounding, differentiable in both.

    Raises:
        ShapeError: see `squared_distances`.
        ValueError: sigma is not a positive finite number.
    """
    return log_mean_kernels(x, y, sigma=sigma)[0]


def log_mean_kernels(x: Tensor, y: Tensor, *, sigma: Sigma) -> Tensor:
    """`log_mean_kernel` for one or several bandwidths, from one table of distances.

    Args:
        x: (n, d), float.
        y: (m, d), same dtype and device.
        sigma: bandwidth or bandwidths, > 0.

    Returns:
        (s,), one for each bandwidth.

    Raises:
        ShapeError: see `squared_distances`.
        ValueError: a sigma is not a positive finite number, or there is none.
    """
    sigmas = bandwidths(sigma)
    squares = squared_distances(x, y)
    sums = [torch.logsumexp(squares.mul(-0.5 / s**2).flatten(), dim=0) for s in sigmas]
    return torch.stack(sums) - math.log(squares.numel())


def median_distance(x: Tensor, y: Tensor, *, max_rows: int = 2_048) -> float:
    """Median Euclidean distance over all pairs of distinct rows of the union of two sets.

    The median heuristic for a kernel's bandwidth. Not differentiated.

    Args:
        x: (n, d), float.
        y: (m, d).
        max_rows: larger unions are thinned to so many rows, evenly spaced, which is enough for a
            median and keeps the work bounded.

    Returns:
        The median, >= 0; 0 where more than half of the pairs coincide.

    Raises:
        ShapeError: the widths differ, a set is not 2-D or empty.
    """
    check_sets(x, y)
    union = _thinned(torch.cat([x, y]).detach(), max_rows)
    n = len(union)
    upper = torch.triu_indices(n, n, offset=1, device=union.device)
    squares = squared_distances(union, union)[upper[0], upper[1]]
    return math.sqrt(float(squares.median()))


def diagonal_share(x: Tensor, *, sigma: float, max_rows: int = 2_048) -> float:
    """Share of a set's kernel mass that is each row with itself.

    sum_i k(x_i, x_i) / sum_ij k(x_i, x_j). Near 1/n the kernel sees the whole set; near 1 the
    matrix is nearly diagonal, and a divergence built on it only pulls the nearest cross pairs
    together.

    Args:
        x: (n, d), float.
        sigma: bandwidth, > 0.
        max_rows: of larger sets the kernel between distinct rows is guessed from so many rows,
            evenly spaced.

    Returns:
        In [1/n, 1].
    """
    some = _thinned(x.detach(), max_rows)
    mass = len(some) * math.exp(float(log_mean_kernel(some, some, sigma=sigma)))  # of a row
    if len(some) == len(x):
        return 1 / mass
    return 1 / (1 + max(0.0, mass - 1) * (len(x) - 1) / (len(some) - 1))


def _thinned(x: Tensor, max_rows: int) -> Tensor:
    """So many rows at most, evenly spaced."""
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


def bandwidths(sigma: Sigma) -> tuple[float, ...]:
    """One or several bandwidths as a tuple.

    Raises:
        ValueError: a sigma is not a positive finite number, or there is none.
    """
    sigmas = sigma if isinstance(sigma, tuple) else (sigma,)
    if not sigmas:
        raise ValueError("at least one sigma is needed")
    for value in sigmas:
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"sigma must be positive and finite, got {value}")
    return sigmas
