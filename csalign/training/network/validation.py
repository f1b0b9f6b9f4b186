"""Figures on held-out rows, recall by image, and the noise rule."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from csalign.adapters.model import Adapter
from csalign.core.arrays import Doubles, Floats, Ints
from csalign.core.enums import Modality
from csalign.core.errors import TrainingError
from csalign.core.progress import reported_to, silent
from csalign.features.join import Pairs
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import RECALL_AT, rank_both_ways
from csalign.runs.load import embed_rows
from csalign.training.network.batch_loss import LEAST_SCALE

MOST_SCALE = 40.0  # of logits in training
ENOUGH_IMAGES = 100  # to validate on; what fewer show is noise in part
SCALES = [3 * 1.05**step for step in range(60)]  # up to 53


class Score(NamedTuple):
    """Figures on the validation rows."""

    mean_recall: float  # mean of R@1/5/10 in both directions, in [0, 1]
    mrr: float  # mean reciprocal rank, averaged over the directions, in [0, 1]
    centroid_distance: float  # norm of the difference of the two means, in [0, 2]

    @property
    def is_perfect(self) -> bool:
        """Return whether every query finds its match first."""
        return self.mrr == 1

    def better_than(self, other: "Score | None") -> bool:
        """Compare by mean recall, then by MRR; of equal ones the narrower gap is better."""
        return other is None or self._order > other._order

    @property
    def _order(self) -> tuple[float, float, float]:
        return self.mean_recall, self.mrr, -self.centroid_distance


class Measured(NamedTuple):
    """Validation figures, and the recall that each held-out image contributes."""

    score: Score
    recalls: Doubles  # (captioned images,), whose mean is the mean recall

    def beats(self, simpler: "Measured", errors: float = 1.0) -> bool:
        """Return whether the recall gained on a simpler form is more than some standard errors.

        The error is that of the mean of paired differences over the same images.
        """
        gains = self.recalls - simpler.recalls
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return bool(gains.mean() > errors * error)


def measure(images: Floats, texts: Floats, text_image: Ints) -> Measured:
    """Measure unit rows (n, k) and (m, k); arguments as those of `rank_both_ways`.

    Raises:
        TrainingError: a row is not finite.
    """
    if not all(np.isfinite(side).all() for side in (images, texts)):  # ranks would be perfect
        raise TrainingError(
            "an embedding is nan or infinite; lower --learning-rate, or look for extreme values in "
            "the features with csalign inspect"
        )
    with reported_to(silent):  # part of a phase that counts something else
        directions = rank_both_ways(images, texts, text_image)
    hits = [(ranks.first[:, None] <= RECALL_AT).mean(1) for ranks in directions]
    _, image = np.unique(text_image[text_image >= 0], return_inverse=True)
    # Texts weigh alike, as they do in the mean recall, however many an image has.
    of_texts = np.bincount(image, hits[1]) * (len(hits[0]) / len(hits[1]))
    recalls = (hits[0] + of_texts) / 2
    gap = np.linalg.norm(images.mean(0, dtype=np.float64) - texts.mean(0, dtype=np.float64))
    mrr = float(np.mean([(1 / ranks.first).mean() for ranks in directions]))
    return Measured(Score(float(recalls.mean()), mrr, float(gap)), recalls)


def logit_scale(adapter: Adapter, rows: Pairs | None, features: FeatureSet | None) -> float:
    """Find the scale of logits to train with, from the recall of the start on held-out pairs.

    c is the scale at which the InfoNCE loss of the start's cosines is least on at most 500 held-out
    pairs. Training does best at about c^2 / 24 (by validation on three corpora of 5,000 to 80,000
    pairs): well below c where few pairs are found, since a low scale overfits less, and above it
    where most are.

    Args:
        adapter: the start, usually a closed form.
        rows: held-out pairs, None without any.
        features: where the tokens of the rows are read from, if the adapter needs them.

    Returns:
        In [7, 40]; 7 with fewer than 100 held-out images, too few to choose by.
    """
    if rows is None or np.count_nonzero(rows.caption_counts) < ENOUGH_IMAGES:
        return LEAST_SCALE
    captioned = np.flatnonzero(rows.caption_counts)
    images = captioned[np.linspace(0, len(captioned) - 1, min(len(captioned), 500)).astype(int)]
    firsts = np.cumsum(rows.caption_counts) - rows.caption_counts
    with reported_to(silent):  # as in `measure`
        x, y = (embed_rows(adapter, side, rows, features) for side in Modality)
    x, y = x[images], y[rows.texts_by_image[firsts[images]]]
    return scale_of(x, y)


def scale_of(x: Floats, y: Floats) -> float:
    """Find the scale of logits from unit rows (n, k) of pairs in order; see `logit_scale`."""
    cosines, right = torch.from_numpy(x @ y.T), torch.arange(len(x))
    losses = [
        cross_entropy(scale * cosines, right) + cross_entropy(scale * cosines.T, right)
        for scale in SCALES
    ]
    calibrated = SCALES[int(torch.stack(losses).argmin())]
    return float(min(MOST_SCALE, max(LEAST_SCALE, calibrated**2 / 24)))


def pool(parts: Sequence[Measured]) -> Measured:
    """Pool the images of several folds."""
    recalls = np.concatenate([part.recalls for part in parts])
    scores = np.array([part.score for part in parts])
    _, mrr, gap = np.average(scores, 0, weights=[len(part.recalls) for part in parts])
    return Measured(Score(float(recalls.mean()), float(mrr), float(gap)), recalls)


def validate(adapter: Adapter, rows: Pairs, features: FeatureSet | None = None) -> Score:
    """Measure an adapter on held-out rows, whose tokens are read from `features` if given."""
    with reported_to(silent):  # as in `measure`
        images, texts = (embed_rows(adapter, side, rows, features) for side in Modality)
    return measure(images, texts, rows.text_image).score
