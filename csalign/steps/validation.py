"""How good an adapter is on held-out pairs: what training and the closed form are chosen by."""

from dataclasses import dataclass

import numpy as np

from csalign.adapters.model import Adapter
from csalign.enums import Modality
from csalign.metrics.retrieval import mean_recall, rank_both_ways
from csalign.store.join import PairedRows


@dataclass(frozen=True)
class Score:
    """Figures on the validation rows.

    Attributes:
        mean_recall: mean of R@1/5/10 in both directions, in [0, 1].
        centroid_distance: norm of the difference of the two means, in [0, 2].
    """

    mean_recall: float
    centroid_distance: float

    def to_json(self) -> dict[str, float]:
        """The figures by name."""
        return {
            "mean_recall": self.mean_recall,
            "centroid_distance": self.centroid_distance,
        }


def validate(adapter: Adapter, rows: PairedRows) -> Score:
    """Measure an adapter on held-out rows."""
    images = adapter.embed(Modality.IMAGE, rows.images)
    texts = adapter.embed(Modality.TEXT, rows.texts)
    ranks = rank_both_ways(images, texts, rows.text_image)
    recall = mean_recall(*(direction.summary() for direction in ranks))
    gap = np.linalg.norm(images.mean(0, dtype=np.float64) - texts.mean(0, dtype=np.float64))
    return Score(recall, float(gap))


def carve(rows: PairedRows, seed: int) -> tuple[PairedRows, PairedRows | None]:
    """Hold out a tenth of the images that have captions, 1,000 at most.

    Returns:
        What is left for training, and the held-out rows; None where fewer than 20 images have
        captions, too few to tell anything.
    """
    captioned = np.flatnonzero([len(texts) > 0 for texts in rows.captions_of])
    if len(captioned) < 20:
        return rows, None
    rng = np.random.default_rng(seed)
    chosen = rng.choice(captioned, min(1_000, len(captioned) // 10), replace=False)
    held_out = np.zeros(len(rows.images), np.bool_)
    held_out[chosen] = True
    return rows.take_images(~held_out), rows.take_images(held_out)
