"""Kernel CCA without training: a Gaussian kernel on one side, a linear map on the other.

CCA between the rows x of one side and the features of a kernel of the other, y, is a regression of
the whitened x on y, followed by the directions of largest covariance between x and its
prediction (Hardoon et al. 2004, with one kernel linear). The regression is exact
kernel ridge regression in blocks of at most `BLOCK_ROWS` rows, whose predictions are averaged
(divide and conquer, Zhang, Duchi and Wainwright 2015), so that the cost grows with n, not n^3.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.adapters.builtin import Kernel, Linear, fixed, gaussian
from csalign.adapters.canonical import TINY, Outputs, match_moments
from csalign.adapters.side import SideAdapter
from csalign.core.arrays import Doubles, Indices
from csalign.core.enums import Modality
from csalign.core.records import Record

BLOCK_ROWS = 4_000  # a kernel matrix of 64 MB
MAX_LANDMARKS = 32_000  # more would make every use of the adapter slow
MATCHED_ROWS = 4_000  # per side, for the moments of the outputs
MAX_COMPONENTS = 512  # of the linear side, or the width; beyond, the ridge leaves little
LEAST_GAP = 1e-3  # of a leverage from 1
LEAST_RIDGE = 1e-5  # relative to the mean of the kernel's diagonal, for rows that hardly vary


class KernelSetting(Record):
    """Settings of a kernel CCA."""

    side: Modality  # of the kernel
    gamma: float  # of exp(-gamma |u - v|^2)
    ridge: float  # of the kernel, relative to the mean eigenvalue of its centred matrix
    other_ridge: float  # of the linear side, relative to its mean eigenvalue
    power: float  # a direction is scaled by its correlation to this power, on each side

    @property
    def name(self) -> str:
        """The settings, as shown to users."""
        return (
            f"kernel CCA ({self.side}s, gamma {self.gamma:g}, ridges {self.ridge:.2g} and "
            f"{self.other_ridge:g}, power {self.power:g})"
        )


class KernelPairs(NamedTuple):
    """Pairs to fit a kernel CCA on: unit rows, float32."""

    linear: Tensor  # (n, d) of the side with the linear map
    kernel: Tensor  # (n, e) of the side with the kernel
    groups: Indices  # (n,) equal for equal rows of `kernel`, such as those of one caption
    weights: Doubles  # (n,), > 0


class Regression(NamedTuple):
    """Kernel ridge regression of c targets on the rows of a side, for one ridge."""

    ridge: float
    weight: Tensor  # (m, c) of the kernel's values of the m landmarks
    bias: Tensor  # (c,)
    cross: Tensor  # (c, c), covariance of predictions and targets, within blocks
    spread: Tensor  # (c, c), covariance of predictions, within blocks
    held_out: Tensor | None  # (m, c), what a landmark's prediction loses if it is left out


class KernelCca:
    """Kernel CCA of some pairs, for one gamma > 0 and the side of the kernel.

    `inputs` are adapters of the width to map to; their unit rows before centring are the pairs'.
    """

    def __init__(
        self,
        pairs: KernelPairs,
        gamma: float,
        side: Modality,
        seed: int,
        inputs: Mapping[Modality, SideAdapter],
    ) -> None:
        self._gamma, self._side, self._seed = gamma, Modality.of(side), seed
        self._inputs = inputs
        self._width = inputs[self._side].shape.width
        weights = torch.from_numpy(pairs.weights / pairs.weights.sum()).float()
        _, first, group = np.unique(pairs.groups, return_index=True, return_inverse=True)
        self._group = torch.from_numpy(group)
        self._weights = weights
        self._mean_x = (weights[:, None] * pairs.linear).sum(0)
        x = pairs.linear - self._mean_x
        values, vectors = torch.linalg.eigh(x.T @ (weights[:, None] * x))
        count = max(MAX_COMPONENTS, self._width)
        self._vectors = vectors.flip(1)[:, :count]
        self._values, self._level = values.flip(0)[:count].clamp(min=0), values.mean()
        self._x = x @ self._vectors
        self._share = torch.zeros(len(first)).index_add_(0, self._group, weights)
        sums = torch.zeros(len(first), self._x.shape[1])
        sums.index_add_(0, self._group, weights[:, None] * self._x)
        self._targets = sums / self._share[:, None]
        rows = pairs.kernel[torch.from_numpy(first)]
        self._mean_y = (self._share[:, None] * rows).sum(0)
        self._landmarks = normalize(rows - self._mean_y, dim=1)

    def candidates(
        self, ridges: Sequence[float], other_ridges: Sequence[float], powers: Sequence[float]
    ) -> Iterator[tuple[KernelSetting, dict[Modality, SideAdapter]]]:
        """Fit each combination of settings; yield both sides of it."""
        for solution in self._regress(ridges):
            for other in other_ridges:
                directions = self._directions(solution, other)
                for power in powers:
                    setting = KernelSetting(
                        side=self._side,
                        gamma=self._gamma,
                        ridge=solution.ridge,
                        other_ridge=other,
                        power=power,
                    )
                    yield setting, self._sides(solution, *directions.maps(power))

    def fit(self, setting: KernelSetting) -> dict[Modality, SideAdapter]:
        """Fit one setting, with the moments of both sides' outputs matched.

        Training rows are fitted too well for that, so their outputs are those that they would
        have if they were left out, by the usual formula of ridge regression.
        """
        (solution,) = self._regress([setting.ridge], held_out=True)
        directions = self._directions(solution, setting.other_ridge)
        sides = self._sides(solution, *directions.maps(setting.power))
        changes = match_moments(*self._held_out(solution, directions, setting.power))
        for side, change in zip((self._side.other, self._side), changes, strict=True):
            sides[side].then(change.weight, change.bias)
        return sides

    def _regress(self, ridges: Sequence[float], *, held_out: bool = False) -> list[Regression]:
        return regress(
            self._targets,
            self._landmarks,
            self._share,
            self._gamma,
            ridges,
            seed=self._seed,
            held_out=held_out,
        )

    def _directions(self, solution: Regression, ridge: float) -> "_Directions":
        whiten = (self._values + ridge * self._level + TINY).rsqrt()
        cross = whiten[:, None] * solution.cross * whiten
        values, vectors = torch.linalg.eigh((cross + cross.T) / 2)
        weight = whiten[:, None] * vectors.flip(1)[:, : self._width]
        correlations = values.flip(0)[: self._width].clamp(min=TINY).sqrt()
        spread_x = self._values @ weight.square()
        spread_y = (weight * (solution.spread @ weight)).sum(0) / correlations.square()
        # As in linear CCA: inner products stay, and the variances of the sides become equal.
        balance = (spread_y.clamp(min=TINY) / spread_x.clamp(min=TINY)) ** 0.25
        return _Directions(whiten, weight, correlations, balance)

    def _sides(self, solution: Regression, x: Tensor, y: Tensor) -> dict[Modality, SideAdapter]:
        """Build both sides from the maps (c, k) of components and of predictions."""
        shapes = {side: own.shape for side, own in self._inputs.items()}
        with torch.device("meta"):  # draws no random numbers
            linear = Linear(replace(shapes[self._side.other], kind="linear"))
            landmarks = len(self._landmarks)
            kernel = Kernel(replace(shapes[self._side], kind="kernel", landmarks=landmarks))
        linear.mean = self._mean_x
        linear.projection.weight = nn.Parameter((self._vectors @ x).T.contiguous())
        linear.projection.bias = nn.Parameter(torch.zeros(self._width))
        kernel.mean, kernel.gamma = self._mean_y, torch.tensor(self._gamma)
        kernel.landmarks = fixed(self._landmarks)
        kernel.weight = fixed((solution.weight @ y).T.contiguous())
        kernel.bias = fixed(solution.bias @ y)
        sides: dict[Modality, SideAdapter] = {
            side: kernel if side is self._side else linear for side in Modality
        }
        for side, own in sides.items():
            own.scale = self._inputs[side].scale
        return sides

    def _held_out(
        self, solution: Regression, directions: "_Directions", power: float
    ) -> tuple[Outputs, Outputs]:
        """Return outputs of some pairs as if each had been left out, of the linear side first."""
        assert solution.held_out is not None
        rng = np.random.default_rng(self._seed)
        pairs = torch.from_numpy(np.sort(rng.permutation(len(self._x))[:MATCHED_ROWS]))
        groups, weights = self._group[pairs], self._weights[pairs]
        predicted = torch.cat(
            [
                gaussian(self._landmarks[part], self._landmarks, self._gamma) @ solution.weight
                for part in torch.split(groups, BLOCK_ROWS // 4)
            ]
        )
        predicted += solution.bias
        x, y = directions.maps(power)
        own = self._x[pairs]
        leverage = (weights * (own * directions.whiten).square().sum(1))[:, None]
        # The linear side is in turn the regression of the kernel's outputs on its rows.
        fitted = predicted @ (x / directions.correlations.square())
        left_out = (own @ x - leverage * fitted) / (1 - leverage).clamp(min=LEAST_GAP)
        return (
            Outputs(left_out, weights),
            Outputs((predicted - solution.held_out[groups]) @ y, weights),
        )


class _Directions(NamedTuple):
    """Directions of CCA, in the space of the linear side's components."""

    whiten: Tensor  # (c,)
    weight: Tensor  # (c, k)
    correlations: Tensor  # (k,)
    balance: Tensor  # (k,), factor of the linear side, by which the kernel's is divided

    def maps(self, power: float) -> tuple[Tensor, Tensor]:
        """Return the maps (c, k) of the linear side's components and of their predictions."""
        emphasis = self.correlations**power
        return (
            self.weight * self.balance * emphasis,
            self.weight / self.balance * emphasis / self.correlations,
        )


def regress(
    targets: Tensor,
    landmarks: Tensor,
    weights: Tensor,
    gamma: float,
    ridges: Sequence[float],
    *,
    seed: int,
    held_out: bool = False,
) -> list[Regression]:
    """Regress targets on a Gaussian kernel for some ridges, block by block.

    Args:
        targets: (m, c).
        landmarks: (m, d), unit rows.
        weights: (m,), > 0.
        gamma: > 0.
        ridges: > 0, relative to the mean eigenvalue of the centred kernel matrix.
        seed: of the blocks.
        held_out: whether to compute `Regression.held_out`.
    """
    m, d = targets.shape
    solutions = [
        Regression(
            ridge,
            torch.zeros(m, d),
            torch.zeros(d),
            torch.zeros(d, d),
            torch.zeros(d, d),
            torch.zeros(m, d) if held_out else None,
        )
        for ridge in ridges
    ]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(m))
    blocks = order.tensor_split(-(-m // BLOCK_ROWS))
    count = len(blocks)
    for block in blocks:
        share = weights[block] / weights[block].sum()
        root = share.sqrt()[:, None]
        kernel = gaussian(landmarks[block], landmarks[block], gamma)
        means = kernel @ share
        mean = share @ means
        centred = kernel.sub_(means).sub_(means[:, None]).add_(mean).mul_(root).mul_(root.T)
        diagonal = centred.diagonal().clone()
        offset = share @ targets[block]
        own = targets[block] - offset
        for solution in solutions:
            ridge = solution.ridge * float(diagonal.mean()) + LEAST_RIDGE / len(block)
            centred.diagonal().copy_(diagonal + ridge)
            factor = _cholesky(centred)
            dual = torch.cholesky_solve((root * own).to(factor.dtype), factor).float()
            values = root * dual
            total = values.sum(0)
            solution.weight[block] = (values - share[:, None] * total) / count
            solution.bias.add_((mean * total - means @ values + offset) / count)
            residuals = ridge * dual / root
            predicted = own - residuals
            solution.cross.add_(predicted.T @ (share[:, None] * own) / count)
            solution.spread.add_(predicted.T @ (share[:, None] * predicted) / count)
            if solution.held_out is not None:
                kept = (ridge * torch.cholesky_inverse(factor).diagonal()).float()
                kept = kept.clamp(min=LEAST_GAP)[:, None]  # 1 - leverage
                solution.held_out[block] = residuals * (1 - kept) / kept / count
    return solutions


def _cholesky(matrix: Tensor) -> Tensor:
    """Factor a positive definite matrix; in float64 if float32 is not enough for it."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        factor = torch.linalg.cholesky(matrix.double())
    return factor
