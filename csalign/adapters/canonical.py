"""Closed-form starts: regularised canonical correlation analysis, and simpler maps, with weights.

CCA as CSA uses it (arXiv 2410.07610): whiten each side, take the singular vectors of the whitened
cross-covariance, weigh each direction by a power of its correlation. Orthogonal Procrustes turns
one side onto the other, ridge regression predicts a side that stays as it is. Weights on the pairs
make a caption that a thousand images share count once. One pass over the pairs gives the moments;
every closed form is then a small problem of the widths alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from csalign.adapters.inputs import Rows, to_tensor, unit_inputs
from csalign.core.enums import Modality

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

CHUNK_ROWS = 8_192


@dataclass(frozen=True)
class ClosedForm:
    """A linear map for each side into one space: z = weight (u - mean) + bias.

    Attributes:
        name: which closed form and its settings, for people.
        image_mean: (d,) float32, of the unit rows.
        image_weight: (k, d) float32.
        text_mean: (e,) float32.
        text_weight: (k, e) float32.
        image_bias: (k,) float32; None for 0.
        text_bias: likewise.
    """

    name: str
    image_mean: Tensor
    image_weight: Tensor
    text_mean: Tensor
    text_weight: Tensor
    image_bias: Tensor | None = None
    text_bias: Tensor | None = None


@dataclass(frozen=True)
class PairMoments:
    """Weighted means and covariances of pairs, float64: all that a closed form needs.

    Attributes:
        mean_x: (d,) of the images' unit rows.
        mean_y: (e,) of the texts' unit rows.
        cov_xx: (d, d).
        cov_yy: (e, e).
        cov_xy: (d, e).
    """

    mean_x: Tensor
    mean_y: Tensor
    cov_xx: Tensor
    cov_yy: Tensor
    cov_xy: Tensor

    @classmethod
    def of(
        cls,
        images: Rows,
        texts: Rows,
        pairs: tuple[Ints, Ints],
        weights: npt.NDArray[np.float64],
        signed_sqrt: tuple[bool, bool],
    ) -> "PairMoments":
        """Accumulate the moments in one pass.

        Args:
            images: (n, d), any float dtype.
            texts: (m, e).
            pairs: k image rows and the k text rows that they are matched with.
            weights: (k,), >= 0, not all 0.
            signed_sqrt: whether the square root is taken, for images and texts.
        """
        d, e = images.shape[1], texts.shape[1]
        total = torch.zeros(d + e, dtype=torch.float64)
        second = torch.zeros(d + e, d + e, dtype=torch.float64)
        share = torch.from_numpy(weights / weights.sum()).float()
        for rows in _chunks(len(weights)):
            u = unit_inputs(to_tensor(images[pairs[0][rows]], CPU), signed_sqrt=signed_sqrt[0])
            v = unit_inputs(to_tensor(texts[pairs[1][rows]], CPU), signed_sqrt=signed_sqrt[1])
            joint = torch.cat([u, v], 1)  # (c, d + e)
            weighted = joint * share[rows, None]
            total += weighted.sum(0)
            second += weighted.T @ joint
        covariance = second - torch.outer(total, total)
        return cls(total[:d], total[d:], covariance[:d, :d], covariance[d:, d:], covariance[:d, d:])

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues and vectors of both sides, and the cross-covariance in those bases."""
        values_x, vectors_x = torch.linalg.eigh(self.cov_xx)
        values_y, vectors_y = torch.linalg.eigh(self.cov_yy)
        cross = vectors_x.T @ self.cov_xy @ vectors_y
        return values_x.clamp(min=0), vectors_x, values_y.clamp(min=0), vectors_y, cross

    def cca(self, *, ridge: float, powers: tuple[float, ...], width: int) -> Iterator[ClosedForm]:
        """Regularised CCA for one ridge and several powers of the correlations.

        Whitening uses (C + ridge * mean eigenvalue * I)^(-1/2) on each side.

        Args:
            ridge: > 0, relative to each side's mean eigenvalue.
            powers: a direction is scaled by its correlation to this power, on each side.
            width: directions to keep, at most min(d, e).
        """
        values_x, vectors_x, values_y, vectors_y, cross = self._eigen
        scale_x = (values_x + ridge * values_x.mean() + TINY).rsqrt()
        scale_y = (values_y + ridge * values_y.mean() + TINY).rsqrt()
        left, correlations, right = torch.linalg.svd(
            scale_x[:, None] * cross * scale_y, full_matrices=False
        )
        map_x = (vectors_x * scale_x) @ left[:, :width]  # (d, k)
        map_y = (vectors_y * scale_y) @ right.T[:, :width]
        # The ridge leaves a direction with another variance on each side. Moving a factor from one
        # side to the other keeps every inner product and makes the two distributions alike.
        balance = (_deviations(map_y, self.cov_yy) / _deviations(map_x, self.cov_xx)).sqrt()
        map_x, map_y = map_x * balance, map_y / balance
        for power in powers:
            emphasis = correlations[:width] ** power
            yield ClosedForm(
                f"CCA (ridge {ridge:g}, power {power:g})",
                self.mean_x.float(),
                _unit_energy(map_x * emphasis, self.cov_xx),
                self.mean_y.float(),
                _unit_energy(map_y * emphasis, self.cov_yy),
            )

    def centred(self, to: Modality | None = None) -> ClosedForm:
        """Each side minus its own mean, for encoders that already share a space.

        Subtracting the means takes the centroid gap away and leaves the rest as it was.

        Args:
            to: a side to leave where it is; the other is then moved onto its mean.
        """
        identity = torch.eye(len(self.mean_x))
        if to is not None:
            return self._onto(to, f"features moved onto the {to} mean", identity)
        return ClosedForm(
            "centred features", self.mean_x.float(), identity, self.mean_y.float(), identity
        )

    def ridge(self, to: Modality, ridge: float, *, centre: bool = False) -> ClosedForm:
        """Ridge regression of one side's unit rows on the other's, for a side that keeps its space.

        The map minimises the weighted mean squared error plus the ridge times its squared norm.

        Args:
            to: the side to predict, whose map is the identity.
            ridge: > 0, relative to the mean eigenvalue of the other side's covariance.
            centre: whether to centre the side `to` as well. Otherwise it stays where it is, as a
                frozen side must, and the map has a bias to get there.
        """
        values_x, vectors_x, values_y, vectors_y, _ = self._eigen
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

    def procrustes(self, width: int | None = None) -> ClosedForm:
        """Orthogonal Procrustes: the rotation or reflection that takes one side nearest the other.

        Both sides are centred. The narrower one (the texts', if they are alike) keeps its axes;
        the wider one is first reduced to its principal components.

        Args:
            width: components to keep of both, at most min(d, e), which is the default.
        """
        _, vectors_x, _, vectors_y, _ = self._eigen  # in ascending order of their eigenvalues
        d, e = len(self.mean_x), len(self.mean_y)
        k = min(d, e) if width is None else width
        axes_x = _eye(d) if d == k else vectors_x[:, -k:].flip(1)
        axes_y = _eye(e) if e == k else vectors_y[:, -k:].flip(1)
        left, _, right = torch.linalg.svd(axes_x.T @ self.cov_xy @ axes_y)
        if d < e:
            axes_y = axes_y @ right.T @ left.T
        else:
            axes_x = axes_x @ left @ right
        return ClosedForm(
            "orthogonal Procrustes",
            self.mean_x.float(),
            axes_x.T.float().contiguous(),
            self.mean_y.float(),
            axes_y.T.float().contiguous(),
        )

    def _onto(self, to: Modality, name: str, weight: Tensor) -> ClosedForm:
        """The side `to` as it is, the other mapped with its mean onto that side's mean."""
        x, y = self.mean_x.float(), self.mean_y.float()
        if to is Modality.TEXT:
            eye = torch.eye(len(y))
            return ClosedForm(name, x, weight, torch.zeros_like(y), eye, image_bias=y)
        eye = torch.eye(len(x))
        return ClosedForm(name, torch.zeros_like(x), eye, y, weight, text_bias=x)


CPU = torch.device("cpu")
TINY = 1e-12  # keeps constant features, whose variance is 0, from dividing by zero


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, CHUNK_ROWS):
        yield slice(start, start + CHUNK_ROWS)


def _deviations(columns: Tensor, covariance: Tensor) -> Tensor:
    """Standard deviation of each output of a (d, k) map, (k,)."""
    variances = torch.sum((covariance @ columns) * columns, dim=0)
    return variances.clamp(min=TINY).sqrt()


def _unit_energy(columns: Tensor, covariance: Tensor) -> Tensor:
    """(d, k) map as a (k, d) weight, scaled so that outputs have mean squared norm 1."""
    scale: Tensor = torch.linalg.vector_norm(_deviations(columns, covariance))
    return (columns / scale).T.float().contiguous()


def is_non_negative(values: Rows) -> bool:
    """Whether features look like averages of ReLU activations: no value below 0."""
    return all(values[rows].min() >= 0 for rows in _chunks(len(values)))
