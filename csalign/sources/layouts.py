"""Pairs that the order of the rows gives: equal counts, several captions per image, or a list."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from csalign.core.arrays import Ints
from csalign.core.errors import DataError
from csalign.sources.arrays.base import CHUNK_ROWS, UNNAMED
from csalign.sources.arrays.files import open_npy
from csalign.sources.arrays.naming import IMAGE_IDS, ITEM_IDS
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.keys import Keys, match


def owners_by_layout(
    images: int, texts: int, each: int, order: Literal["blocks", "copies"]
) -> Ints:
    """Return the image row of each text row, (texts,), where every image has `each` captions.

    They are in "blocks" of the captions of an image, or in "copies" of the list of images.

    Raises:
        DataError: there are not `each` texts per image.
    """
    if texts != images * each:
        raise DataError(
            f"{images} images and {texts} texts: {each} captions per image would be "
            f"{images * each} texts; pass the number of each with --text-counts FILE"
        )
    rows = np.arange(images)
    return np.tile(rows, each) if order == "copies" else np.repeat(rows, each)


def owners_by_counts(path: Path, images: int, texts: int, ids: Any = None) -> Ints:
    """Return the image row of each text row, (m,), by the number of captions of each image.

    Args:
        path: an .npy of integers, or a table with a column ``count``: n counts, or n + 1 offsets
            that begin at 0.
        images: n.
        texts: number of text rows.
        ids: of the images, an Arrow array (n,), if they have some; a table's must be in that order.

    Raises:
        DataError: the file cannot be used or does not add up to `texts`; its row is named.
    """
    counts = _read_counts(path, ids)
    if len(counts) == images + 1 and counts[0] == 0:
        counts = np.diff(counts)
    if len(counts) != images:
        raise DataError(
            f"{path}: has {len(counts)} rows and there are {images} images; write one count per "
            f"image, or {images + 1} offsets"
        )
    if len(negative := np.flatnonzero(counts < 0)):
        row = int(negative[0])
        raise DataError(f"{path}, row {row}: {counts[row]} captions; none can be below 0")
    if counts.sum() != texts:
        raise DataError(f"{path}: adds up to {counts.sum()} captions and there are {texts} texts")
    return np.repeat(np.arange(images), counts)


def _read_counts(path: Path, ids: Any) -> Ints:
    if path.suffix.lower() == ".npy":
        with open_npy(path) as file:
            shape, dtype = file.headers[UNNAMED]
            if len(shape) != 1 or "int" not in dtype:
                raise DataError(f"{path}: has shape {shape} of {dtype}, not a list of integers")
            chunks = list(file.read(UNNAMED, CHUNK_ROWS))
        return np.concatenate(chunks).astype(np.int64) if chunks else np.empty(0, np.int64)
    table = read_label_table(path)
    named = table.find((*IMAGE_IDS, *ITEM_IDS))
    if ids is not None and named is not None and len(ids) == len(named):
        wrong = np.flatnonzero(match(Keys(named), Keys(ids)).rows != np.arange(len(ids)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{table.where(row)}: is of image {named[row].as_py()!r:.200} and image row {row} "
                f"is {ids[row].as_py()!r:.200}; put the counts in the order of the images"
            )
    counts = np.empty(table.rows, np.int64)
    for row, value in enumerate(table.require("count", "counts", "captions", "texts").to_pylist()):
        try:
            counts[row] = int(value or "")
        except (ValueError, OverflowError):
            raise DataError(f"{table.where(row)}: {value!r:.200} is not an integer") from None
    return counts
