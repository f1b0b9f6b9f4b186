"""Rows of any number of sides, which belong together by their items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.arrays import Array, Ints, Mask
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import ConfigError, DataError
from csalign.features import schema
from csalign.features.checks import check_directions
from csalign.features.join import ALL, select_rows, split_names
from csalign.features.reader import FeatureSet


@dataclass(frozen=True)
class SideRows:
    """Rows of one side."""

    name: AnySide
    embeddings: Array  # (n, d) in the stored dtype
    items: Ints  # (n,) int64, number of the item of each row
    table_rows: Ints  # (n,) int64, rows of the side's table, ascending

    def take(self, rows: Ints, items: Ints) -> "SideRows":
        """Take some rows, whose items get new numbers."""
        return replace(
            self, embeddings=self.embeddings[rows], items=items, table_rows=self.table_rows[rows]
        )


@dataclass(frozen=True)
class SidedRows:
    """Rows of several sides of some splits, and the items that they belong to.

    Items are numbered by their keys, so that neither the order of rows nor that of sides counts. A
    row without an item is an item of its own, after all others.
    """

    name: str  # the feature set and its split, for messages
    sides: Mapping[AnySide, SideRows]
    keys: pa.Array  # (count,) of the items, null for rows without one

    @property
    def count(self) -> int:
        """Number of items."""
        return len(self.keys)

    @cached_property
    def present(self) -> Mask:
        """Whether an item has a row of each side, (count, sides)."""
        found = np.zeros((self.count, len(self.sides)), bool)
        for column, side in enumerate(self.sides.values()):
            found[side.items, column] = True
        return found

    def pairs(self, one: str, other: str) -> tuple[Ints, Ints]:
        """Return all pairs of rows of two sides that share an item, by the rows of the first."""
        first, second = self.sides[side_of(one)].items, self.sides[side_of(other)].items
        order = np.argsort(second, kind="stable")
        ranked = second[order]
        starts, stops = (np.searchsorted(ranked, first, side) for side in ("left", "right"))
        counts = stops - starts
        own = np.repeat(np.arange(len(first)), counts)
        within = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
        return own, order[np.repeat(starts, counts) + within]

    def take(self, items: Mask) -> "SidedRows":
        """Take the items where a mask (count,) is true, with all of their rows."""
        numbers = np.cumsum(items) - 1
        sides = {}
        for name, side in self.sides.items():
            rows = np.flatnonzero(items[side.items])
            sides[name] = side.take(rows, numbers[side.items[rows]])
        return replace(self, sides=sides, keys=self.keys.filter(pa.array(items)))


def chosen_sides(features: FeatureSet, sides: Sequence[str] | None) -> tuple[AnySide, ...]:
    """Return the sides of a set that are named, in the set's order; all of them for None.

    Raises:
        ConfigError: the set has no such side, one is named twice, or fewer than two are left.
    """
    there = features.sides
    if sides is None:
        found = there
    else:
        named = [side_of(side.strip()) for side in sides]
        for side in named:
            if side not in there or named.count(side) > 1:
                what = "is named twice" if side in there else f"is not in {features.path}"
                raise ConfigError(f"--sides: {side} {what}; its sides are {', '.join(there)}")
        found = tuple(side for side in there if side in named)
    if len(found) < 2:
        raise ConfigError(
            f"{features.path}: two sides or more are needed, not {', '.join(found) or 'none'}; "
            + (
                "add one with csalign import --side NAME=FILE --add"
                if len(there) < 2
                else f"name more with --sides; its sides are {', '.join(there)}"
            )
        )
    return found


def load_sides(
    features: FeatureSet, split: str = ALL, sides: Sequence[str] | None = None
) -> SidedRows:
    """Read the embeddings and items of some splits ("all", or comma-separated).

    Raises:
        ConfigError: see `chosen_sides`.
        DataError: no row is of these splits, or a row has no direction.
        SchemaError: a shard is damaged.
    """
    chosen = chosen_sides(features, sides)
    names = None if split == ALL else sorted(str(name) for name in split_names(split, ()))
    name = f"{features.path}" + ("" if names is None else f" (split {split})")
    selected = {side: select_rows(features.table(side), names) for side in chosen}
    items = {side: item_column(features, side, rows) for side, rows in selected.items()}
    numbers, keys = number_items(features, items, selected)
    if not len(keys):
        there = ", ".join(str(own or "(rows without a split)") for own in features.splits())
        raise DataError(f"{name}: has no rows; the splits of the set are {there}")
    found = {}
    for side, rows in selected.items():
        table = features.table(side)
        values = table.embeddings() if rows is None else table.take(rows)
        check_directions(values, table.column(schema.ID, rows), f"{features.path}: {side.plural}")
        places = np.arange(len(values)) if rows is None else rows.astype(np.int64)
        found[side] = SideRows(side, values, numbers[side], places)
    return SidedRows(name, found, keys)


def in_order(features: FeatureSet, rows: SidedRows) -> SidedRows:
    """Sort the rows of each side by their item, and those of one item by their ids.

    So sorted they do not depend on the order in which they are stored.
    """
    found = {}
    for side, own in rows.sides.items():
        order = np.argsort(own.items, kind="stable")
        if (np.diff(own.items[order]) == 0).any():
            ids = features.table(side).strings(schema.ID, own.table_rows)
            rank = np.argsort(pc.sort_indices(ids).to_numpy())
            order = np.lexsort((rank, own.items))
        found[side] = own.take(order, own.items[order])
    return replace(rows, sides=found)


def item_column(features: FeatureSet, side: AnySide, rows: Ints | None = None) -> pa.Array:
    """Read the key of the item of each row (ascending; None is all), null for none, (n,).

    Where images and texts have no column of items, an image is an item of its id, and a text
    belongs to that of its image, or is one itself where there are no images.
    """
    name = schema.ITEM
    if isinstance(side, Modality) and not features.manifest.items:
        is_of_image = side is Modality.TEXT and len(features.images)
        name = schema.IMAGE_ID if is_of_image else schema.ID
    return features.table(side).strings(name, rows)


def number_items(
    features: FeatureSet, items: Mapping[AnySide, pa.Array], selected: Mapping[AnySide, Ints | None]
) -> tuple[dict[AnySide, Ints], pa.Array]:
    """Number the items of all sides by their keys, and then the rows without one.

    Returns:
        The item of each row by side, (n,) int64, and the keys of all items, null for those rows.
    """
    values = pa.chunked_array([*items.values()], pa.large_string()).unique().drop_null()
    keys = values.take(pc.sort_indices(values))
    count, numbers = len(keys), dict[AnySide, Ints]()
    for side in sorted(items):
        column = items[side]
        found = pc.index_in(column, value_set=keys).fill_null(-1).to_numpy().astype(np.int64)
        if len(alone := np.flatnonzero(found < 0)):
            rows = selected[side]
            places = alone if rows is None else rows[alone]
            ids = features.table(side).strings(schema.ID, places)
            order = pc.sort_indices(ids).to_numpy()
            found[alone[order]] = count + np.arange(len(alone))
            count += len(alone)
        numbers[side] = found
    padding = pa.nulls(count - len(keys), pa.large_string())
    return numbers, pa.concat_arrays([keys, padding])


def describe_sides(
    features: FeatureSet,
    sides: Sequence[AnySide] | None = None,
    items: Mapping[str, pa.Array] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Count the rows, items and pairs of some sides (all by default); reads no embeddings.

    Args:
        features: a feature set.
        sides: those to count.
        items: the `item_column` of each side, if known.

    Returns:
        By side "rows", those that are "unpaired" (their item has no other side), "width" and
        "encoder"; and the number of "items", "by_sides", how many have rows of so many sides, and
        "pairs" of rows of each two sides that share an item.
    """
    chosen = features.sides if sides is None else sides
    columns = {
        side: item_column(features, side) if items is None else items[side] for side in chosen
    }
    keys = pa.chunked_array([*columns.values()], pa.large_string()).unique().drop_null()
    rows, alone = {}, {}
    for side, column in columns.items():
        found = pc.index_in(column, value_set=keys).drop_null().to_numpy()
        rows[side] = np.bincount(found, minlength=len(keys))
        alone[side] = len(column) - len(found)  # rows without an item, each of which is one
    present = np.sum([own > 0 for own in rows.values()], axis=0)
    by_sides = np.bincount(present, minlength=len(chosen) + 1)
    by_sides[1] += sum(alone.values())
    found = {
        str(side): {
            "rows": len(columns[side]),
            "unpaired": int(own[present == 1].sum()) + alone[side],
            "width": features.table(side).width,
            "encoder": features.table(side).encoder.spec,
        }
        for side, own in rows.items()
    }
    pairs = {
        str(one): {str(other): int(rows[one] @ rows[other]) for other in chosen[place + 1 :]}
        for place, one in enumerate(chosen[:-1])
    }
    counts = {str(n): int(count) for n, count in enumerate(by_sides) if n and count}
    return found, {"items": int(by_sides.sum()), "by_sides": counts, "pairs": pairs}
