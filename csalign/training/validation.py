"""How good an adapter is on held-out pairs: what training and the closed form are chosen by."""

import logging
from dataclasses import dataclass

import numpy as np

from csalign.adapters.model import Adapter
from csalign.core.enums import Modality
from csalign.features.join import Joined, PairedRows
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import mean_recall, rank_both_ways
from csalign.runs.load import embed_rows

log = logging.getLogger(__name__)

MAX_IMAGES = 2_000


@dataclass(frozen=True)
class Score:
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
        """Whether to prefer this one: by mean recall, then by MRR.

        Recall is what users look at; the MRR still tells candidates apart on a small gallery,
        where the recalls are all 1.
        """
        return other is None or (self.mean_recall, self.mrr) > (other.mean_recall, other.mrr)

    def to_json(self) -> dict[str, float]:
        """The figures by name, to build an equal one of."""
        return {
            "mean_recall": self.mean_recall,
            "mrr": self.mrr,
            "centroid_distance": self.centroid_distance,
        }


def validate(adapter: Adapter, rows: PairedRows, features: FeatureSet | None = None) -> Score:
    """Measure an adapter on held-out rows.

    Args:
        adapter: both sides.
        rows: held out.
        features: that they are from, whose tokens then go with them where the adapter takes any.
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


def thin(rows: Joined, seed: int) -> Joined:
    """At most `MAX_IMAGES` of the images that have captions, since it is measured many times."""
    captioned = np.flatnonzero(rows.caption_counts)
    if len(captioned) <= MAX_IMAGES:
        return rows
    keep = np.zeros(rows.n_images, np.bool_)
    keep[np.random.default_rng(seed).choice(captioned, MAX_IMAGES, replace=False)] = True
    log.info("%s: validating on %d of its %d images", rows.name, MAX_IMAGES, len(captioned))
    return rows.take_images(keep)


def carve(rows: Joined, seed: int) -> tuple[Joined, Joined | None]:
    """Hold out some of the images that have captions.

    A tenth of them, but at least 100 and at most 1,000; a quarter where that is less than 100,
    since a handful of pairs tells candidates apart no better than chance.

    Returns:
        What is left for training, and the held-out rows; None where fewer than 20 images have
        captions, too few to tell anything.
    """
    captioned = np.flatnonzero(rows.caption_counts)
    if len(captioned) < 20:
        return rows, None
    rng = np.random.default_rng(seed)
    n = len(captioned)
    chosen = rng.choice(captioned, min(n // 4, max(100, min(1_000, n // 10))), replace=False)
    held_out = np.zeros(rows.n_images, np.bool_)
    held_out[chosen] = True
    return rows.take_images(~held_out, unpaired_texts=True), rows.take_images(held_out)
