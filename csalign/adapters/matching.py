"""Moment matching: affine maps that give the outputs of both sides one mean and covariance."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

SHRINKAGE = 0.3  # towards equal variances, since few rows estimate small directions badly
LEAST_VARIANCE = 1e-9  # leaves sides without any variance unchanged
CENTRED = 1e-4  # distance to the target mean at which to stop: far below any measured gap
CENTRING_ROUNDS = 50
NEIGHBOURS = 10
CHUNK_ROWS = 2_048
_TINY = 1e-12


class OutputMap(NamedTuple):
    """The map z -> weight z + bias of the outputs of a side."""

    weight: Tensor  # (k, k) float32
    bias: Tensor  # (k,) float32


class Outputs(NamedTuple):
    """The outputs of a side."""

    rows: Tensor  # (n, k), not normalised
    weights: Tensor  # (n,), >= 0, not all 0: how much each row counts
    is_frozen: bool = False  # whether the side must stay unchanged


def match_moments(
    x: Outputs, y: Outputs, *, covariances: bool = True
) -> tuple[OutputMap, OutputMap]:
    """Find affine maps after which the unit rows of both sides have similar moments.

    Each side goes half of the way: its mean unit row to 0, its covariance to the midpoint of the
    two, by the optimal transport between Gaussians. If one side is frozen, the other goes all of
    the way.

    Args:
        x: outputs of one side.
        y: of the other, of the same width.
        covariances: whether to match the covariances too, not only the means.
    """
    sides = [_Side(x), _Side(y)]
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
    """The outputs of one side under the map found so far, float64."""

    def __init__(self, outputs: Outputs) -> None:
        self.rows = outputs.rows.cpu().double()  # stretched, but not moved
        weights = outputs.weights.cpu().double()
        self.share = (weights / weights.sum())[:, None]
        self.is_frozen = outputs.is_frozen
        self.weight = torch.eye(self.rows.shape[1], dtype=torch.float64)
        self.bias = torch.zeros(self.rows.shape[1], dtype=torch.float64)

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

        For a target of 0 this is Weiszfeld's iteration for the spatial median.
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
    """Optimal transport between centred Gaussians: the symmetric T with T own T = other, (k, k)."""
    root, inverse = _power(own, 0.5), _power(own, -0.5)
    found: Tensor = inverse @ _power(root @ other @ root, 0.5) @ inverse
    return found


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = (vectors * values.clamp(min=_TINY) ** power) @ vectors.T
    return found


def nearest_mean(known: Tensor, values: Tensor, rows: Tensor, *, k: int = NEIGHBOURS) -> Tensor:
    """Average a value, for each row, over the k known rows nearest by cosine (or all, if fewer).

    Args:
        known: (n, d), unit rows, n >= 1.
        values: (n,), float.
        rows: (m, d), unit rows.
        k: neighbours.

    Returns:
        (m,), of the dtype of `values`.
    """
    k = min(k, len(known))
    chunks = torch.split(rows, CHUNK_ROWS)
    parts = [values[(part @ known.T).topk(k).indices].mean(1) for part in chunks]
    return torch.cat(parts) if parts else values[:0]
