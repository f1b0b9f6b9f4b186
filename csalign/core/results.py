"""Results of the commands, one family of mappings."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from csalign.core.enums import Names, renamed
from csalign.core.errors import ConfigError
from csalign.core.figures import counted, figure_of, interval_place
from csalign.core.progress import CALL_KEYS, current_call

_NO_FIGURES = ("counts", "fingerprints", "index", "protocol", "intervals", "explanations", "names")
# Figures of a block that the repr shows; all of a block that is not listed.
_SHOWN = {
    "retrieval": ("mean_recall", "R@1"),
    "gap": ("centroid_distance",),
    "mixed": ("ndcg@10", "same_side@10"),
    "groups": ("v_measure", "ari", "mean"),
    **dict.fromkeys(("hubness", "before", "baselines"), ()),
}
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
        return [_flat(_without_call(self))]

    def _lines(self) -> list[tuple[str, str]]:
        """Return what the repr shows, by name."""
        own = _flat(_without_call(self), " ")
        return [
            (name.replace("_", " "), _short(value))
            for name, value in own.items()
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


def _flat(document: Mapping[str, Any], between: str = ".") -> dict[str, Any]:
    return {between.join(path): value for path, value in leaves(document)}


def _short(value: Any) -> str:
    """Format a value for a line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, list):
        return str(value)
    if len(value) > _SHOWN_ITEMS or any(isinstance(v, Mapping) or len(str(v)) > 80 for v in value):
        return f"{len(value):,} items"
    return ", ".join(map(_short, value))


def _measured(document: Mapping[str, Any], *above: str) -> list[dict[str, Any]]:
    """Make a row per figure of a document of `evaluate`, or of one below some keys."""
    blocks = {
        block: content
        for block, content in document.items()
        if isinstance(content, Mapping) and block not in (*_NO_FIGURES, "baselines")
    }
    ends = dict(leaves(document.get("intervals", {})))
    rows = []
    for path, value in leaves(blocks):
        if isinstance(value, int | float):
            low, high = ends.get(interval_place(path)) or (None, None)
            block, *parts, figure = (*above, *path)
            row = {"block": block, "part": ".".join(parts) or None, "figure": figure}
            rows.append({**row, "value": value, "low": low, "high": high})
    return rows


class EvalResult(Result):
    """What `evaluate` measured.

    `to_frame` has a row per figure: its "block" ("retrieval", "gap", ...), "part" ("image_to_text",
    "image", ...; None for both sides), "figure", "value", and the ends "low" and "high" of its 95 %
    interval, None where there is none. The parts of block "baselines" start with the baseline and
    its block ("raw.retrieval.image_to_text").
    """

    def _rows(self) -> list[dict[str, Any]]:
        rows = _measured(self)
        for name, document in self.get("baselines", {}).items():
            rows += _measured(document, "baselines", name)
        return rows

    def _lines(self) -> list[tuple[str, str]]:
        counts = ", ".join(f"{count:,} {name}" for name, count in self["counts"].items())
        keys = [key for key in ("features", "adapter", "split", "images") if key in self]
        lines = [(key, "none" if self[key] is None else str(self[key])) for key in keys]
        lines.append(("counts", counts))
        for row in self._rows():
            block, part, name = row["block"], row["part"], row["figure"]
            if name in _SHOWN.get(block, (name,)) and not (block == "mixed" and part):
                try:
                    figure = figure_of(".".join(filter(None, [block, part, name])))
                except KeyError:  # a count
                    continue
                interval = None if row["low"] is None else (row["low"], row["high"])
                twins = ", ".join(filter(None, ["twins", part]))
                above = {"mixed": block, "twins": twins, "groups": None}.get(block, part)
                label = f"{above} {figure.heading}" if above else figure.heading
                shown = figure.show_between(row["value"], interval)
                lines.append((label.replace("_", " "), shown))
        return lines


class CompareResult(Result):
    """Systems side by side, from `compare`; `to_frame` has a row per system."""

    def _rows(self) -> list[dict[str, Any]]:
        return [_flat(row) for row in self["evaluations"]]

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
            (
                row["query"] if row["rank"] == 1 else "",
                f"{row['score']:.4f}  {row['id']} {row['caption'] or ''}",
            )
            for row in self._rows()
        ]


@dataclass(frozen=True, eq=False, repr=False)
class Fields(Result):
    """A result whose values are attributes as well, there as Python types: a path is a `Path`."""

    def __post_init__(self) -> None:
        """Fill the mapping; optional values only if there are any."""
        values = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}
        optional = ("names", "pairing", "existed", "joined", "refit", "sides", "counts")
        self.update({key: value for key, value in values.items() if key not in optional or value})


@dataclass(frozen=True, eq=False, repr=False)
class FeaturesResult(Fields):
    """A feature set that extract, import or apply wrote."""

    features: Path  # its folder; the unfinished one if not complete
    images: int  # image rows; the counts are those of this process if not complete
    texts: int  # text rows
    pairs: int  # texts that belong to an image
    failures: int  # skipped inputs, listed in failures.jsonl
    complete: bool = True  # false if other processes have not finished
    names: Names | None = None  # of the sides, None for image and text
    pairing: str | None = None  # of imported rows, such as "row order"; None if unknown
    existed: bool = False  # whether the same extraction had written it before
    joined: int | None = None  # images that repeated an earlier one, and have no row; None if none
    # {"audio": {"rows": n, "unpaired": u, "width": d, "encoder": spec}, ...}, of import --side
    sides: dict[str, dict[str, Any]] | None = None
    # {"items": n, "by_sides": {"1": n, ...}, "pairs": {"audio": {"text": n}, ...}}, likewise
    counts: dict[str, Any] | None = None

    def _rows(self) -> list[dict[str, Any]]:
        return [{"side": name, **own} for name, own in (self.sides or {}).items()]


@dataclass(frozen=True, eq=False, repr=False)
class SplitResult(Fields):
    """Splits of a feature set; `to_frame` has a row per split."""

    features: Path  # its folder
    splits: dict[str, dict[str, int]]  # rows: {"train": {"images": n, "texts": m}, ...}
    groups: int  # of near-duplicate images, or images that share a caption: each in one split
    grouped: int  # images in them
    threshold: float | None  # least cosine of near-duplicates, standardised; None: equal ones only
    names: Names | None = None  # of the sides, None for image and text

    def _rows(self) -> list[dict[str, Any]]:
        return [{"split": name, **counts} for name, counts in self.splits.items()]

    @property
    def kept_together(self) -> str:
        """The groups in words; empty if there are none."""
        if not self.groups:
            return ""
        images = renamed(f"{self.grouped:,} {self._noun}", self.names)
        groups = counted(self.groups, "group")
        return f"{images} in {groups} kept together: near-duplicates and shared captions"

    def __str__(self) -> str:
        """Return the numbers of images in words, or of items of any number of sides."""
        noun = self._noun
        images = ", ".join(f"{name} {own.get(noun, 0):,}" for name, own in self.splits.items())
        groups = f" ({self.kept_together})" if self.groups else ""
        return renamed(f"{images} {noun}", self.names) + groups

    @property
    def _noun(self) -> str:
        return "items" if any("items" in own for own in self.splits.values()) else "images"


@dataclass(frozen=True, eq=False, repr=False)
class TrainResult(Fields):
    """A finished training run; `to_frame` has a row per entry of "validation"."""

    run: Path  # its folder
    steps: int  # optimizer steps made
    best_step: int  # of the network; 0 is the initialization, if no step beat it
    start: str  # closed form of the initialization with its settings, or "random"
    pairs: dict[str, int]  # texts with an image (or items), in training and validation
    width: int  # of the aligned embeddings: the sum of those of the parts
    parameters: dict[str, int]  # by side, of all parts
    # Figures by what they are of, before a refit: "start", the initialization; "kept", the best
    # weights of the network; "matched", these with moments matched; "parts", all parts. {} without
    # validation; the last two only if there are any.
    validation: dict[str, dict[str, float]]
    seconds: float  # wall time
    names: Names | None = None  # of the sides, None for image and text
    parts: str = ""  # and shares, such as "network 50 %, kernel CCA (...) 50 %"; "": a network
    refit: str = ""  # whether the held-out pairs were learned from at the end, in words
    sides: list[str] | None = None  # of a set of several, whose items `pairs` counts; else None

    def _rows(self) -> list[dict[str, Any]]:
        return [{"weights": name, **score} for name, score in self.validation.items()]


@dataclass(frozen=True, eq=False, repr=False)
class GenerateResult(Fields):
    """Images generated from text."""

    out: Path  # their folder
    images: int
    reused: int  # of them, those that an interrupted call had finished
    decoder: str  # its family
    scale: float  # norm of the embeddings given to the decoder
    scale_from: str  # source of that norm
    seconds: float  # wall time of this call


@dataclass(frozen=True, eq=False, repr=False)
class Trial(Fields):
    """One training run of a search; what follows the wall time is None if unknown."""

    number: int  # from 0, the run with the given settings
    state: str  # "complete"; "pruned", stopped early as it was behind; or "failed"
    settings: dict[str, Any]  # searched settings by name, and "steps" if they differ
    seconds: float  # wall time
    mean_recall: float | None = None  # on validation, in [0, 1]
    mrr: float | None = None  # on validation, in [0, 1]
    centroid_distance: float | None = None  # on validation, in [0, 2]
    cs_divergence: float | None = None  # on validation, at bandwidth 0.5
    # From trial 0, {metric: {"value", "interval"}} with a paired 95 % bootstrap interval over
    # images; {} for trial 0 and incomplete trials.
    difference: dict[str, dict[str, Any]] = field(default_factory=dict)
    start: str | None = None  # closed form of the initialization, or "random"
    steps: int | None = None  # optimizer steps made
    best_step: int | None = None  # of the measured weights
    reason: str | None = None  # of a failure


@dataclass(frozen=True, eq=False, repr=False)
class TuneResult(Fields):
    """The state of a search; `to_frame` has a row per trial."""

    study: Path  # its folder
    config: Path  # settings of the best trial, for csalign train --config
    validation: dict[str, Any]  # name, images and texts of the validation rows
    best: int  # number of the best trial
    recall_slack: float  # recall that may be traded for a smaller gap
    trials: list[Trial]  # in the order of their numbers
    seconds: float  # wall time of this call

    def _rows(self) -> list[dict[str, Any]]:
        return [row for trial in self.trials for row in trial._rows()]


@dataclass(frozen=True)
class Found:
    """Results of a search, streamed."""

    head: dict[str, Any]  # the index and how it was searched
    # Can be iterated once; {"query", "hits": [{"rank", "score", "id", "image_id", "caption",
    # "source"}]} per query.
    queries: Iterator[dict[str, Any]]
    jsonl: bool = False  # whether each is to be printed as a JSON document of its own

    def to_json(self) -> dict[str, Any]:
        """Return all of it as one document."""
        return {**self.head, "queries": list(self.queries), **current_call().to_json()}
