"""Items: which rows of any number of sides belong together, by a table or by a common key."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.arrays import Ints
from csalign.core.config import did_you_mean
from csalign.core.errors import DataError
from csalign.core.figures import counted
from csalign.sources.arrays.naming import (
    IMAGE_IDS,
    ITEM_IDS,
    ITEMS,
    TEXT_IDS,
    first_of,
    is_key,
    plain_name,
)
from csalign.sources.image_rows import row_numbers
from csalign.sources.keys import EXACT, Keys, examples, match, trimmed
from csalign.sources.labels import Labels, check_no_null, first_repeated
from csalign.sources.pairing import ORDER

BY_ROW = "row number from 0"
_OWN_IDS = {"image": IMAGE_IDS, "text": TEXT_IDS}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SideKeys:
    """The names of the rows of one side, (n,)."""

    name: str
    labels: Labels
    ids: pa.Array  # (n,) large_string, unique
    key: str | None  # column that the ids are; None if they are row numbers
    known: pa.Array | None = None  # (n,) items of a side of a set on disk, null for none

    @property
    def is_new(self) -> bool:
        """Whether the side is imported, rather than of a set on disk."""
        return self.known is None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Items:
    """The item of each row of each side."""

    keys: Mapping[str, pa.Array]  # by side, (n,) large_string, null for none
    how: str  # they were found, for people
    lines: tuple[Labels, pa.Array] | None = None  # the table of items, and the item of each line
    captions: Mapping[str, pa.Array] = field(default_factory=dict)  # by side, (n,), of the table


def describe_side(name: str, labels: Labels) -> SideKeys:
    """Find the ids of a side's rows: ``NAME_id``, ``id`` and the like, else row numbers.

    Raises:
        DataError: an id is missing or repeats.
    """
    plain = plain_name(name)
    own = _OWN_IDS.get(name, (f"{plain}_id", f"{plain}_ids", f"{plain}_key"))
    key = first_of((*own, *ITEM_IDS), labels.names)
    if key is None:
        return SideKeys(name, labels, row_numbers(labels.rows), None)
    ids = check_no_null(labels, key, key)
    if (repeated := first_repeated(ids)) is not None:
        row, first = map(labels.where, repeated)
        raise DataError(
            f"{row}: duplicate {key} {ids[repeated[0]].as_py()!r:.200}, also in {first}; the ids "
            f"of {name} name its rows; rename the column to item if it names items, which may have "
            "several rows"
        )
    return SideKeys(name, labels, ids, key)


def join_items(sides: Sequence[SideKeys], table: Labels | None, by: str | None) -> Items:
    """Find the items that the rows of some sides belong to.

    Args:
        sides: new ones, and those of a set that they are added to.
        table: with a column per side, of ids or row numbers, empty for none; or with the columns
            ``side``, ``id`` (or ``row``) and ``item``.
        by: the column whose equal values are one item, or "order"; None for the likeliest one.

    Raises:
        DataError: a name in the table is unknown, a row would belong to two items, columns are
            missing, or nothing says which rows belong together.
    """
    if table is not None:
        return _by_table(sides, table)
    for name in _candidates(sides) if by is None else [] if by == ORDER else [by]:
        found = {side: Keys(own) for side, own in _columns_of(sides, name).items()}
        is_there = len(found) > 1 and all(side.name in found for side in sides if side.is_new)
        if is_there and (by is not None or _may_join(name, sides, [*found.values()])):
            return _by_values(sides, found, name)
    listed = "; ".join(
        f"{own.name}: {', '.join(own.labels.names) or 'none'}" for own in sides if own.is_new
    )
    if by not in (None, ORDER):
        raise DataError(
            f"--pair-by {by}: is not a column of every side (columns of {listed}); correct it, or "
            "give the items with --pairs TABLE"
        )
    return _by_order(sides, by, listed)


def _by_table(sides: Sequence[SideKeys], table: Labels) -> Items:
    if not table.rows:
        raise DataError(f"{table.name}: has no rows; give a line per item, or per row of a side")
    by_name = {plain_name(side.name): side for side in sides}
    is_long = first_of(("side",), table.names) is not None
    cells, used = (_long_cells if is_long else _wide_cells)(by_name, table)
    if missing := next((own.name for own in sides if own.is_new and own.name not in cells), None):
        raise DataError(
            f"{table.name}: names no rows of {missing} (columns: {', '.join(table.names)})"
            f"; add {'lines of side' if is_long else 'a column'} {missing}"
            f"{did_you_mean(missing, table.names)}"
        )
    read = {name: _find_rows(table, by_name[plain_name(name)], *cells[name]) for name in cells}
    rows = {name: found for name, (found, _) in read.items()}
    item, captions, split = (
        first_of(own, table.names) for own in (ITEMS, ("caption",), ("split",))
    )
    captioned = {*rows} if is_long else {*rows} & {"text"}
    used |= {item, split, captions if captioned else None}
    if unread := [name for name in table.names if name not in used]:
        log.warning(
            "%s: columns that are not read: %s; those of a side have the name of its --side",
            *(table.name, ", ".join(unread)),
        )
    keys, how = _line_keys(sides, table, rows, item)
    codes = keys.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    found, texts = {side.name: side.known for side in sides if not side.is_new}, {}
    for name, own in rows.items():
        line_of = _line_of(table, by_name[plain_name(name)], own, keys, codes)
        of_rows = pa.array(line_of, mask=line_of < 0)
        found.setdefault(name, keys.take(of_rows))
        if captions is not None and name in captioned:
            texts[name] = table.column(captions).take(of_rows)
    named = ", ".join(f"{name} by {by}" for name, (_, by) in read.items())
    return Items(found, f"{table.name} ({named}{how})", (table, keys), texts)


def _wide_cells(
    sides: Mapping[str, SideKeys], table: Labels
) -> tuple[dict[str, tuple[pa.Array, bool]], set[str | None]]:
    """Return the cells that name rows by side, with whether they are row numbers; and columns."""
    found, used = {}, set[str | None]()
    for plain, side in sides.items():
        names = (plain, f"{plain}_id", f"{plain}_row")
        there = [name for name in table.names if plain_name(name) in names]
        if len(there) > 1:
            raise DataError(
                f"{table.name}: columns {' and '.join(there)} both name rows of {side.name}; "
                "remove one"
            )
        if there:
            found[side.name] = trimmed(table.column(there[0])), plain_name(there[0]) == names[2]
            used.add(there[0])
    return found, used


def _long_cells(
    sides: Mapping[str, SideKeys], table: Labels
) -> tuple[dict[str, tuple[pa.Array, bool]], set[str | None]]:
    """Return the same of a table with a line per row of any side."""
    side, item = (first_of(names, table.names) for names in (("side",), ITEMS))
    ids, row = (first_of((name,), table.names) for name in ("id", "row"))
    if item is None or (ids is None) == (row is None):
        raise DataError(
            f"{table.name}: has a column side, and then needs item, and id or row "
            f"(columns: {', '.join(table.names)}); add what is missing, or remove one"
        )
    named = pc.fill_null(trimmed(table.column(str(side))), "")
    codes = named.dictionary_encode()
    by_code = [sides.get(plain_name(name)) for name in codes.dictionary.to_pylist()]
    for code, own in enumerate(by_code):
        if own is None:
            line = codes.indices.index(code).as_py()
            names = ", ".join(own.name for own in sides.values())
            raise DataError(
                f"{table.where(line)}: side {named[line].as_py()!r:.80} is not one of {names}; "
                "correct it, or import that side too"
            )
    cells, found = trimmed(table.column(str(ids or row))), {}
    for name in dict.fromkeys(side.name for side in by_code if side is not None):
        codes_of = [code for code, side in enumerate(by_code) if side and side.name == name]
        is_own = pc.is_in(codes.indices, value_set=pa.array(codes_of, codes.indices.type))
        found[name] = pc.if_else(is_own, cells, pa.scalar(None, cells.type)), ids is None
    return found, {side, ids, row}


def _find_rows(table: Labels, side: SideKeys, cells: pa.Array, by_row: bool) -> tuple[Ints, str]:
    """Return the row of the side that each line names, -1 for none, and by what.

    Raises:
        DataError: a name is unknown.
    """
    if not by_row:
        own = None if side.key is None else match(Keys(cells), Keys(side.ids))
        if own is not None and own.is_complete:
            return own.rows, own.worded(str(side.key))
        for name in (name for name in side.labels.names if name != side.key and is_key(name)):
            values = side.labels.column(name)
            if first_repeated(values) is None:
                found = match(Keys(cells), Keys(values))
                if found.is_complete and found.found and found.form in ("", *EXACT):
                    return found.rows, found.worded(name)
        if own is not None:
            line = int(own.missing[0])
            raise DataError(
                f"{table.where(line)}: {side.name} {cells[line].as_py()!r:.200} is not in "
                f"{side.labels.name} ({len(own.missing):,} of {len(cells) - cells.null_count:,} "
                f"names are not; its column {side.key} has {examples(side.ids)}, ...); correct the "
                "cells, or leave them empty"
            )
    is_number = pc.fill_null(pc.match_substring_regex(cells, r"^\d{1,15}(\.0*)?$"), True)
    numbers = pc.if_else(is_number, cells, pa.scalar(None, cells.type)).cast(pa.float64())
    rows = pc.fill_null(numbers, -1).to_numpy().astype(np.int64)
    is_wrong = ~is_number.to_numpy(zero_copy_only=False) | (rows >= len(side))
    if is_wrong.any():
        line = int(np.flatnonzero(is_wrong)[0])
        what = "" if by_row else f"{side.labels.name} has no ids, so that "
        raise DataError(
            f"{table.where(line)}: {side.name} {cells[line].as_py()!r:.200} ({is_wrong.sum():,} "
            f"such cells): {what}cells are row numbers from 0 to {len(side) - 1}; correct them, or "
            "store ids with the embeddings, as a .parquet with a column id does"
        )
    return rows, BY_ROW


def _line_keys(
    sides: Sequence[SideKeys], table: Labels, rows: Mapping[str, Ints], item: str | None
) -> tuple[pa.Array, str]:
    """Return the key of each line's item, and how it was found if no column says it."""
    is_used = np.any([found >= 0 for found in rows.values()], axis=0)
    if blank := int((~is_used).sum()):
        log.warning("%s: %s without a row of any side", table.name, counted(blank, "line"))
    given = None if item is None else trimmed(table.column(item))
    if given is not None and (lines := np.flatnonzero(is_used & given.is_null())).size:
        raise DataError(f"{table.where(int(lines[0]))}: has no {item}; give one to every line")
    old = [side for side in sides if not side.is_new]
    if old or given is not None:
        return _line_keys_of_set(old, table, rows, given) if old else given, ""
    numbers = row_numbers(table.rows)
    named = {name: found[found >= 0] for name, found in rows.items()}
    repeats = {name: len(found) - len(np.unique(found)) for name, found in named.items()}
    if not any(repeats.values()):
        return numbers, ""
    often = max(repeats, key=lambda name: repeats[name])
    ids = next(side.ids for side in sides if side.name == often)
    found = rows[often]
    keys = pc.coalesce(ids.take(pa.array(found, mask=found < 0)), _apart(numbers, ids))
    return keys, f", lines of one {often} as one item"


def _line_keys_of_set(
    old: Sequence[SideKeys], table: Labels, rows: Mapping[str, Ints], given: pa.Array | None
) -> pa.Array:
    """Return the items of lines that name rows, or items, of a set on disk."""
    known = pa.chunked_array([side.known for side in old]).unique().drop_null()
    keys = pa.nulls(table.rows, pa.large_string())
    if given is not None:
        values, _ = _alike([Keys(given), Keys(known)])
        keys = pc.coalesce(known.take(pc.index_in(values[0], value_set=values[1])), given)
    for side in old:
        found = rows.get(side.name, np.full(table.rows, -1))
        own = pc.take(side.known, pa.array(found, mask=found < 0))
        alone = np.flatnonzero((found >= 0) & own.is_null())
        other = pc.not_equal(own, keys).index(True).as_py()
        if len(alone) or other >= 0:
            line = int(alone[0]) if len(alone) else other
            name = f"{side.name} {side.ids[int(found[line])].as_py()!r:.200}"
            raise DataError(
                f"{table.where(line)}: {name} belongs to no item of the set, and --add changes "
                "none of its files; leave the line out, or import all sides again"
                if len(alone)
                else f"{table.where(line)}: {name} is of item {own[line].as_py()!r:.200}, and the "
                f"rest of the line of item {keys[line].as_py()!r:.200}; correct the line"
            )
        keys = pc.coalesce(keys, own)
    return pc.coalesce(keys, _apart(row_numbers(table.rows), known))


def _apart(numbers: pa.Array, taken: pa.Array) -> pa.Array:
    """Return keys of lines of which none is taken."""
    prefix = "line "
    while pc.any(pc.starts_with(taken, prefix)).as_py():
        prefix = f"new {prefix}"
    return pc.replace_substring_regex(numbers, "^", prefix)


def _line_of(table: Labels, side: SideKeys, rows: Ints, keys: pa.Array, codes: Ints) -> Ints:
    """Return the first line that names each row of a side, (n,), -1 for none.

    Lines are of the items `keys`, of which those with equal `codes` are equal.

    Raises:
        DataError: lines of two items name it.
    """
    lines = np.flatnonzero(rows >= 0)
    found = np.full(len(side), -1)
    found[rows[lines[::-1]]] = lines[::-1]
    apart = lines[codes[lines] != codes[found[rows[lines]]]]
    if len(apart):
        line, row = int(apart[0]), int(rows[apart[0]])
        first = int(found[row])
        raise DataError(
            f"{table.where(line)}: {side.name} {side.ids[row].as_py()!r:.200} is of item "
            f"{keys[line].as_py()!r:.200}, and in {table.where(first)} of item "
            f"{keys[first].as_py()!r:.200}; a row belongs to one item: correct the table, or give "
            "such lines one item in a column item"
        )
    return found


def _candidates(sides: Sequence[SideKeys]) -> Iterator[str]:
    """Yield the columns that may join the sides, the likeliest first."""
    names = [[plain_name(name) for name in own.labels.names] for own in sides if own.is_new]
    if any(item in own for own in names for item in ITEMS):
        yield "item"
    there = {name for own in names for name in own}
    yield from (own for side in sides if (own := f"{plain_name(side.name)}_id") in there)
    common = [name for name in dict.fromkeys(names[0]) if all(name in own for own in names)]
    yield from (name for name in ITEM_IDS if name in common)
    yield from (name for name in common if name not in ITEM_IDS and is_key(name))


def _columns_of(sides: Sequence[SideKeys], name: str) -> dict[str, pa.Array]:
    """Return the values of a column by side, those of a set on disk for `id` of its best side."""
    found = {side.name: own for side in sides if (own := _values(side, name)) is not None}
    old = [side.name for side in sides if side.name in found and not side.is_new]
    if len(old) > 1 and plain_name(name) in ITEM_IDS:
        new = pa.chunked_array([own for side, own in found.items() if side not in old])
        fits = {own: pc.sum(pc.is_in(new, value_set=found[own])).as_py() or 0 for own in old}
        best = max(old, key=lambda own: fits[own])
        return {side: own for side, own in found.items() if side == best or side not in old}
    return found


def _values(side: SideKeys, name: str) -> pa.Array | None:
    """Return the values of a side's rows by which sides are joined; None if it has none."""
    plain = plain_name(name)
    is_item, is_own = plain in ITEMS, plain == f"{plain_name(side.name)}_id"
    if side.known is not None:
        return side.known if is_item else side.ids if is_own or plain in ITEM_IDS else None
    names = [*ITEMS] if is_item else [plain]
    if is_item and side.name == "text":
        names.append("image_id")  # as in feature sets of images and texts alone
    column = side.labels.find(names)
    if column is None and side.key is not None and (is_own or (is_item and side.name == "image")):
        return side.ids
    return column


def _may_join(name: str, sides: Sequence[SideKeys], keys: Sequence[Keys]) -> bool:
    """Return whether a column that nobody named may be keys of items.

    One of items, or of the rows of a side, is. Any other is unless most of its values repeat, as
    classes do, no two sides share one, or it counts the rows of sides of different lengths.
    """
    plain = plain_name(name)
    if plain in ITEMS or any(plain == f"{plain_name(side.name)}_id" for side in sides):
        return True
    if all(own.are_few for own in keys):
        return False
    if len({own.distinct for own in keys}) > 1 and all(
        own.bounds in ((0, len(own.values) - 1), (1, len(own.values))) for own in keys
    ):
        return False
    values, _ = _alike(keys)
    count = pc.count_distinct(pa.chunked_array(values)).as_py()
    return cast(bool, count < sum(own.distinct for own in keys))


def _alike(keys: Sequence[Keys]) -> tuple[list[pa.Array], str]:
    """Remove spaces and words for missing keys, and spell numbers alike, as 7 and "007"."""
    plain, numbers = ([own.form(name) for own in keys] for name in ("without spaces", "as numbers"))
    # Where no number changes, neither form joins more.
    if (
        None not in numbers
        and plain != numbers
        and all(own.keep_apart("as numbers") for own in keys)
    ):
        before, after = (pc.count_distinct(pa.chunked_array(own)) for own in (plain, numbers))
        if after.as_py() < before.as_py():
            return numbers, "as numbers"
    return plain, ""


def _by_values(sides: Sequence[SideKeys], found: Mapping[str, Keys], name: str) -> Items:
    """Make the rows of equal values one item."""
    values, form = _alike([*found.values()])
    keys, plain, where = dict(zip(found, values, strict=True)), plain_name(name), ""
    owners = [side for side in sides if side.name in keys]
    for owner in (own for own in owners if plain == f"{plain_name(own.name)}_id"):
        known = keys[owner.name]
        for side in owners:  # which refer to its rows
            own = keys[side.name]
            is_lacking = pc.and_(own.is_valid(), pc.invert(pc.is_in(own, value_set=known)))
            if (row := is_lacking.index(True).as_py()) >= 0:
                raise DataError(
                    f"{side.labels.where(row)}: {name} {own[row].as_py()!r:.200} is not in "
                    f"{owner.labels.name} ({pc.sum(is_lacking).as_py():,} such rows; there are "
                    f"{examples(known)}, ...); correct it, or leave it empty"
                )
    if old := [side for side in owners if not side.is_new]:
        spelled, of_set = (
            pa.chunked_array(own).combine_chunks()
            for own in ([keys[side.name] for side in old], [side.known for side in old])
        )
        for side in (own for own in sides if own.is_new):
            own = keys[side.name]
            item = of_set.take(pc.index_in(own, value_set=spelled, skip_nulls=True))
            keys[side.name] = pc.coalesce(item, own) if plain in ITEMS else item
        where = f" of {old[0].name}" if plain in ITEM_IDS else ""
    keys |= {side.name: side.known for side in sides if not side.is_new}
    return Items(keys, ", ".join(filter(None, [name + where, form])))


def _by_order(sides: Sequence[SideKeys], by: str | None, listed: str) -> Items:
    """Make row i of all sides one item, that of row i of a side on disk if there is one."""
    new = [side for side in sides if side.is_new]
    old = [side for side in sides if not side.is_new]
    of = next((side for side in old if len(side) == len(new[0])), None)
    is_even = len({len(side) for side in new}) == 1 and (not old or of is not None)
    has_keys = all(any(map(is_key, side.labels.names)) for side in new)
    if not is_even or (by is None and (has_keys or old)):
        rows = ", ".join(f"{side.name} {len(side):,}" for side in sides)
        raise DataError(
            f"no column joins the sides (rows: {rows}; columns of {listed}); give their items with "
            "--pairs TABLE, name a column that all have with --pair-by"
            + ", or join row by row with --pair-by order"
            * is_even
        )
    known = row_numbers(len(new[0])) if of is None else of.known
    how = "row order" if of is None else f"row order of {of.name}"
    keys = {side.name: known if side.is_new else side.known for side in sides}
    return Items(keys, how if by == ORDER else f"{how} (a guess, as counts are equal)")
