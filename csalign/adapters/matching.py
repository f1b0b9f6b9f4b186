"""Two sets of outputs brought to one mean and one covariance, by an affine map of each."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

SHRINKAGE = 0.3  # towards equal variances; keeps what few rows say of small directions small
LEAST_VARIANCE = 1e-9  # keeps sides that do not vary at all as they are
CENTRED = 1e-4  # distance to the mean that is asked for: far below any gap that is measured
CENTRING_ROUNDS = 50
_TINY = 1e-12


class OutputMap(NamedTuple):
    """z -> weight z + bias of a side's outputs.

    Attributes:
        weight: (k, k) float32.
        bias: (k,) float32.
    """

    weight: Tensor
    bias: Tensor


class Outputs(NamedTuple):
    """A side's outputs.

    Attributes:
        rows: (n, k), not normalised.
        weights: (n,), >= 0, not all 0: how much each row counts.
        is_frozen: whether the side has to stay as it is.
    """

    rows: Tensor
    weights: Tensor
    is_frozen: bool = False


def match_moments(
    x: Outputs, y: Outputs, *, covariances: bool = True
) -> tuple[OutputMap, OutputMap]:
    """Affine maps after which the unit rows of both sides have like means and covariances.

    Each side goes half of the way: its mean unit row to 0, its covariance to the midpoint of the
    two, by the optimal transport between Gaussians. Beside a frozen side the other goes all of it.

    Args:
        x: outputs of one side.
        y: of the other, as wide.
        covariances: whether to match these too, and not the means alone.
    """
    sides = [_Side.of(x), _Side.of(y)]
    frozen = [side for side in sides if side.is_frozen]
    target = frozen[0].mean() if frozen else torch.zeros(x.rows.shape[1], dtype=torch.float64)
    for side in sides:
        side.centre(target)
    spreads = [side.covariance() for side in sides] if covariances else []
    for side, own, other in zip(sides, spreads, reversed(spreads), strict=False):
        if not side.is_frozen:
            side.stretch(transport(own, other), 1.0 if frozen else 0.5)
            side.centre(target)
    first, second = (OutputMap(side.weight.float(), side.bias.float()) for side in sides)
    return first, second


class _Side:
    """One side's outputs under the map found so far, float64."""

    def __init__(self, rows: Tensor, weights: Tensor, is_frozen: bool) -> None:
        self.rows = rows.double()  # already stretched, not yet moved
        self.share = (weights.double() / weights.double().sum())[:, None]
        self.is_frozen = is_frozen
        self.weight = torch.eye(rows.shape[1], dtype=torch.float64)
        self.bias = torch.zeros(rows.shape[1], dtype=torch.float64)

    @classmethod
    def of(cls, outputs: Outputs) -> "_Side":
        return cls(outputs.rows.cpu(), outputs.weights.cpu(), outputs.is_frozen)

    def mean(self) -> Tensor:
        return (self.share * normalize(self.rows + self.bias, dim=1)).sum(0)

    def covariance(self) -> Tensor:
        unit = normalize(self.rows + self.bias, dim=1)
        centred = unit - (self.share * unit).sum(0)
        spread = centred.T @ (self.share * centred)
        even = spread.trace() / len(spread) * SHRINKAGE + LEAST_VARIANCE
        return (1 - SHRINKAGE) * spread + even * torch.eye(len(spread), dtype=torch.float64)

    def centre(self, target: Tensor) -> None:
        """Move the origin until the mean unit row is `target`.

        For a target of 0 this is Weiszfeld's iteration: the origin becomes the spatial median.
        """
        if self.is_frozen:
            return
        for _ in range(CENTRING_ROUNDS):
            moved = self.rows + self.bias
            weights = self.share / moved.norm(dim=1, keepdim=True).clamp(min=_TINY)
            off = target - (weights * moved).sum(0)
            self.bias = self.bias + off / weights.sum()
            if off.norm() < CENTRED:
                return

    def stretch(self, by: Tensor, part: float) -> None:
        step = (1 - part) * torch.eye(len(by), dtype=torch.float64) + part * by
        self.rows, self.weight, self.bias = self.rows @ step.T, step @ self.weight, step @ self.bias


def transport(own: Tensor, other: Tensor) -> Tensor:
    """The optimal transport map between centred Gaussians: symmetric T with T own T = other.

    Args:
        own: (k, k), symmetric, positive definite, float64.
        other: likewise.
    """
    root, inverse = _power(own, 0.5), _power(own, -0.5)
    found: Tensor = inverse @ _power(root @ other @ root, 0.5) @ inverse
    return found


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = (vectors * values.clamp(min=_TINY) ** power) @ vectors.T
    return found
