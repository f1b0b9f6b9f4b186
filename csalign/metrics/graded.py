"""Retrieval where many items are right: all those of the query's group."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Figures = npt.NDArray[np.float64]

TILE_BYTES = 64 << 20
DEPTH = 10


@dataclass(frozen=True)
class GradedRanks:
    """How well each query's group is found, in one direction.

    Attributes:
        average_precision: (q,) in [0, 1], over the whole gallery.
        ndcg: (q,) in [0, 1], of the first `DEPTH` items.
    """

    average_precision: Figures
    ndcg: Figures

    def summary(self) -> dict[str, float]:
        """Means over the queries."""
        return {
            "map": float(self.average_precision.mean()),
            f"ndcg@{DEPTH}": float(self.ndcg.mean()),
        }


def graded_both_ways(
    images: Floats, texts: Floats, text_image: Ints, groups: Ints
) -> tuple[GradedRanks, GradedRanks]:
    """Find all captions of a group's images for each of its images, and the other way round.

    Queries are those of `rank_both_ways`: images with texts, and texts with an image.

    Args:
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) image row of each text, -1 for none.
        groups: (n,) group of each image, from 0 on; an image without one is a group by itself.

    Returns:
        Image-to-text and text-to-image.
    """
    paired = np.flatnonzero(text_image >= 0)
    of_text = np.where(text_image >= 0, groups[text_image], -1)
    queried = np.unique(text_image[paired])
    return (
        _grade(images[queried], groups[queried], texts, of_text),
        _grade(texts[paired], of_text[paired], images, groups),
    )


def _grade(queries: Floats, wanted: Ints, gallery: Floats, groups: Ints) -> GradedRanks:
    """Grade each query's list of the whole gallery; ties are broken against the model.

    With its group's R items at ranks r_1 < ... < r_R, average precision is the mean of i / r_i,
    and nDCG@K the sum of 1 / log2(r_i + 1) over r_i <= K, over the same sum for ranks 1 to
    min(R, K) (Jarvelin and Kekalainen 2002, with gain 1).

    Args:
        queries: (q, d).
        wanted: (q,) group of each query, which has at least one item in the gallery.
        gallery: (g, d).
        groups: (g,) group of each item, -1 for none.
    """
    precision, ndcg = np.empty(len(queries)), np.empty(len(queries))
    items_of = _members(groups)
    discount = 1 / np.log2(np.arange(DEPTH) + 2)
    step = max(1, TILE_BYTES // (4 * len(gallery)))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ gallery.T
        for row, all_scores in enumerate(scores, start):
            own = np.sort(all_scores[items_of[int(wanted[row])]])[::-1]
            all_scores.sort()
            # Items at least as high, less the right ones among them, are wrong and rank ahead.
            ahead = len(gallery) - np.searchsorted(all_scores, own, side="left")
            ahead -= len(own) - np.searchsorted(own[::-1], own, side="left")
            place = np.arange(1, len(own) + 1)
            ranks = ahead + place
            precision[row] = (place / ranks).mean()
            gains = discount[ranks[ranks <= DEPTH] - 1].sum()
            ndcg[row] = gains / discount[: len(own)].sum()
    return GradedRanks(precision, ndcg)


def _members(groups: Ints) -> dict[int, Ints]:
    """Rows of each group."""
    order = np.argsort(groups, kind="stable")
    names, starts = np.unique(groups[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(name): rows for name, rows in zip(names, parts, strict=True)}
