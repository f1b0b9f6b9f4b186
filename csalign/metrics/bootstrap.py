"""Confidence intervals by the bootstrap over images (Efron 1979, percentile method).

A resample draws as many images as there are, with replacement, and the captions of an image come
with it, since they are not independent. The gallery stays as it is. Two systems measured on the
same rows and resampled with one seed get the same resamples, so their difference has an interval of
its own, narrower than theirs. Of the gap, the figures that follow from sums over rows are
resampled; the others would have to be measured again for each resample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import torch

from csalign.core.arrays import Array, Doubles, Floats, Ints
from csalign.core.progress import tick
from csalign.metrics.gap import pair_distances
from csalign.metrics.retrieval import RECALL_AT, DirectionRanks
from csalign.objective.products import product

Place = tuple[str, ...]
Interval = tuple[float, float]

LEVEL = 0.95
FEWEST_IMAGES = 20  # with fewer, the resamples are too similar to support a verdict
CELLS = 4 << 20  # weights of resamples at a time: 32 MB
MIDDLE = (0.4, 0.6)  # of the ranks, which has the median of nearly all resamples
CENTROID = ("centroid_distance",)
BIASED = (("groups", "v_measure"), ("groups", "ari"))  # copies of a row agree with each other
DIRECTIONS = ("image_to_text", "text_to_image")


class Resampled(Protocol):
    """Figures that can be computed on each resample beside those of retrieval and gap."""

    def figures(self, weights: Ints) -> dict[Place, Doubles]:
        """Compute figures (resamples,) by place, such as ``("mixed", "image", "ndcg@10")``.

        weights are (resamples, units), how often each unit was drawn; unit i is image i with its
        texts, and units after the last image are texts without one.
        """


class ByQuery(Protocol):
    """Ranks of queries, of which figures are means."""

    @property
    def first(self) -> Ints:
        """Rank of the best match of each query, (q,)."""

    def by_query(self) -> dict[str, Array]:
        """Return the contribution of each query, (q,), by figure."""


@dataclass(frozen=True)
class FoldMeans:
    """Means of the same figures of several folds: the images of each, and what was measured."""

    folds: Sequence[tuple[Ints, Resampled]]

    def figures(self, weights: Ints) -> dict[Place, Doubles]:
        """Compute each figure on each resample, as `Resampled` describes."""
        found = [own.figures(weights[:, images]) for images, own in self.folds]
        return {place: np.mean([own[place] for own in found], axis=0) for place in found[0]}


class Verdict(StrEnum):
    """Conclusion from a paired difference."""

    BETTER = "better"
    WORSE = "worse"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Resamples:
    """Figures of one system on each resample, (resamples,) float64 by place.

    A place is where ``csalign eval`` has the figure under "retrieval" or "gap", such as
    ``("text_to_image", "R@1")`` or ``("rmg",)``, or in its document, such as ``("mixed",
    "ndcg@10")``; images is the number of images with texts.
    """

    figures: dict[Place, Doubles]
    images: int

    def intervals(self) -> dict[str, Any]:
        """Return the 95 % percentile interval of each metric, ``[low, high]``, nested by place."""
        return nested({place: list(percentiles(own)) for place, own in self.figures.items()})

    def minus(self, baseline: "Resamples", place: Place) -> tuple[Interval, Verdict]:
        """Compute the interval of a figure's difference from a baseline, and whether it excludes 0.

        The baseline must be of the same rows, number of resamples and seed; higher must be better.
        """
        interval = percentiles(self.figures[place] - baseline.figures[place])
        if self.images < FEWEST_IMAGES or interval[0] <= 0 <= interval[1]:
            return interval, Verdict.UNKNOWN
        return interval, Verdict.BETTER if interval[0] > 0 else Verdict.WORSE


def nested(found: Mapping[Place, Any]) -> dict[str, Any]:
    """Nest values by place."""
    document: dict[str, Any] = {}
    for (*outer, name), value in found.items():
        into = document
        for key in outer:
            into = into.setdefault(key, {})
        into[name] = value
    return document


def percentiles(values: Doubles) -> Interval:
    """Return the bounds of the middle 95 % of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resample(
    ranks: tuple[DirectionRanks, DirectionRanks],
    images: Floats,
    texts: Floats,
    text_image: Ints,
    *,
    resamples: int,
    seed: int,
    further: Sequence[Resampled] = (),
    cells: int = CELLS,
) -> Resamples:
    """Draw images with replacement and compute the figures of each draw.

    Images without texts, and texts without an image, count for the gap and are not queries.

    Args:
        ranks: result of `rank_both_ways` for these rows.
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) row of the image that each text belongs to, -1 for none.
        resamples: how many.
        seed: the same gives the same resamples, whatever the rows' values.
        further: figures of these rows to add.
        cells: bound on the size of the tables held at a time.

    Returns:
        Every figure of retrieval, of the gap "centroid_distance", "rmg" and "alignment", and those
        of `further`.
    """
    units = Units.of(len(images), text_image)
    items, pairs = (np.arange(len(images)), units.of_text), (units.owners, units.paired)
    gap = GapSums.of(images, texts, items, pairs, units)
    directions = [
        RetrievalSums.of(direction, owners, units)
        for direction, owners in zip(ranks, (units.queried, units.owners), strict=True)
    ]
    parts, done = [], 0
    tick("bootstrap: resamples", 0, resamples)
    for weights in units.draws(resamples, seed, max(1, cells // max(units.count, len(texts)))):
        part = gap.figures(weights)
        for name, direction in zip(DIRECTIONS, directions, strict=True):
            part |= {(name, key): values for key, values in direction.figures(weights).items()}
        recalls = [part[name, f"R@{k}"] for name in DIRECTIONS for k in RECALL_AT]
        part |= {("mean_recall",): np.mean(recalls, axis=0)}
        for own in further:
            part |= own.figures(weights)
        parts.append(part)
        done += len(weights)
        tick("bootstrap: resamples", done, resamples)
    figures = {place: np.concatenate([part[place] for part in parts]) for place in parts[0]}
    measured = gap.figures(np.ones((1, units.count), np.int64))[CENTROID]
    figures[CENTROID] = centred_distances(figures[CENTROID], measured)
    for own in further:
        for place, value in own.figures(np.ones((1, units.count), np.int64)).items():
            if place in BIASED:
                figures[place] += value - figures[place].mean()
    return Resamples(figures, len(units.queried))


def centred_distances(resampled: Doubles, measured: Doubles) -> Doubles:
    """Shift resampled distances of centroids, so that their mean square is that measured, (1,).

    A resampled mean strays from its mean, which adds to its squared distance from anything; where
    the gap is narrow, the measured distance would be outside of its own interval.
    """
    squares = np.square(resampled)
    found: Doubles = np.sqrt(np.maximum(0, squares - squares.mean() + np.square(measured)))
    return found


@dataclass(frozen=True)
class Units:
    """Units of the bootstrap: each image with its texts, then each text without an image."""

    count: int  # number of units, of which `images` are images
    images: int
    of_text: Ints  # (m,) unit of each text
    paired: Ints  # rows of the texts with an image
    queried: Ints  # images with texts

    @classmethod
    def of(cls, images: int, text_image: Ints) -> "Units":
        """Find the units of so many images and their texts, (m,) image rows or -1."""
        unpaired = text_image < 0
        of_text = np.where(unpaired, images + np.cumsum(unpaired) - 1, text_image)
        paired = np.flatnonzero(~unpaired)
        count = images + int(unpaired.sum())
        return cls(count, images, of_text, paired, np.unique(of_text[paired]))

    @property
    def owners(self) -> Ints:
        """Image of each paired text."""
        return self.of_text[self.paired]

    def total(self, units: Ints, values: Array | None = None) -> Doubles:
        """Sum the values, or count, by unit, (count,)."""
        return np.bincount(units, weights=values, minlength=self.count).astype(np.float64)

    def draws(self, resamples: int, seed: int, at_a_time: int) -> Iterator[Ints]:
        """Draw how often each unit occurs, (at most `at_a_time`, units) int64 at a time.

        Images with texts, images without, and unpaired texts are drawn among themselves.
        """
        unqueried = np.setdiff1d(np.arange(self.images), self.queried)
        strata = [self.queried, unqueried, np.arange(self.images, self.count)]
        generators = np.random.default_rng(seed).spawn(len(strata))
        for start in range(0, resamples, at_a_time):
            rows = min(at_a_time, resamples - start)
            weights = np.empty((rows, self.count), np.int64)
            for stratum, generator in zip(strata, generators, strict=True):
                n = len(stratum)
                if n:
                    drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
                    counts = np.bincount(drawn.ravel(), minlength=rows * n)
                    weights[:, stratum] = counts.reshape(rows, n)
            yield weights


@dataclass(frozen=True)
class RetrievalSums:
    """Ranks of one direction: sums by unit of the figures, queries by unit, and sorted ranks."""

    sums: dict[str, Doubles]
    queries: Doubles
    first: Ints
    owners: Ints

    @classmethod
    def of(cls, ranks: ByQuery, owners: Ints, units: Units) -> "RetrievalSums":
        """Sum the figures of queries, (q,), by the unit that owns each."""
        sums = {name: units.total(owners, values) for name, values in ranks.by_query().items()}
        order = np.argsort(ranks.first, kind="stable")
        return cls(sums, units.total(owners), ranks.first[order], owners[order])

    def figures(self, weights: Array) -> dict[str, Doubles]:
        """Compute each figure on each resample, from weights (resamples, units)."""
        count = weights @ self.queries
        return self.means(weights) | {"median_rank": self._medians(weights, count)}

    def means(self, weights: Array) -> dict[str, Doubles]:
        """Compute the figures that are means over queries on each resample."""
        count = weights @ self.queries
        means = weights.astype(np.float64, copy=False) @ np.stack(list(self.sums.values()), axis=1)
        return {name: column / count for name, column in zip(self.sums, means.T, strict=True)}

    def _medians(self, weights: Array, count: Doubles) -> Doubles:
        """Compute the median rank of each resample, of count (resamples,) queries."""
        n = len(self.first)
        middles = (count - 1) // 2, count // 2
        for start, stop in (((np.array(MIDDLE) * n).astype(int)), (0, n)):
            before = np.bincount(self.owners[:start], minlength=weights.shape[1])
            # Drawn queries up to each rank.
            below = np.cumsum(weights[:, self.owners[start:stop]], axis=1)
            below += (weights @ before.astype(np.float64)).astype(np.int64)[:, None]
            places = [(below <= middle[:, None]).sum(1) for middle in middles]
            if start == 0 or (places[0].min() > 0 and places[1].max() < stop - start):
                break
        last = len(self.first) - 1  # where no query is drawn
        medians = sum(self.first[np.minimum(start + place, last)] for place in places) / 2
        return np.where(count > 0, medians, np.nan)


@dataclass(frozen=True)
class GapSums:
    """Rows of both sides as sums by unit, (at most units, d) float32.

    counts is (units, 3): rows of the first side, of the second, and pairs; squares (units,) the sum
    of the squared distances of a unit's pairs.
    """

    images: Floats
    texts: Floats
    counts: Doubles
    squares: Doubles

    @classmethod
    def of(
        cls,
        images: Floats,
        texts: Floats,
        items: tuple[Ints, Ints],
        pairs: tuple[Ints, Ints],
        units: Units,
    ) -> "GapSums":
        """Sum rows (n, d) and (m, d) by the units of theirs, and their pairs of rows."""
        x, y, *matched = map(torch.from_numpy, (images, texts, *pairs))
        owners = items[0][pairs[0]]
        distances = pair_distances(x, y, (matched[0], matched[1])).numpy()
        counts = np.stack([units.total(rows) for rows in (*items, owners)], axis=1)
        sum_x, sum_y = (
            _summed(rows, own, units.count)
            for rows, own in zip((images, texts), items, strict=True)
        )
        return cls(sum_x, sum_y, counts, units.total(owners, distances))

    def figures(self, weights: Ints) -> dict[Place, Doubles]:
        """Compute each figure on each resample, from weights (resamples, units).

        "rmg" and "alignment" are not finite if there are no pairs.
        """
        narrow, wide = torch.from_numpy(weights).float(), weights.astype(np.float64)
        sum_x, sum_y = (
            product(narrow[:, : len(rows)], torch.from_numpy(rows).T).double().numpy()
            for rows in (self.images, self.texts)
        )
        images, texts, paired = (wide @ self.counts).T
        twice_x, twice_y, _ = (np.square(wide) @ self.counts).T
        centroids = sum_x / images[:, None] - sum_y / texts[:, None]
        alignment = wide @ self.squares / paired
        within = (_within(sum_x, images, twice_x) + _within(sum_y, texts, twice_y)) / 2
        total = alignment / 4 + within
        return {
            CENTROID: np.linalg.norm(centroids, axis=1),
            ("rmg",): np.divide(alignment / 4, total, out=0 * total, where=total > 0),
            ("alignment",): alignment,
        }


def _summed(rows: Floats, units: Ints, count: int) -> Floats:
    """Sum rows by their units, (count, d); row i as unit i needs no sum, (n, d)."""
    if np.array_equal(units, np.arange(len(units))):
        return rows
    summed = np.zeros((count, rows.shape[1]), np.float32)
    torch.from_numpy(summed).index_add_(0, torch.from_numpy(units), torch.from_numpy(rows))
    return summed


def _within(sums: Doubles, rows: Doubles, twice: Doubles) -> Doubles:
    """Compute the mean of (1 - cos) / 2 over the pairs of different rows of each resample.

    sums is the (r, d) sum of the rows drawn, rows their number, and twice the sum of the squares of
    how often each was drawn: the pairs of a row with itself.
    """
    pairs = rows**2 - twice
    cosines = np.square(sums).sum(axis=1) - twice
    mean: Doubles = np.divide(cosines, pairs, out=np.ones_like(pairs), where=pairs > 0)
    return (1 - mean) / 2
