"""``csalign diagnose`` of a feature set of any number of sides."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from csalign.core.arrays import Array, Ints
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.progress import track
from csalign.evaluation.agreement import (
    COMPARED,
    HARDLY,
    NEIGHBOURS,
    Agreement,
    Sample,
    measure_agreement,
)
from csalign.evaluation.config import DiagnoseConfig
from csalign.evaluation.sides.measure import both_ways, refuse_options
from csalign.features.arrays import write_arrays
from csalign.features.checks import LEAST_PAIRS
from csalign.features.reader import FeatureSet
from csalign.features.schema import read_manifest, write_manifest
from csalign.features.sides import SidedRows, load_sides

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pair:
    items: int  # that both sides have
    agreement: Agreement | None  # None of too few items

    @property
    def is_small(self) -> bool:
        """Whether nothing can be said of so few items."""
        return self.items < LEAST_PAIRS

    def describe(self) -> dict[str, Any]:
        names = ("compared", "cka", "mutual_knn", "mutual_knn_chance")
        own = self.agreement
        return {
            "items": self.items,
            **{name: getattr(own, name) if own else None for name in names},
            "looks_random": own is not None and own.is_random,
        }


def diagnose_sides(features: FeatureSet, config: DiagnoseConfig, split: str) -> dict[str, Any]:
    """Measure how well the sides of a set agree, by pairs, and how many items have them.

    Raises:
        ConfigError: an option has no meaning here.
        DataError, SchemaError: as of `load_sides`.
    """
    refuse_options(config, "logit_scale", "cs_weight", "bandwidth", "pairs", "report")
    _refuse_adapter(features, config)
    rows = load_sides(features, split, config.sides)
    rng, there = np.random.default_rng(config.seed), rows.present
    numbers = np.bincount(there.sum(1), minlength=len(rows.sides) + 1)
    pairs: dict[tuple[str, str], _Pair] = {}
    chosen = [*combinations(range(len(rows.sides)), 2)]
    names = [*rows.sides]
    for i, j in track(chosen, "agreement: pairs of sides", len(chosen)):
        shared = np.flatnonzero(there[:, i] & there[:, j])
        some = rng.permutation(shared)[:COMPARED]
        x, y = (_one_row_each(rows, names[k], some) for k in (i, j))
        sample = Sample(x, y, unpaired={})
        pairs[names[i], names[j]] = _Pair(len(shared), measure_agreement(sample, seed=config.seed))
    return {
        "features": str(features.path),
        "split": split,
        "sides": [*map(str, names)],
        "counts": {
            "items": rows.count,
            "rows": {str(name): len(own.items) for name, own in rows.sides.items()},
            "items_by_side": dict(zip(map(str, names), there.sum(0).tolist(), strict=True)),
            "items_by_sides": {str(k): int(n) for k, n in enumerate(numbers) if k},
        },
        "forecast": {
            "pairs": both_ways({pair: own.describe() for pair, own in pairs.items()}),
            "words": [*_words(rows.count, numbers, pairs)],
        },
    }


def _one_row_each(rows: SidedRows, name: Any, items: Ints) -> Array:
    """Return the first row of some items of a side, in their order."""
    own = rows.sides[name]
    found, first = np.unique(own.items, return_index=True)
    return own.embeddings[first[np.searchsorted(found, items)]]


def _words(count: int, numbers: Ints, pairs: Mapping[tuple[str, str], _Pair]) -> Iterator[str]:
    several, complete = int(numbers[2:].sum()), int(numbers[-1])
    yield (
        f"{several:,} of {count:,} items have two sides or more, {complete:,} have all "
        f"{len(numbers) - 1}; the others count as unpaired rows."
    )
    few = [f"{a} and {b} ({own.items:,})" for (a, b), own in pairs.items() if own.is_small]
    if few:
        yield (
            f"Fewer than {LEAST_PAIRS} shared items say little of how well two sides align: "
            f"{', '.join(few)}."
        )
    for (a, b), own in pairs.items():
        known = own.agreement
        if not own.is_small and known and (known.is_random or known.excess < HARDLY):
            yield f"{a} and {b}: {next(known.findings())}."
    excess: dict[str, list[float]] = {}
    for pair, own in pairs.items():
        for name in pair:
            excess.setdefault(name, []).append(own.agreement.excess if own.agreement else 0.0)
    best = max(excess, key=lambda name: (np.mean(excess[name]), name))
    if len(excess) > 2 and np.mean(excess[best]) > HARDLY:
        yield (
            f"The others agree best with {best} (mean mutual {NEIGHBOURS}-NN "
            f"{np.mean(excess[best]):.3f} above chance), the first choice for --hub."
        )


def _refuse_adapter(features: FeatureSet, config: DiagnoseConfig) -> None:
    if config.adapter is not None:
        raise ConfigError(
            f"{config.adapter}: sides beside images and texts are diagnosed before training, "
            f"without an adapter; use csalign diagnose {features.path}, or csalign eval "
            f"{features.path} --adapter {config.adapter}"
        )


def write_pair(features: FeatureSet, config: DiagnoseConfig, split: str, folder: Path) -> None:
    """Write two sides as a set of images and texts, for a diagnosis of this pair.

    Of several rows of an item on the first side one is used.

    Raises:
        ConfigError: an option has no meaning here.
        DataError: the sides share no item.
    """
    _refuse_adapter(features, config)
    rows = load_sides(features, split, config.sides)
    first, second = rows.sides.values()
    items = np.unique(first.items)
    owners = np.searchsorted(items, second.items)
    owners = np.where(items[np.minimum(owners, len(items) - 1)] == second.items, owners, -1)
    if not (owners >= 0).any():
        raise DataError(f"{rows.name}: {first.name} and {second.name} share no item")
    if left := len(first.items) - len(items):
        log.info("%s: %d further %s rows of an item are not used", rows.name, left, first.name)
    write_arrays(folder, _one_row_each(rows, first.name, items), second.embeddings, owners)
    names = dict(zip(Modality, (str(first.name), str(second.name)), strict=True))
    write_manifest(folder, read_manifest(folder).model_copy(update={"names": names}))
