"""Choice between closed forms on held-out rows: settings, recall by image, and the noise rule."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from csalign.adapters.canonical import ClosedForm
from csalign.core.records import Record
from csalign.metrics.retrieval import RECALL_AT, rank_both_ways
from csalign.training.data import Score

Doubles = npt.NDArray[np.float64]

LADDER = range(-8, 7)  # ridges from 1e-4 to 1,000
POWERS = (0.5, 1.0)
# Without a validation set there is nothing to choose by; these did well on every corpus tried.
SAFE_RIDGE, SAFE_POWER = 1.0, 1.0


def ridge_at(step: int) -> float:
    """Return the ridge at a step of the ladder, two steps per power of ten: 0.3, 1, 3, 10."""
    return float(f"{10 ** (step / 2):.0e}")


def nearby(step: int) -> list[int]:
    """Return a step of the ladder and those beside it."""
    return [near for near in (step - 1, step, step + 1) if near in LADDER]


class Setting(Record):
    """A closed form with its settings, to be fitted on any pairs."""

    form: Literal["random", "centred", "ridge", "cca"]
    ridge: float = SAFE_RIDGE
    power: float = SAFE_POWER  # of "cca"
    share: float = 0.0  # weight of matches of unpaired rows; 0 for none
    path: tuple[tuple[float, float], ...] = ()  # ridge and power of each round of matches

    @property
    def rounds(self) -> int:
        """Number of times that unpaired rows are matched and CCA is fitted again."""
        return len(self.path)


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


class Candidate(NamedTuple):
    """A setting fitted on the pairs of each fold, and measured on what the folds hold out."""

    setting: Setting
    step: int  # of its ridge, or of that of the last round, on the ladder
    forms: list[ClosedForm]  # of each fold
    measured: Measured


def best_of(candidates: Iterable[Candidate]) -> Candidate:
    """Return the best candidate on validation, the first of equal ones."""
    best: Candidate | None = None
    for own in candidates:
        if best is None or own.measured.score.better_than(best.measured.score):
            best = own
    assert best is not None
    return best
