"""The divergence between Gaussian fits of two sets."""

import torch
from torch import Tensor

from csalign.objective.kernels import check_sets

_FLOOR = 1e-6  # variance; keeps two sets of one point each finite, and is nothing to unit rows


def gaussian_jeffreys(x: Tensor, y: Tensor, *, shrinkage: float = 0.1) -> Tensor:
    """Jeffreys divergence KL(p || q) + KL(q || p) between Gaussian fits p and q of two sets.

    With means m, biased covariances S and t = tr(S_x + S_y) / 2d the fits have the covariances
    C = (1 - shrinkage) S + (shrinkage * t + 1e-6) I, of full rank also where a set has fewer rows
    than columns. The log-determinants cancel:

    J = 1/2 tr(C_x^-1 (C_y - C_x) C_y^-1 (C_y - C_x))
        + 1/2 (m_x - m_y)^T (C_x^-1 + C_y^-1) (m_x - m_y)

    Args:
        x: (n, d), float32 or float64; one row has no spread, so n >= 2 to mean much.
        y: (m, d), same dtype and device.
        shrinkage: in (0, 1]; at 1 only means and a common variance are compared. The estimate
            then grows like the squared distance of the means.

    Returns:
        () tensor in nats, >= 0, 0 where means and covariances agree; differentiable in both.

    Raises:
        ShapeError: either is not 2-D or empty, or the widths differ.
        ValueError: shrinkage is not in (0, 1].
    """
    check_sets(x, y)
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}")
    spread_x, spread_y = _covariance(x), _covariance(y)
    width = x.shape[1]
    common = shrinkage * (spread_x.trace() + spread_y.trace()) / (2 * width) + _FLOOR
    ridge = common * torch.eye(width, dtype=x.dtype, device=x.device)
    root_x = _root((1 - shrinkage) * spread_x + ridge)
    root_y = _root((1 - shrinkage) * spread_y + ridge)
    # Both halves are squared norms of whitened differences, so neither can round below zero.
    change = (1 - shrinkage) * (spread_y - spread_x)
    covariances = _whiten(root_y, _whiten(root_x, change).mT).square().sum()
    shift = (x.mean(0) - y.mean(0))[:, None]
    means = _whiten(root_x, shift).square().sum() + _whiten(root_y, shift).square().sum()
    return (covariances + means) / 2


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def _root(covariance: Tensor) -> Tensor:
    """Cholesky factor; NaN, not an exception, where the input was not finite."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance)
    return factor.masked_fill(info != 0, torch.nan)


def _whiten(root: Tensor, columns: Tensor) -> Tensor:
    whitened: Tensor = torch.linalg.solve_triangular(root, columns, upper=False)
    return whitened
