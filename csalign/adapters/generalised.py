"""Closed forms of any number of sides, of whose items each has some.

Generalised CCA finds directions in which the sides of an item agree: the leading eigenvectors of
the whitened cross-covariances of all pairs of sides (Kettenring 1971). Each block is estimated from
the items that have both sides, so that items without all sides count as far as they go. For two
sides it is `PairMoments.cca`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.canonical import TINY, PairMoments, leading
from csalign.adapters.side import CHUNK_ROWS, Rows, UnitRows
from csalign.core.arrays import Array, Doubles, Ints
from csalign.core.enums import Modality
from csalign.core.errors import DataError

MAX_COMPONENTS = 4_096  # principal components of all sides, if that leaves each as many as
LEAST_COMPONENTS = 256
ITEMS_AT_ONCE = 4_096
PLAIN = UnitRows()


@dataclass(frozen=True)
class SideInput:
    """Rows of one side, and their items."""

    rows: Rows  # (n, d), any float dtype
    items: Ints  # (n,), equal for rows of one item, of all sides; below 0 for rows to leave out
    unit: UnitRows = PLAIN  # makes the unit rows


class SideMap(NamedTuple):
    """Linear map of one side: z = weight (u - mean) + bias of unit rows u."""

    mean: Tensor  # (d,) float32
    weight: Tensor  # (k, d) float32
    bias: Tensor | None = None  # (k,) float32; None for 0

    def outputs(self, rows: Tensor) -> Tensor:
        """Map unit rows (n, d) to unit rows (n, k)."""
        z = (rows - self.mean) @ self.weight.T
        return normalize(z if self.bias is None else z + self.bias, dim=1)


class GeneralForm(NamedTuple):
    """Linear maps of any sides to one space."""

    name: str  # which closed form and its settings, as shown to users
    sides: dict[str, SideMap]

    def functions(self, sides: Mapping[str, SideInput]) -> dict[str, Callable[[Array], Tensor]]:
        """Return functions from raw rows of each side to unit outputs, for `consensus`."""
        return {
            name: partial(_outputs, side.unit, self.sides[name]) for name, side in sides.items()
        }


class _Spectrum(NamedTuple):
    """Principal components of the unit rows of one side, float64, the first first."""

    mean: Tensor  # (d,)
    values: Tensor  # (c,), variances
    vectors: Tensor  # (d, c)
    level: Tensor  # (), the mean variance of all d components


@dataclass(frozen=True)
class SideMoments:
    """Covariances of the unit rows of any sides, an item as much as any other."""

    spectra: dict[str, _Spectrum]
    cross: Tensor  # (C, C) float64, of the components of all sides; blocks of one side are 0
    counts: Tensor  # (N, N) int64, items that have both of two sides; diagonal 0

    @classmethod
    def of(cls, sides: Mapping[str, SideInput]) -> "SideMoments":
        """Accumulate the moments in two passes over the rows.

        A side's mean and covariance are those of all its rows, with or without partner. Of
        its principal components the first 2,048 of two sides, 1,024 of four and so on are kept.

        Args:
            sides: by name, at least 2, each with at least 1 row to use.

        Raises:
            DataError: sides share no item with the others, directly or through a third.
        """
        limit = max(LEAST_COMPONENTS, MAX_COMPONENTS // len(sides))
        spectra = {name: _spectrum(side, limit) for name, side in sides.items()}
        widths = [len(own.values) for own in spectra.values()]
        total, count = sum(widths), len(sides)
        second = torch.zeros(total, total, dtype=torch.float64)
        first = torch.zeros(count, total, dtype=torch.float64)  # of items that have that side
        counts = torch.zeros(count, count, dtype=torch.float64)
        for means, present in _item_means(sides, spectra):
            second += means.T @ means
            first += present.T @ means
            counts += present.T @ present
        reached = torch.linalg.matrix_power(counts.sign() + torch.eye(count).double(), count)[0] > 0
        if not reached.all():
            groups = [
                ", ".join(name for name, own in zip(sides, reached, strict=True) if own == is_first)
                for is_first in (True, False)
            ]
            raise DataError(
                f"sides {groups[0]} share no item with {groups[1]}, so that nothing relates them; "
                "add items that have both, or choose sides that share some"
            )
        side_of = torch.arange(count).repeat_interleave(torch.tensor(widths))
        items = counts[side_of][:, side_of].clamp(min=1)
        # The means of a pair of sides are those of the items that have both.
        along = first[side_of] / items
        cross = second / items - along.T * along
        cross[side_of[:, None] == side_of] = 0
        return cls(spectra, cross, counts.long().fill_diagonal_(0))

    def gcca(self, *, ridge: float, powers: tuple[float, ...], width: int) -> Iterator[GeneralForm]:
        """Compute regularised generalised CCA for a ridge and powers of the correlations.

        A pair of sides counts as much as it has items. A side that takes little part in a
        direction has small outputs in it.

        Args:
            ridge: > 0, relative to each side's mean eigenvalue; whitening as in `PairMoments.cca`.
            powers: a direction is scaled by its mean correlation to this power, on each side.
            width: directions to keep, at most min(d, e) for two sides. Fewer are found if the
                sides have fewer dimensions or items.
        """
        spectra = self.spectra.values()
        scales = [(own.values + ridge * own.level + TINY).rsqrt() for own in spectra]
        widths = torch.tensor([len(scale) for scale in scales])
        side_of = torch.arange(len(scales)).repeat_interleave(widths)
        weights = (self.counts / self.counts.max())[side_of][:, side_of]
        whiten = torch.cat(scales)
        parts, values = _agreements(
            whiten[:, None] * self.cross * weights * whiten, widths.tolist(), width
        )
        maps = [scale[:, None] * part for scale, part in zip(scales, parts, strict=True)]
        # With a ridge the deviations of a direction differ between the sides, beyond the part that
        # each takes in it. They become equal, and for two sides every inner product stays.
        taken = torch.stack([torch.linalg.vector_norm(part, dim=0) for part in parts])
        variances = torch.stack(
            [
                own.values @ (part / norm.clamp(min=TINY)).square()
                for own, part, norm in zip(spectra, maps, taken, strict=True)
            ]
        )
        spread = variances.clamp(min=TINY).sqrt()
        balance = (taken.square() * spread.log()).sum(0).exp() / spread
        for power in powers:
            sides = {}
            for (name, own), part, factor in zip(self.spectra.items(), maps, balance, strict=True):
                columns = part * factor * values**power
                energy = (own.values @ columns.square()).sum().clamp(min=TINY)
                weight = own.vectors @ columns / energy.sqrt()
                sides[name] = SideMap(own.mean.float(), weight.T.float().contiguous())
            yield GeneralForm(f"generalised CCA (ridge {ridge:g}, power {power:g})", sides)


def item_weights(items: Ints) -> Doubles:
    """Return the weight of each row, (n,): one by the number of rows of its item."""
    _, group, sizes = np.unique(items, return_inverse=True, return_counts=True)
    weights: Doubles = 1 / sizes[group]
    return weights


def _spectrum(side: SideInput, limit: int) -> _Spectrum:
    used = np.flatnonzero(side.items >= 0)
    weights = item_weights(side.items[used])
    share = torch.from_numpy(weights / weights.sum()).float()
    width = side.rows.shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    second = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(used), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        rows = side.unit(side.rows[used[part]])
        weighted = rows * share[part, None]
        total += weighted.sum(0)
        second += weighted.T @ rows
    values, vectors = torch.linalg.eigh(second - torch.outer(total, total))
    values = values.clamp(min=0).flip(0)
    return _Spectrum(total, values[:limit], vectors.flip(1)[:, :limit], values.mean())


class _ByItem:
    """The rows of a side in the order of their items, without those left out."""

    def __init__(self, side: SideInput) -> None:
        self._side = side
        order = np.argsort(side.items, kind="stable")
        self._rows = order[np.searchsorted(side.items[order], 0) :]
        self.items = side.items[self._rows]

    def means(self, items: Ints, of: Callable[[Array], Tensor]) -> tuple[Tensor, Tensor]:
        """Average outputs of the rows of each item, ascending: (m, k), and (m, 1): 1 if any."""
        first, last = np.searchsorted(self.items, [items[0], items[-1] + 1])
        own = self.items[first:last]
        place = np.searchsorted(items, own)
        known = items[place] == own
        where = torch.from_numpy(place[known])
        found = of(self._side.rows[self._rows[first:last][known]])
        sizes = torch.bincount(where, minlength=len(items)).float()[:, None]
        sums = torch.zeros(len(items), found.shape[1]).index_add_(0, where, found)
        return sums / sizes.clamp(min=1), (sizes > 0).float()


def _item_means(
    sides: Mapping[str, SideInput], spectra: Mapping[str, _Spectrum]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mean components (m, C) of m items, 0 for a missing side, and which sides they have.

    Items with one side are left out. The second is (m, N), 1 or 0; both are float32.
    """
    owns = [_ByItem(side) for side in sides.values()]
    items, counts = np.unique(
        np.concatenate([np.unique(own.items) for own in owns]), return_counts=True
    )
    for chunk in _chunks(items[counts > 1]):
        found = [
            own.means(chunk, partial(_components, side.unit, spectra[name]))
            for own, (name, side) in zip(owns, sides.items(), strict=True)
        ]
        yield torch.cat([means for means, _ in found], 1), torch.cat([has for _, has in found], 1)


def _components(unit: UnitRows, spectrum: _Spectrum, rows: Array) -> Tensor:
    return (unit(rows) - spectrum.mean.float()) @ spectrum.vectors.float()


def _outputs(unit: UnitRows, side: SideMap, rows: Array) -> Tensor:
    return side.outputs(unit(rows))


def _chunks(items: Ints) -> Iterator[Ints]:
    for start in range(0, len(items), ITEMS_AT_ONCE):
        yield items[start : start + ITEMS_AT_ONCE]


def consensus(
    sides: Mapping[str, SideInput],
    outputs: Mapping[str, Callable[[Array], Tensor]],
    items: Ints,
) -> tuple[Tensor, Tensor]:
    """Average the outputs of each item over its sides, of each side over its rows.

    Args:
        sides: the sides to average.
        outputs: functions from raw rows of each side to unit outputs (n, k) float32.
        items: (m,), m >= 1, each once, in any order.

    Returns:
        (m, k) float32, 0 for an item without sides; (m,), the number of sides it has.
    """
    order = np.argsort(items)
    means, counts = [], []
    owns = {name: _ByItem(side) for name, side in sides.items()}
    for chunk in _chunks(items[order]):
        found = [own.means(chunk, outputs[name]) for name, own in owns.items()]
        count = torch.stack([has for _, has in found]).sum(0)
        means.append(torch.stack([mean for mean, _ in found]).sum(0) / count.clamp(min=1))
        counts.append(count[:, 0])
    back = torch.from_numpy(np.argsort(order))
    return torch.cat(means)[back], torch.cat(counts)[back]


def _agreements(matrix: Tensor, widths: list[int], width: int) -> tuple[list[Tensor], Tensor]:
    """Return the leading eigenvectors, a part of each side, and the mean correlations (k,)."""
    if len(widths) == 2:
        left, values, right = leading(matrix[: widths[0], widths[0] :], width)
        return [left / 2**0.5, right / 2**0.5], values
    found, vectors = torch.linalg.eigh(matrix)
    kept = min(width, int((found > 0).sum()))
    parts = vectors.flip(1)[:, :kept].split(widths)
    return [*parts], found.flip(0)[:kept] / (len(widths) - 1)


def add_side(side: SideInput, targets: Array, *, ridge: float) -> SideMap:
    """Regress the unit outputs of other sides on the unit rows of a new one.

    Args:
        side: the new side; rows without a target have an item below 0.
        targets: (n, k), for each row the `consensus` of its item's other sides; not used where
            the item is below 0.
        ridge: > 0, relative to the mean eigenvalue; to be chosen on items held out.
    """
    used = np.flatnonzero(side.items >= 0)
    weights = item_weights(side.items[used])
    moments = PairMoments.of(side.rows, targets, (used, used), weights, (side.unit, PLAIN))
    form = moments.ridge(Modality.TEXT, ridge)  # the targets are in place of texts
    return SideMap(form.image_mean, form.image_weight, form.image_bias)
