"""Lambda, the weight of the distribution term: fixed, or led by validation."""

from dataclasses import dataclass, replace

from csalign.training.validation import Score

START, LEAST, MOST = 0.1, 1e-3, 10.0
RAISE, LOWER = 1.5, 0.5


@dataclass(frozen=True)
class Weight:
    """The weight of the distribution term from one validation to the next.

    Attributes:
        value: lambda, >= 0.
        adapts: whether `after` changes it.
    """

    value: float
    adapts: bool = False

    @classmethod
    def of(cls, setting: float | str) -> "Weight":
        """That of ``--cs-weight``, a number or "auto"."""
        return cls(START, adapts=True) if isinstance(setting, str) else cls(setting)

    def after(self, score: Score, best: Score | None) -> "Weight":
        """The weight after a validation: more while recall holds, half where it fell.

        Half is more than one raise undone, so that it settles where the term costs no recall; where
        it never does it ends at the most.

        Args:
            score: the validation's.
            best: the best one before it.
        """
        if not self.adapts or best is None:
            return self
        factor = RAISE if score.mean_recall >= best.mean_recall else LOWER
        return replace(self, value=min(MOST, max(LEAST, self.value * factor)))
