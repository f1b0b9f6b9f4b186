"""The debiased Sinkhorn divergence: entropic optimal transport between two sets."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from csalign.objective.kernels import Sigma, bandwidths, squared_distances


def sinkhorn_divergence(
    x: Tensor, y: Tensor, *, sigma: Sigma, iterations: int = 20, scaling: float = 0.5
) -> Tensor:
    """Debiased Sinkhorn divergence of two sets with uniform weights (Feydy et al. 2019).

    S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, with OT the optimal transport of cost
    |x_i - y_j|^2 / 2 plus sigma^2 times the relative entropy of the plan to the product. As sigma
    grows S tends to half the squared distance of the means, as it falls to half the squared
    Wasserstein-2 distance. Equal to geomloss's SamplesLoss("sinkhorn", p=2, blur=sigma) once both
    have converged.

    The potentials come from symmetrised updates in the log domain, one at each blur from the
    diameter down to sigma and `iterations` more at sigma. The gradient is the transport plan's
    and does not go through the updates. On unit rows at sigma 0.5 the default leaves the value
    exact to 1e-5 and the gradient to 1 %; smaller sigmas need more: at 0.2 the value is within
    1 %, but in few dimensions the gradient up to 20 % off.

    Args:
        x: (n, d), float.
        y: (m, d), same dtype and device; rows need not be paired.
        sigma: the blur, > 0: the kernel exp(-cost / sigma^2) is `cs_divergence`'s at the same
            sigma. The mean over several.
        iterations: updates at the last blur, >= 0.
        scaling: factor from one blur to the next, in (0, 1).

    Returns:
        () tensor, >= 0 and 0 for equal sets, up to rounding and convergence.

    Raises:
        ShapeError: either is not 2-D or empty, or the widths differ.
        ValueError: sigma is not positive and finite, or the schedule makes no sense.
    """
    if iterations < 0 or not 0 < scaling < 1:
        raise ValueError(
            f"iterations must be >= 0 and scaling between 0 and 1, got {iterations} and {scaling}"
        )
    cross, own_x, own_y = (squared_distances(a, b) / 2 for a, b in ((x, y), (x, x), (y, y)))
    values = []
    for blur in bandwidths(sigma):
        schedule = _Schedule(blur, iterations, scaling)
        own = _transport_to_itself(own_x, schedule) + _transport_to_itself(own_y, schedule)
        values.append(_transport(cross, schedule) - own / 2)
    return torch.stack(values).mean()


@dataclass(frozen=True)
class _Schedule:
    blur: float
    iterations: int
    scaling: float

    def epsilons(self, cost: Tensor) -> list[float]:
        """Squared blurs of the updates: from the diameter down, then the one asked for."""
        diameter = math.sqrt(2 * float(cost.max()))
        steps = 0
        if self.blur < diameter < math.inf:
            steps = math.ceil(math.log(self.blur / diameter) / math.log(self.scaling))
        coarse = [diameter * self.scaling**step for step in range(steps)]
        return [blur**2 for blur in coarse + [self.blur] * self.iterations]


def _transport(cost: Tensor, schedule: _Schedule) -> Tensor:
    """Entropic transport cost, the mean of the semi-duals in either potential.

    An error in the potentials enters the value squared, and a semi-dual's gradient in the cost is
    the plan itself.
    """
    fixed = cost.detach()
    f, g = fixed.new_zeros(cost.shape[0]), fixed.new_zeros(cost.shape[1])
    for epsilon in schedule.epsilons(fixed):
        # Both from the old ones, then halfway: symmetric in the sides, and it does not oscillate.
        new_f, new_g = _quick_softmin(fixed, g, epsilon), _quick_softmin(fixed.T, f, epsilon)
        f, g = (f + new_f) / 2, (g + new_g) / 2
    epsilon = schedule.blur**2
    along_x = _softmin(cost, g, epsilon).mean() + g.mean()
    along_y = _softmin(cost.T, f, epsilon).mean() + f.mean()
    return (along_x + along_y) / 2


def _transport_to_itself(cost: Tensor, schedule: _Schedule) -> Tensor:
    """`_transport` of a set to itself, whose two potentials are one."""
    fixed = cost.detach()
    f = fixed.new_zeros(len(cost))
    for epsilon in schedule.epsilons(fixed):
        f = (f + _quick_softmin(fixed, f, epsilon)) / 2
    return _softmin(cost, f, schedule.blur**2).mean() + f.mean()


def _softmin(cost: Tensor, potential: Tensor, epsilon: float) -> Tensor:
    """(n,): -epsilon log mean_j exp((potential_j - cost_ij) / epsilon)."""
    exponents = (potential - cost) / epsilon
    return -epsilon * (exponents.logsumexp(1) - math.log(cost.shape[1]))


def _quick_softmin(cost: Tensor, potential: Tensor, epsilon: float) -> Tensor:
    """`_softmin` without a gradient."""
    exponents = (potential - cost).div_(epsilon)
    largest = exponents.amax(1, keepdim=True)
    # What is cut off is below rounding; left alone it gives subnormals, which are slow to add.
    sums = exponents.sub_(largest).clamp_(min=-80).exp_().sum(1)
    return -epsilon * (sums.log_() + largest[:, 0] - math.log(cost.shape[1]))
