"""Which embedding is of what, and which image and text belong together."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Literal

from csalign.core.errors import DataError
from csalign.sources.arrays.arrow_files import ARROW, PARQUET, is_plain, open_table, read_labels
from csalign.sources.arrays.base import Labels, Strings
from csalign.sources.arrays.numpy_files import read_integers
from csalign.sources.records.tables import read_table

ID_NAMES = ("id",)
IMAGE_ID_NAMES = ("image_id", "image", "image_row")
TEXT_ID_NAMES = ("text_id", "text", "text_row")
COUNT_NAMES = ("count", "counts", "captions", "texts")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextRows:
    """What is known of each text row; all of length m.

    Attributes:
        ids: unique.
        image_ids: None where a text has no image.
        captions: None where unknown.
        splits: None where there is none.
    """

    ids: Strings
    image_ids: Strings
    captions: Strings
    splits: Strings


@dataclass(frozen=True)
class ImageRows:
    """What is known of each image row; all of length n.

    Attributes:
        ids: unique.
        sources: None where unknown.
        splits: None where there is none.
        numbered: whether the ids are the row numbers, since nothing gives others.
    """

    ids: Strings
    sources: Strings
    splits: Strings
    numbered: bool = False


def read_label_table(path: Path) -> Labels:
    """Read a whole .csv, .tsv, .jsonl, .parquet, .arrow or .feather of labels.

    Raises:
        DataError: there is no such file, it is of another kind or damaged.
    """
    if path.suffix.lower() in (*PARQUET, *ARROW):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        found = open_table(path)
        names = [field.name for field in found.schema if is_plain(field.type)]
        return read_labels(str(path), [found], {name: name for name in names})
    table = read_table(path)
    return Labels(str(path), len(table), table.columns, table.where)


def describe_images(count: int, labels: Labels | None) -> ImageRows:
    """Ids, sources and splits of the image rows; row numbers are their ids where none are known.

    Raises:
        DataError: there are labels of another number of rows, or an id is missing or repeats.
    """
    none: Strings = [None] * count
    if labels is None:
        return ImageRows(_numbers(count), none, none, numbered=True)
    _check_rows(labels, count, "images")
    return ImageRows(
        _ids(labels),
        labels.columns.get("source", none),
        labels.columns.get("split", none),
        numbered=_get(labels, ID_NAMES) is None,
    )


def describe_texts(
    count: int,
    images: ImageRows | None,
    labels: Labels | None,
    pairs: Labels | None = None,
    owners: Sequence[int] | None = None,
) -> TextRows:
    """Ids, images, captions and splits of the text rows.

    Args:
        count: text rows.
        images: what is known of the images, None where there are none.
        labels: of the texts, row by row, or None.
        pairs: with an image id in each row, and the text's id in each, or else a row a text in
            the array's order.
        owners: row of the image that each text belongs to, where the layout of the array says so.
            Without `pairs` and `owners` the labels' image ids pair, or ids where images and texts
            have the same, or the order of rows.

    Raises:
        DataError: counts differ, an id is missing, repeats, or names nothing that is there.
    """
    ids: Strings = _numbers(count)
    known: dict[str, Strings] = {"caption": [None] * count, "split": [None] * count}
    named: Strings | None = None
    if labels is not None:
        _check_rows(labels, count, "texts")
        ids = _ids(labels)
        named = _get(labels, IMAGE_ID_NAMES)
        known |= {name: labels.columns[name] for name in known.keys() & labels.columns.keys()}
    if pairs is not None:
        row_of = _rows_of_texts(pairs, ids)
        named = _spread(_require(pairs, IMAGE_ID_NAMES), row_of, count)
        for name in known.keys() & pairs.columns.keys():
            known[name] = _spread(pairs.columns[name], row_of, count)
    if images is None:
        if named is not None:
            log.warning("image ids of the texts are left out: there are no images")
        named = [None] * count
    elif owners is not None:
        if labels is not None and named is not None:
            raise DataError(
                f"{labels.name}: names the image of each text; leave out --captions-per-image and "
                "--text-counts"
            )
        named = [images.ids[row] for row in owners]
    elif named is None:
        numbered = labels is None or _get(labels, ID_NAMES) is None
        named = _by_id_or_row(images, ids, by_id=not numbered and not images.numbered)
    if images is not None:
        _check_owners(named, images, pairs or labels)
    return TextRows(ids, named, known["caption"], known["split"])


def owners_by_layout(
    images: int, texts: int, each: int, order: Literal["blocks", "copies"]
) -> Sequence[int]:
    """The image row of each text row, where every image has as many captions.

    Args:
        images: image rows.
        texts: text rows.
        each: captions an image.
        order: "blocks" of the captions of an image, one after the other, or whole "copies" of the
            list of images.

    Raises:
        DataError: there are not `each` texts an image.
    """
    if texts != images * each:
        raise DataError(
            f"{images} images and {texts} texts: {each} captions an image would be "
            f"{images * each} texts; give the number of each with --text-counts FILE"
        )
    if order == "copies":
        return list(chain.from_iterable(repeat(range(images), each)))
    return [row for row in range(images) for _ in range(each)]


def owners_by_counts(path: Path, images: int, texts: int) -> Sequence[int]:
    """The image row of each text row, from a file of counts or offsets, texts in image order.

    Args:
        path: an .npy of integers, or a table with a column ``count``: n counts, or n + 1 offsets
            that begin at 0.
        images: n.
        texts: text rows.

    Raises:
        DataError: the file cannot be used or does not add up to `texts`; its row is named.
    """
    counts = _read_counts(path)
    if len(counts) == images + 1 and counts[0] == 0:
        counts = [after - before for before, after in pairwise(counts)]
    if len(counts) != images:
        raise DataError(
            f"{path}: has {len(counts)} rows and there are {images} images; give a count an image, "
            f"or {images + 1} offsets"
        )
    negative = next((row for row, count in enumerate(counts) if count < 0), None)
    if negative is not None:
        raise DataError(f"{path}, row {negative}: {counts[negative]} captions; none can be below 0")
    if sum(counts) != texts:
        raise DataError(f"{path}: counts {sum(counts)} captions and there are {texts} texts")
    return [row for row, count in enumerate(counts) for _ in range(count)]


def share_splits(images: ImageRows, texts: TextRows) -> tuple[ImageRows, TextRows]:
    """Give an image's split to its texts that have none, and the other way round.

    Raises:
        DataError: an image and one of its texts, or two of its texts, are in different splits.
    """
    known: dict[str, str] = {
        str(image): split
        for image, split in zip(images.ids, images.splits, strict=True)
        if split is not None
    }
    for text, owner, split in zip(texts.ids, texts.image_ids, texts.splits, strict=True):
        if owner is not None and split is not None and known.setdefault(owner, split) != split:
            raise DataError(
                f"text {text!r:.200} is in split {split!r:.200} and its image {owner!r:.200} in "
                f"{known[owner]!r:.200}; an image and its texts belong in one split"
            )
    image_splits = [known.get(str(image)) for image in images.ids]
    text_splits = [
        split if owner is None else known.get(owner)
        for owner, split in zip(texts.image_ids, texts.splits, strict=True)
    ]
    return (
        ImageRows(images.ids, images.sources, image_splits),
        TextRows(texts.ids, texts.image_ids, texts.captions, text_splits),
    )


def _read_counts(path: Path) -> list[int]:
    if path.suffix.lower() == ".npy":
        return read_integers(path)
    table = read_label_table(path)
    counts = []
    for row, value in enumerate(_require(table, COUNT_NAMES)):
        try:
            counts.append(int(value or ""))
        except ValueError:
            raise DataError(
                f"{table.where(row)}: {value!r:.200} is no number of captions"
            ) from None
    return counts


def _numbers(count: int) -> list[str | None]:
    return [str(row) for row in range(count)]


def _get(labels: Labels, names: Sequence[str]) -> Strings | None:
    return next((labels.columns[name] for name in names if name in labels.columns), None)


def _require(labels: Labels, names: Sequence[str]) -> Strings:
    column = _get(labels, names)
    if column is None:
        listed = ", ".join(labels.columns) or "none"
        raise DataError(f"{labels.name}: has no column {names[0]!r} (columns: {listed}); add it")
    return column


def _check_rows(labels: Labels, count: int, what: str) -> None:
    if labels.rows != count:
        raise DataError(
            f"{labels.name}: has {labels.rows} rows and there are {count} {what}; the table "
            "describes the array row by row"
        )


def _ids(labels: Labels) -> Strings:
    ids = _get(labels, ID_NAMES)
    if ids is None:
        return _numbers(labels.rows)
    seen: dict[str, int] = {}
    for row, value in enumerate(ids):
        if value is None:
            raise DataError(f"{labels.where(row)}: has no id; give every row one, or none")
        if value in seen:
            raise DataError(
                f"{labels.where(row)}: id {value!r:.200} stands in {labels.where(seen[value])} "
                "too; ids must be unique, several captions of an image are texts with its image_id"
            )
        seen[value] = row
    return ids


def _by_id_or_row(images: ImageRows, ids: Strings, *, by_id: bool) -> Strings:
    """The image of each text where nothing names it: the one of its id, or else of its row."""
    shared = set(images.ids).intersection(ids) if by_id else set()
    if len(shared) == len(ids) == len(images.ids):
        return ids
    if shared:  # keys of which some are missing: the order of rows would be a guess
        raise DataError(
            f"{len(shared)} of {len(images.ids)} images and {len(ids)} texts share an id, the "
            "others do not; say which belong together with --pairs TABLE or a column image_id"
        )
    if len(ids) != len(images.ids):
        raise DataError(
            f"{len(images.ids)} images and {len(ids)} texts: rows are pairs only where there are "
            "as many of each; say which belong together with --pairs TABLE, a column image_id, or "
            "--captions-per-image"
        )
    return images.ids


def _rows_of_texts(pairs: Labels, text_ids: Strings) -> list[int]:
    """For each row of the pairs table, the text row that it speaks of."""
    named = _get(pairs, TEXT_ID_NAMES)
    if named is None:
        _check_rows(pairs, len(text_ids), "texts")
        return list(range(len(text_ids)))
    position = {value: row for row, value in enumerate(text_ids)}
    rows: list[int] = []
    seen: dict[int, int] = {}
    for row, value in enumerate(named):
        if value not in position:
            raise DataError(
                f"{pairs.where(row)}: text {value!r:.200} is not there; texts are named by the "
                "text table's id column, or else by row number from 0"
            )
        if position[value] in seen:
            raise DataError(
                f"{pairs.where(row)}: text {value!r:.200} is paired in "
                f"{pairs.where(seen[position[value]])} too; a text belongs to one image, repeat "
                "its row in the array"
            )
        seen[position[value]] = row
        rows.append(position[value])
    return rows


def _spread(values: Strings, rows: Sequence[int], count: int) -> Strings:
    """Values by table row, as values by text row; None for texts that the table leaves out."""
    spread: list[str | None] = [None] * count
    for row, value in zip(rows, values, strict=True):
        spread[row] = value
    return spread


def _check_owners(owners: Strings, images: ImageRows, labels: Labels | None) -> None:
    known = set(images.ids)
    lost = [row for row, owner in enumerate(owners) if owner is not None and owner not in known]
    if lost:
        where = "" if labels is None else f"{labels.name}: "
        raise DataError(
            f"{where}image {owners[lost[0]]!r:.200} is not there ({len(lost)} texts name images "
            "that are not); images are named by the image table's id column, or else by row number "
            "from 0"
        )
