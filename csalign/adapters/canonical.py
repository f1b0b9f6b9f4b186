"""Linear maps without training: closed forms for pairs, and the matching of output moments."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.side import CHUNK_ROWS, Rows, UnitRows
from csalign.core.arrays import Doubles, Ints
from csalign.core.enums import Modality

TINY = 1e-12  # avoids a division by 0 for constant features, whose variance is 0
SHRINKAGE = 0.3  # towards equal variances, since few rows estimate small directions badly
LEAST_VARIANCE = 1e-9  # leaves sides without any variance unchanged
CENTRED = 1e-4  # distance to the target mean at which to stop: far below any measured gap
CENTRING_ROUNDS = 50
NEIGHBOURS = 10
NEIGHBOUR_ROWS = 2_048  # per product


@dataclass(frozen=True)
class ClosedForm:
    """Linear maps of both sides to one space: z = weight (u - mean) + bias of unit rows u."""

    name: str  # which closed form and its settings, as shown to users
    image_mean: Tensor  # (d,) float32
    image_weight: Tensor  # (k, d) float32
    text_mean: Tensor  # (e,) float32
    text_weight: Tensor  # (k, e) float32
    image_bias: Tensor | None = None  # (k,) float32; None for 0
    text_bias: Tensor | None = None

    def outputs(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Map unit rows, (n, d) and (m, e), to unit rows (n, k) and (m, k)."""
        x = (images - self.image_mean) @ self.image_weight.T
        y = (texts - self.text_mean) @ self.text_weight.T
        x = x if self.image_bias is None else x + self.image_bias
        y = y if self.text_bias is None else y + self.text_bias
        return normalize(x, dim=1), normalize(y, dim=1)


@dataclass(frozen=True)
class PairMoments:
    """Weighted means and covariances of the unit rows of pairs, float64."""

    mean_x: Tensor  # (d,) of images
    mean_y: Tensor  # (e,) of texts
    cov_xx: Tensor  # (d, d)
    cov_yy: Tensor  # (e, e)
    cov_xy: Tensor  # (d, e)

    @classmethod
    def of(
        cls,
        images: Rows,
        texts: Rows,
        pairs: tuple[Ints, Ints],
        weights: Doubles,
        units: tuple[UnitRows, UnitRows] = (UnitRows(), UnitRows()),
    ) -> "PairMoments":
        """Accumulate the moments in one pass.

        Args:
            images: (n, d), any float dtype.
            texts: (m, e).
            pairs: k image rows and the k text rows that they are paired with.
            weights: (k,), >= 0, not all 0.
            units: make unit rows of images and of texts.
        """
        d, e = images.shape[1], texts.shape[1]
        total = torch.zeros(d + e, dtype=torch.float64)
        second = torch.zeros(d + e, d + e, dtype=torch.float64)
        share = torch.from_numpy(weights / weights.sum()).float()
        for rows in _chunks(len(weights)):
            sides = zip(units, (images, texts), pairs, strict=True)
            joint = torch.cat([unit(side[own[rows]]) for unit, side, own in sides], 1)
            weighted = joint * share[rows, None]
            total += weighted.sum(0)
            second += weighted.T @ joint
        covariance = second - torch.outer(total, total)
        return cls(total[:d], total[d:], covariance[:d, :d], covariance[d:, d:], covariance[:d, d:])

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ascending eigenvalues and eigenvectors of the covariance of images, then of texts."""
        values_x, vectors_x = torch.linalg.eigh(self.cov_xx)
        values_y, vectors_y = torch.linalg.eigh(self.cov_yy)
        return values_x.clamp(min=0), vectors_x, values_y.clamp(min=0), vectors_y

    def with_cross(self, cov_xy: Tensor) -> "PairMoments":
        """Replace the cross-covariance (d, e), and keep the eigenvalues that are known."""
        found = replace(self, cov_xy=cov_xy)
        found.__dict__["eigen"] = self.eigen
        return found

    def cca(self, *, ridge: float, powers: tuple[float, ...], width: int) -> Iterator[ClosedForm]:
        """Compute regularised CCA (Hotelling 1936) for a ridge and powers of the correlations.

        Whitening uses (C + ridge * mean eigenvalue * I)^(-1/2) on each side.

        Args:
            ridge: > 0, relative to each side's mean eigenvalue.
            powers: a direction is scaled by its correlation to this power, on each side.
            width: directions to keep, at most min(d, e).
        """
        values_x, vectors_x, values_y, vectors_y = self.eigen
        scale_x = (values_x + ridge * values_x.mean() + TINY).rsqrt()
        scale_y = (values_y + ridge * values_y.mean() + TINY).rsqrt()
        cross = vectors_x.T @ self.cov_xy @ vectors_y
        left, correlations, right = leading(scale_x[:, None] * cross * scale_y, width)
        map_x = (vectors_x * scale_x) @ left  # (d, k)
        map_y = (vectors_y * scale_y) @ right
        # With a ridge the variances of a direction differ between the sides. Moving a factor from
        # one side to the other keeps every inner product and makes the two variances equal.
        balance = (_deviations(map_y, self.cov_yy) / _deviations(map_x, self.cov_xx)).sqrt()
        map_x, map_y = map_x * balance, map_y / balance
        for power in powers:
            emphasis = correlations**power
            yield ClosedForm(
                f"CCA (ridge {ridge:g}, power {power:g})",
                self.mean_x.float(),
                _unit_energy(map_x * emphasis, self.cov_xx),
                self.mean_y.float(),
                _unit_energy(map_y * emphasis, self.cov_yy),
            )

    def centred(self, to: Modality | None = None) -> ClosedForm:
        """Subtract each side's mean, or move one onto that of `to`; for encoders of one space.

        This removes the centroid gap and changes nothing else.
        """
        identity = torch.eye(len(self.mean_x))
        if to is not None:
            return self._onto(to, f"features moved onto the {to} mean", identity)
        return ClosedForm(
            "centred features", self.mean_x.float(), identity, self.mean_y.float(), identity
        )

    def ridge(self, to: Modality, ridge: float, *, centre: bool = False) -> ClosedForm:
        """Regress the unit rows of one side, which keeps its space, on those of the other.

        The map minimises the weighted mean squared error plus the ridge times its squared norm.

        Args:
            to: the side to predict, whose map is the identity.
            ridge: > 0, relative to the mean eigenvalue of the other side's covariance.
            centre: whether to centre the side `to` too. Otherwise it stays unchanged, as a frozen
                side must, and the map has a bias.
        """
        to = Modality.of(to)
        values_x, vectors_x, values_y, vectors_y = self.eigen
        if to is Modality.TEXT:
            values, vectors, cross = values_x, vectors_x, self.cov_xy
        else:
            values, vectors, cross = values_y, vectors_y, self.cov_xy.T
        scale = values + ridge * values.mean() + TINY
        weight = ((vectors / scale) @ (vectors.T @ cross)).T.float().contiguous()
        form = self._onto(to, f"ridge regression to the {to} side (ridge {ridge:g})", weight)
        if not centre:
            return form
        x, y = self.mean_x.float(), self.mean_y.float()
        return replace(form, image_mean=x, text_mean=y, image_bias=None, text_bias=None)

    def procrustes(self, to: Modality) -> ClosedForm:
        """Rotate the centred unit rows of one side onto those of the other, `to`, which stays.

        The map is orthogonal, or has orthonormal rows or columns if the widths differ; it
        minimises the weighted mean squared error (Schönemann 1966).
        """
        to = Modality.of(to)
        cross = self.cov_xy if to is Modality.TEXT else self.cov_xy.T
        left, _, right = torch.linalg.svd(cross, full_matrices=False)
        weight = (left @ right).T.float().contiguous()
        return self._onto(to, f"orthogonal Procrustes to the {to} side", weight)

    def _onto(self, to: Modality, name: str, weight: Tensor) -> ClosedForm:
        """Keep the side `to`; map the other so that the means coincide."""
        x, y = self.mean_x.float(), self.mean_y.float()
        if to is Modality.TEXT:
            eye = torch.eye(len(y))
            return ClosedForm(name, x, weight, torch.zeros_like(y), eye, image_bias=y)
        eye = torch.eye(len(x))
        return ClosedForm(name, torch.zeros_like(x), eye, y, weight, text_bias=x)


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, CHUNK_ROWS):
        yield slice(start, start + CHUNK_ROWS)


def leading(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and values: (d, k), (k,), (e, k).

    From the smaller Gram matrix, many times as fast as an SVD. Values below 1e-8 of the first are
    rounding errors.
    """
    if len(matrix) < matrix.shape[1]:
        right, values, left = leading(matrix.T, width)
        return left, values, right
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :width]
    images = matrix @ vectors
    values = torch.linalg.vector_norm(images, dim=0)
    return images / values.clamp(min=TINY), values, vectors


def _deviations(columns: Tensor, covariance: Tensor) -> Tensor:
    """Return the standard deviation of each output of a (d, k) map, (k,)."""
    variances = torch.sum((covariance @ columns) * columns, dim=0)
    return variances.clamp(min=TINY).sqrt()


def _unit_energy(columns: Tensor, covariance: Tensor) -> Tensor:
    """Transpose a (d, k) map to a (k, d) weight whose outputs have mean squared norm 1."""
    scale: Tensor = torch.linalg.vector_norm(_deviations(columns, covariance))
    return (columns / scale).T.float().contiguous()


def is_non_negative(values: Rows) -> bool:
    """Return whether no value is below 0, as in averages of ReLU activations."""
    return all(values[rows].min() >= 0 for rows in _chunks(len(values)))


class OutputMap(NamedTuple):
    """Map z -> weight z + bias of the outputs of a side."""

    weight: Tensor  # (k, k) float32
    bias: Tensor  # (k,) float32


class Outputs(NamedTuple):
    """Outputs of a side."""

    rows: Tensor  # (n, k), not normalised
    weights: Tensor  # (n,), >= 0, not all 0: how much each row counts
    is_frozen: bool = False  # whether the side must stay unchanged


def match_moments(
    x: Outputs, y: Outputs, *, covariances: bool = True
) -> tuple[OutputMap, OutputMap]:
    """Find affine maps after which the unit rows of both sides have similar moments.

    Each side goes half of the way: its mean unit row to 0, its covariance to the midpoint of the
    two (with `covariances`), by the optimal transport between Gaussians. If one side is frozen,
    the other goes all of the way.
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
    """Outputs of one side under the map found so far, float64."""

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
            weights = self.share / moved.norm(dim=1, keepdim=True).clamp(min=TINY)
            off = target - (weights * moved).sum(0)
            self.bias = self.bias + off / weights.sum()
            if off.norm() < CENTRED:
                return

    def stretch(self, by: Tensor, part: float) -> None:
        step = (1 - part) * torch.eye(len(by), dtype=torch.float64) + part * by
        self.rows, self.weight, self.bias = self.rows @ step.T, step @ self.weight, step @ self.bias


def transport(own: Tensor, other: Tensor) -> Tensor:
    """Return the optimal transport of centred Gaussians: symmetric (k, k) T, T own T = other."""
    root, inverse = _power(own, 0.5), _power(own, -0.5)
    found: Tensor = inverse @ _power(root @ other @ root, 0.5) @ inverse
    return found


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = (vectors * values.clamp(min=TINY) ** power) @ vectors.T
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
    chunks = torch.split(rows, NEIGHBOUR_ROWS)
    parts = [values[(part @ known.T).topk(k).indices].mean(1) for part in chunks]
    return torch.cat(parts) if parts else values[:0]


def mutual_neighbours(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Match rows that are each other's nearest by CSLS (Conneau et al. 2018).

    CSLS is 2 cos(x, y) less the mean cosine of each row to its `NEIGHBOURS` nearest, or all if
    fewer, of the other side.

    Args:
        x: (n, d), any norm.
        y: (m, d). A table of n m scores is in memory.

    Returns:
        Positions (p,) in x, ascending, and (p,) in y, p >= 1.
    """
    scores = normalize(x, dim=1) @ normalize(y, dim=1).T
    strips = [torch.split(table, NEIGHBOUR_ROWS) for table in (scores, scores.T)]
    density_x, density_y = (
        torch.cat([strip.topk(min(NEIGHBOURS, strip.shape[1])).values.mean(1) for strip in own])
        for own in strips
    )
    scores.mul_(2).sub_(density_x[:, None]).sub_(density_y)
    nearest = scores.argmax(1)
    rows = torch.arange(len(x))
    is_mutual = scores.argmax(0)[nearest] == rows
    return rows[is_mutual], nearest[is_mutual]
