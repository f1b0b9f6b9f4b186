"""``csalign compare``: several systems side by side, and which differences are more than chance."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from csalign.adapters.checkpoint import read_info
from csalign.core.errors import ConfigError, CsalignError, DataError, SchemaError
from csalign.core.progress import Progress, silent
from csalign.core.records import parse_json
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import describe, measure
from csalign.features.schema import read_manifest
from csalign.metrics.bootstrap import Resamples
from csalign.runs.metadata import CONFIG, read_environment, read_settings

log = logging.getLogger(__name__)

FIGURES = {
    "mean_recall": ("retrieval", "mean_recall"),
    "image_to_text_R@1": ("retrieval", "image_to_text", "R@1"),
    "text_to_image_R@1": ("retrieval", "text_to_image", "R@1"),
    "centroid_distance": ("gap", "centroid_distance"),
    "rmg": ("gap", "rmg"),
    "cs_divergence": ("gap", "cs_divergence"),
    "frechet": ("gap", "frechet"),
}
"""What is compared, and where ``csalign eval --json`` has it."""

DECIDES = "mean_recall"  # which figure the verdict is about
BASELINE = "baseline"
NOT_PAIRED = "cannot tell (not paired)"

Limits = tuple[FiniteFloat, FiniteFloat]
_Parts = list[FiniteFloat] | dict[str, FiniteFloat]


class _Fingerprints(BaseModel):
    features: str
    adapter: str | None


class _Protocol(BaseModel):
    name: str = "all"


class _Document(BaseModel):
    """What is needed of a document of ``csalign eval --json``, older ones included."""

    model_config = ConfigDict(frozen=True)

    features: str
    adapter: str | None
    split: str
    names: dict[str, str] | None = None
    counts: dict[str, int]
    retrieval: dict[str, FiniteFloat | dict[str, FiniteFloat]]
    gap: dict[str, FiniteFloat | dict[str, FiniteFloat | _Parts]]
    protocol: _Protocol = _Protocol()
    fingerprints: _Fingerprints | None = None
    parameters: int | None = None
    bandwidth: FiniteFloat | None = None
    intervals: Annotated[dict[str, Limits | dict[str, Limits]], Field(default_factory=dict)]

    def figures(self) -> dict[str, float]:
        """The figures that are compared; KeyError or TypeError where one is not there."""
        found = {}
        for name, (part, *place) in FIGURES.items():
            found[name] = float(_at(getattr(self, part), place))
        return found

    def data(self) -> tuple[Any, ...]:
        """What must be equal for two documents to be of the same queries."""
        assert self.fingerprints is not None
        return self.fingerprints.features, self.split, sorted(self.counts.items())


@dataclass
class _Entry:
    """A row to be: what was measured, and its resamples where they could be had."""

    path: Path
    document: _Document
    resamples: Resamples | None = None
    unpaired: str | None = None

    @property
    def source(self) -> Path:
        return Path(self.document.adapter or self.document.features)


def compare(
    paths: Sequence[Path],
    *,
    split: str | None = None,
    baseline: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Line up the figures of runs and evaluations, each against a baseline.

    A run is evaluated on the features that it was trained on. A document of ``csalign eval --json``
    keeps its figures, and is measured again for the ranks of each query if it is of the baseline's
    features, split and queries, and what it was made from is still there unchanged. The difference
    to the baseline is then resampled in pairs; otherwise only the figures' own intervals are given.

    Args:
        paths: run folders and documents.
        split: of the runs (default: test if there is one, else all).
        baseline: name or path of one of them, or its number, from 1 on (default: the first).
        progress: told how far it is.

    Returns:
        ``{"evaluations": [{"name", "split", FIGURES..., "intervals", "difference", "verdict",
        "parameters", "seconds"}, ...]}`` in the order given. A name is the adapter's path, or the
        features' without one, less a folder that all share. "intervals" is ``{figure: [low,
        high]}``, as far as they are known; "difference" is ``{figure: {"value", "interval"}}``,
        and {} for the baseline and for what cannot be paired; "verdict" is of the mean recall:
        "baseline", "better", "worse", "cannot tell" or "cannot tell (not paired)". "parameters"
        and "seconds" are None where they are not known.

    Raises:
        DataError: a path is missing, or is neither a run nor such a document; it is named.
        ConfigError: `baseline` is none of them.
    """
    if not paths:
        return {"evaluations": []}
    entries = []
    for number, path in enumerate(paths):
        progress("evaluations", number, len(paths))
        entries.append(_run(path, split) if path.is_dir() else _Entry(path, _read(path)))
    progress("evaluations", len(paths), len(paths))
    names = _names(entries)
    first = _chosen(baseline, entries, names)
    _pair(entries, names, first)
    _warn_of_bandwidths(entries)
    rows = [
        {"name": name, "split": entry.document.split, **_row(entry, first)}
        for name, entry in zip(names, entries, strict=True)
    ]
    called = [entry.document.names for entry in entries]
    same = called[0] if all(own == called[0] for own in called) else None
    return {"evaluations": rows} | ({} if same is None else {"names": same})


def _run(path: Path, split: str | None) -> _Entry:
    """Evaluate a run on the features that it was trained on."""
    info = read_info(path)
    settings = path / CONFIG
    try:
        features = read_settings(path)["features"]
        manifest = read_manifest(EvalConfig(features=features).feature_set)
    except KeyError:
        if settings.is_file():
            raise SchemaError(f"{settings}: names no features; train again") from None
        raise DataError(
            f"{path}: has no config.toml that names its features; use csalign eval --json and "
            "compare what it prints"
        ) from None
    except (ValueError, TypeError, AttributeError):
        raise SchemaError(f"{settings}: names no features; train again") from None
    except SchemaError:
        raise
    except DataError as error:
        raise DataError(
            f"{path}: cannot be evaluated on the features that it was trained on: {error}"
        ) from None
    if manifest.fingerprint() != info.data_fingerprint:
        log.warning("%s: %s changed since it was trained on them", path, features)
    measured = measure(EvalConfig(features=features, adapter=path, split=split))
    resamples = measured.resample()
    return _Entry(path, _Document.model_validate(describe(measured, resamples)), resamples)


def _read(path: Path) -> _Document:
    try:
        document = _Document.model_validate(parse_json(path.read_text(encoding="utf-8")))
        document.figures()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; make one with csalign eval --json, or give a run"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path}: is not what csalign eval --json prints; give files of it, or runs"
        ) from None
    return document


def _names(entries: Sequence[_Entry]) -> list[str]:
    apart = len({entry.source.parent for entry in entries}) > 1
    return [
        (str(entry.source) if apart else entry.source.name)
        + ("" if entry.document.adapter else " (no adapter)")
        for entry in entries
    ]


def _chosen(baseline: str | None, entries: Sequence[_Entry], names: Sequence[str]) -> _Entry:
    if baseline is None:
        return entries[0]
    for entry, name in zip(entries, names, strict=True):
        if baseline in (name, str(entry.path), str(entry.source)):
            return entry
    if baseline.isascii() and baseline.isdigit() and 1 <= int(baseline) <= len(entries):
        return entries[int(baseline) - 1]
    raise ConfigError(
        f"baseline: {baseline!r} is none of {', '.join(names)}; name one of them, or give its "
        f"number, 1 to {len(entries)}"
    )


def _pair(entries: Sequence[_Entry], names: Sequence[str], baseline: _Entry) -> None:
    """Get resamples for all that can be paired with the baseline; say what cannot, and why."""
    others = [entry for entry in entries if entry is not baseline]
    for entry in others:
        entry.unpaired = _other_data(entry.document, baseline.document)
    matching = [entry for entry in others if entry.unpaired is None]
    if matching:
        for entry in (baseline, *matching):
            if entry.resamples is None:
                entry.resamples, entry.unpaired = _measured_again(entry.document)
    if baseline.unpaired is not None:
        for entry in matching:
            entry.unpaired = f"of the baseline, {baseline.unpaired}"
    reasons = [
        f"{name} ({entry.unpaired})"
        for name, entry in zip(names, entries, strict=True)
        if entry is not baseline and entry.unpaired is not None
    ]
    if reasons:
        log.warning(
            "not paired with the baseline, so no difference is judged: %s", "; ".join(reasons)
        )


def _other_data(document: _Document, baseline: _Document) -> str | None:
    """Why two documents are not of the same queries, None if they are."""
    if document.fingerprints is None or baseline.fingerprints is None:
        return "an older csalign eval, which did not note what it measured"
    if document.fingerprints.features != baseline.fingerprints.features:
        return "other features"
    if document.protocol != baseline.protocol:
        return f"protocol {document.protocol.name}, the baseline {baseline.protocol.name}"
    if document.split != baseline.split:
        return f"split {document.split}, the baseline {baseline.split}"
    return None if document.data() == baseline.data() else "another number of queries"


def _measured_again(document: _Document) -> tuple[Resamples | None, str | None]:
    """Resamples of what a document describes, or why there are none."""
    try:
        config = EvalConfig.resolve(
            None,
            {
                "features": document.features,
                "adapter": document.adapter,
                "split": document.split,
                "protocol": document.protocol.name,
            },
        )
        measured = measure(config)
    except CsalignError as error:
        return None, str(error)
    for part, fingerprint in measured.fingerprints.items():
        if fingerprint != getattr(document.fingerprints, part):
            return None, f"{getattr(document, part)} changed since its evaluation"
    return measured.resample(), None


def _warn_of_bandwidths(entries: Sequence[_Entry]) -> None:
    known = {entry.document.bandwidth for entry in entries} - {None}
    if len(known) > 1:
        log.warning(
            "CS figures of different bandwidths (%s) say nothing of each other",
            ", ".join(f"{bandwidth:g}" for bandwidth in sorted(filter(None, known))),
        )


def _row(entry: _Entry, baseline: _Entry) -> dict[str, Any]:
    figures = entry.document.figures()
    known = entry.resamples.intervals() if entry.resamples else entry.document.intervals
    found = {name: _interval(known, place[1:]) for name, place in FIGURES.items()}
    intervals = {name: list(interval) for name, interval in found.items() if interval}
    difference, verdict = _difference(entry, baseline)
    return {
        **figures,
        "intervals": intervals,
        "difference": difference,
        "verdict": BASELINE if entry is baseline else verdict,
        "parameters": entry.document.parameters,
        "seconds": _seconds(entry.document),
    }


def _difference(entry: _Entry, baseline: _Entry) -> tuple[dict[str, Any], str]:
    """Each figure less the baseline's, and what to make of it."""
    own, others = entry.resamples, baseline.resamples
    if entry is baseline or entry.unpaired or own is None or others is None:
        return {}, NOT_PAIRED
    found, start, difference = entry.document.figures(), baseline.document.figures(), {}
    for name, (_, *place) in FIGURES.items():
        if tuple(place) in own.figures:
            interval, _ = own.minus(others, tuple(place))
            value = found[name] - start[name]
            difference[name] = {"value": value, "interval": list(interval)}
    _, verdict = own.minus(others, FIGURES[DECIDES][1:])
    return difference, verdict.value


def _interval(known: Any, place: Sequence[str]) -> Limits | None:
    try:
        found = _at(known, place)
    except (KeyError, TypeError):
        return None
    return None if isinstance(found, dict) else found


def _seconds(document: _Document) -> float | None:
    """How long a run took to train, where it says so and is still what was evaluated."""
    if document.adapter is None or document.fingerprints is None:
        return None
    run = Path(document.adapter)
    try:
        environment = read_environment(run)
        same = read_info(run).weights_sha256 == document.fingerprints.adapter
        return float(environment["seconds"]) if same else None
    except (CsalignError, OSError, ValueError, KeyError, TypeError):
        return None  # only a remark beside the figures


def _at(document: Any, place: Sequence[str]) -> Any:
    for key in place:
        document = document[key]
    return document
