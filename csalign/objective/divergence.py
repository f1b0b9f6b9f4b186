"""The kernel divergences: how far apart two sets of embeddings lie as distributions."""

from typing import NamedTuple

import torch
from torch import Tensor

from csalign.objective.kernels import Sigma, log_mean_kernels


class CSTerms(NamedTuple):
    """What the Cauchy-Schwarz divergence is made of; their sum is the divergence.

    Attributes:
        cross: -2 log mean k(x, y), >= 0, () tensor; falls as the sets come together.
        intra: log mean k(x, x) + log mean k(y, y), <= 0, () tensor; falls as each set spreads.
    """

    cross: Tensor
    intra: Tensor


def cs_terms(x: Tensor, y: Tensor, *, sigma: Sigma) -> CSTerms:
    """The two terms of `cs_divergence`, which takes the same arguments; both differentiable."""
    cross = -2 * log_mean_kernels(x, y, sigma=sigma)
    intra = log_mean_kernels(x, x, sigma=sigma) + log_mean_kernels(y, y, sigma=sigma)
    return CSTerms(cross=cross.mean(), intra=intra.mean())


def cs_divergence(x: Tensor, y: Tensor, *, sigma: Sigma) -> Tensor:
    """Estimate the Cauchy-Schwarz divergence between two sets of rows.

    log mean k(x, x) + log mean k(y, y) - 2 log mean k(x, y) with the Gaussian kernel
    k(a, b) = exp(-|a - b|^2 / (2 sigma^2)); all pairs, diagonals included (arXiv 2502.17028,
    from kernel density estimates of -log((int pq)^2 / (int p^2 int q^2))).

    Args:
        x: (n, d), float, any norm, n >= 1.
        y: (m, d), same dtype and device; m may differ from n, rows need not be paired.
        sigma: bandwidth, > 0, a distance between rows and not its square; the mean of the
            divergences at several.

    Returns:
        () tensor in nats, >= 0 up to rounding, 0 when the sets coincide; differentiable in both,
        with finite gradients however far apart the sets are.

    Raises:
        ShapeError: either is not 2-D or empty, or the widths differ.
        ValueError: sigma is not a positive finite number.

    Examples:
        >>> import torch
        >>> float(cs_divergence(torch.zeros(1, 1), torch.ones(1, 1), sigma=1.0))
        1.0
    """
    terms = cs_terms(x, y, sigma=sigma)
    return terms.intra + terms.cross


def mmd(x: Tensor, y: Tensor, *, sigma: Sigma) -> Tensor:
    """Squared maximum mean discrepancy with the same kernel (Gretton et al. 2012, biased).

    mean k(x, x) + mean k(y, y) - 2 mean k(x, y), diagonals included.

    Args:
        x: (n, d), float.
        y: (m, d), same dtype and device.
        sigma: bandwidth, > 0; the mean over several.

    Returns:
        () tensor, in [0, 2] up to rounding.
    """
    sets = ((x, x), (y, y), (x, y))
    return mmd_of_means(torch.stack([log_mean_kernels(a, b, sigma=sigma) for a, b in sets]))


def cs_of_means(log_means: Tensor) -> Tensor:
    """`cs_divergence` by the logarithms of mean kernels within x, within y and across, (3, s)."""
    return (log_means[0] + log_means[1] - 2 * log_means[2]).mean()


def mmd_of_means(log_means: Tensor) -> Tensor:
    """`mmd`, likewise."""
    means = log_means.exp()
    return (means[0] + means[1] - 2 * means[2]).mean()
