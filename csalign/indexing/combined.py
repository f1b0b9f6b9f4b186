"""Queries of several sides: one search per side, then one score over what any of them found."""

import numpy as np

from csalign.core.arrays import Floats, Ints
from csalign.features.checks import scaled
from csalign.indexing.vectors import VectorIndex
from csalign.metrics.sides import TEMPERATURE

MOST_VALUES = 1 << 28  # of the vectors of candidates at a time, 1 GiB
CANDIDATES, PER_HIT = 200, 10  # of each search: at least so many, and so many per hit


def search_combined(index: VectorIndex, queries: Floats, top: int) -> tuple[Floats, Ints]:
    """Find the best rows of queries of m sides each, best first, by their `combined_scores`.

    Candidates are the nearest rows of each side's vector and of their mean, with the vectors that
    the index keeps, which are not exact if it compresses them.

    Args:
        index: of unit rows.
        queries: (m, q, d) float32, unit rows.
        top: how many rows are asked for.

    Returns:
        Scores and rows, (q, k) each, with k the smaller of `top` and the number of rows; the row
        is -1 where fewer were found.

    Raises:
        ConfigError: the index cannot return its vectors.
    """
    k, most = min(top, len(index)), max(CANDIDATES, PER_HIT * top)
    sides, count, width = queries.shape
    scores = np.full((count, k), -np.inf, np.float32)
    rows = np.full(scores.shape, -1, np.int64)
    step = max(1, MOST_VALUES // ((sides + 1) * min(most, len(index)) * width))
    for start in range(0, count, step):
        part = queries[:, start : start + step]
        found = [index.search_with_vectors(own, most) for own in (*part, scaled(part.mean(0)))]
        for number, own in enumerate(np.moveaxis(part, 1, 0)):
            numbers = np.concatenate([numbers[number] for numbers, _ in found])
            vectors = np.concatenate([vectors[number] for _, vectors in found])
            unique, first = np.unique(numbers, return_index=True)
            unique, first = unique[unique >= 0], first[unique >= 0]
            values = combined_scores(own, vectors[first])
            order = np.lexsort((unique, -values))[:k]
            row = start + number
            scores[row, : len(order)], rows[row, : len(order)] = values[order], unique[order]
    return scores, rows


def combined_scores(query: Floats, items: Floats) -> Floats:
    """Score items by a query of m sides, each weighted by how near it is to the item.

    sum_m w_m <z, q_m> / |sum_m w_m q_m| with w_m = exp(<z, q_m> / 0.1) (arXiv 2609.15335), which
    is the cosine of the item and the weighted sum of the sides.

    Args:
        query: (m, d) unit rows.
        items: (n, d) unit rows.

    Returns:
        (n,) float32 in [-1, 1].

    >>> combined_scores(np.eye(2), np.array([[1.0, 0.0], [0.6, 0.8]])).round(3).tolist()
    [1.0, 0.86]
    """
    cosines = query @ items.T
    weights = np.exp((cosines - cosines.max(0)) / TEMPERATURE)
    squares = np.einsum("mn,mk,kn->n", weights, query @ query.T, weights)
    found: Floats = (weights * cosines).sum(0) / np.sqrt(np.maximum(squares, 1e-12))
    return found.astype(np.float32)
