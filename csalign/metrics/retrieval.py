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
# One tile of scores; larger ones leave the processor's caches without being any faster.
TILE_BYTES = 64 << 20


@dataclass(frozen=True)
class DirectionRanks:
    """Where each query's matches were found, in one direction.

    Attributes:
        first: (q,) int64, 1-based rank of the best-placed match of each query.
        average_precision: (q,) float64 in [0, 1].
    """

    first: Ints
    average_precision: npt.NDArray[np.float64]

    def summary(self) -> dict[str, float]:
        """R@1/5/10, median rank, mean reciprocal rank and mean average precision.

        R@K is the share of queries with at least one match among the first K, as the CLIP papers
        count it.
        """
        recalls = {f"R@{k}": float((self.first <= k).mean()) for k in RECALL_AT}
        return recalls | {
            "median_rank": float(np.median(self.first)),
            "mrr": float((1 / self.first).mean()),
            "map": float(self.average_precision.mean()),
        }


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
    order = np.argsort(owners, kind="stable")
    queried, counts = np.unique(owners, return_counts=True)
    captions = np.split(paired[order], np.cumsum(counts)[:-1])
    image_to_text = _rank(images[queried], texts, captions)
    text_to_image = _rank(texts[paired], images, owners.reshape(-1, 1))
    return image_to_text, text_to_image


def _rank(queries: Floats, gallery: Floats, matches: Sequence[Ints] | Ints) -> DirectionRanks:
    """Exact ranks of each query's matches in the gallery by inner product.

    A match's rank is 1 + the wrong items that score at least as high (ties against the model) +
    the other matches that score higher. All scores compared come from the same tile, since the
    same product computed elsewhere may round differently and outrank itself.
    """
    queries, gallery = np.ascontiguousarray(queries), np.ascontiguousarray(gallery)
    first = np.empty(len(queries), np.int64)
    precision = np.empty(len(queries))
    step = max(1, TILE_BYTES // (4 * len(gallery)))
    for start in range(0, len(queries), step):
        tile = faiss.pairwise_distances(
            queries[start : start + step], gallery, faiss.METRIC_INNER_PRODUCT
        )
        for row, scores in enumerate(tile, start):
            first[row], precision[row] = _rank_one(scores, matches[row])
    return DirectionRanks(first, precision)


def _rank_one(scores: Floats, own: Ints) -> tuple[int, float]:
    """Rank of the best match and average precision, from one query's scores of the gallery."""
    positives = np.sort(scores[own])[::-1]  # best first
    scores[own] = -np.inf  # the tile is ours; what is left are the wrong items
    wrong = np.array([np.count_nonzero(scores >= score) for score in positives])
    position = np.arange(1, len(own) + 1)
    return int(wrong[0]) + 1, float((position / (position + wrong)).mean())


def mean_recall(*directions: dict[str, Any]) -> float:
    """Mean of R@1, R@5 and R@10 over the given directions' summaries."""
    return float(np.mean([summary[f"R@{k}"] for summary in directions for k in RECALL_AT]))
