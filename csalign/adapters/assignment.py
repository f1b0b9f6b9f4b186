"""Start for few pairs, or none: clusters of both sides matched by a quadratic assignment."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.canonical import TINY, ClosedForm, PairMoments, mutual_neighbours


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
GOOD, DOUBTFUL = 0.9, 0.4  # least agreement; 20 pairs alone give 0.8


class Trust(NamedTuple):
    """How far a start without validation can be relied on."""

    agreement: float  # mean cosine of the texts predicted for images to another restart's
    matched: float  # mean cosine of mutual nearest neighbours on held-out rows

    @property
    def word(self) -> str:
        """Whether the start is "good", "doubtful", or no better than "chance"."""
        if self.agreement < DOUBTFUL:
            return "chance"
        return "good" if self.agreement >= GOOD else "doubtful"


def assignment_start(
    images: Tensor,
    texts: Tensor,
    pairs: tuple[Tensor, Tensor],
    seed: int,
    *,
    width: int = WIDTH,
    restarts: int = RESTARTS,
    stages: Sequence[Stage] = STAGES,
) -> tuple[ClosedForm, Trust]:
    """Find maps of both sides to one space from unpaired rows and few pairs, or none.

    The centres of clusters of both sides are matched so that their cosines agree (a quadratic
    assignment) and, as a linear term, so do pairs and the previous, coarser matching. The mean
    cross-covariance of matched centres gives a CCA, which is refined by rounds of mutual nearest
    neighbours. The restart whose matched rows are nearest is returned.

    Args:
        images: (n, d) float32 unit rows without partner, n >= 300.
        texts: (m, e), m >= 300, in any order.
        pairs: (k, d) and (k, e) unit rows of the pairs, k >= 0.
        seed: of all that is drawn.
        width: of the shared space, at most min(d, e).
        restarts: repetitions from other random numbers, at least 2.
        stages: sizes of the assignments, the coarsest first.

    Returns:
        The maps, and how far the restarts agree.
    """
    means = images.mean(0), texts.mean(0)
    count = len(pairs[0])
    known = [(pairs[0] - means[0]).T @ (pairs[1] - means[1]) / count] if count else []
    generator = torch.Generator().manual_seed(seed)
    learned, held_out = [], []
    for rows, mean in zip((images, texts), means, strict=True):
        order = torch.randperm(len(rows), generator=generator)
        cut = min(len(rows) // 5, MOST_HELD_OUT)
        held_out.append(rows[order[:cut]] - mean)
        learned.append(rows[order[cut:]] - mean)
    x, y = learned
    spread = PairMoments(
        means[0].double(),
        means[1].double(),
        (x.T @ x / len(x)).double(),
        (y.T @ y / len(y)).double(),
        torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64),
    )
    found = [
        _rounds(
            x, y, known, _coarse_to_fine(x, y, known, stages, generator), spread, width, generator
        )
        for _ in range(restarts)
    ]
    matched = [_matched(form, *held_out) for form in found]
    best = max(range(restarts), key=matched.__getitem__)
    predicted = [held_out[0] @ form.image_weight.T @ form.text_weight for form in found]
    cosines = [
        float(torch.cosine_similarity(rows, predicted[best], dim=1).mean())
        for number, rows in enumerate(predicted)
        if number != best
    ]
    form = replace(found[best], name=f"matched clusters, {found[best].name}")
    return form, Trust(max(cosines), matched[best])


def _coarse_to_fine(
    x: Tensor,
    y: Tensor,
    known: list[Tensor],
    stages: Sequence[Stage],
    generator: torch.Generator,
) -> Tensor:
    """Return the cross-covariance (d, e) of the last stage, of centred rows."""
    x, y = normalize(x, dim=1), normalize(y, dim=1)
    last: list[Tensor] = []
    for stage in stages:
        last = [_cross_of_clusters(x, y, known + last, stage, generator)]
    return last[0]


def _rounds(
    x: Tensor,
    y: Tensor,
    known: list[Tensor],
    cross: Tensor,
    spread: PairMoments,
    width: int,
    generator: torch.Generator,
) -> ClosedForm:
    """Fit CCA on a cross-covariance, then on those of rows matched by the last map."""
    for _ in range(ROUNDS):
        form = _fit(spread, cross, width)
        a, b = _sample(x, BLOCK, generator), _sample(y, BLOCK, generator)
        rows, columns = mutual_neighbours(a @ form.image_weight.T, b @ form.text_weight.T)
        cross = a[rows].T @ b[columns] / len(rows)
        if known:
            cross = SHARE * cross + (1 - SHARE) * known[0]
    return _fit(spread, cross, width)


def _fit(spread: PairMoments, cross: Tensor, width: int) -> ClosedForm:
    (form,) = spread.with_cross(cross.double()).cca(ridge=RIDGE, powers=(POWER,), width=width)
    return form


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
