"""Settings of closed forms, and candidates to choose from."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from csalign.adapters.canonical import ClosedForm
from csalign.core.records import Record
from csalign.training.network.validation import Measured

LADDER = range(-8, 7)  # ridges from 1e-4 to 1,000
POWERS = (0.5, 1.0)
# Without a validation set there is nothing to choose by; these did well on every corpus tried.
SAFE_RIDGE, SAFE_POWER = 1.0, 1.0


def ridge_at(step: int) -> float:
    """Return the ridge at a step of the ladder, two steps per power of ten: 0.3, 1, 3, 10."""
    return float(f"{10 ** (step / 2):.0e}")


def step_of(ridge: float) -> int:
    """Return the step of a ridge of the ladder."""
    return round(2 * math.log10(ridge))


def nearby(step: int) -> list[int]:
    """Return a step of the ladder and those beside it."""
    return [near for near in (step - 1, step, step + 1) if near in LADDER]


class Setting(Record):
    """A closed form with its settings, to be fitted on any pairs."""

    form: (
        Literal["random", "centred", "ridge", "cca", "assignment"]
        | Literal["mean-shift", "standardised", "closed-form"]
    )
    ridge: float = SAFE_RIDGE
    power: float = SAFE_POWER  # of "cca"
    share: float = 0.0  # weight of matches of unpaired rows; 0 for none
    path: tuple[tuple[float, float], ...] = ()  # ridge and power of each round of matches

    @property
    def rounds(self) -> int:
        """Number of times that unpaired rows are matched and CCA is fitted again."""
        return len(self.path)


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
