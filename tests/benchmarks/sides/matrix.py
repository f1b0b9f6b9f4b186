"""Ranks of every side against every other, by one function for all methods, and their intervals."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pair = tuple[str, str]
Embed = Callable[[str, Floats], Floats]  # unit rows of a side

RECALL_AT = (1, 5, 10)
TIE = 1e-6


class Sides(NamedTuple):
    """The rows of every side, and which of them each item has; -1 for none."""

    names: tuple[str, ...]
    rows: dict[str, Floats]
    of_items: dict[str, Ints]
    splits: NDArray[np.str_]

    def of_split(self, split: str) -> dict[str, Ints]:
        """For the items of a split, the row of each side."""
        return {name: own[self.splits == split] for name, own in self.of_items.items()}

    def common(self, a: str, b: str, split: str) -> tuple[Ints, Ints]:
        """The rows of the items of a split that have both sides."""
        rows = self.of_split(split)
        both = (rows[a] >= 0) & (rows[b] >= 0)
        return rows[a][both], rows[b][both]


def load_sides(folder: Path, table: str = "items.csv") -> Sides:
    """Read arrays and a table that corpus.py wrote."""
    with (folder / table).open(newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    names = tuple(name for name in lines[0] if name not in ("item", "split"))
    rows = {name: np.load(folder / f"{name}.npy") for name in names}
    of_items = {name: np.array([int(line[name] or -1) for line in lines]) for name in names}
    return Sides(names, rows, of_items, np.array([line["split"] for line in lines]))


def ranks(queries: Floats, gallery: Floats, match: Ints) -> Ints:
    """The rank of the match (q,) of each query in a gallery of unit rows; ties rank ahead."""
    scores = queries @ gallery.T
    own = scores[np.arange(len(queries)), match]
    found: Ints = (scores >= own[:, None] - TIE).sum(axis=1)  # the match itself is among them
    return found


def pair_ranks(sides: Sides, pair: Pair, embed: Embed, split: str = "test") -> dict[Pair, Ints]:
    """The ranks in both directions, of items that have both sides among all rows of the split."""
    outputs, at = {}, {}
    for name in pair:
        own = sides.of_split(split)[name]
        outputs[name] = embed(name, sides.rows[name][own[own >= 0]])
        at[name] = np.where(own >= 0, np.cumsum(own >= 0) - 1, -1)
    both = (at[pair[0]] >= 0) & (at[pair[1]] >= 0)
    return {
        (a, b): ranks(outputs[a][at[a][both]], outputs[b], at[b][both])
        for a, b in (pair, pair[::-1])
    }


def all_ranks(sides: Sides, embed: Embed, split: str = "test") -> dict[Pair, Ints]:
    """The ranks of every ordered pair of sides."""
    found: dict[Pair, Ints] = {}
    for at, a in enumerate(sides.names):
        for b in sides.names[at + 1 :]:
            found |= pair_ranks(sides, (a, b), embed, split)
    return found


def recall(found: Ints) -> float:
    """Mean of recall at 1, 5 and 10, in percent."""
    return 100 * float(np.mean([(found <= k).mean() for k in RECALL_AT]))


def mean_recall(found: Mapping[Pair, Ints]) -> float:
    """Mean over ordered pairs of sides."""
    return float(np.mean([recall(own) for own in found.values()]))


def hits(
    sides: Sides, found: Mapping[Pair, Ints]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recalls and whether there is one, (ordered pairs, test items) each, for a bootstrap."""
    own = sides.of_split("test")
    pairs = list(permutations(sides.names, 2))
    has = np.array([(own[a] >= 0) & (own[b] >= 0) for a, b in pairs])
    values = np.zeros(has.shape)
    for row, pair in enumerate(pairs):
        values[row, has[row]] = np.mean([found[pair] <= k for k in RECALL_AT], axis=0)
    return values, has.astype(float)


def interval(
    values: NDArray[np.float64], has: NDArray[np.float64], resamples: int = 2_000
) -> tuple[float, float, float]:
    """Mean over ordered pairs, or of a difference, in points, with its 95 % bootstrap over items.

    Args:
        values: (pairs, items), 0 where an item has no query of that pair.
        has: (pairs, items), 1 where it has.
        resamples: of items.
    """
    counts = np.random.default_rng(0).multinomial(
        values.shape[1], np.full(values.shape[1], 1 / values.shape[1]), resamples
    )
    means = (counts @ values.T / np.maximum(counts @ has.T, 1)).mean(axis=1)
    low, high = np.percentile(100 * means, (2.5, 97.5))
    centre = (values.sum(axis=1) / has.sum(axis=1)).mean()
    return 100 * float(centre), float(low), float(high)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if len(values) > 1 else "")
