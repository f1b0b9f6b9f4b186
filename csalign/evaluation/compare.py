"""``csalign compare``: several systems side by side, with paired significance intervals."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csalign.adapters.checkpoint import read_info
from csalign.adapters.hub import local_path
from csalign.adapters.kinds import is_baseline
from csalign.core.errors import ConfigError, CsalignError, DataError, ShapeError
from csalign.core.figures import value_at
from csalign.core.paths import is_remote
from csalign.core.progress import Progress, reported_to, silent, within
from csalign.core.results import CompareResult
from csalign.evaluation.config import CompareConfig, EvalConfig
from csalign.evaluation.documents import Document, PairDocument, SidedDocument, read_document
from csalign.evaluation.loading import Loaded, load, warn_of_trained
from csalign.evaluation.measure import Evaluation, describe, measure_loaded
from csalign.evaluation.protocols import AlignedRows
from csalign.evaluation.sides.measure import (
    SidedEvaluation,
    is_sided,
    measure_sides,
    refuse_options,
)
from csalign.evaluation.versions import compare_versions, have_one_side
from csalign.features.checks import warn_of_queries
from csalign.features.reader import FeatureSet
from csalign.features.schema import MANIFEST
from csalign.metrics.bootstrap import Resamples, Verdict
from csalign.runs.metadata import find_features, read_environment

log = logging.getLogger(__name__)

SHARED = {"allow_adapter", "any_encoder", "device", "labels", "groups"}  # options of an evaluation

DECIDES = "mean_recall"  # the metric of the verdict
BASELINE = "baseline"
NOT_PAIRED = "cannot tell (not paired)"
APPROXIMATE = "cannot tell (approximate)"


@dataclass
class _Entry:
    """A system: its document, its resamples if it can be resampled, and else why it cannot."""

    path: Path
    document: Document
    resamples: Resamples | None = None
    unpaired: str | None = None
    aligned: Any = None  # its rows, if it was measured here, for `warn_of_trained`

    @property
    def source(self) -> Path:
        return Path(self.document.adapter or self.document.features)


def compare(config: CompareConfig, progress: Progress = silent) -> CompareResult:
    """Line up the metrics of runs and evaluations, each against a baseline.

    A feature set is evaluated without an adapter, which shows what a run has gained; a set whose
    sides have different widths has no such figures, and is left out with a warning. A run is
    evaluated on ``config.features``, by default on the features that it was trained on, or from
    Python on the two arrays that it is compared with. A document
    of ``csalign eval --json`` keeps its metrics; its queries are ranked again if it has the
    baseline's features, split and counts, both are exact, and its inputs are unchanged. The
    difference is then resampled in pairs. Feature sets of one side each are compared by id, as
    embeddings of the same items by several models: `versions.compare_versions` describes that
    document.

    Returns:
        ``{"evaluations": [{"name", "split", "index", FIGURES..., "intervals", "difference",
        "verdict", "parameters", "seconds"}, ...]}`` in the order given. "intervals" is
        ``{metric: [low, high]}`` as far as known; "difference" is ``{metric: {"value",
        "interval"}}``, {} for the baseline and unpaired systems; "verdict" is about the mean
        recall: "baseline", "better", "worse", "cannot tell", "cannot tell (not paired)" or
        "cannot tell (approximate)". "parameters" and "seconds" are None if unknown.

    Raises:
        DataError: a path is missing, or is neither a feature set, a run nor such a document; or
            the features of a run are not found.
        ShapeError: the sides of the only feature set have different widths.
        ConfigError: the baseline is not one of them.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> run = csalign.train((images, texts), "run", steps=2, hidden=8).run
    >>> csalign.compare(run, run, features=(images, texts)).to_frame()["verdict"].tolist()
    ['baseline', 'cannot tell']
    """
    config.check()
    systems = [local_path(path) for path in config.systems]
    if have_one_side(systems):
        return compare_versions(config, systems)
    entries: list[_Entry] = []
    total, rows = len(systems), _Rows()
    for number, path in enumerate(systems, 1):
        try:
            with reported_to(within(f"{path.name} ({number}/{total})")):
                is_run = path.is_dir() or is_baseline(path)
                entries.append(
                    _evaluate(path, config, rows) if is_run else _Entry(path, read_document(path))
                )
        except ShapeError as error:
            if total == 1 or not ((path / MANIFEST).is_file() or is_baseline(path)):
                raise
            log.warning("left out: %s", error)
    if not entries:
        raise DataError("nothing to compare is left; pass runs")
    warn_of_trained([entry.aligned for entry in entries if entry.aligned is not None])
    names = _names(entries)
    sides = [entry.document.sides for entry in entries]
    for name, own in zip(names, sides, strict=True):
        if {*own} != {*sides[0]}:
            both = (" and ".join(one) or "images and texts" for one in (sides[0], own))
            raise ConfigError(
                f"{names[0]}: is measured on {next(both)}, {name} on {next(both)}; name the sides "
                "that both have with --sides"
            )
    baseline = _find_baseline(config.baseline, entries, names)
    _pair(entries, names, baseline, config)
    known = {entry.document.bandwidth for entry in entries if entry.document.bandwidth is not None}
    if len(known) > 1:
        listed = ", ".join(f"{bandwidth:g}" for bandwidth in sorted(known))
        log.warning("CS divergences of different bandwidths (%s) are not comparable", listed)
    found = [
        _row(name, entry, baseline, config.labels)
        for name, entry in zip(names, entries, strict=True)
    ]
    called = entries[0].document.names
    is_common = called is not None and all(entry.document.names == called for entry in entries)
    return CompareResult(
        {"evaluations": found}
        | ({"sides": sides[0]} if sides[0] else {})
        | ({"names": called} if is_common else {})
    )


class _Rows(dict[tuple[Path, str | None], Loaded]):
    """Rows of the feature sets by path and split, each loaded, and warned of, once."""

    def of(self, options: EvalConfig) -> Loaded:
        """Return the rows that the options name."""
        place = options.feature_set
        key = (place if is_remote(place) else place.resolve(), options.split)
        if key not in self:
            self[key] = load(options)
            warn_of_queries(self[key].rows, self[key].rows.name)
        return self[key]


def _evaluate(path: Path, config: CompareConfig, rows: _Rows) -> _Entry:
    """Evaluate a feature set as it is, or a run."""
    run = None if (path / MANIFEST).is_file() else path
    features = path if run is None else config.features
    if is_baseline(run) and features is None:
        sets = [own for own in config.systems if (own / MANIFEST).is_file()]
        if not sets:
            raise ConfigError(
                f"{run}: is a baseline, which is fitted on features; name them with --features, or "
                "among the systems"
            )
        features = sets[0]
    elif run is not None and features is None:
        features = find_features(run, read_info(run).data_fingerprint)
    shared = config.model_dump(include={*SHARED, "split", "sides"})
    options = EvalConfig(features=features, adapter=run, subsets=False, **shared)
    if is_sided(FeatureSet.open(options.feature_set), config.sides):
        refuse_options(config, "labels", "groups")
        sided = measure_sides(options, options)
        found = SidedDocument.model_validate(sided.describe())
        return _Entry(path, found, sided.resamples, aligned=sided)
    evaluation = measure_loaded(options, rows.of(options))
    document = PairDocument.model_validate(describe(evaluation))
    return _Entry(path, document, evaluation.resamples, aligned=evaluation.aligned)


def _names(entries: Sequence[_Entry]) -> list[str]:
    is_long = len({entry.source.parent for entry in entries}) > 1
    return [
        (str(entry.source) if is_long else entry.source.name)
        + ("" if entry.document.adapter else " (no adapter)")
        for entry in entries
    ]


def _find_baseline(baseline: str | None, entries: Sequence[_Entry], names: list[str]) -> _Entry:
    if baseline is None:
        return entries[0]
    for entry, name in zip(entries, names, strict=True):
        if baseline in (name, str(entry.path), str(entry.source)):
            return entry
    if baseline.isascii() and baseline.isdigit() and 1 <= int(baseline) <= len(entries):
        return entries[int(baseline) - 1]
    raise ConfigError(
        f"--baseline: {baseline!r} is not one of {', '.join(names)}; name one of them, or pass its "
        f"number, 1 to {len(entries)}"
    )


def _pair(
    entries: Sequence[_Entry], names: list[str], baseline: _Entry, config: CompareConfig
) -> None:
    """Resample all that can be paired with the baseline; log what cannot, and why."""
    reasons = []
    for entry, name in zip(entries, names, strict=True):
        if entry is not baseline:
            entry.unpaired = _reason_against_pairing(entry.document, baseline.document)
            if entry.unpaired is None:
                _resample(baseline, config)
                _resample(entry, config)
            if entry.unpaired is None and baseline.unpaired is not None:
                entry.unpaired = f"of the baseline, {baseline.unpaired}"
            if entry.unpaired is not None:
                reasons.append(f"{name} ({entry.unpaired})")
    if reasons:
        log.warning("not paired with the baseline, so not judged: %s", "; ".join(reasons))


def _reason_against_pairing(document: Document, baseline: Document) -> str | None:
    own, other = document.fingerprints, baseline.fingerprints
    if own is None or other is None:
        return "written by an older csalign eval without fingerprints"
    if own.features != other.features:
        return "other features"
    if document.rule != baseline.rule:
        return f"protocol {document.rule}, the baseline {baseline.rule}"
    if document.split != baseline.split:
        return f"split {document.split}, the baseline {baseline.split}"
    if document.counts != baseline.counts:
        return "another number of queries"
    kinds = document.kind, baseline.kind
    return None if kinds == ("exact", "exact") else "ranks {}, the baseline {}".format(*kinds)


def _resample(entry: _Entry, config: CompareConfig) -> None:
    """Measure again what a document describes and resample it, or state why it cannot be done."""
    document = entry.document
    if entry.resamples is not None or entry.unpaired is not None:
        return
    given = document.model_dump(include={"features", "adapter", "split"})
    given |= config.model_dump(include=SHARED)
    evaluation: SidedEvaluation | Evaluation
    aligned: SidedEvaluation | AlignedRows
    try:
        options = EvalConfig.resolve(None, given | {"protocol": document.rule, "subsets": False})
        if document.sides:
            options = options.model_copy(update={"sides": tuple(document.sides)})
            evaluation = aligned = measure_sides(options, options)
        else:
            evaluation = measure_loaded(options, load(options, options.protocol))
            aligned = evaluation.aligned
    except CsalignError as error:
        entry.unpaired = str(error)
        return
    for part, fingerprint in aligned.fingerprints().items():
        if fingerprint != getattr(document.fingerprints, part):
            entry.unpaired = f"{getattr(document, part)} changed since its evaluation"
            return
    entry.resamples = evaluation.resamples
    if isinstance(evaluation, Evaluation):
        entry.document = PairDocument.model_validate(document.model_dump() | evaluation.tasks)


def _row(name: str, entry: _Entry, baseline: _Entry, labels: str | None) -> dict[str, Any]:
    document, figures = entry.document, entry.document.figures(labels)
    known = entry.resamples.intervals() if entry.resamples else document.intervals
    intervals = {
        name: value_at(known, document.resampled(name))
        for name, own in figures.items()
        if own is not None
    }
    difference: dict[str, Any] = {}
    verdicts: dict[str, Verdict] = {}
    is_exact = {document.kind, baseline.document.kind} == {"exact"}
    verdict = NOT_PAIRED if is_exact else APPROXIMATE
    own, others = entry.resamples, baseline.resamples
    if entry is baseline:
        verdict = BASELINE
    elif own is not None and others is not None and entry.unpaired is None:
        for figure, before in baseline.document.figures(labels).items():
            place, value = document.resampled(figure), figures[figure]
            if place in own.figures and before is not None and value is not None:
                interval, verdicts[figure] = own.minus(others, place)
                difference[figure] = {"value": value - before, "interval": list(interval)}
        verdict = verdicts[DECIDES].value
    of_directions = {
        name: own.value for name, own in verdicts.items() if name.endswith(f"_{DECIDES}")
    }
    return {
        "name": name,
        "split": document.split,
        "index": document.kind,
        **figures,
        "intervals": {
            name: [*own] for name, own in intervals.items() if isinstance(own, list | tuple)
        },
        "difference": difference,
        "verdict": verdict,
        **({"verdicts": of_directions} if document.sides else {}),
        "parameters": document.parameters,
        "seconds": _seconds(document),
    }


def _seconds(document: Document) -> float | None:
    """Return the training time of a run, if it is recorded and the run is what was evaluated."""
    try:
        run = Path(document.adapter or "")
        if document.fingerprints is None or document.fingerprints.adapter is None:
            return None
        same = read_info(run).weights_sha256 == document.fingerprints.adapter
        return float(read_environment(run)["seconds"]) if same else None
    except (CsalignError, OSError, ValueError, KeyError, TypeError):
        return None  # only a remark beside the metrics
