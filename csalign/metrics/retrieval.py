"""Cross-modal retrieval: the exact ranks of all matches, both ways, from one pass of tiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from csalign.metrics.tiles import Staircase, wrong_ahead

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

RECALL_AT = (1, 5, 10)


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
    images: Floats,
    texts: Floats,
    text_image: Ints,
    device: torch.device | None = None,
    *,
    divided: bool = False,
) -> tuple[DirectionRanks, DirectionRanks]:
    """Rank every text for every image that has texts, and every image for every paired text.

    A match's rank is 1 + the wrong items that score at least as high (ties against the model) +
    the other matches that are placed before it. Scores are inner products, and one product serves
    both directions; no more than a tile of it is held.

    Args:
        images: (n, d) float32, unit rows: the gallery of the texts.
        texts: (m, d) float32, unit rows: the gallery of the images.
        text_image: (m,) row of the image that each text belongs to, -1 for none.
        device: where to multiply and count (default: the CPU). Devices round differently, so that
            scores which differ in their last digits may change places.
        divided: whether each process of the job searches a part, all having the same arguments;
            each then gets all ranks.

    Returns:
        Image-to-text over the images with texts, and text-to-image over the paired texts, in row
        order.
    """
    stairs = Staircase.lay(len(images), text_image)
    wrong_texts, wrong_images = wrong_ahead(images, texts, stairs, device, divided=divided)
    counts = stairs.caption_counts
    in_row_order = np.argsort(stairs.image_order[: len(counts)])  # out of that of the tiles
    wrong_images = wrong_images[np.argsort(stairs.text_order[: len(wrong_images)])]
    return (
        _of_runs(wrong_texts, counts).take(in_row_order),
        _of_runs(wrong_images, np.ones(len(wrong_images), np.int64)),
    )


def _of_runs(wrong: Ints, counts: Ints) -> DirectionRanks:
    """What follows from the wrong items ahead of each match.

    Args:
        wrong: (pairs,) of consecutive runs of matches, a run a query.
        counts: (q,) their lengths, all positive.
    """
    starts = np.cumsum(counts) - counts
    query = np.repeat(np.arange(len(counts)), counts)
    wrong = wrong[np.lexsort((wrong, query))]  # the best match of each query first
    position = np.arange(len(wrong)) - starts[query] + 1
    ranks = position + wrong

    def mean(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        sums: npt.NDArray[np.float64] = np.add.reduceat(values, starts, dtype=np.float64)
        return sums / counts

    return DirectionRanks(
        first=ranks[starts],
        average_precision=mean(position / ranks),
        recalled=np.stack([mean(ranks <= k) for k in RECALL_AT], axis=1),
        r_precision=mean(ranks <= counts[query]),
    )


def mean_recall(*directions: dict[str, Any]) -> float:
    """Mean of R@1, R@5 and R@10 over the given directions' summaries."""
    return float(np.mean([summary[f"R@{k}"] for summary in directions for k in RECALL_AT]))
