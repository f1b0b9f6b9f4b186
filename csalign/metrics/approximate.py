"""Retrieval by an approximate index, as a search service does it; the only importer of faiss."""

import math
from typing import Any, Literal, cast

import faiss
import numpy as np
import numpy.typing as npt

from csalign.metrics.retrieval import RECALL_AT, DirectionRanks

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

IndexName = Literal["ivf", "hnsw"]

LISTED = 100  # neighbours of each query
JUDGED_BY = 10  # nearest items by which an index is judged
SAMPLED = 1_000  # queries that judge it
QUERIES_AT_A_TIME = 16_384
LINKS = 32  # of an item, in HNSW
ROWS_A_CELL = 39  # of IVF; faiss warns of poor cells where there are fewer
PROBED = 1 / 16  # of the cells


def rank_both_ways_by_index(
    images: Floats, texts: Floats, text_image: Ints, kind: IndexName
) -> tuple[tuple[DirectionRanks, DirectionRanks], tuple[float, float]]:
    """Rank as `retrieval.rank_both_ways` does, but only among the `LISTED` items of an index.

    A query without a match there is given the last rank, and a match that is not there counts as
    never found in the average precision.

    Args:
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) row of the image that each text belongs to, -1 for none.
        kind: ivf, cells around centroids, a sixteenth of which is searched; or hnsw, a graph.

    Returns:
        Ranks of image-to-text and of text-to-image; and for both the share of a query's ten
        nearest items that the index has among its first ten, on at most `SAMPLED` queries.
    """
    paired = np.flatnonzero(text_image >= 0)
    queried, counts = np.unique(text_image[paired], return_counts=True)
    of_texts, of_images = _build(texts, kind), _build(images, kind)
    ranks = (
        _rank(of_texts, images[queried], text_image, queried, counts),
        _rank(
            of_images,
            texts[paired],
            np.arange(len(images)),
            text_image[paired],
            np.ones_like(paired),
        ),
    )
    recalls = (
        _recall(of_texts, images[queried], texts),
        _recall(of_images, texts[paired], images),
    )
    return ranks, recalls


def _build(rows: Floats, kind: IndexName) -> faiss.Index:
    rows = np.ascontiguousarray(rows)
    n, width = rows.shape
    index: Any
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = 2 * LISTED
    else:
        cells = max(1, min(int(4 * math.sqrt(n)), n // ROWS_A_CELL))
        centroids = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFFlat(centroids, width, cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = math.ceil(cells * PROBED)
        index.train(rows)
    index.add(rows)
    return cast(faiss.Index, index)


def _rank(
    index: faiss.Index, queries: Floats, owners: Ints, wanted: Ints, counts: Ints
) -> DirectionRanks:
    """Ranks of the listed matches.

    Args:
        index: of g items.
        queries: (q, d) unit rows.
        owners: (g,) what each item belongs to.
        wanted: (q,) the owner whose items are a query's matches.
        counts: (q,) how many matches there are.
    """
    parts = []
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        some = slice(start, start + QUERIES_AT_A_TIME)
        scores, items = _search(index, queries[some], LISTED)
        matches = (items >= 0) & (owners[items] == wanted[some, None])
        parts.append(_ranks_in_list(scores, matches, counts[some], last=index.ntotal))
    return DirectionRanks.joined(parts)


def _ranks_in_list(
    scores: Floats, matches: npt.NDArray[np.bool_], counts: Ints, last: int
) -> DirectionRanks:
    """From the scores of the listed items, falling, and which of them are matches, (q, l) each."""
    wrong = np.cumsum(~matches, axis=1)
    for place in reversed(range(wrong.shape[1] - 1)):  # ties against the model
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


def _recall(index: faiss.Index, queries: Floats, gallery: Floats) -> float:
    """Share of the truly nearest items that the index lists among as many, on some queries."""
    step = -(-len(queries) // SAMPLED)
    sample = np.ascontiguousarray(queries[::step])
    listed = min(JUDGED_BY, index.ntotal)
    _, found = _search(index, sample, listed)
    _, nearest = faiss.knn(
        sample, np.ascontiguousarray(gallery), listed, metric=faiss.METRIC_INNER_PRODUCT
    )
    return float((found[:, :, None] == nearest[:, None, :]).any(axis=2).mean())


def _search(index: faiss.Index, queries: Floats, listed: int) -> tuple[Floats, Ints]:
    """Scores and items, (q, listed) or as many as there are; -1 where fewer were found."""
    scores, items = index.search(np.ascontiguousarray(queries), min(listed, index.ntotal))
    return scores, items
