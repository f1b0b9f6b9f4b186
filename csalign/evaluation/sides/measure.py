"""Measure any number of sides: the matrix of recalls, the gaps, and retrieval by several sides."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch

from csalign.adapters.checkpoint import read_info
from csalign.adapters.kinds import is_baseline
from csalign.core.config import Config
from csalign.core.devices import pick_device
from csalign.core.enums import AnySide, Modality
from csalign.core.errors import ConfigError, DataError, OutputError, ShapeError
from csalign.core.figures import counted
from csalign.core.progress import tick, track
from csalign.core.results import EvalResult, leaves
from csalign.evaluation.config import EvalConfig, MeasureOptions, SourceOptions
from csalign.evaluation.loading import is_trained_on, warn_of_trained
from csalign.features import schema
from csalign.features.checks import FEW_QUERIES, unit_rows
from csalign.features.join import ALL
from csalign.features.reader import FeatureSet
from csalign.features.sides import SidedRows, chosen_sides, load_sides
from csalign.metrics.bootstrap import Place, Resamples, nested
from csalign.metrics.gap import gap_of_items
from csalign.metrics.sides import (
    FROM_TARGET,
    MEAN_RECALL,
    SCORES,
    FirstRanks,
    Pair,
    Points,
    mean_of_recalls,
    rank_by_subsets,
    rank_rows,
    resample_sides,
)
from csalign.runs.load import check_aligned, load_adapter_for

ALL_SUBSETS = 5  # sides; of more, only all the others of a side, and all but one
OF_PAIRS = (
    *("protocol", "index", "baselines", "pictures", "umap", "groups", "labels", "relevance", "by"),
    *("correct", "zero_shot", "class_of", "encoder"),
)
"""Options of ``csalign eval`` that have a meaning for images and texts only."""
COLLAPSED_RANK = 1.5  # effective dimensions

log = logging.getLogger(__name__)


def is_sided(features: FeatureSet, sides: Sequence[str] | None) -> bool:
    """Return whether what is named, by default all of a set, is more than images and texts."""
    if sides is None:
        return features.is_sided
    return {*chosen_sides(features, sides)} != {*Modality}


def refuse_options(config: Config, *names: str) -> None:
    """Raise ConfigError if an option is set that has a meaning for two sides only."""
    fields = type(config).model_fields
    if given := [name for name in names if getattr(config, name) != fields[name].default]:
        listed = ", ".join(map(config.shown, given))
        raise ConfigError(
            f"{listed}: only for images and texts; omit it, or select these with --sides image,text"
        )


@dataclass(frozen=True)
class SidedEvaluation:
    """Embedded rows of several sides, and what is measured of them."""

    features: FeatureSet
    split: str  # comma-separated names
    rows: SidedRows
    points: Mapping[str, Points]  # by name
    options: MeasureOptions
    device: torch.device
    adapter: Path | None = None
    weights_sha256: str | None = None
    parameters: int | None = None
    is_trained: bool | None = False  # on some of the rows; None if that is unknown

    @cached_property
    def pairs(self) -> dict[Pair, Any]:
        """All pairs of rows of two sides that share an item."""
        return {(a, b): self.rows.pairs(a, b) for a, b in combinations(self.points, 2)}

    @cached_property
    def ranks(self) -> dict[Place, FirstRanks]:
        """The ranks of all directions and, if the options want them, by subsets."""
        cells, points = [*permutations(self.points, 2)], self.points
        found: dict[Place, FirstRanks] = {
            ("matrix", a, b): rank_rows(points[a], points[b], self.device)
            for a, b in track(cells, "ranking: directions", len(cells))
        }
        for target, subsets in track(self.subsets(found).items(), "ranking: by several sides"):
            own = rank_by_subsets(points, self.rows.count, target, subsets, self.device)
            found |= {
                ("subsets", target, *place): ranks
                for place, ranks in own.items()
                if len(ranks.first)
            }
        return found

    def subsets(self, ranks: Mapping[Place, FirstRanks]) -> dict[str, list[tuple[str, ...]]]:
        """List the subsets that are measured by target, in each the best sides first."""
        found: dict[str, list[tuple[str, ...]]] = {}
        for target in self.points if self.options.subsets and len(self.points) > 2 else ():
            recall = {
                name: mean_of_recalls(
                    [ranks["matrix", name, target], ranks["matrix", target, name]]
                )
                for name in self.points
                if name != target
            }
            best_first = sorted(recall, key=lambda name: (-recall[name], name))
            found[target] = [
                tuple(sorted(own, key=best_first.index)) for own in subsets_of([*recall])
            ]
        return found

    @cached_property
    def resamples(self) -> Resamples:
        """The figures on bootstrap resamples."""
        return resample_sides(
            *(self.points, self.rows.count, self.ranks, self.pairs),
            resamples=self.options.resamples,
            seed=self.options.seed,
        )

    def describe(self) -> dict[str, Any]:
        """Build the document of ``csalign eval``."""
        gap, ranks = self._gap()
        for side, rank in ranks.items():
            if rank < COLLAPSED_RANK:
                log.warning(
                    "all %s embeddings are nearly the same, so a small gap means nothing here", side
                )
        return {
            "features": str(self.features.path),
            "split": self.split,
            "adapter": None if self.adapter is None else str(self.adapter),
            "sides": [*self.points],
            "fingerprints": self.fingerprints(),
            "parameters": self.parameters,
            "bandwidth": self.options.bandwidth,
            "index": {"kind": "exact", "device": self.device.type},
            "counts": {
                "items": self.rows.count,
                "rows": {name: len(own.items) for name, own in self.points.items()},
                "pairs": both_ways({pair: len(rows) for pair, (rows, _) in self.pairs.items()}),
            },
            **self._ranked(),
            "gap": gap,
            "effective_rank": ranks,
            "intervals": self.resamples.intervals() if self.options.intervals else {},
        }

    def fingerprints(self) -> dict[str, str | None]:
        """Return the fingerprints of the features' content and of the adapter's weights."""
        return {"features": self.features.manifest.fingerprint(), "adapter": self.weights_sha256}

    def _gap(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Compute the gap of each pair of sides, and the effective rank of each side."""
        found: dict[Pair, Any] = {}
        ranks: dict[str, float] = {}
        for (a, b), pairs in track(self.pairs.items(), "gap: pairs of sides", len(self.pairs)):
            x, y = self.points[a], self.points[b]
            own = gap_of_items(
                *(x.rows, y.rows, (x.items, y.items), pairs),
                sigma=self.options.bandwidth,
                seed=self.options.seed,
            )
            names = {"image": a, "text": b}
            for block in (own, own.get("standard_errors", {})):
                if "uniformity" in block:
                    parts = block["uniformity"].items()
                    block["uniformity"] = {names.get(key, key): value for key, value in parts}
            ranks |= {names[key]: value for key, value in own.pop("effective_rank").items()}
            del own["spectrum"]
            found[a, b] = own
        return both_ways(found), ranks

    def _ranked(self) -> dict[str, Any]:
        """Build the blocks "matrix", "mean_recall" and "subsets"."""
        cells = [own for place, own in self.ranks.items() if place[0] == "matrix"]
        found: dict[str, Any] = {"matrix": {}, MEAN_RECALL: mean_of_recalls(cells), "subsets": {}}
        found |= nested({place: own.summary() for place, own in self.ranks.items()})
        for target, subsets in self.subsets(self.ranks).items():
            for subset in subsets:
                place = "subsets", target, "+".join(sorted(subset))
                if (*place, SCORES[0]) not in self.ranks:
                    continue  # no item of the subset has a row of the target
                block = found["subsets"][target][place[-1]]
                for score in SCORES:
                    both = (self.ranks[*place, score, *way] for way in ((), (FROM_TARGET,)))
                    block[score][MEAN_RECALL] = mean_of_recalls([*both])
                own, best = (block[score][MEAN_RECALL] for score in (SCORES[0], SCORES[-1]))
                block |= {"best_side": subset[0], "gain": own - best}
        return found


class SidesResult(EvalResult):
    """What `evaluate` measured of several sides.

    `to_frame` has a row per figure: its "block" ("matrix", "gap" or "subsets"), "part" (such as
    "audio.text"), "figure", "value", and the ends "low" and "high" of its 95 % interval.
    """

    def _rows(self) -> list[dict[str, Any]]:
        ends, rows = dict(leaves(self["intervals"])), []
        for path, value in leaves({key: self[key] for key in ("matrix", "gap", "subsets")}):
            if isinstance(value, int | float):
                low, high = ends.get(path) or (None, None)
                row = {"block": path[0], "part": ".".join(path[1:-1]), "figure": path[-1]}
                rows.append({**row, "value": value, "low": low, "high": high})
        return rows

    def _lines(self) -> list[tuple[str, str]]:
        shown = {key: str(self[key]) for key in ("features", "adapter", "split")}
        shown["sides"] = ", ".join(f"{own} ({n:,})" for own, n in self["counts"]["rows"].items())
        recalls = {
            f"{a} to {b} mean recall % ↑": own[MEAN_RECALL]
            for a, row in self["matrix"].items()
            for b, own in row.items()
        } | {"mean recall % ↑": self["mean_recall"]}
        return [*shown.items(), *((k, f"{100 * (v or 0):.2f}") for k, v in recalls.items())]


def subsets_of(others: Sequence[str]) -> list[tuple[str, ...]]:
    """List the subsets of a target's other sides that are measured, the smallest first."""
    names = sorted(others)
    least = 2 if len(names) < ALL_SUBSETS else len(names) - 1
    return [own for k in range(least, len(names) + 1) for own in combinations(names, k)]


def both_ways(cells: Mapping[Pair, Any]) -> dict[str, Any]:
    """Nest what has no direction by both orders of its sides."""
    return nested({pair: own for (a, b), own in cells.items() for pair in ((a, b), (b, a))})


def measure_sides(config: SourceOptions, options: MeasureOptions) -> SidedEvaluation:
    """Load and embed the rows of several sides; see `evaluate`.

    Sides without an adapter, where `--sides` does not name them, and sides without rows in the
    split are left out, which is logged.

    Raises:
        ConfigError: fewer than two sides are left, or the adapter is a baseline.
        ShapeError: no adapter is given, and the widths of the sides differ.
        DataError, SchemaError: as of `evaluate`.
    """
    features = FeatureSet.open(config.feature_set)
    split = config.split or ("test" if "test" in features.splits() else ALL)
    names, adapter, info = chosen_sides(features, config.sides), None, None
    if config.adapter is not None:
        names = _sides_of_run(features, config.adapter, config.sides, names)
        adapter, info = load_adapter_for(features, config.adapter, config, sides=names)
    rows = load_sides(features, split, names)
    if empty := [name for name, own in rows.sides.items() if not len(own.items)]:
        log.warning("%s: no rows of %s, left out", rows.name, ", ".join(empty))
        names = tuple(name for name in names if name not in empty)
        if len(names) < 2:
            raise DataError(
                f"{rows.name}: has rows of {', '.join(names)} only; name another --split"
            )
        rows = replace(rows, sides={name: rows.sides[name] for name in names})
    if not (several := int((rows.present.sum(1) > 1).sum())):
        raise DataError(
            f"{rows.name}: no item has rows of two of {', '.join(names)}; name another --split or "
            "other --sides, or check the items with csalign diagnose"
        )
    if several < FEW_QUERIES:
        log.warning(
            "%s: only %s have two sides or more, so recalls are uncertain; see the intervals",
            *(rows.name, counted(several, "item")),
        )
    widths = {name: own.embeddings.shape[1] for name, own in rows.sides.items()}
    if adapter is None and len({*widths.values()}) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ShapeError(
            f"{features.path}: the sides have different widths ({listed}), so nothing can be "
            "compared before training; pass --adapter RUN, or --sides with those of one width"
        )
    points: dict[str, Points] = {}
    for name, own in rows.sides.items():
        tick(f"embedding: {name}")
        place = f"{rows.name}: {name.plural}"
        ids = features.table(name).column(schema.ID, own.table_rows)
        if adapter is None:
            values = unit_rows(own.embeddings, ids, place)
        else:
            values = adapter.embed(name, own.embeddings)
            check_aligned(values, ids, place, config.adapter)
        points[str(name)] = Points(values, own.items)
    device = pick_device(config.device)
    evaluation = SidedEvaluation(
        *(features, split, rows, points, options),
        device if device.type == "cuda" else torch.device("cpu"),
    )
    if adapter is None or info is None:
        return evaluation
    return replace(
        evaluation,
        adapter=config.adapter,
        weights_sha256=info.weights_sha256,
        parameters=sum(adapter.parameter_counts().values()),
        is_trained=is_trained_on(features, info, split),
    )


def _sides_of_run(
    features: FeatureSet, run: Path, wanted: Sequence[str] | None, names: tuple[AnySide, ...]
) -> tuple[AnySide, ...]:
    """Return the sides that a run has an adapter for, of those that are measured."""
    if is_baseline(run):
        raise ConfigError(
            f"{run}: is fitted on images and texts; pass --sides image,text, or a run of csalign "
            "train"
        )
    there = [*read_info(run).adapters]
    missing = [name for name in names if name not in there]
    kept = tuple(name for name in names if name in there)
    if missing and (wanted is not None or len(kept) < 2):
        raise ConfigError(
            f"{run}: has no adapter for {', '.join(missing)}, only for {', '.join(there)}; pass "
            f"--sides {','.join(kept) or 'A,B'}, or train on {features.path}"
        )
    if missing:
        log.info("%s: has no adapter for %s, measured without", run, ", ".join(missing))
    return kept


def evaluate_sides(config: EvalConfig, unwritten: list[OutputError]) -> dict[str, Any]:
    """Measure several sides; see `evaluate`."""
    refuse_options(config, *OF_PAIRS)
    evaluation = measure_sides(config, config)
    warn_of_trained([evaluation])
    document = evaluation.describe()
    if config.report is not None:
        from csalign.report.sides import write_sides

        try:
            write_sides(config.report, document)
        except OutputError as error:
            unwritten.append(error)
    return document
