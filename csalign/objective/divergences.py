"""Divergences: measures of how far apart two sets of embeddings are as distributions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.enums import DivergenceName
from csalign.core.errors import ShapeError
from csalign.objective.kernels import (
    Sigma,
    bandwidths,
    check_sets,
    log_mean_kernels,
    masked_log_mean_kernels,
    squared_distances,
)

_VARIANCE_FLOOR = 1e-6  # keeps two sets of one point each finite; negligible for unit rows
_COARSE_STEPS = 6  # of Sinkhorn where the bandwidth is not known on the host: 2 / 2^5 is narrow


class CSTerms(NamedTuple):
    """The terms of the Cauchy-Schwarz divergence, () tensors; their sum is the divergence.

    cross, -2 log mean k(x, y) >= 0, falls as the sets come together; intra, log mean k(x, x) +
    log mean k(y, y) <= 0, falls as each set spreads.
    """

    cross: Tensor
    intra: Tensor


def cs_terms(x: Tensor, y: Tensor, *, sigma: Sigma) -> CSTerms:
    """Compute the two terms of `cs_divergence`, which has the same arguments."""
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


def holder(sides: Sequence[Tensor], sigma: Sigma) -> Tensor:
    """Estimate the Hoelder divergence of several sets of rows, all at once.

    sum_m log int p_m^M - M log int prod_m p_m, for M sets: 0 for equal densities, else positive, by
    the generalised Hoelder inequality. p_m(z) is the mean kernel of z and the rows of set m. int
    p_m^M is the mean of p_m^(M - 1) over the rows of m, diagonal included, and int prod_m p_m the
    mean over the sets m of the mean of prod_(n != m) p_n over the rows of m.

    For two sets it is `cs_divergence`. In wide kernels, as between Gaussians of one covariance, it
    is the sum of the CS divergences of all pairs of sets. The integrals are estimated on different
    rows, so that from three sets on the inequality is not exact: for sets that nearly coincide in
    density the estimate can be a little below 0.

    Args:
        sides: M >= 2 sets, (n_m, d), float, any norm, of one dtype and device; rows need not be
            paired. The kernels of all pairs of rows are in memory at once.
        sigma: bandwidth, > 0, as in `cs_divergence`; the mean of the divergences at several.

    Returns:
        () tensor in nats, the same in any order of the sets; differentiable in all of them, with
        finite gradients however far apart they are.

    Raises:
        ShapeError: a set is not 2-D or empty, or the widths differ.
        ValueError: there are fewer than two sets, or sigma is not a positive finite number.
    """
    if (count := len(sides)) < 2:
        raise ValueError(f"a divergence needs at least 2 sets, got {count}")
    for side in sides:
        check_sets(sides[0], side)
    sizes, rows = [len(side) for side in sides], torch.cat(list(sides))
    squares, values = squared_distances(rows, rows), []
    for width in bandwidths(sigma):
        kernels = torch.split(squares.mul(-0.5 / width**2), sizes, 1)
        densities = torch.stack([_log_mean(own, 1) for own in kernels], 1)  # of each row, logs
        parts = torch.split(densities, sizes)
        powers = [_log_mean((count - 1) * part[:, m]) for m, part in enumerate(parts)]
        products = [_log_mean(part.sum(1) - part[:, m]) for m, part in enumerate(parts)]
        values.append(torch.stack(powers).sum() - count * _log_mean(torch.stack(products)))
    return torch.stack(values).mean()


def _log_mean(logs: Tensor, dim: int = 0) -> Tensor:
    return logs.logsumexp(dim) - math.log(logs.shape[dim])


def mmd(x: Tensor, y: Tensor, *, sigma: Sigma) -> Tensor:
    """Compute the squared MMD with the same kernel (Gretton et al. 2012, biased).

    mean k(x, x) + mean k(y, y) - 2 mean k(x, y), diagonals included, in [0, 2] up to rounding.
    Arguments and exceptions as for `cs_divergence`.
    """
    sets = ((x, x), (y, y), (x, y))
    return mmd_of_means(torch.stack([log_mean_kernels(a, b, sigma=sigma) for a, b in sets]))


def cs_of_means(log_means: Tensor) -> Tensor:
    """Compute `cs_divergence` from the log mean kernels of x, of y and across, (3, s)."""
    return (log_means[0] + log_means[1] - 2 * log_means[2]).mean()


def mmd_of_means(log_means: Tensor) -> Tensor:
    """Compute `mmd` from the log mean kernels of x, of y and across, (3, s)."""
    means = log_means.exp()
    return (means[0] + means[1] - 2 * means[2]).mean()


def token_divergence(
    x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, *, sigma: Sigma
) -> Tensor:
    """Average the CS divergence between the two token sets of each sample over the batch.

    Rows are used as they are, see `unit_tokens`; samples in which a side has no token are omitted.

    Args:
        x: (b, v, d), float, any norm; the content of padding, even NaN, has no effect.
        y: (b, l, d), same dtype and device; l may differ from v.
        x_mask: (b, v), bool, True where there is a token.
        y_mask: (b, l), bool.
        sigma: bandwidth, > 0; the mean over several.

    Returns:
        () tensor in nats, >= 0 up to rounding; 0 where every sample is omitted.
    """
    fits = x.ndim == y.ndim == 3 and len(x) == len(y) and x.shape[2] == y.shape[2]
    if not fits or x_mask.shape != x.shape[:2] or y_mask.shape != y.shape[:2]:
        raise ShapeError(
            "two batches of tokens of one width with their masks are needed, got shapes "
            f"{tuple(x.shape)}, {tuple(y.shape)}, {tuple(x_mask.shape)} and {tuple(y_mask.shape)}"
        )
    if x_mask.dtype != torch.bool or y_mask.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {x_mask.dtype} and {y_mask.dtype}")
    bandwidths(sigma)
    if not x_mask.numel() or not y_mask.numel():
        return x[:0].sum() + y[:0].sum()  # an empty sum is 0 and keeps the graph
    both = (x_mask.any(1) & y_mask.any(1))[:, None]
    # An omitted sample becomes two equal sets of zeros.
    x = x.masked_fill(~(x_mask & both)[..., None], 0)
    y = y.masked_fill(~(y_mask & both)[..., None], 0)
    x_mask, y_mask = x_mask | ~both, y_mask | ~both
    own_x = masked_log_mean_kernels(x, x, x_mask, x_mask, sigma=sigma)
    own_y = masked_log_mean_kernels(y, y, y_mask, y_mask, sigma=sigma)
    cross = masked_log_mean_kernels(x, y, x_mask, y_mask, sigma=sigma)
    found = (own_x + own_y - 2 * cross).mean(0) * both[:, 0]
    return found.sum() / both.sum().clamp(min=1)


def unit_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Normalise tokens (b, v, d) under a mask (b, v), bool; padding becomes 0."""
    return normalize(x.masked_fill(~mask[..., None], 0), dim=-1)


def gaussian_jeffreys(x: Tensor, y: Tensor, *, shrinkage: float = 0.1) -> Tensor:
    """Compute the Jeffreys divergence KL(p || q) + KL(q || p) of Gaussian fits p and q.

    With means m, biased covariances S and t = tr(S_x + S_y) / 2d the fits have the covariances
    C = (1 - shrinkage) S + (shrinkage * t + 1e-6) I, of full rank even if a set has fewer rows
    than columns. The log-determinants cancel:

    J = 1/2 tr(C_x^-1 (C_y - C_x) C_y^-1 (C_y - C_x))
        + 1/2 (m_x - m_y)^T (C_x^-1 + C_y^-1) (m_x - m_y)

    Args:
        x: (n, d), float32 or float64; a single row has no spread, so use n >= 2.
        y: (m, d), same dtype and device.
        shrinkage: in (0, 1], else ValueError; at 1 only means and a common variance are compared.

    Returns:
        () tensor in nats, >= 0, 0 where means and covariances agree; differentiable in both.
    """
    check_sets(x, y)
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}")
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    spread_x, spread_y = centred_x.T @ centred_x / len(x), centred_y.T @ centred_y / len(y)
    width = x.shape[1]
    common = shrinkage * (spread_x.trace() + spread_y.trace()) / (2 * width) + _VARIANCE_FLOOR
    ridge = common * torch.eye(width, dtype=x.dtype, device=x.device)
    root_x = _cholesky((1 - shrinkage) * spread_x + ridge)
    root_y = _cholesky((1 - shrinkage) * spread_y + ridge)
    # Both halves are squared norms of whitened differences, so neither can round below zero.
    change = (1 - shrinkage) * (spread_y - spread_x)
    covariances = _whiten(root_y, _whiten(root_x, change).mT).square().sum()
    shift = (x.mean(0) - y.mean(0))[:, None]
    means = _whiten(root_x, shift).square().sum() + _whiten(root_y, shift).square().sum()
    return (covariances + means) / 2


def _cholesky(covariance: Tensor) -> Tensor:
    """Factor a covariance; NaN, not an exception, where the input was not finite."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance)
    return factor.masked_fill(info != 0, torch.nan)


def _whiten(root: Tensor, columns: Tensor) -> Tensor:
    whitened: Tensor = torch.linalg.solve_triangular(root, columns, upper=False)
    return whitened


def sinkhorn_divergence(
    x: Tensor, y: Tensor, *, sigma: Sigma, iterations: int = 20, diameter: float | None = None
) -> Tensor:
    """Compute the debiased Sinkhorn divergence with uniform weights (Feydy et al. 2019).

    S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, with OT the optimal transport of cost
    |x_i - y_j|^2 / 2 plus sigma^2 times the relative entropy of the plan to the product. As sigma
    grows S tends to half the squared distance of the means, as it falls to half the squared
    Wasserstein-2 distance. Equal to geomloss's SamplesLoss("sinkhorn", p=2, blur=sigma) once both
    have converged.

    The potentials come from symmetrised updates in the log domain, one at each blur from the
    diameter down to sigma by halves (six, none below sigma, if sigma is a tensor) and `iterations`
    more at sigma. The diameter, the largest distance, is measured by default, for which the host
    waits for the device; that of unit rows is 2 at most. The gradient is the transport plan's and
    does not go through the updates. Arguments and exceptions as for `cs_divergence`, with sigma
    as the blur: exp(-cost / sigma^2) is its kernel. Returns a () tensor, >= 0 and 0 for equal
    sets, up to rounding and convergence.
    """
    cross, own_x, own_y = (squared_distances(a, b) / 2 for a, b in ((x, y), (x, x), (y, y)))
    values = []
    for blur in bandwidths(sigma):
        updates = partial(_epsilons, blur=blur, iterations=iterations, diameter=diameter)
        own = sum(_transport_to_itself(cost, updates(cost)) for cost in (own_x, own_y))
        values.append(_transport(cross, updates(cross)) - own / 2)
    return torch.stack(values).mean()


def _epsilons(
    cost: Tensor, blur: float | Tensor, iterations: int, diameter: float | None
) -> list[float | Tensor]:
    """Return squared blurs of the updates: from the diameter down, then the given one."""
    diameter = math.sqrt(2 * float(cost.detach().max())) if diameter is None else diameter
    if isinstance(blur, Tensor):
        coarse = [blur.clamp(min=diameter / 2**step) for step in range(_COARSE_STEPS)]
        return [width**2 for width in coarse + [blur] * iterations]
    steps = math.ceil(math.log2(diameter / blur)) if blur < diameter < math.inf else 0
    return [(diameter / 2**step) ** 2 for step in range(steps)] + [blur**2] * iterations


def _transport(cost: Tensor, epsilons: list[float | Tensor]) -> Tensor:
    """Compute the entropic transport cost, the mean of the semi-duals in either potential.

    An error in the potentials enters the value squared, and a semi-dual's gradient in the cost is
    the plan itself.
    """
    fixed = cost.detach()
    f, g = fixed.new_zeros(cost.shape[0]), fixed.new_zeros(cost.shape[1])
    for epsilon in epsilons:
        # Both from the previous ones, then halfway: symmetric in the sides, without oscillation.
        new_f, new_g = _quick_softmin(fixed, g, epsilon), _quick_softmin(fixed.T, f, epsilon)
        f, g = (f + new_f) / 2, (g + new_g) / 2
    along_x = _softmin(cost, g, epsilons[-1]).mean() + g.mean()
    along_y = _softmin(cost.T, f, epsilons[-1]).mean() + f.mean()
    return (along_x + along_y) / 2


def _transport_to_itself(cost: Tensor, epsilons: list[float | Tensor]) -> Tensor:
    """Compute `_transport` of a set to itself, whose two potentials are equal."""
    fixed = cost.detach()
    f = fixed.new_zeros(len(cost))
    for epsilon in epsilons:
        f = (f + _quick_softmin(fixed, f, epsilon)) / 2
    return _softmin(cost, f, epsilons[-1]).mean() + f.mean()


def _softmin(cost: Tensor, potential: Tensor, epsilon: float | Tensor) -> Tensor:
    """Compute (n,) -epsilon log mean_j exp((potential_j - cost_ij) / epsilon)."""
    exponents = (potential - cost) / epsilon
    return -epsilon * (exponents.logsumexp(1) - math.log(cost.shape[1]))


def _quick_softmin(cost: Tensor, potential: Tensor, epsilon: float | Tensor) -> Tensor:
    """Compute `_softmin` without a gradient."""
    exponents = (potential - cost).div_(epsilon)
    largest = exponents.amax(1, keepdim=True)
    # The clamp cuts off less than rounding; without it come subnormals, which are slow to add.
    sums = exponents.sub_(largest).clamp_(min=-80).exp_().sum(1)
    return -epsilon * (sums.log_() + largest[:, 0] - math.log(cost.shape[1]))


@dataclass(frozen=True)
class Divergence:
    """Divergence with its properties; call it with two sets and sigma."""

    name: DivergenceName  # its name in the configuration
    _compute: Callable[..., Tensor]
    minimum: int = 1  # rows that each side needs
    has_bandwidth: bool = False  # whether sigma changes it
    matched: bool = False  # whether it compares row i with row i and so ignores unpaired rows
    of_means: Callable[[Tensor], Tensor] | None = None  # from `FusedTerms.log_means`

    def __call__(self, x: Tensor, y: Tensor, *, sigma: Sigma) -> Tensor:
        """Compute the divergence of x (n, d) and y (m, d), a () tensor differentiable in both.

        Sinkhorn starts at the diameter of unit rows, 2.

        Raises:
            ShapeError: the shapes do not fit together, or a side has fewer than `minimum` rows.
        """
        check_sets(x, y)
        if self.matched and len(x) != len(y):
            raise ShapeError(f"matched rows are needed, got {len(x)} and {len(y)}")
        if min(len(x), len(y)) < self.minimum:
            raise ShapeError(
                f"the divergence {self.name.value!r} needs at least {self.minimum} rows per side, "
                f"got {len(x)} and {len(y)}"
            )
        return self._compute(x, y, sigma=sigma) if self.has_bandwidth else self._compute(x, y)


def divergence(name: DivergenceName) -> Divergence:
    """Find a divergence by its name, or raise ValueError.

    "pairs-mse" is the mean squared distance of matched rows, "none" a constant 0.
    """
    return _DIVERGENCES[DivergenceName(name)]


_DIVERGENCES = {
    found.name: found
    for found in (
        Divergence(DivergenceName.CS, cs_divergence, has_bandwidth=True, of_means=cs_of_means),
        # Of two sets; see `holder` for more.
        Divergence(DivergenceName.HOLDER, cs_divergence, has_bandwidth=True, of_means=cs_of_means),
        Divergence(DivergenceName.MMD, mmd, has_bandwidth=True, of_means=mmd_of_means),
        Divergence(DivergenceName.GAUSSIAN_KL, gaussian_jeffreys, minimum=2),
        Divergence(
            DivergenceName.SINKHORN, partial(sinkhorn_divergence, diameter=2.0), has_bandwidth=True
        ),
        Divergence(
            DivergenceName.PAIRS_MSE, lambda x, y: (x - y).square().sum(1).mean(), matched=True
        ),
        # An empty sum is 0 and keeps the graph.
        Divergence(DivergenceName.NONE, lambda x, y: x[:0].sum() + y[:0].sum()),
    )
}
