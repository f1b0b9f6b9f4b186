"""Retrieval by an approximate index, as a search service does it; the only importer of faiss."""

import math
from typing import Any, Literal

import faiss
import numpy as np

from csalign.core.arrays import Floats, Ints, Mask
from csalign.metrics.retrieval import RECALL_AT, DirectionRanks

IndexName = Literal["ivf", "hnsw"]

LISTED = 100  # neighbours of each query
JUDGED_BY = 10  # nearest items by which the recall of an index is measured
SAMPLED = 1_000  # queries used to measure it
QUERIES_AT_A_TIME = 16_384
ROWS_PER_CELL = 39  # of IVF; faiss warns of poor cells below it
PROBED = 1 / 16  # of the cells


def rank_both_ways_by_index(
    images: Floats,
    texts: Floats,
    text_image: Ints,
    kind: IndexName,
    *,
    listed: int = LISTED,
    probed: float = PROBED,
) -> tuple[tuple[DirectionRanks, DirectionRanks], tuple[float, float]]:
    """Rank as `retrieval.rank_both_ways` does, but only among the items that an index lists.

    A query without a match there gets the last rank, and a match that is not listed counts as
    never found in the average precision. The rows are those of that function. `kind` is ivf, cells
    around centroids, of which a share `probed` is searched; or hnsw, a graph. `listed` items are
    listed per query.

    Returns:
        Ranks of image-to-text and of text-to-image; and for both the share of a query's ten
        nearest items that are among the first ten of the index, on at most `SAMPLED` queries.
    """
    paired = np.flatnonzero(text_image >= 0)
    queried, counts = np.unique(text_image[paired], return_counts=True)
    of_texts, of_images = (_build(rows, kind, listed, probed) for rows in (texts, images))
    own, every = text_image[paired], np.arange(len(images))
    ranks = (
        _rank(of_texts, images[queried], text_image, queried, counts, listed),
        _rank(of_images, texts[paired], every, own, np.ones_like(paired), listed),
    )
    recalls = (_recall(of_texts, images[queried], texts), _recall(of_images, texts[paired], images))
    return ranks, recalls


def _build(rows: Floats, kind: IndexName, listed: int, probed: float) -> Any:
    rows = np.ascontiguousarray(rows)
    cells = max(1, min(int(4 * math.sqrt(len(rows))), len(rows) // ROWS_PER_CELL))
    factory = "HNSW32,Flat" if kind == "hnsw" else f"IVF{cells},Flat"
    index: Any = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efSearch = 2 * listed
    else:
        index.nprobe = math.ceil(cells * probed)
    index.train(rows)
    index.add(rows)
    return index


def _rank(
    index: Any, queries: Floats, owners: Ints, wanted: Ints, counts: Ints, listed: int
) -> DirectionRanks:
    """Rank the listed matches: the items whose owner (g,) is the wanted one (q,) of a query."""
    parts = []
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        some = slice(start, start + QUERIES_AT_A_TIME)
        scores, items = _search(index, queries[some], listed)
        matches = (items >= 0) & (owners[items] == wanted[some, None])
        parts.append(_ranks_in_list(scores, matches, counts[some], last=index.ntotal))
    return DirectionRanks.joined(parts)


def _ranks_in_list(scores: Floats, matches: Mask, counts: Ints, last: int) -> DirectionRanks:
    """Compute ranks from the falling scores of the listed items and their matches, (q, l)."""
    wrong = np.cumsum(~matches, axis=1)
    for place in reversed(range(wrong.shape[1] - 1)):  # ties count against the model
        tied = scores[:, place] == scores[:, place + 1]
        wrong[tied, place] = wrong[tied, place + 1]
    position = np.cumsum(matches, axis=1)
    ranks = np.where(matches, position + wrong, last + 1)
    within = [(ranks <= min(k, last)).sum(axis=1) / counts for k in RECALL_AT]
    return DirectionRanks(
        first=np.minimum(ranks.min(axis=1), last),
        average_precision=np.where(matches, position / ranks, 0).sum(axis=1) / counts,
        recalled=np.stack(within, axis=1),
        r_precision=(ranks <= counts[:, None]).sum(axis=1) / counts,
    )


def _recall(index: Any, queries: Floats, gallery: Floats) -> float:
    """Share of the truly nearest items that the index lists among as many, on some queries."""
    sample = np.ascontiguousarray(queries[:: -(-len(queries) // SAMPLED)])
    _, found = _search(index, sample, JUDGED_BY)
    gallery = np.ascontiguousarray(gallery)
    _, nearest = faiss.knn(sample, gallery, found.shape[1], metric=faiss.METRIC_INNER_PRODUCT)
    return float((found[:, :, None] == nearest[:, None, :]).any(axis=2).mean())


def _search(index: Any, queries: Floats, listed: int) -> tuple[Floats, Ints]:
    """Return scores and items, (q, listed) or as many as there are; -1 where fewer were found."""
    scores, items = index.search(np.ascontiguousarray(queries), min(listed, index.ntotal))
    return scores, items
