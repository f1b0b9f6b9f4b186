"""Results of the commands as frozen records, and the progress of the command that runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from csalign.core.enums import Names, renamed

T = TypeVar("T")

Progress = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: `what` is the phase and, after a colon, the unit of its work,
as in "matching" or "training: step"; `done` counts from 0, `total` is None while unknown. Called
often; must return quickly."""


def silent(what: str, done: int, total: int | None) -> None:
    """Ignore progress."""


_CURRENT: ContextVar[Progress] = ContextVar("progress", default=silent)


def current_progress() -> Progress:
    """Return the callback of the command that runs; `silent` outside of any."""
    return _CURRENT.get()


@contextmanager
def reported_to(progress: Progress) -> Iterator[None]:
    """Report the progress of all that runs in this block to a callback."""
    token = _CURRENT.set(progress)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def tick(what: str, done: int = 0, total: int | None = None) -> None:
    """Report progress to the command that runs; see `Progress`."""
    current_progress()(what, done, total)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield items, and report before the first and after each how many are done."""
    tick(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        tick(what, done, total)


def show_figures(figures: Mapping[str, str], *, notable: bool = False) -> None:
    """Show the latest figures of the phase that reported last, if the callback can.

    That is, if it has a method ``figures(figures, notable)``.

    Args:
        figures: formatted, by name, in order; a value without a name is shown alone.
        notable: worth a line of its own in a log.
    """
    show = getattr(current_progress(), "figures", None)
    if show is not None:
        show(figures, notable)


def duration(seconds: float) -> str:
    """Format a time for people, such as ``42 s``, ``1m52s`` or ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def within(name: str) -> Progress:
    """Return a callback that reports phases to the current one as parts of another phase."""
    return _Part(current_progress(), name)


@dataclass(frozen=True)
class _Part:
    outer: Progress
    name: str

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.outer(f"{self.name}, {what}", done, total)

    def figures(self, figures: Mapping[str, str], notable: bool) -> None:
        with reported_to(self.outer):
            show_figures(figures, notable=notable)


@dataclass(frozen=True)
class Result:
    """Base of the results."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; "names" and "pairing" only if there are any."""
        values = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}
        optional = ("names", "pairing")
        return {name: value for name, value in values.items() if name not in optional or value}


@dataclass(frozen=True)
class FeaturesResult(Result):
    """A feature set that extract, import or apply wrote.

    Attributes:
        features: its folder.
        images: image rows.
        texts: text rows.
        pairs: texts that belong to an image.
        failures: skipped inputs, listed in ``failures.jsonl``.
        complete: false if other processes have not finished; the counts are then those of this
            process, and `features` is the unfinished folder.
        names: of the sides, None for image and text.
        pairing: what paired imported rows, such as "row order" or "image_id"; None if unknown.
    """

    features: Path
    images: int
    texts: int
    pairs: int
    failures: int
    complete: bool = True
    names: Names | None = None
    pairing: str | None = None


@dataclass(frozen=True)
class SplitResult(Result):
    """Splits of a feature set.

    Attributes:
        features: its folder.
        splits: rows by split, ``{"train": {"images": n, "texts": m}, ...}``.
        groups: groups of near-duplicate images, or images that share a caption, each of which is
            in one split.
        grouped: images in them.
        threshold: least cosine of near-duplicates, between standardised embeddings; None if only
            equal embeddings were grouped.
        names: of the sides, None for image and text.
    """

    features: Path
    splits: dict[str, dict[str, int]]
    groups: int
    grouped: int
    threshold: float | None
    names: Names | None = None

    @property
    def kept_together(self) -> str:
        """The groups in words; empty if there are none."""
        if not self.groups:
            return ""
        images = renamed(f"{self.grouped:,} images", self.names)
        groups = f"{self.groups:,} group" + "s" * (self.groups > 1)
        return f"{images} in {groups} kept together: near-duplicates and shared captions"

    def __str__(self) -> str:
        """Return the numbers of images in words."""
        images = ", ".join(f"{name} {own['images']:,}" for name, own in self.splits.items())
        groups = f" ({self.kept_together})" if self.groups else ""
        return renamed(f"{images} images", self.names) + groups


@dataclass(frozen=True)
class TrainResult(Result):
    """A finished training run.

    Attributes:
        run: its folder.
        steps: optimizer steps made.
        best_step: step of the saved weights; 0 is the initialization, if no step beat it.
        start: closed form of the initialization with its settings, or "random".
        pairs: texts with an image, in training and validation.
        parameters: trainable parameters by side.
        validation: scores of the initialization and of the saved weights; {} without validation.
        seconds: wall time.
        names: of the sides, None for image and text.
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


@dataclass(frozen=True)
class GenerateResult(Result):
    """Images generated from text.

    Attributes:
        out: their folder.
        images: number of images.
        reused: of them, those that an interrupted call had finished.
        decoder: family of the decoder.
        scale: norm of the embeddings given to the decoder.
        scale_from: source of that norm.
        seconds: wall time of this call.
    """

    out: Path
    images: int
    reused: int
    decoder: str
    scale: float
    scale_from: str
    seconds: float


@dataclass(frozen=True)
class Trial(Result):
    """One training run of a search.

    Attributes:
        number: from 0, the run with the given settings.
        state: "complete"; "pruned", stopped early as it was behind; or "failed".
        settings: searched settings by name, and "steps" if they differ.
        seconds: wall time.
        mean_recall: on validation, in [0, 1]; this and all that follows is None if unknown.
        mrr: on validation, in [0, 1].
        centroid_distance: on validation, in [0, 2].
        cs_divergence: on validation, at bandwidth 0.5.
        difference: from trial 0, ``{metric: {"value", "interval"}}`` with a paired 95 % bootstrap
            interval over images; {} for trial 0 and incomplete trials.
        start: closed form of the initialization, or "random".
        steps: optimizer steps made.
        best_step: step of the measured weights.
        reason: of a failure.
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


@dataclass(frozen=True)
class TuneResult(Result):
    """The state of a search.

    Attributes:
        study: its folder.
        config: settings of the best trial, for ``csalign train --config``.
        validation: name, images and texts of the validation rows.
        best: number of the best trial.
        recall_slack: recall that may be traded for a smaller gap.
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


@dataclass(frozen=True)
class Found:
    """Results of a search, streamed.

    Attributes:
        head: the index and how it was searched.
        queries: ``{"query", "hits": [{"rank", "score", "id", "image_id", "caption", "source"}]}``
            per query; can be iterated once.
        jsonl: whether each is to be printed as a JSON document of its own.
    """

    head: dict[str, Any]
    queries: Iterator[dict[str, Any]]
    jsonl: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return all of it as one document."""
        return {**self.head, "queries": list(self.queries)}
