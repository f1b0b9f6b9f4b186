"""Retrieval among any number of sides: exact ranks of rows, and of items that several describe.

Each row of a side belongs to an item, numbered from 0; an item has any number of rows on a side, or
none. A query counts if its item is in the gallery, and its hit is any row of that item.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csalign.core.arrays import Array, Doubles, Floats, Ints, Mask
from csalign.core.progress import tick
from csalign.features.checks import scaled
from csalign.metrics.bootstrap import (
    CELLS,
    CENTROID,
    GapSums,
    Place,
    Resamples,
    RetrievalSums,
    Units,
    centred_distances,
)
from csalign.metrics.retrieval import RECALL_AT, STEP
from csalign.objective.products import product

TEMPERATURE = 0.1  # of the weights of query-weighted scores, as in the paper
SCORES = ("query_weighted", "mean", "sum", "best_single")
FROM_TARGET, MEAN_RECALL = "from_target", "mean_recall"
STRIP_BYTES = 64 << 20  # of the tables of scores that are held at a time
LEAST_NORM = 1e-6  # of a weighted sum of unit rows

Scores = Callable[[Ints], Iterator[tuple[Place, Tensor]]]
Pair = tuple[str, str]


class Points(NamedTuple):
    """Embedded rows of a side."""

    rows: Floats  # (n, d) float32, unit rows
    items: Ints  # (n,) int64, item of each row


class FirstRanks(NamedTuple):
    """Rank of the best match of each query that has one."""

    first: Ints  # (q,) int64, from 1 on; wrong rows that tie come first
    owners: Ints  # (q,) int64, item of each query
    gallery: int  # rows, or items, that are ranked

    def by_query(self) -> dict[str, Array]:
        """Return the contribution of each query to figures that are means over queries, (q,)."""
        return {**{f"R@{k}": self.first <= k for k in RECALL_AT}, "mrr": 1 / self.first}

    def summary(self) -> dict[str, float | int | None]:
        """Return the figures, None without queries, and the numbers of queries and ranked rows."""
        found: dict[str, float | int | None] = {
            name: float(values.mean()) if len(values) else None
            for name, values in self.by_query().items()
        }
        is_asked = len(self.first) > 0
        return found | {
            "median_rank": float(np.median(self.first)) if is_asked else None,
            MEAN_RECALL: mean_of_recalls([self]) if is_asked else None,
            "queries": len(self.first),
            "gallery": self.gallery,
        }


def mean_of_recalls(ranks: Sequence[FirstRanks]) -> float:
    """Average R@1, R@5 and R@10 over ranks; those without queries do not count, 0 without any."""
    found = [np.mean([own.first <= k for k in RECALL_AT]) for own in ranks if len(own.first)]
    return float(np.mean(found)) if found else 0.0


def rank_rows(
    queries: Points,
    gallery: Points,
    device: torch.device | None = None,
    *,
    strip_bytes: int = STRIP_BYTES,
) -> FirstRanks:
    """Rank the rows of one side for each row of another whose item has any there.

    As `retrieval.rank_both_ways` does: 1 + the wrong rows that score at least as high as the best
    match. Scores are inner products, of which a strip of `strip_bytes` is held at a time.
    """
    device, g = device or torch.device("cpu"), len(gallery.items)
    step = _step(len(queries.items), g, strip_bytes)
    x, y = torch.from_numpy(queries.rows).to(device), _padded(gallery.rows, device)

    def scores(part: Ints) -> Iterator[tuple[Place, Tensor]]:
        yield (), _cosines(x, part, y, step)[:, :g]

    asked, ranks = _rank(scores, queries.items, gallery.items, step)
    return FirstRanks(ranks.get((), asked), queries.items[asked], g)


def _step(queries: int, gallery: int, strip_bytes: int) -> int:
    """Find how many queries to score at a time; products of one shape round alike, so ties hold."""
    most = strip_bytes // (4 * max(1, gallery)) // STEP
    return max(1, min(most, -(-queries // STEP))) * STEP


def _padded(rows: Array, device: torch.device) -> Tensor:
    """Append rows of zeros, to a multiple of `STEP`."""
    more = np.zeros((-len(rows) % STEP, rows.shape[1]), np.float32)
    return torch.from_numpy(np.concatenate([rows, more])).to(device)


def _cosines(x: Tensor, part: Ints, y: Tensor, step: int) -> Tensor:
    """Multiply some rows of x with all of y, as one of `step` rows at least."""
    some = x.new_zeros(step, x.shape[1])
    some[: len(part)] = x[torch.from_numpy(part).to(x.device)]
    return product(some, y)[: len(part)]


def _rank(
    scores: Scores, query_items: Ints, gallery_items: Ints, step: int
) -> tuple[Ints, dict[Place, Ints]]:
    """Rank the best match of the queries that have one: their numbers (q,), and ranks by place.

    `scores` computes tables (k, gallery) for k queries, which are overwritten.
    """
    order = np.argsort(gallery_items, kind="stable")
    starts, stops = (
        np.searchsorted(gallery_items[order], query_items, side) for side in ("left", "right")
    )
    matches = stops - starts
    asked = np.flatnonzero(matches)
    found: dict[Place, list[Array]] = {}
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        counts = matches[part]
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        at = np.repeat(np.arange(len(part)), counts), order[np.repeat(starts[part], counts) + nth]
        for place, table in scores(part):
            rows, columns = (torch.from_numpy(own).to(table.device) for own in at)
            best = table.new_full((len(part),), -torch.inf)
            best = best.scatter_reduce(0, rows, table[rows, columns], "amax")
            table[rows, columns] = torch.nan  # which is not ahead of anything
            ahead = table.ge_(best[:, None]).sum(1)
            found.setdefault(place, []).append(ahead.cpu().numpy().astype(np.int64) + 1)
        tick("ranking: queries", start + len(part), len(asked))
    return asked, {place: np.concatenate(parts) for place, parts in found.items()}


def describe_items(points: Points, count: int) -> tuple[Floats, Mask]:
    """Average the rows of each item, normalised, (count, d); return which items have any too."""
    sums = torch.zeros(count, points.rows.shape[1])
    sums.index_add_(0, torch.from_numpy(points.items), torch.from_numpy(points.rows))
    return scaled(sums.numpy()), np.bincount(points.items, minlength=count) > 0


def rank_by_subsets(
    sides: Mapping[str, Points],
    count: int,
    target: str,
    subsets: Sequence[tuple[str, ...]],
    device: torch.device | None = None,
    *,
    strip_bytes: int = STRIP_BYTES,
) -> dict[Place, FirstRanks]:
    """Rank rows of one side against items that are described by some of the other sides.

    An item is described by the sides of a subset that it has, each by the normalised mean of its
    rows, z_m; items without any take no part. For a row t of the target the scores are

    - query_weighted: sum_m w_m <t, z_m> / |sum_m w_m z_m|, w_m = exp(<t, z_m> / 0.1)
      (SCALAR, arXiv 2609.15335);
    - mean: the cosine with the mean of the z_m;
    - sum: the mean of the <t, z_m>, which ranks as their sum where no side is missing;
    - best_single: <t, z_m> of the first side of the subset that the item has.

    Args:
        sides: the target and the sides of all subsets, by name.
        count: number of items.
        target: name of the side.
        subsets: names of two other sides or more, each, the best first.
        device: where to multiply (default: the CPU).
        strip_bytes: size of the tables of scores that are held at a time, about.

    Returns:
        By subset, its sorted names joined by "+", and score: of the target's rows for items; and
        with "from_target" at the end of the place, of items for the target's rows.
    """
    device = device or torch.device("cpu")
    names = sorted({name for subset in subsets for name in subset})
    vectors, has = zip(*(describe_items(sides[name], count) for name in names), strict=True)
    kept, own = np.flatnonzero(np.any(has, axis=0)), sides[target]
    described = _Described.of([rows[kept] for rows in vectors], np.stack(has)[:, kept], device)
    members = {"+".join(sorted(one)): [names.index(name) for name in one] for one in subsets}
    given = own.rows, own.items, kept, members, strip_bytes
    forth, back = (described.rank(*given, of_items=of_items) for of_items in (True, False))
    ranks: dict[Place, FirstRanks] = {}
    for name, subset in members.items():
        is_in = np.any([has[k] for k in subset], axis=0)
        for score in SCORES:
            for (items, found), way, size in (
                (forth, (), len(own.items)),
                (back, (FROM_TARGET,), int(is_in.sum())),
            ):
                asked = is_in[items]
                first = np.minimum(found.get((name, score), items), size)
                ranks[name, score, *way] = FirstRanks(first[asked], items[asked], size)
    return ranks


@dataclass(frozen=True)
class _Described:
    """Items, each described by one row per side, 0 where it has none."""

    vectors: Sequence[Floats]  # of each side (k, d)
    present: Tensor  # (m, k), 1 where an item has a side, else 0
    gram: Tensor  # (m, m, k), inner products of an item's sides, twice those of different ones

    @classmethod
    def of(cls, vectors: Sequence[Floats], has: Mask, device: torch.device) -> "_Described":
        z = torch.from_numpy(np.stack(vectors)).to(device)
        gram = 2 * torch.stack([(z * other).sum(2) for other in z])
        gram.diagonal().mul_(0.5)
        return cls(vectors, torch.from_numpy(has).float().to(device), gram)

    def rank(
        self,
        targets: Floats,
        target_items: Ints,
        items: Ints,
        members: Mapping[str, Sequence[int]],
        strip_bytes: int,
        *,
        of_items: bool,
    ) -> tuple[Ints, dict[Place, Ints]]:
        """Rank the targets for the items (k,), or the other way, by all scores.

        Returns:
            Item of each query, and ranks by subset and score.
        """
        m, device, rows = len(self.vectors), self.gram.device, [targets] * len(self.vectors)
        queries, gallery = (items, target_items) if of_items else (target_items, items)
        left, right = (self.vectors, rows) if of_items else (rows, self.vectors)
        x = [torch.from_numpy(own).to(device) for own in left]
        y = [_padded(own, device) for own in right]
        step, g = _step(len(queries), len(gallery), strip_bytes // (5 * m + m * m)), len(gallery)

        def scores(part: Ints) -> Iterator[tuple[Place, Tensor]]:
            cosines = torch.stack([_cosines(x[k], part, y[k], step)[:, :g] for k in range(m)])
            some = (torch.from_numpy(part).to(device), None) if of_items else (None, slice(None))
            return _scores(cosines, self.present[:, *some], self.gram[:, :, *some], members)

        asked, found = _rank(scores, queries, gallery, step)
        return queries[asked], found


def _scores(
    cosines: Tensor, present: Tensor, gram: Tensor, members: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Place, Tensor]]:
    """Compute all scores, from cosines (m, k, g) that are 0 for sides that are missing.

    present and gram are those of `_Described`, of shapes that broadcast.
    """

    def over(norm: Tensor) -> Tensor:
        return norm.clamp(min=0).sqrt_().clamp_(min=LEAST_NORM)

    weights = torch.exp(cosines / TEMPERATURE).mul_(present)
    m = len(cosines)
    pairs = [(i, j) for i in range(m) for j in range(i, m)]
    squares = {(i, j): (weights[i] * weights[j]).mul_(gram[i, j]) for i, j in pairs}
    weights *= cosines
    for name, subset in members.items():
        own = [pair for pair in pairs if {*pair} <= {*subset}]
        there, cosine = present[subset].sum(0), _sum(cosines[k] for k in sorted(subset))
        tables = (
            _sum(weights[k] for k in sorted(subset)) / over(_sum(squares[pair] for pair in own)),
            cosine / over(_sum(gram[pair] for pair in own)),
            cosine / there.clamp(min=1),
            reduce(
                lambda table, k: torch.where(present[k] > 0, cosines[k], table),
                reversed(subset),
                cosines[subset[-1]],
            ),
        )
        for score, table in zip(SCORES, tables, strict=True):
            yield (name, score), torch.where(there > 0, table, -torch.inf)


def _sum(tables: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tables)


def resample_sides(
    sides: Mapping[str, Points],
    count: int,
    ranks: Mapping[Place, FirstRanks],
    pairs: Mapping[Pair, tuple[Ints, Ints]],
    *,
    resamples: int,
    seed: int,
) -> Resamples:
    """Draw items with replacement, with their rows, and compute the figures of each draw.

    As `bootstrap.resample`: galleries stay as they are, and one seed draws the same items for any
    embeddings of the same rows. Items of two sides or more, and the others, are drawn apart.

    Args:
        sides: rows of each side.
        count: number of items.
        ranks: by place in the document: ("matrix", a, b), ("subsets", target, subset, score) and
            the same with "from_target".
        pairs: all pairs of rows of two sides that share an item; each pair of sides once.
        resamples: how many.
        seed: of the draws.

    Returns:
        Figures by place in the document: those of all ranks, such as ("matrix", a, b, "R@1"),
        ("mean_recall",), ("gap", a, b, "centroid_distance"), likewise "rmg" and "alignment",
        ("subsets", target, subset, "gain").
    """
    has = [np.bincount(own.items, minlength=count) > 0 for own in sides.values()]
    units = Units.of(count, np.flatnonzero(np.sum(has, axis=0) > 1))
    gaps = {
        (a, b): GapSums.of(
            sides[a].rows, sides[b].rows, (sides[a].items, sides[b].items), pairs[a, b], units
        )
        for a, b in pairs
    }
    sums = {
        place: RetrievalSums.of(own, own.owners, units)
        for place, own in ranks.items()
        if len(own.first)
    }
    parts: list[dict[Place, Doubles]] = []
    done, longest = 0, max([count, *(len(own.first) for own in ranks.values())])
    for drawn in units.draws(resamples, seed, max(1, CELLS // longest)):
        parts.append(_figures(drawn, sums, gaps))
        done += len(drawn)
        tick("bootstrap: resamples", done, resamples)
    figures = {place: np.concatenate([part[place] for part in parts]) for place in parts[0]}
    for values in figures.values():
        is_drawn = np.isfinite(values)
        if not is_drawn.all() and is_drawn.any():
            values[~is_drawn] = values[is_drawn].mean()
    for place, measured in _figures(np.ones((1, count), np.int64), {}, gaps).items():
        if place[-1:] == CENTROID:
            figures[place] = centred_distances(figures[place], measured)
    known = {place: values for place, values in figures.items() if np.isfinite(values).all()}
    return Resamples(known, len(units.queried))


@np.errstate(divide="ignore", invalid="ignore")  # no row of a side may be drawn
def _figures(
    drawn: Ints, sums: Mapping[Place, RetrievalSums], gaps: Mapping[Pair, GapSums]
) -> dict[Place, Doubles]:
    """Compute all figures on some resamples, from how often each item was drawn."""
    weights, part = drawn.astype(np.float64), dict[Place, Doubles]()
    for (a, b), gap in gaps.items():
        for (name,), values in gap.figures(drawn).items():
            part |= {("gap", *pair, name): values for pair in ((a, b), (b, a))}
    for place, own in sums.items():
        found = own.figures(weights) if place[0] == "matrix" else own.means(weights)
        found[MEAN_RECALL] = np.mean([found[f"R@{k}"] for k in RECALL_AT], axis=0)
        part |= {(*place, name): values for name, values in found.items()}
    for place in sums:
        if place[-1] == FROM_TARGET:
            score = (*place[:-1], MEAN_RECALL)
            part[score] = (part[score] + part[*place, MEAN_RECALL]) / 2
    for place in {place[:3] for place in sums if place[-1] == FROM_TARGET}:
        own_recall, best = (part[*place, name, MEAN_RECALL] for name in (SCORES[0], SCORES[-1]))
        part[*place, "gain"] = own_recall - best
    if recalls := [part[*place, MEAN_RECALL] for place in sums if place[0] == "matrix"]:
        part[MEAN_RECALL,] = np.nanmean(recalls, axis=0)
    return part
