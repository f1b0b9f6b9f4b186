"""Choice between forms of an adapter on held-out rows: recall by query, and the noise rule."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from csalign.metrics.retrieval import RECALL_AT, rank_both_ways
from csalign.training.data import Score

Doubles = npt.NDArray[np.float64]


class Measured(NamedTuple):
    """Validation figures, and the recall that each held-out image contributes."""

    score: Score
    recalls: Doubles  # (captioned images,), whose mean is the mean recall

    def beats(self, simpler: "Measured") -> bool:
        """Return whether the recall gained on a simpler form is more than its standard error.

        The error is that of the mean of paired differences over the same images.
        """
        gains = self.recalls - simpler.recalls
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return bool(gains.mean() > error)


def measure(
    images: npt.NDArray[np.float32],
    texts: npt.NDArray[np.float32],
    text_image: npt.NDArray[np.int64],
) -> Measured:
    """Measure unit rows (n, k) and (m, k); arguments as those of `rank_both_ways`."""
    directions = rank_both_ways(images, texts, text_image)
    hits = [(ranks.first[:, None] <= RECALL_AT).mean(1) for ranks in directions]
    _, image = np.unique(text_image[text_image >= 0], return_inverse=True)
    # Texts weigh alike, as they do in the mean recall, however many an image has.
    of_texts = np.bincount(image, hits[1]) * (len(hits[0]) / len(hits[1]))
    recalls = (hits[0] + of_texts) / 2
    gap = np.linalg.norm(images.mean(0, dtype=np.float64) - texts.mean(0, dtype=np.float64))
    mrr = float(np.mean([(1 / ranks.first).mean() for ranks in directions]))
    return Measured(Score(float(recalls.mean()), mrr, float(gap)), recalls)


def pool(parts: Sequence[Measured]) -> Measured:
    """Pool the images of several folds."""
    recalls = np.concatenate([part.recalls for part in parts])
    scores = np.array([part.score for part in parts])
    _, mrr, gap = np.average(scores, 0, weights=[len(part.recalls) for part in parts])
    return Measured(Score(float(recalls.mean()), float(mrr), float(gap)), recalls)
