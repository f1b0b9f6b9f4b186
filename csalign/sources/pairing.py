"""Ids of embeddings, and the pairs of images and texts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from csalign.core.errors import DataError
from csalign.sources.arrays.base import CHUNK_ROWS, UNNAMED, Labels, Strings
from csalign.sources.arrays.files import open_npy, read_labels
from csalign.sources.arrow import ARROW, PARQUET
from csalign.sources.records.tables import read_table

ID_NAMES = ("id",)
IMAGE_ID_NAMES = ("image_id", "image", "image_row")
TEXT_ID_NAMES = ("text_id", "text", "text_row")
COUNT_NAMES = ("count", "counts", "captions", "texts")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextRows:
    """Columns of the text rows; ids are unique, all else is None where unknown."""

    ids: Strings
    image_ids: Strings
    captions: Strings
    splits: Strings


@dataclass(frozen=True)
class ImageRows:
    """Columns of the image rows, as in `TextRows`; `numbered` if the ids are row numbers."""

    ids: Strings
    sources: Strings
    splits: Strings
    numbered: bool = False


def read_label_table(path: Path) -> Labels:
    """Read a .csv, .tsv, .jsonl, .parquet, .arrow or .feather of labels.

    Raises:
        DataError: it is missing, of another kind, or damaged.
    """
    if path.suffix.lower() not in (*PARQUET, *ARROW):
        table = read_table(path)
        return Labels(str(path), len(table), table.columns, table.where)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return read_labels(path)


def describe_images(count: int, labels: Labels | None) -> ImageRows:
    """Return ids, sources and splits of `count` image rows; ids default to row numbers.

    Raises:
        DataError: `labels` has another number of rows, or an id is missing or repeated.
    """
    none: Strings = [None] * count
    if labels is None:
        return ImageRows(_numbers(count), none, none, numbered=True)
    _check_rows(labels, count, "images")
    return ImageRows(
        _ids(labels),
        labels.columns.get("source", none),
        labels.columns.get("split", none),
        numbered=_find(labels, ID_NAMES) is None,
    )


def describe_texts(
    count: int,
    images: ImageRows | None,
    labels: Labels | None,
    pairs: Labels | None = None,
    owners: Sequence[int] | None = None,
) -> TextRows:
    """Return ids, image ids, captions and splits of the text rows.

    Args:
        count: number of text rows.
        images: the image rows, None if there are none.
        labels: of the texts, row by row, or None.
        pairs: an image id per row, with the id of its text, or else one row per text in order.
        owners: image row of each text, if the layout of the array gives it. Without `pairs` and
            `owners`, texts are paired by the image ids of `labels`, else by equal ids of images
            and texts, else by row.

    Raises:
        DataError: counts differ, or an id is missing, repeated or unknown.
    """
    ids: Strings = _numbers(count)
    known: dict[str, Strings] = {"caption": [None] * count, "split": [None] * count}
    image_ids: Strings | None = None
    if labels is not None:
        _check_rows(labels, count, "texts")
        ids, image_ids = _ids(labels), _find(labels, IMAGE_ID_NAMES)
        known |= {name: labels.columns[name] for name in known.keys() & labels.columns.keys()}
    if pairs is not None:
        image_ids = _require(pairs, IMAGE_ID_NAMES)
        row_of = {text: row for row, text in enumerate(_paired_rows(pairs, ids))}
        columns = {name: pairs.columns[name] for name in known.keys() & pairs.columns.keys()}
        image_ids, *values = (
            [column[row_of[text]] if text in row_of else None for text in range(count)]
            for column in (image_ids, *columns.values())
        )
        known |= dict(zip(columns, values, strict=True))
    if images is None:
        if image_ids is not None:
            log.warning("image ids of the texts are ignored: there are no images")
        return TextRows(ids, [None] * count, known["caption"], known["split"])
    if owners is not None:
        if labels is not None and image_ids is not None:
            raise DataError(
                f"{labels.name}: names the image of each text; omit --captions-per-image and "
                "--text-counts"
            )
        image_ids = [images.ids[row] for row in owners]
    elif image_ids is None:
        numbered = images.numbered or labels is None or _find(labels, ID_NAMES) is None
        image_ids = _by_id_or_row(images.ids, ids, set() if numbered else set(ids))
    lost = set(image_ids) - {None, *images.ids}
    if lost:
        table = pairs or labels
        rows = [row for row, owner in enumerate(image_ids) if owner in lost]
        raise DataError(
            f"{table.name + ': ' if table else ''}image {image_ids[rows[0]]!r:.200} of text "
            f"row {rows[0]} is unknown ({len(rows)} texts name unknown images); images are named "
            "by the image table's id column, or else by row number from 0"
        )
    return TextRows(ids, image_ids, known["caption"], known["split"])


def owners_by_layout(
    images: int, texts: int, each: int, order: Literal["blocks", "copies"]
) -> Sequence[int]:
    """Return the image row of each text row, where every image has `each` captions.

    Args:
        images: number of image rows.
        texts: number of text rows.
        each: captions per image.
        order: "blocks" of the captions of an image, or whole "copies" of the list of images.

    Raises:
        DataError: there are not `each` texts per image.
    """
    if texts != images * each:
        raise DataError(
            f"{images} images and {texts} texts: {each} captions per image would be "
            f"{images * each} texts; pass the number of each with --text-counts FILE"
        )
    if order == "copies":
        return [*range(images)] * each
    return [row for row in range(images) for _ in range(each)]


def owners_by_counts(path: Path, images: int, texts: int) -> Sequence[int]:
    """Return the image row of each text row, by the number of captions of each image.

    Args:
        path: an .npy of integers, or a table with a column ``count``: n counts, or n + 1 offsets
            that begin at 0.
        images: n.
        texts: number of text rows.

    Raises:
        DataError: the file cannot be used or does not add up to `texts`; its row is named.
    """
    counts = _read_counts(path)
    if len(counts) == images + 1 and counts[0] == 0:
        counts = [after - before for before, after in pairwise(counts)]
    if len(counts) != images:
        raise DataError(
            f"{path}: has {len(counts)} rows and there are {images} images; write one count per "
            f"image, or {images + 1} offsets"
        )
    negative = next((row for row, count in enumerate(counts) if count < 0), None)
    if negative is not None:
        raise DataError(f"{path}, row {negative}: {counts[negative]} captions; none can be below 0")
    if sum(counts) != texts:
        raise DataError(f"{path}: adds up to {sum(counts)} captions and there are {texts} texts")
    return [row for row, count in enumerate(counts) for _ in range(count)]


def share_splits(images: ImageRows, texts: TextRows) -> tuple[ImageRows, TextRows]:
    """Give the split of an image to its texts without one, and vice versa.

    Raises:
        DataError: an image and one of its texts, or two of its texts, are in different splits.
    """
    known = {
        image: split
        for image, split in zip(images.ids, images.splits, strict=True)
        if split is not None
    }
    for text, owner, split in zip(texts.ids, texts.image_ids, texts.splits, strict=True):
        if owner is not None and split is not None and known.setdefault(owner, split) != split:
            raise DataError(
                f"text {text!r:.200} is in split {split!r:.200} and its image {owner!r:.200} in "
                f"{known[owner]!r:.200}; an image and its texts belong in one split"
            )
    text_splits = [
        split if owner is None else known.get(owner)
        for owner, split in zip(texts.image_ids, texts.splits, strict=True)
    ]
    return (
        replace(images, splits=[known.get(image) for image in images.ids]),
        replace(texts, splits=text_splits),
    )


def _read_counts(path: Path) -> list[int]:
    if path.suffix.lower() == ".npy":
        with open_npy(path) as file:
            shape, dtype = file.headers[UNNAMED]
            if len(shape) != 1 or "int" not in dtype:
                raise DataError(f"{path}: has shape {shape} of {dtype}, not a list of integers")
            return [int(count) for rows in file.read(UNNAMED, CHUNK_ROWS) for count in rows]
    table = read_label_table(path)
    counts = []
    for row, value in enumerate(_require(table, COUNT_NAMES)):
        try:
            counts.append(int(value or ""))
        except ValueError:
            raise DataError(f"{table.where(row)}: {value!r:.200} is not an integer") from None
    return counts


def _numbers(count: int) -> list[str | None]:
    return [str(row) for row in range(count)]


def _find(labels: Labels, names: Sequence[str]) -> Strings | None:
    return next((labels.columns[name] for name in names if name in labels.columns), None)


def _require(labels: Labels, names: Sequence[str]) -> Strings:
    column = _find(labels, names)
    if column is None:
        listed = ", ".join(labels.columns) or "none"
        raise DataError(f"{labels.name}: has no column {names[0]!r} (columns: {listed}); add it")
    return column


def _check_rows(labels: Labels, count: int, what: str) -> None:
    if labels.rows != count:
        raise DataError(
            f"{labels.name}: has {labels.rows} rows and there are {count} {what}; the table needs "
            "one row per row of the array"
        )


def _ids(labels: Labels) -> Strings:
    ids = _find(labels, ID_NAMES)
    seen: dict[str, int] = {}
    for row, value in enumerate(ids or ()):
        if value is None:
            raise DataError(f"{labels.where(row)}: has no id; give every row one, or none")
        if seen.setdefault(value, row) != row:
            raise DataError(
                f"{labels.where(row)}: duplicate id {value!r:.200}, also in "
                f"{labels.where(seen[value])}; for several captions per image, give each text its "
                "own id and an image_id"
            )
    return _numbers(labels.rows) if ids is None else ids


def _by_id_or_row(image_ids: Strings, text_ids: Strings, keys: set[str | None]) -> Strings:
    """Return the image of each text: that of the same id if the ids are `keys`, else of its row."""
    shared = keys.intersection(image_ids)
    counts = f"{len(image_ids)} images and {len(text_ids)} texts"
    if len(shared) == len(text_ids) == len(image_ids):
        return text_ids
    if shared:  # keys of which some are missing: the order of rows would be a guess
        raise DataError(
            f"only {len(shared)} of {counts} share an id; give the image of each text with "
            "--pairs TABLE or a column image_id"
        )
    if len(text_ids) != len(image_ids):
        raise DataError(
            f"{counts}: counts differ, so rows cannot be paired one to one; give the image of each "
            "text with --pairs TABLE, a column image_id, or --captions-per-image"
        )
    return image_ids


def _paired_rows(pairs: Labels, text_ids: Strings) -> Sequence[int]:
    """Return the text row of each row of the pairs table."""
    named = _find(pairs, TEXT_ID_NAMES)
    if named is None:
        _check_rows(pairs, len(text_ids), "texts")
        return range(len(text_ids))
    position = {value: row for row, value in enumerate(text_ids)}
    seen: dict[str | None, int] = {}
    for row, value in enumerate(named):
        if value not in position:
            raise DataError(
                f"{pairs.where(row)}: text {value!r:.200} is unknown; texts are named by the "
                "text table's id column, or else by row number from 0"
            )
        if seen.setdefault(value, row) != row:
            raise DataError(
                f"{pairs.where(row)}: text {value!r:.200} is also paired in "
                f"{pairs.where(seen[value])}; a text has one image, repeat its row in the array"
            )
    return [position[value] for value in named]
