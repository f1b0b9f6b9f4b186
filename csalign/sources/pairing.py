"""Ids of embeddings, and the pairs of images and texts."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.sources.arrays.naming import (
    ITEM_IDS,
    PATHS,
    REFERENCES,
    TEXT_IDS,
    first_of,
    is_id,
    is_key,
    label_side,
    plain_name,
)
from csalign.sources.image_rows import ImageRows, keys_of_images, row_numbers
from csalign.sources.keys import Match, examples, match
from csalign.sources.labels import Ints, Labels, check_no_null, first_repeated
from csalign.sources.records.tables import CAPTION_NAMES, SPLIT_NAME

ORDER = "order"  # of --pair-by: by the order of the rows
BY_ROW = "row order"
_ROW = "image_row"  # always a row number from 0, as text_row
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
        by: "order", or a column of both sides.
        same_rows: whether both sides are columns of one table, and so are paired by row.
        remedy: what to do where the counts differ, the end of a message.
    """

    pairs: Labels | None = None
    owners: Ints | None = None
    layout: str = ""
    by: str | None = None
    same_rows: bool = False
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
        columns["id"] = _text_ids(labels, images)
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


def _text_ids(labels: Labels, images: ImageRows | None) -> pa.Array:
    """Return the ids of the texts; row numbers if there are none.

    Ids that repeat may be those of images that have some.
    """
    name = first_of(TEXT_IDS, labels.names) or first_of(ITEM_IDS, labels.names)
    if name is None:
        return row_numbers(labels.rows)
    ids = check_no_null(labels, name, "id")
    if (repeated := first_repeated(ids)) is not None:
        if images is not None and images.key is not None and plain_name(name) in ITEM_IDS:
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
        is_row = first_of(_PAIR_IMAGES, rules.pairs.names) == first_of([_ROW], rules.pairs.names)
        known, rows = keys_of_images(images, None if is_row else images.key)
        found = match(wanted, known)
        named = "by row number from 0" if is_row else "by the image table's id column"
        _check_found(found, wanted, known, rules.pairs.name, named)
        return found.among(rows), found.worded(rules.pairs.name)
    if rules.owners is not None:
        if labels is not None and first_of(REFERENCES, labels.names):
            raise DataError(
                f"{labels.name}: names the image of each text; omit --captions-per-image and "
                "--text-counts"
            )
        owners = images.owners[rules.owners]
        _check_layout(images, texts, labels, owners, rules.layout)
        return owners, rules.layout
    if rules.by not in (None, ORDER):
        return _by_column(images, labels, str(rules.by))
    if rules.by is None and not rules.same_rows and labels is not None:
        found_by_key = _by_any_key(images, labels, texts)
        if found_by_key is not None:
            return found_by_key
    if rules.by is None and not rules.same_rows:
        for own in (labels, images.labels):
            for name, reason in own.unread.items() if own else ():
                raise DataError(
                    f"{own and own.name}: {name} looks like keys but {reason}, or pair rows in "
                    "order with --pair-by order"
                )
    if len(texts.owners) != len(images.owners):
        raise DataError(
            f"{len(images.owners)} images and {len(texts.owners)} texts: counts differ, so rows "
            f"cannot be paired one to one; {rules.remedy}"
        )
    is_repeated = images.kept is not None
    return images.owners, f"{images.key}" if rules.same_rows and is_repeated else BY_ROW


def _check_layout(
    images: ImageRows, texts: TextRows, labels: Labels | None, owners: Ints, layout: str
) -> None:
    """Raise DataError where a key of both sides pairs the rows in another way."""
    try:
        found = labels and _by_any_key(images, labels, texts)
    except DataError as error:
        log.warning("paired by %s, though there are keys that do not fit: %s", layout, error)
        found = None
    if labels and found and len(wrong := np.flatnonzero(found[0] != owners)):
        row = int(wrong[0])
        raise DataError(
            f"{labels.where(row)}: belongs to image {images.ids[int(owners[row])].as_py()!r:.200} "
            f"by {layout}, and to another by {found[1]}; pair by it with --pair-by instead"
        )


def _by_column(images: ImageRows, labels: Labels | None, name: str) -> tuple[Ints, str]:
    for side, own in (("texts", labels), ("images", images.labels)):
        if own is None or name not in own.names:
            listed = ", ".join(own.names) if own else "none"
            raise DataError(
                f"{own.name if own else 'the ' + side}: has no column {name!r} (columns of the "
                f"{side}: {listed}); correct --pair-by"
            )
    assert labels is not None
    known, rows = keys_of_images(images, name)
    if known is None:
        raise DataError(
            f"{images.labels and images.labels.name}: {name} is not one key per image; use "
            "another column with --pair-by"
        )
    wanted = labels.column(name)
    found = match(wanted, known)
    _check_found(found, wanted, known, labels.name, f"by {name}")
    return found.among(rows), found.worded(name)


def _by_any_key(images: ImageRows, labels: Labels, texts: TextRows) -> tuple[Ints, str] | None:
    """Pair by the first columns that fit; None if neither side has keys of the other.

    Raises:
        DataError: columns that look like keys of one another do not fit.
    """
    refused: list[tuple[int, str, str]] = []  # matches, name and problem
    own = images.labels and images.labels.name
    for name, image_name, is_strong in _candidates(images, labels):
        plain = plain_name(name)
        if name == image_name and labels.name == own:  # one column of one file fits in any case
            continue
        wanted = labels.column(name)
        is_most = wanted.null_count * 2 < len(wanted)
        if plain in (*TEXT_IDS, *ITEM_IDS) and any(
            plain_name(key) in REFERENCES or matches * 2 > len(wanted)
            for matches, key, _ in refused
        ):  # ids may be equal by chance, as numbers
            break
        known, rows = keys_of_images(images, image_name)
        if known is None:
            assert images.labels is not None
            keys = images.labels.column(str(image_name))
            matches = match(wanted, keys).found
            is_few = pc.count_distinct(keys).as_py() * 2 <= len(keys)  # such as classes or users
            is_same = is_strong and plain == plain_name(str(image_name))
            if not is_few and matches * 2 > (0 if is_same else len(wanted)):
                refused.append((matches, name, _unusable(images.labels, str(image_name))))
            continue
        found = match(wanted, known)
        is_fit = found.is_complete and (found.found or plain in REFERENCES)
        if is_fit and (is_strong or is_most):
            return found.among(rows), found.worded(name)
        shared = found.found if plain in TEXT_IDS or found.found * 2 > len(wanted) else 0
        if (is_strong or shared) and not found.is_complete:
            where, named = f"{labels.name}: {name}", image_name or "row number"
            named = f"by {named}, or else by row number from 0"
            refused.append((found.found, name, _unknown(found, wanted, known, where, named)))
    if refused:
        raise DataError(max(refused, key=lambda entry: entry[0])[2])
    _warn_of_other_columns(images, labels)
    return None


def _unusable(labels: Labels, name: str) -> str:
    """Say which row of the images makes a column unusable as their key."""
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


def _warn_of_other_columns(images: ImageRows, labels: Labels) -> None:
    """Warn of a column that would pair the rows in another order, but is not named like a key."""
    if images.labels is None or images.labels.name == labels.name:
        return
    for name in labels.names:
        if name not in images.labels.names or is_key(name) or _is_content(name):
            continue
        own, other = labels.column(name), images.labels.column(name)
        if pc.count_distinct(own).as_py() * 2 > len(own) and len(own) == len(other):
            rows = match(own, other).rows
            if (rows >= 0).sum() * 2 > len(rows) and (rows != np.arange(len(rows))).any():
                log.warning(
                    "%s: %s has the values of %s in another order; is it their key? Then pass "
                    "--pair-by %s",
                    *(labels.name, name, images.labels.name, name),
                )


def _candidates(images: ImageRows, labels: Labels) -> Iterator[tuple[str, str | None, bool]]:
    """Yield columns of texts and images that may be one key, and whether they must fit.

    None stands for the row numbers of images.
    """
    own = {
        plain_name(name): name for name in reversed(images.labels.names if images.labels else ())
    }
    keys = [name for name in own.values() if is_key(name) and not _is_content(name)]
    if images.key in keys:
        keys = [images.key, *(name for name in keys if name != images.key)]
    references = [name for plain in REFERENCES if (name := first_of([plain], labels.names))]
    for name in references:
        if plain_name(name) == _ROW:
            yield name, None, True
            continue
        same = own.get(plain_name(name))
        others = [key for key in keys if key != same]
        for image_name in ([same] if same else []) + others:
            yield name, image_name, True
        if images.key is None:
            yield name, None, True
    for name in labels.names:
        plain = plain_name(name)
        if name in references or _is_content(name) or plain in (*TEXT_IDS, *ITEM_IDS):
            continue
        if plain in own and is_key(name):
            yield name, own[plain], is_id(name)
    paths = [name for name in labels.names if plain_name(name) in PATHS]
    for name in paths:
        for image_name in [key for key in keys if key != own.get(plain_name(name))]:
            yield name, image_name, False
    for name in labels.names:
        plain = plain_name(name)
        if plain in ITEM_IDS and images.key is not None:
            yield name, images.key, plain_name(images.key) in ITEM_IDS
        elif is_key(name) and label_side(name) is Modality.TEXT and name not in references:
            for image_name in keys if images.key is None else [images.key]:
                yield name, image_name, False


def _is_content(name: str) -> bool:
    return plain_name(name) in (*CAPTION_NAMES, SPLIT_NAME)


def _check_found(found: Match, wanted: pa.Array, known: pa.Array, where: str, named: str) -> None:
    """Raise DataError unless all keys are known."""
    if len(found.missing):
        raise DataError(_unknown(found, wanted, known, where, named))


def _unknown(found: Match, wanted: pa.Array, known: pa.Array, where: str, named: str) -> str:
    """Name the first text whose key is unknown."""
    row = int(found.missing[0])
    shown = (
        f"{examples(wanted)} of the texts, {examples(known)} of the images"
        if not found.found
        else f"images are named {named}"
    )
    return (
        f"{where}: image {wanted[row].as_py()!r:.200} of text row {row} is unknown "
        f"({len(found.missing)} texts name unknown images); {shown}; correct the keys, pass "
        "--pairs TABLE, or ignore them with --pair-by order"
    )


def _paired_rows(pairs: Labels, text_ids: pa.Array) -> pa.Array:
    """Return the row of the pairs table of each text, null for none."""
    if (named := pairs.find(_PAIR_TEXTS)) is None:
        pairs.check_rows(len(text_ids), "texts")
        return pa.array(np.arange(len(text_ids)))
    is_row = first_of(_PAIR_TEXTS, pairs.names) == first_of(_PAIR_TEXTS[2:], pairs.names)
    found = match(named, row_numbers(len(text_ids)) if is_row else text_ids)
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
