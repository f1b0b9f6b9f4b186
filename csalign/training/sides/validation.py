"""Figures of any sides on held-out rows."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from csalign.adapters.model import Adapter
from csalign.core.arrays import Floats, Ints
from csalign.core.enums import AnySide
from csalign.core.progress import reported_to, silent, tick
from csalign.features.sides import SidedRows
from csalign.training.network.batch_loss import LEAST_SCALE
from csalign.training.network.validation import (
    ENOUGH_IMAGES,
    Measured,
    Score,
    measure,
    scale_of,
)

Outputs = Mapping[AnySide, tuple[Floats, Ints]]
"""Unit rows (n, k), one of each item, and their items (n,) ascending, by side."""

MOST_TO_SCALE = 500  # items of a pair of sides


def measure_sides(outputs: Outputs, to: AnySide | None = None) -> Measured:
    """Measure the retrieval of each side by each other, of items that have both.

    The gallery is all rows of a side. The score is the mean over the pairs of sides, or those that
    have the side `to`; see `Measured`, whose recalls are of the items of any pair.
    """
    count = 1 + max(int(items.max(initial=-1)) for _, items in outputs.values())
    recalls, scores = np.zeros(count), []
    for one, other in combinations(outputs, 2):
        (x, first), (y, second) = outputs[one], outputs[other]
        places = np.searchsorted(first, second)
        owner = np.where(first[np.minimum(places, len(first) - 1)] == second, places, -1)
        if (owner >= 0).any() and to in (None, one, other):
            found = measure(x, y, owner)
            scores.append(found.score)
            recalls[second[owner >= 0]] += found.recalls / len(found.recalls)
    measured = np.flatnonzero(np.bincount(_shared(outputs, to), minlength=count))
    mean = Score(*(float(own) for own in np.mean(scores, 0)))
    return Measured(mean, recalls[measured] * (len(measured) / len(scores)))


def _shared(outputs: Outputs, to: AnySide | None) -> Ints:
    """Return the items of each pair of sides that is measured, (k,) with repeats."""
    pairs = [pair for pair in combinations(outputs, 2) if to in (None, *pair)]
    found = [np.intersect1d(outputs[one][1], outputs[other][1]) for one, other in pairs]
    return np.concatenate(found)


def first_rows(rows: SidedRows) -> dict[AnySide, tuple[Any, Ints]]:
    """Return the first row of each item, (k, d), and the items, (k,) ascending, of each side."""
    found: dict[AnySide, tuple[Any, Ints]] = {}
    for side, own in rows.sides.items():
        items, first = np.unique(own.items, return_index=True)
        found[side] = own.embeddings[first], items
    return found


def embed_sides(adapter: Adapter, rows: SidedRows) -> Outputs:
    """Align the first row of each item and side."""
    tick("embedding")
    found = first_rows(rows).items()
    return {side: (adapter.embed(side, own), items) for side, (own, items) in found if len(items)}


def validate_sides(adapter: Adapter, rows: SidedRows, to: AnySide | None = None) -> Score:
    """Measure an adapter on held-out rows; see `measure_sides`."""
    with reported_to(silent):  # part of a phase that counts something else
        return measure_sides(embed_sides(adapter, rows), to).score


def scale_of_sides(adapter: Adapter, rows: SidedRows | None, to: AnySide | None = None) -> float:
    """Find the scale of logits: the mean over the pairs of sides of `logit_scale`.

    Pairs of sides with fewer than 100 held-out items do not count; 7 if none is left.
    """
    if rows is None:
        return LEAST_SCALE
    with reported_to(silent):
        outputs, scales = embed_sides(adapter, rows), []
    for one, other in combinations(outputs, 2):
        (x, first), (y, second) = outputs[one], outputs[other]
        _, left, right = np.intersect1d(first, second, assume_unique=True, return_indices=True)
        if len(left) >= ENOUGH_IMAGES and to in (None, one, other):
            some = np.linspace(0, len(left) - 1, min(len(left), MOST_TO_SCALE)).astype(int)
            scales.append(scale_of(x[left[some]], y[right[some]]))
    return float(np.mean(scales)) if scales else LEAST_SCALE
