"""Ids of embeddings, and the pairs of images and texts."""

import logging
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.errors import DataError
from csalign.sources.arrays.naming import (
    ITEM_IDS,
    REFERENCES,
    TEXT_IDS,
    first_of,
    is_counter,
    plain_name,
)
from csalign.sources.image_rows import ImageRows, keys_of_images, row_numbers
from csalign.sources.keys import (
    CAPTION,
    OWN,
    REFERENCE,
    ROW,
    KeyPair,
    Keys,
    key_pairs,
    match,
    unknown_key,
)
from csalign.sources.labels import Ints, Labels, check_no_null, first_repeated
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
    """What decides the pairs, the first that is given.

    Attributes:
        pairs: a table of an image id per row, with the id of its text, or else one row per text.
        owners: (m,) image row of each text row.
        layout: how `owners` were made, for people.
        is_shape: whether `owners` are those of the array's shape, which keys may replace.
        by: "order", or a column of either side.
        same_rows: whether both sides are columns of one table, and so are paired by row.
        doubt: why the order of the rows cannot be trusted, "" if it can.
        remedy: what to do where the counts differ, the end of a message.
    """

    pairs: Labels | None = None
    owners: Ints | None = None
    layout: str = ""
    is_shape: bool = False
    by: str | None = None
    same_rows: bool = False
    doubt: str = ""
    remedy: str = "give the image of each text with --pairs TABLE, or in a column image_id"


def describe_texts(
    count: int, images: ImageRows | None, labels: Labels | None, rules: Rules | None = None
) -> tuple[TextRows, str | None]:
    """Return the columns of the text rows, and how their images were found, for people.

    Args:
        count: number of text rows.
        images: the images, None if there are none.
        labels: of the texts, row by row, or None.
        rules: what decides the pairs; otherwise the columns of both sides do, or the order of the
            rows if neither has keys.

    Raises:
        DataError: counts differ, an id is missing, repeated or unknown, or keys do not match.
    """
    rules = rules or Rules()
    none = pa.nulls(count, pa.large_string())
    columns, wanted = {"id": row_numbers(count), "caption": none, "split": none}, None
    if labels is not None:
        labels.check_rows(count, "texts")
        columns["id"] = _text_ids(labels, images, rules.is_shape)
        columns["caption"] = labels.find(CAPTION_NAMES, none)
        columns["split"] = labels.find((SPLIT_NAME,), none)
    if (pairs := rules.pairs) is not None:
        wanted, rows = pairs.require(*_PAIR_IMAGES), _paired_rows(pairs, columns["id"])
        wanted = wanted.take(rows)
        for name in ("caption", "split"):
            if (column := pairs.find((name,))) is not None:
                columns[name] = column.take(rows)
    texts = TextRows(columns, np.full(count, -1))
    if images is None:
        if wanted is not None or (labels and first_of(REFERENCES, labels.names)):
            log.warning("image ids of the texts are ignored: there are no images")
        return texts, None
    owners, how = _owners(images, texts, labels, wanted, rules)
    return replace(texts, owners=owners), how


def share_splits(images: ImageRows, texts: TextRows) -> None:
    """Give the split of an image to its texts without one, and vice versa.

    Raises:
        DataError: an image and one of its texts, or two of its texts, are in different splits.
    """
    columns = [images.columns["split"], texts.columns["split"]]
    names = pa.chunked_array(columns).unique().drop_null()
    known, own = (
        pc.fill_null(pc.index_in(column, value_set=names), -1).to_numpy(zero_copy_only=False).copy()
        for column in columns
    )
    owners = texts.owners
    has_both = (owners >= 0) & (own >= 0)
    given = np.flatnonzero(has_both)[::-1]  # the first text of an image wins
    given = given[known[owners[given]] < 0]
    known[owners[given]] = own[given]
    bad = np.flatnonzero(has_both & (own != known[owners]))
    if len(bad):
        text, image = int(bad[0]), int(owners[bad[0]])
        raise DataError(
            f"text {texts.columns['id'][text].as_py()!r:.200} is in split "
            f"{names[int(own[text])].as_py()!r} and its image {images.ids[image].as_py()!r:.200} "
            f"in {names[int(known[image])].as_py()!r}; an image and its texts belong in one split"
        )
    own = np.where(owners >= 0, known[owners], own)
    for rows, codes in ((images, known), (texts, own)):
        rows.columns["split"] = names.take(pa.array(codes, mask=codes < 0))


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
    images: ImageRows, texts: TextRows, labels: Labels | None, wanted: pa.Array | None, rules: Rules
) -> tuple[Ints, str]:
    """Return the image of each text, -1 for none, and how it was found."""
    if rules.pairs is not None and wanted is not None:
        is_row = first_of(_PAIR_IMAGES, rules.pairs.names) == first_of([ROW], rules.pairs.names)
        known, rows = keys_of_images(images, None if is_row else images.key)
        found = match(Keys(wanted), Keys(known))
        named = "by row number from 0" if is_row else "by the image table's id column"
        if not found.is_complete:
            raise DataError(unknown_key(found, wanted, known, rules.pairs.name, named))
        return found.among(rows), found.worded(rules.pairs.name)
    owners, how = images.owners, BY_ROW
    if rules.owners is not None:
        owners, how = images.owners[rules.owners], rules.layout
    if rules.owners is not None and not rules.is_shape:
        if labels is not None and first_of(REFERENCES, labels.names):
            raise DataError(
                f"{labels.name}: names the image of each text; omit --captions-per-image and "
                "--text-counts"
            )
        _check_layout(images, labels, owners, how)
        return owners, how
    if rules.by not in (None, ORDER):
        return _by_column(images, labels, str(rules.by))
    if rules.by is None and not rules.same_rows:
        by_key = None if labels is None else _by_any_key(images, labels)
        if by_key is not None:
            return by_key
        for own in (labels, images.labels):
            for name, reason in own.unread.items() if own else ():
                raise DataError(
                    f"{own and own.name}: {name} looks like keys but {reason}, or pair rows in "
                    "order with --pair-by order"
                )
        _check_counters(labels, images.labels)
        _check_counters(images.labels, labels)
        if rules.doubt:
            raise DataError(f"{rules.doubt}, or pair rows in order with --pair-by order")
    if len(texts.owners) != len(owners):
        raise DataError(
            f"{len(owners)} images and {len(texts.owners)} texts: counts differ, so rows "
            f"cannot be paired one to one; {rules.remedy}"
        )
    is_repeated = rules.same_rows and images.kept is not None and images.key is not None
    return owners, str(images.key) if is_repeated else how


def _by_column(images: ImageRows, labels: Labels | None, name: str) -> tuple[Ints, str]:
    """Pair by a column that is given: of both sides, or of one and any that fits of the other."""
    own = labels.names if labels else ()
    other = images.labels.names if images.labels else ()
    if labels is None or (name not in own and name not in other):
        raise DataError(
            f"{labels.name if labels else 'the texts'}: has no column {name!r} (columns of the "
            f"texts: {', '.join(own) or 'none'}); correct --pair-by"
        )
    problem = f"{labels.name}: no column of the other side fits {name}; correct --pair-by"
    is_both = name in own and name in other
    for pair in key_pairs(images, labels, name):
        if is_both and (pair.name, pair.other) != (name, name):
            continue
        if not pair.is_key:
            problem = (
                f"{images.labels and images.labels.name}: {pair.other} is not one key per image; "
                "use another column with --pair-by"
            )
        elif pair.found.is_complete and pair.found.found:
            return pair.images, pair.found.worded(name)
        elif is_both:
            problem = pair.unknown(labels.name)
    raise DataError(problem)


def _by_any_key(images: ImageRows, labels: Labels) -> tuple[Ints, str] | None:
    """Pair by the likeliest columns that fit; None if neither side has keys of the other.

    Numbers that count from 0 or 1 fit by chance, so they pair only where names say so, and not
    where other keys contradict them.

    Raises:
        DataError: columns that look like keys of one another do not fit, or contradict each other.
    """
    refused: list[tuple[int, str]] = []  # matches and problem
    best: tuple[Ints, str] | None = None
    unpaired: tuple[Ints, str] | None = None
    is_bound = False  # whether a column refers to images, though it does not fit
    for pair in key_pairs(images, labels):
        if pair.rank >= OWN and (best or is_bound):
            break
        found, is_most = pair.found, pair.is_most
        if pair.rank == CAPTION and not (pair.is_key and found.is_complete):
            continue
        if not pair.is_key:
            if is_most or (found.found and pair.is_strong and pair.is_same):
                refused.append((found.found, _unusable(images.labels, str(pair.other))))
                is_bound |= is_most
            continue
        how = pair.images, found.worded(pair.name)
        if best and is_most and not pair.is_chance:
            _check_agreement(images, labels, best, *how)
        if found.is_complete and not found.found:
            if pair.rank <= REFERENCE:
                unpaired, is_bound = unpaired or how, True
        elif found.is_complete:
            if pair.is_fit(len(images.owners)):
                best = best or how
                if not pair.is_chance:
                    break
            elif pair.is_chance and pair.is_reordered:
                refused.append((found.found, _ambiguous(pair, labels, images.labels)))
        elif pair.is_strong or (is_most and not pair.is_chance):
            refused.append((found.found, pair.unknown(labels.name)))
            is_bound |= is_most or plain_name(pair.name) in REFERENCES
    if best is None and refused:
        raise DataError(max(refused, key=lambda entry: entry[0])[1])
    return best or unpaired


def _check_counters(labels: Labels | None, other: Labels | None) -> None:
    """Raise DataError where a column numbers the rows in another order, as a table's old index."""
    if labels is None:
        return
    shared = other.names if other and other.name == labels.name else ()
    for name in labels.names:
        if not is_counter(name) or name in shared:
            continue
        keys = Keys(labels.column(name))
        is_index = keys.are_counted and keys.distinct == len(keys.values)
        if is_index and (np.diff(pc.cast(keys.form("as numbers"), pa.int64())) < 0).any():
            raise DataError(
                f"{labels.name}: {name} numbers the rows in another order, and the other side has "
                "no such column; sort the rows by it, or keep them with --pair-by order"
            )


def _check_layout(images: ImageRows, labels: Labels | None, owners: Ints, layout: str) -> None:
    """Raise DataError where keys pair rows in another way; warn where they are unknown."""
    for pair in key_pairs(images, labels) if labels else ():
        if pair.rank > OWN:
            break
        if labels and pair.is_key and pair.is_most and not pair.is_chance:
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


def _ambiguous(pair: KeyPair, labels: Labels, own: Labels | None) -> str:
    return (
        f"{labels.name}: {pair.name} has the numbers of {pair.other} of {own and own.name} in "
        f"another order, which may be chance; pair by it with --pair-by {pair.name}, or ignore it "
        "with --pair-by order"
    )


def _unusable(labels: Labels | None, name: str) -> str:
    """Say which row of the images makes a column unusable as their key."""
    assert labels is not None
    keys = labels.column(name)
    if keys.null_count:
        problem = f"{labels.where(keys.is_null().index(True).as_py())}: has no {name}"
    else:
        row, first = first_repeated(keys) or (0, 0)
        problem = (
            f"{labels.where(row)}: duplicate {name} {keys[row].as_py()!r:.200}, also in "
            f"{labels.where(first)}"
        )
    return (
        f"{problem}, and texts name their images by it; correct the keys, pass --pairs TABLE, or "
        "ignore them with --pair-by order"
    )


def _paired_rows(pairs: Labels, text_ids: pa.Array) -> pa.Array:
    """Return the row of the pairs table of each text, null for none."""
    if (named := pairs.find(_PAIR_TEXTS)) is None:
        pairs.check_rows(len(text_ids), "texts")
        return pa.array(np.arange(len(text_ids)))
    is_row = first_of(_PAIR_TEXTS, pairs.names) == first_of(_PAIR_TEXTS[2:], pairs.names)
    known = row_numbers(len(text_ids)) if is_row else text_ids
    found = match(Keys(named), Keys(known))
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
