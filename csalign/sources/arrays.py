"""Arrays of embeddings that somebody already has, and tables that describe their rows."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.errors import DataError, ShapeError
from csalign.sources.tables import Table

Array = npt.NDArray[Any]
Strings = Sequence[str | None]

IMAGE_ARRAYS = ("images", "image", "image_embeddings", "img_emb")
TEXT_ARRAYS = ("texts", "text", "text_embeddings", "text_emb")
NPY_MAGIC = b"\x93NUMPY"
ID_NAMES = ("id",)
IMAGE_ID_NAMES = ("image_id", "image", "image_row")
TEXT_ID_NAMES = ("text_id", "text", "text_row")


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
    """What is known of each image row; all of length n."""

    ids: Strings
    sources: Strings
    splits: Strings


def read_array(spec: Path, names: Sequence[str]) -> Array:
    """Open an array of embeddings; an .npy is mapped, not read.

    Args:
        spec: a .npy file, or an .npz with the array's name behind a colon (``both.npz:images``),
            which may be left out where the file holds one of `names`.
        names: what the array may be called inside an .npz.

    Returns:
        (n, d), float16, float32 or float64, n >= 1.

    Raises:
        DataError: the file is not there, is damaged, or holds pickled objects.
        ShapeError: the array is not 2-D, is empty, or not of a float dtype.
    """
    path, _, name = str(spec).partition(".npz:")
    file = Path(f"{path}.npz") if name else spec
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        array = _load(file, name, names)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        if "pickle" in str(error).lower() or "object" in str(error).lower():
            raise DataError(
                f"{file}: holds Python objects, which csalign never unpickles; save a plain array "
                "with numpy.save(path, array.astype('float32'))"
            ) from None
        raise DataError(f"{file}: is no readable NumPy file ({error})") from None
    if array.ndim != 2 or not array.size:
        what = "is empty" if not array.size else "embeddings are (rows, width)"
        raise ShapeError(f"{file}: has shape {array.shape}: {what}")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ShapeError(
            f"{file}: has dtype {array.dtype}; embeddings are float16, float32 or float64, save "
            "them with numpy.save(path, array.astype('float32'))"
        )
    return array


def _load(file: Path, name: str, names: Sequence[str]) -> Array:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as start:
            if start.read(len(NPY_MAGIC)) != NPY_MAGIC:
                raise ValueError("it has not the beginning of one")
        array: Array = np.load(file, mmap_mode="r", allow_pickle=False)
        return array
    with np.load(file, allow_pickle=False) as archive:
        wanted = name or next((known for known in names if known in archive), None)
        if wanted not in archive:
            there = ", ".join(archive.files) or "none"
            hint = f"{file.name}:NAME" if not name else "one of them"
            raise DataError(
                f"{file}: has no array {wanted or names[0]!r} (arrays: {there}); name {hint}"
            )
        chosen: Array = archive[wanted]
        return chosen


def describe_images(count: int, table: Table | None) -> ImageRows:
    """Ids, sources and splits of the image rows; row numbers are their ids without a table.

    Raises:
        DataError: the table has another number of rows, or an id is missing or repeats.
    """
    none: Strings = [None] * count
    if table is None:
        return ImageRows(_numbers(count), none, none)
    _check_rows(table, count, "images")
    return ImageRows(_ids(table), table.get(("source",)) or none, table.get(("split",)) or none)


def describe_texts(
    count: int, images: ImageRows, table: Table | None, pairs: Table | None
) -> TextRows:
    """Ids, images, captions and splits of the text rows.

    Args:
        count: text rows.
        images: what is known of the images.
        table: with a row a text, in the array's order, or None.
        pairs: with an image id in each row, and the text's id in each, or else a row a text in
            the array's order; None pairs by the text table's image ids, or row by row.

    Raises:
        DataError: counts differ, an id is missing, repeats, or names nothing that is there.
    """
    ids: Strings = _numbers(count)
    known: dict[str, Strings] = {"caption": [None] * count, "split": [None] * count}
    owners: Strings | None = None
    if table is not None:
        _check_rows(table, count, "texts")
        ids = _ids(table)
        owners = table.get(IMAGE_ID_NAMES)
        known |= {name: table.columns[name] for name in known.keys() & table.columns.keys()}
    if pairs is not None:
        row_of = _rows_of_texts(pairs, ids)
        owners = _spread(pairs.require(IMAGE_ID_NAMES), row_of, count)
        for name in known.keys() & pairs.columns.keys():
            known[name] = _spread(pairs.columns[name], row_of, count)
    if owners is None:
        if count != len(images.ids):
            raise DataError(
                f"{len(images.ids)} images and {count} texts: rows are pairs only where there are "
                "as many of each; say which belong together with --pairs TABLE"
            )
        owners = images.ids
    _check_owners(owners, images, pairs or table)
    return TextRows(ids, owners, known["caption"], known["split"])


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
                f"text {text!r} is in split {split!r} and its image {owner!r} in "
                f"{known[owner]!r}; an image and its texts belong in one split"
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


def _numbers(count: int) -> list[str | None]:
    return [str(row) for row in range(count)]


def _check_rows(table: Table, count: int, what: str) -> None:
    if len(table) != count:
        raise DataError(
            f"{table.path}: has {len(table)} rows and there are {count} {what}; the table "
            "describes the array row by row"
        )


def _ids(table: Table) -> Strings:
    ids = table.get(ID_NAMES)
    if ids is None:
        return _numbers(len(table))
    seen: dict[str, int] = {}
    for row, value in enumerate(ids):
        if value is None:
            raise DataError(f"{table.where(row)}: has no id")
        if value in seen:
            raise DataError(
                f"{table.where(row)}: id {value!r} stands in row {table.numbers[seen[value]]} "
                "too; ids must be unique"
            )
        seen[value] = row
    return ids


def _rows_of_texts(pairs: Table, text_ids: Strings) -> list[int]:
    """For each row of the pairs table, the text row that it speaks of."""
    named = pairs.get(TEXT_ID_NAMES)
    if named is None:
        _check_rows(pairs, len(text_ids), "texts")
        return list(range(len(text_ids)))
    position = {value: row for row, value in enumerate(text_ids)}
    rows: list[int] = []
    seen: dict[int, int] = {}
    for row, value in enumerate(named):
        if value not in position:
            raise DataError(
                f"{pairs.where(row)}: text {value!r} is not there; texts are named by the text "
                "table's id column, or else by row number from 0"
            )
        if position[value] in seen:
            raise DataError(
                f"{pairs.where(row)}: text {value!r} is paired in row "
                f"{pairs.numbers[seen[position[value]]]} too; a text belongs to one image, repeat "
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


def _check_owners(owners: Strings, images: ImageRows, table: Table | None) -> None:
    known = set(images.ids)
    lost = [row for row, owner in enumerate(owners) if owner is not None and owner not in known]
    if lost:
        where = "" if table is None else f"{table.path}: "
        raise DataError(
            f"{where}image {owners[lost[0]]!r} is not there ({len(lost)} texts name images that "
            "are not); images are named by the image table's id column, or else by row number "
            "from 0"
        )
