"""What the steps return: frozen records of plain numbers and paths, ready for JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FeaturesResult:
    """A feature set that was written by extract, import or apply.

    Attributes:
        features: its folder.
        images: image rows.
        texts: text rows.
        pairs: texts that belong to an image.
        failures: inputs that were left out, listed in ``failures.jsonl``.
        complete: false where this process did its share and others are not done yet; the rest
            then speaks of this share, and `features` is the unfinished folder.
    """

    features: Path
    images: int
    texts: int
    pairs: int
    failures: int
    complete: bool = True

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {**asdict(self), "features": str(self.features)}


@dataclass(frozen=True)
class TrainResult:
    """A finished training run.

    Attributes:
        run: its folder.
        steps: optimiser steps that were made.
        best_step: step whose weights were kept; 0 is the start, where nothing trained beat it.
        start: which closed form (or "random") training started from, and its settings.
        pairs: texts with an image that were trained on and validated on.
        parameters: trainable parameters by side.
        validation: mean recall and centroid gap on the validation split of the start and of what
            was kept; {} without validation.
        seconds: wall time.
    """

    run: Path
    steps: int
    best_step: int
    start: str
    pairs: dict[str, int]
    parameters: dict[str, int]
    validation: dict[str, dict[str, float]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {**asdict(self), "run": str(self.run)}
