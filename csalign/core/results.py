"""Results of the commands as frozen records, and the progress callback."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from csalign.core.enums import Names

Progress = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: `what` names the work and its unit ("images"), `done` counts
from 0, `total` is None while unknown. Called often; must return quickly."""


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


def show_figures(progress: Progress, figures: Mapping[str, float]) -> None:
    """Show the latest metrics by name, if the callback has a method `figures`."""
    show = getattr(progress, "figures", None)
    if show is not None:
        show(figures)


def _with_names(document: dict[str, Any]) -> dict[str, Any]:
    """Omit the names of sides that have none of their own."""
    if document["names"] is None:
        del document["names"]
    return document


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
        names: what the sides are called, None where that is image and text.
    """

    features: Path
    images: int
    texts: int
    pairs: int
    failures: int
    complete: bool = True
    names: Names | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return _with_names({**asdict(self), "features": str(self.features)})


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
        names: what the sides are called, None where that is image and text.
    """

    run: Path
    steps: int
    best_step: int
    start: str
    pairs: dict[str, int]
    parameters: dict[str, int]
    validation: dict[str, dict[str, float]]
    seconds: float
    names: Names | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return _with_names({**asdict(self), "run": str(self.run)})


@dataclass(frozen=True)
class GenerateResult:
    """Images that were made of texts.

    Attributes:
        out: their folder.
        images: how many there are.
        reused: of them, made by an earlier process that was stopped.
        decoder: family of the decoder.
        scale: norm that the embeddings were given.
        scale_from: what told it.
        seconds: wall time of this call.
    """

    out: Path
    images: int
    reused: int
    decoder: str
    scale: float
    scale_from: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


@dataclass(frozen=True)
class Trial:
    """One training run of a search.

    Attributes:
        number: counted from 0, which is the run without any tuning.
        state: "complete"; "pruned", ended early since it lagged behind; or "failed".
        settings: the searched settings by name, and "steps" where those differ; the rest is as
            given.
        seconds: wall time.
        mean_recall: on validation, in [0, 1]; like all that follows None where it failed.
        mrr: likewise.
        centroid_distance: likewise, in [0, 2].
        cs_divergence: likewise, at bandwidth 0.5.
        difference: of the mean recall and the centroid distance to trial 0, ``{figure: {"value",
            "interval"}}`` with a paired 95 % bootstrap interval over images; {} of trial 0 itself,
            and of what was not completed.
        start: which closed form, or "random".
        steps: optimiser steps that were made.
        best_step: step whose weights were measured.
        reason: why it failed.
    """

    number: int
    state: str
    settings: dict[str, Any]
    seconds: float
    mean_recall: float | None = None
    mrr: float | None = None
    centroid_distance: float | None = None
    cs_divergence: float | None = None
    difference: dict[str, dict[str, Any]] = field(default_factory=dict)
    start: str | None = None
    steps: int | None = None
    best_step: int | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class TuneResult:
    """A search as far as it went.

    Attributes:
        study: its folder.
        config: the winner's settings, for ``csalign train --config``.
        validation: where the trials were measured, and on how many images and texts.
        best: number of the winner.
        recall_slack: recall that might be given for a narrower gap.
        trials: in the order of their numbers.
        seconds: wall time of this call.
    """

    study: Path
    config: Path
    validation: dict[str, Any]
    best: int
    recall_slack: float
    trials: list[Trial]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {**asdict(self), "study": str(self.study), "config": str(self.config)}


@dataclass(frozen=True)
class Found:
    """What a search finds, query by query, as it is asked for.

    Attributes:
        head: the index and how it was asked.
        queries: ``{"query", "hits": [{"rank", "score", "id", "image_id", "caption", "source"}]}``
            of each query in turn; can be gone through once.
        jsonl: whether each is wanted as a JSON document of its own.
    """

    head: dict[str, Any]
    queries: Iterator[dict[str, Any]]
    jsonl: bool = False

    def to_json(self) -> dict[str, Any]:
        """All of it as one document."""
        return {**self.head, "queries": list(self.queries)}
