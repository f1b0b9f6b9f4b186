"""Ids of embeddings, and the pairs of images and texts."""

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.arrays import Ints
from csalign.core.errors import DataError
from csalign.core.figures import counted
from csalign.sources.arrays.naming import (
    ITEM_IDS,
    ITEMS,
    REFERENCES,
    TEXT_IDS,
    first_of,
    is_counter,
    plain_name,
)
from csalign.sources.image_rows import ImageRows, fill_splits, keys_of_images, row_numbers
from csalign.sources.keys import ROW, Keys, Rank, key_pairs, match, trimmed, unknown_key
from csalign.sources.labels import Labels, check_no_null, first_repeated
from csalign.sources.records.tables import CAPTION_NAMES, SPLIT_NAME

ORDER = "order"  # of --pair-by: by the order of the rows
BY_ROW = "row order"
_PAIR_IMAGES = ("image_id", "image", "image_row")  # columns of --pairs
_PAIR_TEXTS = ("text_id", "text", "text_row")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextRows:
    """The texts of an array's rows."""

    columns: dict[str, pa.Array]  # id, which is unique, caption and split, (m,); null where unknown
    owners: Ints  # (m,) image of each text, -1 for none


@dataclass(frozen=True)
class Rules:
    """What decides the pairs, the first that is given."""

    pairs: Labels | None = None  # an image id per row, with the id of its text or one row per text
    owners: Ints | None = None  # (m,) image row of each text row
    layout: str = ""  # how `owners` were made, for people
    is_shape: bool = False  # whether `owners` are of the array's shape, which keys may replace
    by: str | None = None  # "order", or a column of either side
    same_rows: bool = False  # whether both sides are columns of one table, and so paired by row
    doubt: str = ""  # why the order of the rows cannot be trusted
    # What to do where the counts differ.
    remedy: str = "give the image of each text with --pairs TABLE, or in a column image_id"


def describe_texts(
    count: int, images: ImageRows | None, labels: Labels | None, rules: Rules | None = None
) -> tuple[TextRows, str | None]:
    """Return the columns of the text rows, and how their images were found, for people.

    Without rules the columns of both sides decide, or the order of the rows if neither has keys.

    Raises:
        DataError: counts differ, an id is missing, repeated or unknown, or keys do not match.
    """
    rules = rules or Rules()
    none = pa.nulls(count, pa.large_string())
    labels, wanted = Labels("the texts", count, str) if labels is None else labels, None
    labels.check_rows(count, "texts")
    columns = {
        "id": _text_ids(labels, images, rules.is_shape),
        "caption": labels.find(CAPTION_NAMES, none),
        "split": labels.find((SPLIT_NAME,), none),
    }
    if (pairs := rules.pairs) is not None:
        wanted, rows = pairs.require(*_PAIR_IMAGES), _paired_rows(pairs, columns["id"])
        wanted = wanted.take(rows)
        for name in ("caption", "split"):
            if (column := pairs.find((name,))) is not None:
                columns[name] = column.take(rows)
    if images is None:
        if wanted is not None or first_of(REFERENCES, labels.names):
            log.warning("image ids of the texts are ignored: there are no images")
        return TextRows(columns, np.full(count, -1)), None
    owners, how = _owners(images, count, labels, wanted, rules)
    return TextRows(columns, owners), how


def share_splits(images: ImageRows, texts: TextRows) -> None:
    """Give the split of an image to its texts without one, and vice versa.

    Raises:
        DataError: an image and one of its texts, or two of its texts, are in different splits.
    """
    own = texts.columns["split"]
    known, of_texts, bad = fill_splits(images.columns["split"], own, texts.owners)
    if bad is not None:
        raise DataError(
            f"text {texts.columns['id'][bad].as_py()!r:.200} is in split {own[bad].as_py()!r} and "
            f"its image {images.ids[int(texts.owners[bad])].as_py()!r:.200} in "
            f"{of_texts[bad].as_py()!r}; an image and its texts belong in one split"
        )
    images.columns["split"], texts.columns["split"] = known, of_texts


def _text_ids(labels: Labels, images: ImageRows | None, is_shape: bool) -> pa.Array:
    """Return the ids of the texts; row numbers if there are none.

    Ids that repeat may be those of images that have some, or of rows with several captions each.
    """
    name = first_of(TEXT_IDS, labels.names) or first_of(ITEM_IDS, labels.names)
    if name is None:
        return row_numbers(labels.rows)
    ids = check_no_null(labels, name, "id")
    if (repeated := first_repeated(ids)) is not None:
        is_item = images and images.key is not None and plain_name(name) in ITEM_IDS
        if is_shape or is_item:
            return row_numbers(labels.rows)
        row, first = repeated
        raise DataError(
            f"{labels.where(row)}: duplicate id {ids[row].as_py()!r:.200}, also in "
            f"{labels.where(first)}; for several captions per image, give each text its own id "
            "and an image_id"
        )
    return ids


def _owners(
    images: ImageRows, count: int, labels: Labels, wanted: pa.Array | None, rules: Rules
) -> tuple[Ints, str]:
    """Return the image of each text, -1 for none, and how it was found."""
    if rules.pairs is not None and wanted is not None:
        is_row = plain_name(str(first_of(_PAIR_IMAGES, rules.pairs.names))) == ROW
        known, owners = keys_of_images(images, None if is_row else images.key)
        assert owners is not None  # a key, or row numbers
        found = match(Keys(wanted), Keys(known))
        named = "by row number from 0" if is_row else "by the image table's id column"
        if not found.is_complete:
            raise DataError(unknown_key(found, wanted, known, rules.pairs.name, named))
        return found.among(owners), found.worded(rules.pairs.name)
    owners, how = images.owners, BY_ROW
    if rules.owners is not None:
        owners, how = images.owners[rules.owners], rules.layout
    if rules.owners is not None and not rules.is_shape:
        _check_layout(images, labels, owners, how)
        return owners, how
    if rules.by not in (None, ORDER):
        return _by_column(images, labels, str(rules.by))
    if rules.by is None and not rules.same_rows:
        if (by_key := _by_any_key(images, labels)) is not None:
            return by_key
        if doubt := _unread_key(labels, images.labels) or rules.doubt:
            raise DataError(f"{doubt}, or pair rows in order with --pair-by order")
    if count != len(owners):
        raise DataError(
            f"{len(owners)} images and {count} texts: counts differ, so rows cannot be paired one "
            f"to one; {rules.remedy}"
        )
    is_repeated = rules.same_rows and images.kept is not None and images.key is not None
    return owners, str(images.key) if is_repeated else how


def _by_column(images: ImageRows, labels: Labels, name: str) -> tuple[Ints, str]:
    """Pair by a column that is given: of both sides, or of one and any that fits of the other."""
    if name not in (*labels.names, *images.labels.names):
        raise DataError(
            f"{labels.name}: has no column {name!r} (columns of the texts: "
            f"{', '.join(labels.names) or 'none'}); correct --pair-by"
        )
    if plain_name(name) in ITEMS:
        return _by_item(images, labels)
    is_both = name in labels.names and name in images.labels.names
    for pair in key_pairs(images, labels, name):
        if is_both and (pair.name, pair.other) != (name, name):
            continue
        is_complete = pair.images is not None and pair.found.is_complete
        if pair.images is not None and is_complete and pair.found.found:
            return pair.images, pair.found.worded(name)
        if is_both and not is_complete:
            raise DataError(pair.problem(images.labels, labels))
    raise DataError(f"{labels.name}: no column of the other side fits {name}; correct --pair-by")


def _by_item(images: ImageRows, labels: Labels) -> tuple[Ints, str]:
    """Pair the rows of each item, of which either side may have several, or none.

    In feature sets of images and texts alone, an item is the id of an image.
    """
    none = pa.nulls(labels.rows, pa.large_string())
    wanted = trimmed(labels.find((*ITEMS, "image_id"), none))
    known, owners = images.labels.find(ITEMS), images.owners
    if known is None:
        known, owners = images.ids, np.arange(len(images.ids))
    rows = pc.fill_null(pc.index_in(wanted, value_set=trimmed(known), skip_nulls=True), -1)
    rows = rows.to_numpy(zero_copy_only=False)
    keys = known.drop_null()
    if several := len(keys) - pc.count_distinct(keys).as_py():
        log.warning(
            "%s: %s of an item that an earlier row has, and so without a pair; several rows of an "
            "item on both sides need csalign import --side",
            *(images.labels.name, counted(several, "row")),
        )
    return np.where(rows >= 0, owners[rows], -1), "item"


def _by_any_key(images: ImageRows, labels: Labels) -> tuple[Ints, str] | None:
    """Pair by the likeliest columns that fit; None if neither side has keys of the other.

    Numbers that count from 0 or 1 fit by chance, so they pair only where names say so, and not
    where other keys contradict them.

    Raises:
        DataError: columns that look like keys of one another do not fit, or contradict each other.
    """
    best: tuple[Ints, str] | None = None
    unpaired: tuple[Ints, str] | None = None
    refused: list[tuple[int, str]] = []  # matches and problem
    is_bound = False  # whether a column refers to images, though it does not fit
    for pair in key_pairs(images, labels):
        if pair.rank >= Rank.OWN and (best or is_bound):
            break
        if best and pair.is_evident and pair.images is not None:
            _check_agreement(images, labels, best, pair.images, pair.name)
        if pair.verdict in ("broken", "ambiguous"):
            refused.append((pair.found.found, pair.problem(images.labels, labels)))
            is_bound |= pair.is_evident or plain_name(pair.name) in REFERENCES
        elif pair.verdict and pair.images is not None:
            how = pair.images, pair.found.worded(pair.name)
            if pair.verdict == "unpaired":
                unpaired, is_bound = unpaired or how, True
                continue
            best = best or how
            if not pair.compared.are_counted:
                break
    if best is None and refused:
        raise DataError(max(refused, key=lambda entry: entry[0])[1])
    if best and (lacking := int((best[0] < 0).sum())):
        log.warning("%s: %d texts have no image, as they have no %s", labels.name, lacking, best[1])
    return best or unpaired


def _unread_key(*sides: Labels) -> str:
    """Say which column looks like a key that cannot be used, "" if none does.

    That is one of another type or length, or that numbers the rows of one side in another order,
    as the index of a table does.
    """
    for own in sides:
        for name, reason in own.unread.items():
            return f"{own.name}: {name} looks like keys but {reason}"
    if names := _reordered(*sides):
        return (
            f"{sides[0].name}: {names} together name the rows, which are in another order in "
            f"{sides[1].name}; sort both by them"
        )
    shared = {*sides[0].names} & {*sides[1].names} if sides[0].name == sides[1].name else {*()}
    for own in sides:
        for name in own.names:
            keys = Keys(own.column(name)) if is_counter(name) and name not in shared else None
            if keys is None or not keys.are_counted or keys.distinct < len(keys.values):
                continue
            if (np.diff(pc.cast(keys.form("as numbers"), pa.int64())) < 0).any():
                return (
                    f"{own.name}: {name} numbers the rows in another order, and the other side has "
                    "no such column; sort the rows by it"
                )
    return ""


def _reordered(one: Labels, two: Labels) -> str:
    """Return the columns, such as video and frame, that both sides have in different orders."""
    names = [name for name in one.names if name in two.names]
    if len(names) < 2 or one.rows != two.rows:
        return ""
    end, none = (pa.scalar(text, pa.large_string()) for text in ("\n", ""))
    first, second = (
        pc.binary_join_element_wise(*(pc.coalesce(own.column(name), none) for name in names), end)
        for own in (one, two)
    )
    places = pc.index_in(first, second)
    is_same = not places.null_count and pc.count_distinct(places).as_py() == one.rows
    return " and ".join(names) if is_same and not first.equals(second) else ""


def _check_layout(images: ImageRows, labels: Labels, owners: Ints, layout: str) -> None:
    """Raise DataError where keys pair rows in another way; warn where they are unknown."""
    if first_of(REFERENCES, labels.names):
        raise DataError(
            f"{labels.name}: names the image of each text; omit --captions-per-image and "
            "--text-counts"
        )
    for pair in key_pairs(images, labels):
        if pair.rank > Rank.OWN:
            break
        if pair.images is not None and pair.is_evident:
            _check_agreement(images, labels, (owners, layout), pair.images, pair.name)
            if not pair.found.is_complete:
                log.warning(
                    "%s: paired by %s, though %d texts name unknown images in %s",
                    *(labels.name, layout, len(pair.found.missing), pair.name),
                )


def _check_agreement(
    images: ImageRows, labels: Labels, first: tuple[Ints, str], owners: Ints, name: str
) -> None:
    """Raise DataError where a column names another image than what pairs the rows."""
    wrong = np.flatnonzero((owners >= 0) & (owners != first[0]))
    if len(wrong):
        row = int(wrong[0])
        one, two = (images.ids[int(own[row])].as_py() for own in (first[0], owners))
        raise DataError(
            f"{labels.where(row)}: belongs to image {one!r:.200} by {first[1]}, and to "
            f"{two!r:.200} by {name}; choose with --pair-by {name}, or --pair-by order"
        )


def _paired_rows(pairs: Labels, text_ids: pa.Array) -> pa.Array:
    """Return the row of the pairs table of each text, null for none."""
    if (named := pairs.find(_PAIR_TEXTS)) is None:
        pairs.check_rows(len(text_ids), "texts")
        return pa.array(np.arange(len(text_ids)))
    is_row = plain_name(str(first_of(_PAIR_TEXTS, pairs.names))) == "text_row"
    found = match(Keys(named), Keys(row_numbers(len(text_ids)) if is_row else text_ids))
    if len(unknown := np.flatnonzero(found.rows < 0)):
        row = int(unknown[0])
        raise DataError(
            f"{pairs.where(row)}: text {named[row].as_py()!r:.200} is unknown; texts are named by "
            "the text table's id column, or else by row number from 0"
        )
    if (repeated := first_repeated(pa.array(found.rows))) is not None:
        row, other = repeated
        raise DataError(
            f"{pairs.where(row)}: text {named[row].as_py()!r:.200} is also paired in "
            f"{pairs.where(other)}; a text has one image, repeat its row in the array"
        )
    rows = np.full(len(text_ids), -1)
    rows[found.rows] = np.arange(len(named))
    return pa.array(rows, mask=rows < 0)
