"""Results of the commands, one family of mappings."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from csalign.core.enums import Names, renamed
from csalign.core.errors import ConfigError
from csalign.core.figures import figure_of
from csalign.core.progress import CALL_KEYS, current_call

_NO_FIGURES = ("counts", "fingerprints", "index", "protocol", "intervals", "explanations", "names")
_SHOWN_ITEMS = 8  # of a list


class Result(dict[str, Any]):
    """What a command returns: a dict of plain JSON values, the document that ``--json`` prints.

    Its last keys say how it came about: "csalign_version", "date" (ISO 8601, UTC), "command", and
    "warnings", a list. Two results are equal if all other keys are.

    >>> result = Result(rows=3, recall={"value": 0.5})
    >>> result["recall"]["value"]
    0.5
    >>> result
    Result
      rows          3
      recall value  0.5
    >>> result.to_frame()
       rows  recall.value
    0     3           0.5
    """

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict of JSON values."""
        return dict(self)

    def to_frame(self) -> Any:
        """Return a `pandas.DataFrame`: one row, or what the class says.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ConfigError(
                "to_frame: needs pandas; install it with: pip install pandas"
            ) from None
        return pd.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        own = {key: value for key, value in self.items() if key not in CALL_KEYS}
        return [{".".join(path): value for path, value in leaves(own)}]

    def _lines(self) -> list[tuple[str, str]]:
        """Return what the repr shows, by name."""
        own = {key: value for key, value in self.items() if key not in CALL_KEYS}
        return [
            (" ".join(path).replace("_", " "), _short(value))
            for path, value in leaves(own)
            if value is not None
        ]

    def __repr__(self) -> str:
        lines = self._lines()
        width = max((len(name) for name, _ in lines), default=0)
        shown = [f"  {name:{width}}  {value}".rstrip() for name, value in lines]
        warned = [f"  warning: {text}" for text in self.get("warnings", ())]
        return "\n".join([type(self).__name__, *shown, *warned])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict):
            return NotImplemented
        return _without_call(self) == _without_call(other)

    __hash__ = None  # as of every dict


def _without_call(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in CALL_KEYS}


def leaves(
    document: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the value of everything in a nested document."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _short(value: Any) -> str:
    """Format a value for a line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, list):
        return str(value)
    if len(value) > _SHOWN_ITEMS or any(isinstance(own, Mapping) for own in value):
        return f"{len(value):,} items"
    return ", ".join(map(_short, value))


class EvalResult(Result):
    """What `evaluate` measured.

    `to_frame` has a row per figure: its "block" ("retrieval", "gap", ...), "part" ("image_to_text",
    "image", ...; None for both sides), "figure", "value", and the ends "low" and "high" of its 95 %
    interval, None where there is none.
    """

    def _figures(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        for block, content in self.items():
            if isinstance(content, Mapping) and block not in _NO_FIGURES:
                found = leaves(content, (block,))
                yield from (
                    (path, value) for path, value in found if isinstance(value, int | float)
                )

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "block": path[0],
                "part": ".".join(path[1:-1]) or None,
                "figure": path[-1],
                "value": value,
                "low": low,
                "high": high,
            }
            for path, value in self._figures()
            for low, high in [self._interval(path)]
        ]

    def _interval(self, path: tuple[str, ...]) -> Any:
        found: Any = self.get("intervals", {})
        for key in path[1:]:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, list) else (None, None)

    def _lines(self) -> list[tuple[str, str]]:
        counts = ", ".join(f"{count:,} {name}" for name, count in self["counts"].items())
        keys = [key for key in ("features", "adapter", "split", "images") if key in self]
        about = [(key, "none" if self[key] is None else str(self[key])) for key in keys]
        shown = []
        for path, value in self._figures():
            place = ".".join(path)
            if place in _SHOWN or path[0] not in ("retrieval", "gap", "hubness"):
                figure = figure_of(place)
                part = f"{path[1].replace('_', ' ')} " if len(path) > 2 else ""
                interval = self._interval(path)
                ends = (
                    "" if interval[0] is None else " [{}, {}]".format(*map(figure.show, interval))
                )
                shown.append((part + figure.heading, figure.show(value) + ends))
        return [*about, ("counts", counts), *shown]


_SHOWN = (
    *("retrieval.mean_recall", "retrieval.image_to_text.R@1", "retrieval.text_to_image.R@1"),
    "gap.centroid_distance",
)


class CompareResult(Result):
    """Systems side by side, from `compare`; `to_frame` has a row per system."""

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {".".join(path): value for path, value in leaves(row)} for row in self["evaluations"]
        ]

    def _lines(self) -> list[tuple[str, str]]:
        return [
            (row["name"], f"mean recall {100 * row['mean_recall']:.2f} %, {row['verdict']}")
            for row in self["evaluations"]
        ]


class SearchResult(Result):
    """Items found by `search`; `to_frame` has a row per hit, with its "query"."""

    def _rows(self) -> list[dict[str, Any]]:
        return [{"query": one["query"], **hit} for one in self["queries"] for hit in one["hits"]]

    def _lines(self) -> list[tuple[str, str]]:
        return [
            (one["query"] if hit["rank"] == 1 else "", f"{hit['score']:.4f}  {named}")
            for one in self["queries"]
            for hit in one["hits"]
            for named in [" ".join(filter(None, [hit["id"], hit["caption"]]))]
        ]


@dataclass(frozen=True, eq=False, repr=False)
class Fields(Result):
    """A result whose values are attributes as well, there as Python types: a path is a `Path`."""

    def __post_init__(self) -> None:
        """Fill the mapping; "names" and "pairing" only if there are any."""
        values = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}
        optional = ("names", "pairing")
        self.update({key: value for key, value in values.items() if key not in optional or value})


@dataclass(frozen=True, eq=False, repr=False)
class FeaturesResult(Fields):
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


@dataclass(frozen=True, eq=False, repr=False)
class SplitResult(Fields):
    """Splits of a feature set; `to_frame` has a row per split.

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

    def _rows(self) -> list[dict[str, Any]]:
        return [{"split": name, **counts} for name, counts in self.splits.items()]

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


@dataclass(frozen=True, eq=False, repr=False)
class TrainResult(Fields):
    """A finished training run; `to_frame` has a row per entry of "validation".

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

    def _rows(self) -> list[dict[str, Any]]:
        return [{"weights": name, **score} for name, score in self.validation.items()]


@dataclass(frozen=True, eq=False, repr=False)
class GenerateResult(Fields):
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


@dataclass(frozen=True, eq=False, repr=False)
class Trial(Fields):
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


@dataclass(frozen=True, eq=False, repr=False)
class TuneResult(Fields):
    """The state of a search; `to_frame` has a row per trial.

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

    def _rows(self) -> list[dict[str, Any]]:
        return [row for trial in self.trials for row in trial._rows()]


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
        return {**self.head, "queries": list(self.queries), **current_call().to_json()}
