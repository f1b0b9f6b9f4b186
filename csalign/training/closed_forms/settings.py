"""Settings of closed forms, and candidates to choose from."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from csalign.core.records import Record
from csalign.training.network.validation import Measured

log = logging.getLogger(__name__)

LADDER = range(-8, 7)  # ridges from 1e-4 to 1,000
FIRST_STEPS = (-3, -1, 1, 3)  # ridges 0.03, 0.3, 3, 30; then those beside the best
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
        Literal["random", "centred", "ridge", "cca", "gcca", "assignment"]
        | Literal["mean-shift", "standardised", "closed-form"]
    )
    ridge: float = SAFE_RIDGE
    power: float = SAFE_POWER  # of "cca" and "gcca"
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
    forms: list[Any]  # of each fold
    measured: Measured


def climb(at: Callable[[int], Candidate], name: str) -> Candidate:
    """Try ridges, then those beside the best until it lies between two that are worse."""
    found: dict[int, Candidate] = {}
    steps = [*FIRST_STEPS]
    while steps:
        found |= {step: at(step) for step in steps}
        best = best_of(found.values())
        # Where all is right, smaller ridges narrow the gap without end.
        is_done = best.measured.score.is_perfect
        steps = [] if is_done else [step for step in nearby(best.step) if step not in found]
    if best.step in (LADDER[0], LADDER[-1]):
        log.warning(
            "%s: ridge %g is the best on validation, the last of those tried; look for "
            "repeated or damaged embeddings with csalign inspect",
            *(name, best.setting.ridge),
        )
    return best


def best_of(candidates: Iterable[Candidate]) -> Candidate:
    """Return the best candidate on validation, the first of equal ones."""
    best: Candidate | None = None
    for own in candidates:
        if best is None or own.measured.score.better_than(best.measured.score):
            best = own
    assert best is not None
    return best
