"""How far a figure can be trusted: intervals by the bootstrap over images.

A resample draws as many images as there are, with replacement, and the captions of an image come
with it, since they are no independent witnesses. The gallery stays as it is. Two systems measured
on the same rows and resampled with one seed get the same resamples, so that their difference has an
interval of its own, narrower than theirs: what is hard for one is mostly hard for the other.

Of the gap, the figures that sums over rows give are resampled; those that need all pairs of rows or
a decomposition (CS, MMD, Frechet, separability, uniformity, effective rank) would take as long as
measuring them anew for each resample, and are left out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from csalign.metrics.retrieval import RECALL_AT, DirectionRanks

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]
Place = tuple[str, ...]
Interval = tuple[float, float]

LEVEL = 0.95
FEWEST_IMAGES = 20  # with less, the resamples are too much alike to tell anything
CELLS = 4 << 20  # weights of resamples at a time: 32 MB
PAIRS_AT_A_TIME = 16_384
CENTROID = ("centroid_distance",)
DIRECTIONS = ("image_to_text", "text_to_image")


class Verdict(StrEnum):
    """What a paired difference says."""

    BETTER = "better"
    WORSE = "worse"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Resamples:
    """The figures of one system on each resample.

    Attributes:
        figures: (resamples,) float64 by place: where ``csalign eval`` has the figure under
            "retrieval" or "gap", such as ``("text_to_image", "R@1")`` or ``("rmg",)``.
        images: how many images with texts were drawn from.
    """

    figures: dict[Place, Floats]
    images: int

    def intervals(self) -> dict[str, Any]:
        """The 95 % percentile interval of each figure, ``[low, high]``, nested by place."""
        nested: dict[str, Any] = {}
        for place, values in self.figures.items():
            *outer, name = place
            into = nested.setdefault(outer[0], {}) if outer else nested
            into[name] = list(percentiles(values))
        return nested

    def minus(self, baseline: "Resamples", place: Place) -> tuple[Interval, Verdict]:
        """How much higher a figure is than the baseline's, and whether it is at all.

        Args:
            baseline: of the same rows, number of resamples and seed.
            place: which figure; one where more is better, for the verdict to make sense.
        """
        interval = percentiles(self.figures[place] - baseline.figures[place])
        if self.images < FEWEST_IMAGES or interval[0] <= 0 <= interval[1]:
            return interval, Verdict.UNKNOWN
        return interval, Verdict.BETTER if interval[0] > 0 else Verdict.WORSE


def percentiles(values: Floats) -> Interval:
    """What the middle 95 % of the values lie between."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resample(
    ranks: tuple[DirectionRanks, DirectionRanks],
    images: Rows,
    texts: Rows,
    text_image: Ints,
    *,
    resamples: int,
    seed: int,
) -> Resamples:
    """Draw images again and again and compute the figures of each draw.

    Images without texts, and texts without an image, are drawn among themselves; they count for
    the gap and are no queries.

    Args:
        ranks: what `rank_both_ways` gave for these rows.
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) row of the image that each text belongs to, -1 for none.
        resamples: how many.
        seed: the same gives the same resamples, whatever the rows' values.

    Returns:
        Every figure of retrieval, and of the gap "centroid_distance", "rmg" and "alignment".
    """
    units = _Units.of(len(images), text_image)
    retrieval, gap = _Retrieval.of(ranks, units), _Gap.of(images, texts, units)
    whole = gap.figures(np.ones((1, units.count), np.int64))
    at_a_time = max(1, CELLS // max(units.count, len(text_image)))
    parts = [
        retrieval.figures(weights) | gap.figures(weights)
        for weights in _draws(units, resamples, seed, at_a_time)
    ]
    figures = {place: np.concatenate([part[place] for part in parts]) for place in parts[0]}
    figures[CENTROID] = _recentred(figures[CENTROID], whole[CENTROID])
    return Resamples(figures, len(units.queried))


def _recentred(distances: Floats, measured: Floats) -> Floats:
    """Distances of means without what resampling itself adds to them.

    A resampled mean strays from its mean, which adds to its squared distance from anything, on
    average by as much as the spread of the rows over their number. Where the gap is narrow that
    would put the measured distance outside of its own interval. The same holds for the measured
    distance and the population's: the interval is that of the distance between so many rows.
    """
    squares = np.square(distances)
    centred: Floats = np.sqrt(np.maximum(0, squares - squares.mean() + np.square(measured)))
    return centred


@dataclass(frozen=True)
class _Units:
    """What is drawn: each image with its texts, and each text without an image by itself.

    Attributes:
        count: how many; images come first.
        images: of them, images.
        of_text: (m,) unit of each text.
        paired: rows of the texts with an image.
        queried: images with texts.
    """

    count: int
    images: int
    of_text: Ints
    paired: Ints
    queried: Ints

    @classmethod
    def of(cls, images: int, text_image: Ints) -> "_Units":
        lone = text_image < 0
        of_text = np.where(lone, images + np.cumsum(lone) - 1, text_image)
        paired = np.flatnonzero(~lone)
        return cls(images + int(lone.sum()), images, of_text, paired, np.unique(of_text[paired]))

    @property
    def owners(self) -> Ints:
        """The image of each paired text."""
        return self.of_text[self.paired]

    def strata(self) -> list[Ints]:
        """Units that are drawn among themselves: no resample is then without a query."""
        unqueried = np.setdiff1d(np.arange(self.images), self.queried)
        return [self.queried, unqueried, np.arange(self.images, self.count)]

    def total(self, units: Ints, values: npt.NDArray[Any]) -> Floats:
        """Sums of the values by unit, (count,)."""
        return np.bincount(units, weights=values, minlength=self.count).astype(np.float64)


def _draws(units: _Units, resamples: int, seed: int, at_a_time: int) -> Iterator[Ints]:
    """How often each unit was drawn, (at most `at_a_time`, units) int64 at a time."""
    strata = units.strata()
    generators = np.random.default_rng(seed).spawn(len(strata))
    for start in range(0, resamples, at_a_time):
        rows = min(at_a_time, resamples - start)
        weights = np.empty((rows, units.count), np.int64)
        for stratum, generator in zip(strata, generators, strict=True):
            n = len(stratum)
            if n:
                drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
                counts = np.bincount(drawn.ravel(), minlength=rows * n)
                weights[:, stratum] = counts.reshape(rows, n)
        yield weights


@dataclass(frozen=True)
class _Retrieval:
    """Ranks of both directions as sums by unit, and in order for the median.

    Attributes:
        names: figures that are means over queries.
        sums: (units, names) of each direction.
        queries: (units,) of each direction, queries of a unit.
        ordered: of each direction, first ranks in ascending order and the unit of each.
    """

    names: tuple[str, ...]
    sums: list[Floats]
    queries: list[Floats]
    ordered: list[tuple[Ints, Ints]]

    @classmethod
    def of(cls, ranks: tuple[DirectionRanks, DirectionRanks], units: _Units) -> "_Retrieval":
        sums, queries, ordered = [], [], []
        for direction, owners in zip(ranks, (units.queried, units.owners), strict=True):
            first, columns = direction.first, direction.by_query().values()
            sums.append(np.stack([units.total(owners, column) for column in columns], axis=1))
            queries.append(units.total(owners, np.ones(len(owners))))
            order = np.argsort(first, kind="stable")
            ordered.append((first[order], owners[order]))
        return cls(tuple(ranks[0].by_query()), sums, queries, ordered)

    def figures(self, weights: Ints) -> dict[Place, Floats]:
        """Each figure on each resample; `weights` (resamples, units)."""
        found: dict[Place, Floats] = {}
        wide = weights.astype(np.float64)
        for name, sums, queries, (first, owners) in zip(
            DIRECTIONS, self.sums, self.queries, self.ordered, strict=True
        ):
            count = wide @ queries
            means = wide @ sums / count[:, None]
            found |= {(name, key): means[:, column] for column, key in enumerate(self.names)}
            found[name, "median_rank"] = _medians(first, owners, weights, count.astype(np.int64))
        recalls = [found[name, f"R@{k}"] for name in DIRECTIONS for k in RECALL_AT]
        return found | {("mean_recall",): np.mean(recalls, axis=0)}


def _medians(ascending: Ints, owners: Ints, weights: Ints, count: Ints) -> Floats:
    """Median rank of each resample, (r,).

    Only the ranks about the middle are counted one by one, as many as it takes.

    Args:
        ascending: (q,) ranks in ascending order.
        owners: (q,) unit of each.
        weights: (r, units) how often each unit was drawn.
        count: (r,) ranks that were drawn.
    """
    lower, upper = (count - 1) // 2, count // 2
    middle, reach = len(ascending) // 2, 8 * math.isqrt(len(ascending))
    while True:
        start, stop = max(0, middle - reach), middle + reach
        before = weights @ np.bincount(owners[:start], minlength=weights.shape[1])
        below = before[:, None] + np.cumsum(weights[:, owners[start:stop]], axis=1)
        if (before <= lower).all() and (below[:, -1] > upper).all():
            break
        reach *= 2
    places = (start + (below <= k[:, None]).sum(axis=1) for k in (lower, upper))
    medians: Floats = sum(ascending[place] for place in places) / 2
    return medians


@dataclass(frozen=True)
class _Gap:
    """Rows of both sides as sums by unit.

    Attributes:
        images: (images, d) float32.
        texts: (units, d) float32, the sum of each unit's texts.
        counts: (units, 3): images, texts, and texts with an image.
        squares: (units,) sum of the squared distances of a unit's pairs.
    """

    images: Rows
    texts: Rows
    counts: Floats
    squares: Floats

    @classmethod
    def of(cls, images: Rows, texts: Rows, units: _Units) -> "_Gap":
        summed = torch.zeros(units.count, texts.shape[1])
        summed.index_add_(0, torch.from_numpy(units.of_text), torch.from_numpy(texts))
        members = (np.arange(units.images), units.of_text, units.owners)
        counts = [units.total(rows, np.ones(len(rows))) for rows in members]
        distances = np.empty(len(units.paired))
        for start in range(0, len(distances), PAIRS_AT_A_TIME):
            some = slice(start, start + PAIRS_AT_A_TIME)
            apart = images[units.owners[some]] - texts[units.paired[some]]
            distances[some] = np.square(apart, dtype=np.float64).sum(axis=1)
        squares = units.total(units.owners, distances)
        return cls(images, summed.numpy(), np.stack(counts, axis=1), squares)

    def figures(self, weights: Ints) -> dict[Place, Floats]:
        """Each figure on each resample; `weights` (resamples, units)."""
        narrow, wide = weights.astype(np.float32), weights.astype(np.float64)
        sum_x = (narrow[:, : len(self.images)] @ self.images).astype(np.float64)
        sum_y = (narrow @ self.texts).astype(np.float64)
        images, texts, paired = (wide @ self.counts).T
        twice_x, twice_y, _ = (np.square(wide) @ self.counts).T
        centroids = sum_x / images[:, None] - sum_y / texts[:, None]
        alignment = wide @ self.squares / paired
        within = (_within(sum_x, images, twice_x) + _within(sum_y, texts, twice_y)) / 2
        total = alignment / 4 + within
        rmg = np.divide(alignment / 4, total, out=np.zeros_like(total), where=total > 0)
        return {
            CENTROID: np.linalg.norm(centroids, axis=1),
            ("rmg",): rmg,
            ("alignment",): alignment,
        }


def _within(sums: Floats, rows: Floats, twice: Floats) -> Floats:
    """Mean of (1 - cos) / 2 over the pairs of different rows of each resample.

    Args:
        sums: (r, d) sum of the drawn unit rows.
        rows: (r,) how many were drawn.
        twice: (r,) sum of the squares of how often each was: pairs of a row with itself.
    """
    pairs = rows**2 - twice
    cosines = np.square(sums).sum(axis=1) - twice
    mean: Floats = np.divide(cosines, pairs, out=np.ones_like(pairs), where=pairs > 0)
    distance: Floats = (1 - mean) / 2
    return distance
