"""Mean Gaussian kernels over all pairs of rows of large sets, in one pass over the rows.

Rows meet landmarks, not each other. Some landmarks, the base, span a low-rank kernel
k'(a, b) = k(a, base) (k(base, base) + ridge)^-1 k(base, b) (Nystrom), whose mean over all pairs
follows from the rows' mean kernels with the base. What it leaves, k - k', is estimated with others,
the witnesses S, drawn from the rows themselves:

    mean over x, x' of r  ~  2 (mean over x, s of r) - (mean over s != s' of r),    r = k - k',

which is unbiased and whose error, -|mu_x - mu_s|^2 in the space of r, falls with the number of
witnesses, not with its root. How far the estimates spread with a block of witnesses left out tells
the standard error.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csalign.core.errors import ShapeError
from csalign.objective.kernels import bandwidths, check_sets, squared_distances

BASE = 512  # rows a side
WITNESSES = 512  # rows a side
BLOCKS = 32
RIDGE = 1e-4  # of a kernel whose diagonal is 1; any is unbiased, a smaller one drowns in rounding
TILE_ROWS = 512  # tiles of distances that stay in the cache


class Estimate(NamedTuple):
    """A figure and its standard error; nan where the kernel means drown in the error."""

    value: float
    error: float


@dataclass(frozen=True)
class Landmarks:
    """Rows that others are compared with.

    Attributes:
        base: (b, d) float32, of both sides.
        witnesses: (k, d) float32 of each side, drawn without regard to the base.
    """

    base: Tensor
    witnesses: tuple[Tensor, Tensor]

    @classmethod
    def draw(
        cls, x: Tensor, y: Tensor, *, seed: int, base: int = BASE, witnesses: int = WITNESSES
    ) -> "Landmarks":
        """Draw them from two sets.

        Args:
            x: (n, d), float; only the drawn rows are read, so that a mapped file will do.
            y: (m, d), float.
            seed: the same gives the same.
            base: rows of each side in the base.
            witnesses: of each side; a smaller side is taken whole, and its own mean is exact.

        Raises:
            ShapeError: a set is empty or not 2-D, or the widths differ.
        """
        check_sets(x, y)
        rng = np.random.default_rng(seed)

        def some(rows: Tensor, count: int) -> Tensor:
            chosen = np.sort(rng.choice(len(rows), min(len(rows), count), replace=False))
            return rows[torch.from_numpy(chosen)].float()

        union = torch.cat([some(x, base), some(y, base)])
        return cls(union, (some(x, witnesses), some(y, witnesses)))


class MeanKernels(NamedTuple):
    """Mean kernels, each (1 + BLOCKS,) float64: of all, then with a block of witnesses left out.

    Attributes:
        xx: over all pairs of x, each row with itself included.
        yy: likewise of y.
        xy: over all pairs across.
        sizes: rows of x and of y.
    """

    xx: Tensor
    yy: Tensor
    xy: Tensor
    sizes: tuple[int, int]

    def cs_divergence(self) -> Estimate:
        """Estimate of `csalign.objective.divergence.cs_divergence`."""
        return _estimate(self.xx.log() + self.yy.log() - 2 * self.xy.log(), least=0)

    def mmd(self) -> Estimate:
        """Estimate of `csalign.objective.divergence.mmd`."""
        return _estimate(self.xx + self.yy - 2 * self.xy, least=0)

    def uniformity(self) -> tuple[Estimate, Estimate]:
        """Log mean kernel of x and of y over pairs of different rows."""
        means = zip((self.xx, self.yy), self.sizes, strict=True)
        off = [(own * n - 1) / (n - 1) if n > 1 else torch.ones_like(own) for own, n in means]
        return _estimate(off[0].log()), _estimate(off[1].log())

    def cross_uniformity(self) -> Estimate:
        """Log mean kernel across."""
        return _estimate(self.xy.log())


class KernelSums:
    """Sums of kernels between rows and landmarks; rows come in chunks, in any order.

    Args:
        landmarks: drawn from the rows to come.
        sigmas: bandwidths, > 0.

    Raises:
        ValueError: a sigma is not positive and finite.
    """

    def __init__(self, landmarks: Landmarks, sigmas: Iterable[float]) -> None:
        self._landmarks = landmarks
        self._sigmas = bandwidths(tuple(sigmas))
        self._points = torch.cat([landmarks.base, *landmarks.witnesses])
        self._sums = torch.zeros(2, len(self._sigmas), len(self._points), dtype=torch.float64)
        self._counts = [0, 0]

    def add(self, side: int, rows: Tensor) -> None:
        """Count rows of x (side 0) or y (side 1), (n, d), any float dtype.

        Raises:
            ShapeError: not 2-D, or another width than the landmarks'.
        """
        if rows.ndim != 2 or rows.shape[1] != self._points.shape[1]:
            raise ShapeError(
                f"rows of width {self._points.shape[1]} are needed, got {tuple(rows.shape)}"
            )
        # Products in float32 and sums of a tile too; only sums of tiles need more.
        for tile in torch.split(rows, TILE_ROWS):
            squares = squared_distances(tile.float(), self._points)
            for i, sigma in enumerate(self._sigmas):
                last = i == len(self._sigmas) - 1
                exponents = squares.mul_(-0.5 / sigma**2) if last else squares * (-0.5 / sigma**2)
                self._sums[side, i] += exponents.exp_().sum(0)
        self._counts[side] += len(rows)

    def merge(self, other: "KernelSums") -> None:
        """Count the rows that another has counted, with the same landmarks and bandwidths.

        Raises:
            ValueError: they are not the same.
        """
        if self._sigmas != other._sigmas or not torch.equal(self._points, other._points):
            raise ValueError("sums of other landmarks or bandwidths cannot be merged")
        self._sums += other._sums
        self._counts = [own + more for own, more in zip(self._counts, other._counts, strict=True)]

    def means(self, sigma: float) -> MeanKernels:
        """The mean kernels of one of the bandwidths.

        Raises:
            ValueError: a side has no rows yet, or sigma is not among the bandwidths.
        """
        if not all(self._counts):
            raise ValueError("rows of both sides are needed")
        split = [len(self._landmarks.base), *map(len, self._landmarks.witnesses)]
        sums = self._sums[:, self._sigmas.index(sigma)]
        with_base, *with_witnesses = torch.split(
            sums / torch.tensor(self._counts)[:, None], split, dim=1
        )
        base, *witnesses = torch.split(self._points.double(), split)
        factor = _cholesky(base, sigma)
        means = _project(factor, with_base)
        inside = [_project(factor, _kernel(rows, base, sigma)) for rows in witnesses]

        def residual(i: int, j: int) -> Tensor:
            """(k, l) between the witnesses of two sides."""
            return _kernel(witnesses[i], witnesses[j], sigma) - inside[i] @ inside[j].T

        def toward(i: int, j: int) -> Tensor:
            """(k,) mean of each witness of a side with all rows of another."""
            return with_witnesses[i][j] - inside[i] @ means[j]

        masks = [_masks(len(rows), n) for rows, n in zip(witnesses, self._counts, strict=True)]
        own = [
            means[i].square().sum()
            + _within(residual(i, i), toward(i, i), masks[i], self._counts[i])
            for i in (0, 1)
        ]
        x, y = (mask / mask.sum(1, keepdim=True) for mask in masks)
        across = x @ toward(0, 1) + y @ toward(1, 0) - ((x @ residual(0, 1)) * y).sum(1)
        sizes = self._counts[0], self._counts[1]
        return MeanKernels(own[0], own[1], means[0] @ means[1] + across, sizes)


def _cholesky(base: Tensor, sigma: float) -> Tensor:
    ridge = RIDGE * torch.eye(len(base), dtype=base.dtype)
    factor: Tensor = torch.linalg.cholesky(_kernel(base, base, sigma) + ridge)
    return factor


def _project(factor: Tensor, table: Tensor) -> Tensor:
    """(n, b) kernels with the base -> (n, b), whose products are k'."""
    solved: Tensor = torch.linalg.solve_triangular(factor, table.T, upper=False)
    return solved.T


def _within(residual: Tensor, toward: Tensor, mask: Tensor, n: int) -> Tensor:
    """Mean of a residual kernel over all pairs of a side's n rows, for each mask.

    Args:
        residual: (k, k) of the witnesses.
        toward: (k,) mean of each with all rows, itself among them.
        mask: (1 + BLOCKS, k), 1 for the witnesses to use.
        n: rows.
    """
    count = mask.sum(1)
    diagonal = residual.diagonal()
    others = (toward * n - diagonal) / max(n - 1, 1)
    pairs = ((mask @ residual) * mask).sum(1) - mask @ diagonal
    off = 2 * (mask @ others) / count - pairs / (count * (count - 1)).clamp(min=1)
    return (mask @ diagonal) / count / n + (1 - 1 / n) * off


def _masks(witnesses: int, rows: int) -> Tensor:
    """(1 + BLOCKS, witnesses): all, then all but a block; always all where they are all rows."""
    mask = torch.ones(1 + BLOCKS, witnesses, dtype=torch.float64)
    if witnesses < rows:
        mask[torch.arange(witnesses) % BLOCKS + 1, torch.arange(witnesses)] = 0
    return mask


def _estimate(figures: Tensor, least: float = -math.inf) -> Estimate:
    """A figure, which is never below `least`, from those with and without each block."""
    left_out = figures[1:]
    # The error is a sum over pairs of witnesses, of which leaving one block out takes each twice.
    spread = (left_out - left_out.mean()).square().sum() * (BLOCKS - 1) / BLOCKS / 2
    error = float(spread.sqrt())
    if not math.isfinite(error):
        return Estimate(math.nan, math.nan)
    return Estimate(max(least, float(figures[0])), error)


def _kernel(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    return squared_distances(x, y).mul_(-0.5 / sigma**2).exp_()
