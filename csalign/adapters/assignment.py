"""Start for few pairs, or none: clusters of both sides matched by a quadratic assignment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.canonical import TINY, ClosedForm, PairMoments, mutual_neighbours

Rows = tuple[Tensor, Tensor]


class Stage(NamedTuple):
    """Size of one of the successive assignments, from coarse to fine."""

    clusters: int
    repeats: int  # with other clusters, whose cross-covariances are averaged
    orders: int  # random orders, each improved by swaps


STAGES = (Stage(30, 12, 300), Stage(45, 8, 64), Stage(90, 4, 16))
SAMPLE = 5_000  # rows of each side that are clustered at once
CLUSTER_ROUNDS = 8
LEAST_GAIN = 1e-6  # of a swap; float32 rounds below
SHARE = 0.97  # of matched rows, beside the pairs: a few pairs alone fit few directions
RIDGE, POWER, WIDTH = 3.0, 1.0, 128
ROUNDS, BLOCK = 8, 4_096
MOST_HELD_OUT = 2_000  # rows of each side
RESTARTS = 3
GOOD, DOUBTFUL = 0.9, 0.4  # least agreement
NEAR, SURE = 0.05, 3.0  # mean rank of a good start; standard errors above chance


class Trust(NamedTuple):
    """How far a start can be relied on, found without validation."""

    agreement: float  # mean cosine of the texts predicted for images by two starts
    matched: float  # mean cosine of mutual nearest neighbours on held-out rows
    rank: float = 0.5  # share of rows nearer than the partner left out, in [0, 1], with pairs
    pairs: int = 0  # known

    @property
    def word(self) -> str:
        """Whether the start is "good", "doubtful", or no better than "chance"."""
        is_good, is_chance = self.agreement >= GOOD, self.agreement < DOUBTFUL
        if self.pairs:  # which all starts may follow, whatever they are worth
            is_good = self.rank <= NEAR
            is_chance = (0.5 - self.rank) * (12 * self.pairs) ** 0.5 < SURE
        return "chance" if is_chance else "good" if is_good else "doubtful"

    def __str__(self) -> str:
        """Say what was matched, the figures, and what they mean."""
        found = f"without pairs: agreement of {RESTARTS} starts {self.agreement:.2f}"
        if self.pairs:
            farther = f"{1 - self.rank:.0%} of rows farther than a partner left out"
            found = f"with {self.pairs} pairs: {farther}"
        advice = {"good": "", "chance": "; do not rely on it"}.get(self.word, "; measure it")
        return f"clusters matched {found}, mean cosine {self.matched:.2f}: {self.word}{advice}"


@dataclass(frozen=True)
class Clusters:
    """Unpaired rows of both sides, to find maps to one space from, with few pairs or none.

    The centres of clusters of both sides are matched so that their cosines agree (a quadratic
    assignment) and, as a linear term, so do pairs and the previous, coarser matching. The mean
    cross-covariance of matched centres gives a CCA, which is refined by rounds of mutual nearest
    neighbours.
    """

    images: Tensor  # (n, d) float32 unit rows without partner, n >= 300
    texts: Tensor  # (m, e), m >= 300, in any order
    seed: int  # of all that is drawn
    width: int = WIDTH  # of the shared space, at most min(d, e)
    stages: Sequence[Stage] = STAGES  # sizes of the assignments, the coarsest first

    @cached_property
    def _rows(self) -> tuple[list[Tensor], list[Tensor], PairMoments]:
        """Centred rows to learn from and held-out ones, and the moments of the former."""
        generator = torch.Generator().manual_seed(self.seed)
        learned, held_out, means = [], [], []
        for rows in (self.images, self.texts):
            order = torch.randperm(len(rows), generator=generator)
            cut, mean = min(len(rows) // 5, MOST_HELD_OUT), rows.mean(0)
            held_out.append(rows[order[:cut]] - mean)
            learned.append(rows[order[cut:]] - mean)
            means.append(mean.double())
        spread_x, spread_y = ((x.T @ x / len(x)).double() for x in learned)
        mean_x, mean_y = means
        cross = torch.zeros(len(mean_x), len(mean_y), dtype=torch.float64)
        return learned, held_out, PairMoments(mean_x, mean_y, spread_x, spread_y, cross)

    def fit(self, pairs: Rows, number: int = 0) -> ClosedForm:
        """Find the maps from pairs, (k, d) and (k, e) unit rows, k >= 0, and random numbers."""
        (x, y), _, spread = self._rows
        known = []
        if len(pairs[0]):
            a, b = pairs[0] - spread.mean_x.float(), pairs[1] - spread.mean_y.float()
            known = [a.T @ b / len(a)]
        generator = torch.Generator().manual_seed(self.seed + number)
        last: list[Tensor] = []
        units = normalize(x, dim=1), normalize(y, dim=1)
        for stage in self.stages:
            last = [_cross_of_clusters(*units, known + last, stage, generator)]
        cross = last[0]
        for _ in range(ROUNDS):
            form = self._cca(cross)
            a, b = _sample(x, BLOCK, generator), _sample(y, BLOCK, generator)
            rows, columns = mutual_neighbours(a @ form.image_weight.T, b @ form.text_weight.T)
            cross = a[rows].T @ b[columns] / len(rows)
            if known:
                cross = SHARE * cross + (1 - SHARE) * known[0]
        return replace(self._cca(cross), name="matched clusters")

    def _cca(self, cross: Tensor) -> ClosedForm:
        moments = self._rows[2].with_cross(cross.double())
        (form,) = moments.cca(ridge=RIDGE, powers=(POWER,), width=self.width)
        return form

    def start(self, pairs: Rows) -> tuple[ClosedForm, Trust]:
        """Find the maps, and how far they can be relied on.

        Without pairs, the start of several whose matched rows are nearest is returned. With pairs
        it is that of all of them, and two starts with half of them each rank the rest.
        """
        _, (x, y), _ = self._rows
        count = len(pairs[0])
        halves = [(pairs[0][part::2], pairs[1][part::2]) for part in range(2)]
        subsets = [*halves, pairs] if count else [pairs] * RESTARTS
        found = [self.fit(subset, number) for number, subset in enumerate(subsets)]
        matched = [_matched(form, x, y) for form in found]
        best = len(found) - 1 if count else max(range(RESTARTS), key=matched.__getitem__)
        predicted = [x @ form.image_weight.T @ form.text_weight for form in found]
        agreement = max(
            float(torch.cosine_similarity(predicted[best], rows, dim=1).mean())
            for number, rows in enumerate(predicted)
            if number != best
        )
        ranks = [self._ranks(*own) for own in zip(found, halves[::-1], strict=False)]
        rank = float(torch.cat(ranks).mean()) if count else 0.5
        return found[best], Trust(agreement, matched[best], rank, count)

    def _ranks(self, form: ClosedForm, pairs: Rows) -> Tensor:
        """Return the share of held-out rows nearer than the partner, (k,), over both sides."""
        _, (x, y), spread = self._rows
        own = form.outputs(*pairs)
        others = form.outputs(x + spread.mean_x.float(), y + spread.mean_y.float())
        cosines = (own[0] * own[1]).sum(1, keepdim=True)
        nearer = [own[side] @ others[1 - side].T > cosines for side in range(2)]
        return torch.cat(nearer, 1).float().mean(1)


def _matched(form: ClosedForm, x: Tensor, y: Tensor) -> float:
    x = normalize(x @ form.image_weight.T, dim=1)
    y = normalize(y @ form.text_weight.T, dim=1)
    rows, columns = mutual_neighbours(x, y)
    return float((x[rows] * y[columns]).sum(1).mean())


def _sample(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:most]]


def _cross_of_clusters(
    x: Tensor, y: Tensor, known: Sequence[Tensor], stage: Stage, generator: torch.Generator
) -> Tensor:
    """Return the mean cross-covariance (d, e) of matched centres of unit rows."""
    total = torch.zeros(x.shape[1], y.shape[1])
    for _ in range(stage.repeats):
        a, b = (_centres(_sample(side, SAMPLE, generator), stage, generator) for side in (x, y))
        linear = torch.zeros(len(a), len(b))
        for cross in known:
            term = a @ cross @ b.T
            term = term - term.mean(0) - term.mean(1, keepdim=True) + term.mean()
            linear += term / term.norm().clamp(min=TINY)
        orders = torch.rand(stage.orders, len(a), generator=generator).argsort(1)
        total += a.T @ b[assign(_cosines(a), _cosines(b), linear, orders)]
    return total / (stage.repeats * stage.clusters)


def _centres(rows: Tensor, stage: Stage, generator: torch.Generator) -> Tensor:
    """Cluster unit rows by k-means from k-means++ seeds; return the centres (c, d)."""
    centres = _sample(rows, 1, generator)
    distances = 1 - rows @ centres[0]  # half the squared ones, of unit rows
    while len(centres) < min(stage.clusters, len(rows)):
        weights = distances.clamp(min=TINY)
        seed = rows[torch.multinomial(weights, 1, generator=generator)]
        centres = torch.cat([centres, seed])
        distances = distances.minimum(1 - rows @ seed[0])
    for _ in range(CLUSTER_ROUNDS):
        nearest = (rows @ centres.T - centres.square().sum(1) / 2).argmax(1)
        counts = nearest.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def _cosines(centres: Tensor) -> Tensor:
    """Return the cosines of centres less their mean, with diagonal 0 and norm 1."""
    unit = normalize(centres - centres.mean(0), dim=1)
    other = 1 - torch.eye(len(unit))
    cosines = unit @ unit.T
    cosines = (cosines - (cosines * other).sum() / other.sum()) * other
    found: Tensor = cosines / cosines.norm().clamp(min=TINY)
    return found


def assign(a: Tensor, b: Tensor, linear: Tensor, orders: Tensor) -> Tensor:
    """Maximise sum a[i, j] b[p[i], p[j]] + sum linear[i, p[i]] over permutations p.

    Each order is improved by its best swap until none gains (2-opt); the best one is returned.

    Args:
        a: (c, c), symmetric, diagonal 0.
        b: (c, c), likewise.
        linear: (c, c).
        orders: (s, c) int64, permutations to begin with.

    Returns:
        (c,) int64.
    """
    orders, size = orders.clone(), orders.shape[1]
    while True:
        moved = b[orders[:, :, None], orders[:, None, :]]  # (s, c, c)
        product = 2 * a @ moved + linear[:, orders].transpose(0, 1)
        own = product.diagonal(dim1=1, dim2=2)
        gains = product + product.transpose(1, 2) - own[:, :, None] - own[:, None, :]
        gain, at = (gains + 4 * a * moved).flatten(1).max(1)
        better = (gain > LEAST_GAIN).nonzero()[:, 0]
        if not len(better):
            values = (a * moved).sum((1, 2)) + linear[torch.arange(size), orders].sum(1)
            return orders[values.argmax()]
        first, second = at[better] // size, at[better] % size
        kept = orders[better, first]
        orders[better, first] = orders[better, second]
        orders[better, second] = kept
