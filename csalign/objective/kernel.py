"""The Gaussian kernel between two sets of rows, in the log domain."""

import math

import torch
from torch import Tensor

from csalign.errors import ShapeError


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
    check_sigma(sigma)
    exponents = squared_distances(x, y).mul(-0.5 / sigma**2)
    return torch.logsumexp(exponents.flatten(), dim=0) - math.log(exponents.numel())


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
    union = torch.cat([x, y]).detach()
    if len(union) > max_rows:
        union = union[torch.linspace(0, len(union) - 1, max_rows, device=union.device).long()]
    n = len(union)
    upper = torch.triu_indices(n, n, offset=1, device=union.device)
    squares = squared_distances(union, union)[upper[0], upper[1]]
    return math.sqrt(float(squares.median()))


def diagonal_share(x: Tensor, *, sigma: float) -> float:
    """Share of a set's kernel mass that is each row with itself.

    sum_i k(x_i, x_i) / sum_ij k(x_i, x_j). Near 1/n the kernel sees the whole set; near 1 the
    matrix is nearly diagonal, and a divergence built on it only pulls the nearest cross pairs
    together.

    Args:
        x: (n, d), float.
        sigma: bandwidth, > 0.

    Returns:
        In [1/n, 1].
    """
    return math.exp(-float(log_mean_kernel(x.detach(), x.detach(), sigma=sigma))) / len(x)


def check_sets(x: Tensor, y: Tensor) -> None:
    """Raise ShapeError unless both are 2-D, not empty, and of one width."""
    if x.ndim != 2 or y.ndim != 2 or not len(x) or not len(y) or x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"two sets of rows of one width are needed, got shapes {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )


def check_sigma(sigma: float) -> None:
    """Raise ValueError unless sigma is a positive finite number."""
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
