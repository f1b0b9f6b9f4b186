"""Cross-modal retrieval: exact ranks from FAISS scores; the only importer of faiss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

RECALL_AT = (1, 5, 10)
# Neighbours that FAISS lists for each query; deeper matches are ranked by counting.
LISTED = 100
# One tile of scores; larger ones leave the processor's caches without being any faster.
TILE_BYTES = 64 << 20
QUERIES_AT_A_TIME = 16_384  # bounds what the lists take
NO_ITEM = -1
FAR = np.iinfo(np.int64).max


@dataclass(frozen=True)
class DirectionRanks:
    """Where each query's matches were found, in one direction.

    Attributes:
        first: (q,) int64, 1-based rank of the best-placed match of each query.
        average_precision: (q,) float64 in [0, 1].
        recalled: (q, 3) float64, share of a query's matches among the first 1, 5 and 10.
        r_precision: (q,) float64, share of right items among the first R, R being how many
            matches the query has.
    """

    first: Ints
    average_precision: npt.NDArray[np.float64]
    recalled: npt.NDArray[np.float64]
    r_precision: npt.NDArray[np.float64]

    def by_query(self) -> dict[str, npt.NDArray[Any]]:
        """What each query adds to the figures that are means over queries, (q,) each.

        R@K is 1 where at least one match is among the first K, as the CLIP papers count it;
        true_recall@K the share of the matches that are (mteb's recall).
        """
        shares = self.recalled.T
        return {
            **{f"R@{k}": self.first <= k for k in RECALL_AT},
            **{f"true_recall@{k}": share for k, share in zip(RECALL_AT, shares, strict=True)},
            "r_precision": self.r_precision,
            "mean_rank": self.first,
            "mrr": 1 / self.first,
            "map": self.average_precision,
        }

    def summary(self) -> dict[str, float]:
        """The figures of `by_query` over all queries, and the median of the first ranks."""
        means = {name: float(values.mean()) for name, values in self.by_query().items()}
        return means | {"median_rank": float(np.median(self.first))}

    def take(self, queries: npt.NDArray[Any]) -> "DirectionRanks":
        """Those of some queries, by number or where true."""
        return DirectionRanks(*(values[queries] for values in self._fields()))

    @staticmethod
    def joined(parts: Sequence["DirectionRanks"]) -> "DirectionRanks":
        """Those of several sets of queries, in order."""
        fields = zip(*(part._fields() for part in parts), strict=True)
        return DirectionRanks(*(np.concatenate(values) for values in fields))

    def _fields(self) -> tuple[npt.NDArray[Any], ...]:
        return self.first, self.average_precision, self.recalled, self.r_precision


def rank_both_ways(
    images: Floats, texts: Floats, text_image: Ints
) -> tuple[DirectionRanks, DirectionRanks]:
    """Rank every text for every image that has texts, and every image for every paired text.

    Args:
        images: (n, d) float32, unit rows: the gallery of the texts.
        texts: (m, d) float32, unit rows: the gallery of the images.
        text_image: (m,) row of the image that each text belongs to, -1 for none.

    Returns:
        Image-to-text over the images with texts, and text-to-image over the paired texts, in row
        order.
    """
    paired = np.flatnonzero(text_image >= 0)
    owners = text_image[paired]
    order = paired[np.argsort(owners, kind="stable")]
    queried, counts = np.unique(owners, return_counts=True)
    image_to_text = _rank(images[queried], texts, _padded(order, counts))
    text_to_image = _rank(texts[paired], images, owners.reshape(-1, 1))
    return image_to_text, text_to_image


def _padded(items: Ints, counts: Ints) -> Ints:
    """Consecutive runs of `items`, one a row, filled up with `NO_ITEM`: (q, longest run)."""
    rows = np.full((len(counts), counts.max()), NO_ITEM)
    column = np.arange(rows.shape[1])
    rows[column < counts[:, None]] = items
    return rows


def _rank(queries: Floats, gallery: Floats, matches: Ints) -> DirectionRanks:
    """Exact ranks of each query's matches in the gallery by inner product.

    A match's rank is 1 + the wrong items that score at least as high (ties against the model) +
    the other matches that are placed before it. FAISS lists the nearest items of each query; where
    that list does not settle all ranks, the wrong items are counted.

    Args:
        queries: (q, d) unit rows.
        gallery: (g, d) unit rows.
        matches: (q, p) gallery rows that are right, filled up with `NO_ITEM`; at least one each.
    """
    queries, gallery = np.ascontiguousarray(queries), np.ascontiguousarray(gallery)
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    step = max(1, TILE_BYTES // (4 * len(gallery)))
    wrong = np.empty(matches.shape, np.int64)
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        some = slice(start, start + QUERIES_AT_A_TIME)
        wrong[some], settled = _wrong_in_list(index, queries[some], matches[some])
        deep = start + np.flatnonzero(~settled)
        for first in range(0, len(deep), step):
            rows = deep[first : first + step]
            wrong[rows] = _wrong_by_counting(queries[rows] @ gallery.T, matches[rows])
    return _summed_up(wrong)


def _summed_up(wrong: Ints) -> DirectionRanks:
    """What follows from the wrong items at or before each match, (q, p), `FAR` for no match."""
    wrong = np.sort(wrong, axis=1)  # the best match first; what fills up counts as infinitely far
    known = wrong < FAR
    counts = known.sum(axis=1)
    position = np.arange(1, wrong.shape[1] + 1)
    ranks = np.where(known, wrong, 0) + position
    within = [(known & (ranks <= k)).sum(axis=1) / counts for k in RECALL_AT]
    return DirectionRanks(
        first=wrong[:, 0] + 1,
        average_precision=np.where(known, position / ranks, 0).sum(axis=1) / counts,
        recalled=np.stack(within, axis=1),
        r_precision=(known & (ranks <= counts[:, None])).sum(axis=1) / counts,
    )


def _wrong_in_list(
    index: faiss.IndexFlatIP, queries: Floats, matches: Ints
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """From FAISS's nearest items: wrong items at or before each match, (q, p), and where settled.

    A query is settled when each of its matches is listed and beats the end of the list, so that
    no item beyond the list can tie with it; or when the list is the whole gallery.
    """
    listed = min(index.ntotal, LISTED + matches.shape[1])
    scores, items = index.search(queries, listed)
    wrong = np.full(matches.shape, FAR)
    settled = np.ones(len(queries), np.bool_)
    is_match = np.zeros(items.shape, np.bool_)
    for column in matches.T:
        is_match |= items == column[:, None]
    for place, column in enumerate(matches.T):
        here = items == column[:, None]
        there, needed = here.any(axis=1), column != NO_ITEM
        score = np.where(here, scores, -np.inf).max(axis=1, keepdims=True)
        count = ((scores >= score) & ~is_match).sum(axis=1)
        wrong[needed, place] = count[needed]
        beats_end = (score[:, 0] > scores[:, -1]) | (listed == index.ntotal)
        settled &= ~needed | (there & beats_end)
    return wrong, settled


def _wrong_by_counting(scores: Floats, matches: Ints) -> Ints:
    """Wrong items that score at least as high as each match, (q, p), from all scores (q, g).

    The matches' scores are taken from the same product as those that they are compared with:
    computed elsewhere they may round differently, and a match outrank itself.
    """
    own = np.take_along_axis(scores, np.maximum(matches, 0), axis=1)
    for column in matches.T:
        rows = np.flatnonzero(column != NO_ITEM)
        scores[rows, column[rows]] = -np.inf  # what is left are the wrong items
    wrong = np.full(matches.shape, FAR)
    for place, column in enumerate(matches.T):
        count = np.count_nonzero(scores >= own[:, place : place + 1], axis=1)
        needed = column != NO_ITEM
        wrong[needed, place] = count[needed]
    return wrong


def mean_recall(*directions: dict[str, Any]) -> float:
    """Mean of R@1, R@5 and R@10 over the given directions' summaries."""
    return float(np.mean([summary[f"R@{k}"] for summary in directions for k in RECALL_AT]))
