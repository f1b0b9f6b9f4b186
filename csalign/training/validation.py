"""Validation: the figures by which the initialization and the best step are chosen."""

from typing import NamedTuple

import numpy as np

from csalign.adapters.model import Adapter
from csalign.core.enums import Modality
from csalign.features.join import PairedRows
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import mean_recall, rank_both_ways
from csalign.runs.load import embed_rows


class Score(NamedTuple):
    """Figures on the validation rows.

    Attributes:
        mean_recall: mean of R@1/5/10 in both directions, in [0, 1].
        mrr: mean reciprocal rank, averaged over the directions, in [0, 1].
        centroid_distance: norm of the difference of the two means, in [0, 2].
    """

    mean_recall: float
    mrr: float
    centroid_distance: float

    def better_than(self, other: "Score | None") -> bool:
        """Compare by mean recall, then by MRR, which still differs where all recalls are 1."""
        return other is None or (self.mean_recall, self.mrr) > (other.mean_recall, other.mrr)

    def to_json(self) -> dict[str, float]:
        """Return the figures by name."""
        return self._asdict()


def validate(adapter: Adapter, rows: PairedRows, features: FeatureSet | None = None) -> Score:
    """Measure an adapter on held-out rows.

    Args:
        adapter: both sides.
        rows: held out.
        features: to read their tokens from; None embeds without tokens.
    """
    images, texts = (embed_rows(adapter, side, rows, features) for side in Modality)
    ranks = rank_both_ways(images, texts, rows.text_image)
    summaries = [direction.summary() for direction in ranks]
    gap = np.linalg.norm(images.mean(0, dtype=np.float64) - texts.mean(0, dtype=np.float64))
    return Score(
        mean_recall=mean_recall(*summaries),
        mrr=float(np.mean([summary["mrr"] for summary in summaries])),
        centroid_distance=float(gap),
    )
