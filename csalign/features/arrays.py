"""Arrays in memory as a feature set on disk."""

from pathlib import Path
from typing import Any

import numpy as np

from csalign.core.arrays import Array
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError

CHUNK_ROWS = 65_536
IN_MEMORY = "arrays-in-memory"
"""Name of the folder of a temporary feature set."""


def as_rows(values: Any, name: str) -> Array:
    """Return rows as a NumPy array (n, d) of numbers, without a copy where that is possible.

    Args:
        values: a NumPy array, a torch tensor on any device, a DataFrame or its column of vectors,
            or a list of vectors.
        name: what they are, for messages.

    Raises:
        ShapeError: they are not rows of numbers.

    >>> as_rows([[1, 2], [3, 4]], "x").shape
    (2, 2)
    """
    found = as_array(values, name)
    if found.ndim != 2:
        one = "; pass one row as [row]" if found.ndim == 1 else ""
        raise ShapeError(f"{name}: has shape {found.shape}, not (rows, width){one}")
    return found


def as_array(values: Any, name: str) -> Array:
    """Return values as a NumPy array of real numbers of any shape; see `as_rows`."""
    if hasattr(values, "detach"):  # a tensor; NumPy has no bfloat16
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    try:
        found: Array = np.asarray(values)
        if found.dtype == object and found.ndim == 1:  # a DataFrame's column of vectors
            found = np.asarray([np.asarray(row) for row in found])
    except ValueError as error:  # rows of several lengths
        raise ShapeError(f"{name}: cannot be an array ({error}); give rows of one length") from None
    if not np.issubdtype(found.dtype, np.number) or np.issubdtype(found.dtype, np.complexfloating):
        what = "text" if found.dtype.kind == "U" else f"values of dtype {found.dtype}"
        raise ShapeError(f"{name}: contains {what}, not embeddings; give an array of floats")
    return found


def is_array(value: Any) -> bool:
    """Return whether a value is an array or tensor of at least one dimension, or a list of rows."""
    if isinstance(value, list):
        return bool(value) and _is_row(value[0])
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def _is_row(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(own, int | float) for own in value)
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) == 1


def is_pair_of_arrays(value: Any) -> bool:
    """Return whether a value is ``(images, texts)`` or ``(images, texts, image_of_text)``."""
    return (
        isinstance(value, list | tuple) and len(value) in (2, 3) and all(map(is_array, value[:2]))
    )


def write_arrays(folder: Path, images: Any, texts: Any, image_of_text: Any = None) -> None:
    """Write arrays as a feature set in float32, with row numbers as ids.

    Args:
        folder: does not exist yet.
        images: (n, d), whatever `as_rows` takes; finite, no row of norm 0.
        texts: (m, e), likewise, or (n, k, e) for k texts of each image, in the order of the images.
        image_of_text: (m,) whole numbers, the row of the image of each text, -1 for none. By
            default row i of one side belongs to row i of the other.

    Raises:
        ShapeError: the shapes do not fit together.
        DataError: a row has no direction; its number is named.
    """
    from csalign.features.schema import EncoderInfo
    from csalign.features.writer import FeatureWriter, Rows

    image_rows, text_rows = as_rows(images, "images"), as_array(texts, "texts")
    if text_rows.ndim == 3 and len(text_rows) == len(image_rows) and image_of_text is None:
        image_of_text = np.repeat(np.arange(len(image_rows)), text_rows.shape[1])
        text_rows = text_rows.reshape(-1, text_rows.shape[2])
    sides = {Modality.IMAGE: image_rows, Modality.TEXT: as_rows(text_rows, "texts")}
    owners = _owners(len(image_rows), len(text_rows), image_of_text)
    folder.mkdir(parents=True)
    encoders = {
        side: EncoderInfo(spec="unknown", width=max(1, rows.shape[1]))
        for side, rows in sides.items()
    }
    with FeatureWriter(folder, encoders, "float32") as writer:
        for side, rows in sides.items():
            for start in range(0, len(rows), CHUNK_ROWS):
                chunk = rows[start : start + CHUNK_ROWS]
                ids: list[str | None] = [str(start + row) for row in range(len(chunk))]
                columns = {"id": ids}
                if side is Modality.TEXT:
                    own = owners[start : start + CHUNK_ROWS].tolist()
                    columns["image_id"] = [None if row < 0 else str(row) for row in own]
                writer.write(side, Rows(columns, chunk))


def _owners(images: int, texts: int, image_of_text: Any) -> Array:
    """Return the image row of each text, (m,), -1 for none."""
    if image_of_text is None:
        if images == texts:
            return np.arange(texts)
        counts = f"{images:,} images and {texts:,} texts"
        if images and texts and texts % images == 0:
            rows, each = f"numpy.arange({images})", texts // images
            raise ShapeError(
                f"{counts}: pass (images, texts, numpy.repeat({rows}, {each})) if the first {each} "
                f"texts belong to the first image, or (images, texts, numpy.tile({rows}, {each})) "
                f"if the first {images} texts belong to one image each"
            )
        swapped = "; are the two swapped?" if texts and images % texts == 0 else ""
        raise ShapeError(
            f"{counts}: pass (images, texts, image_of_text), with the row of the image of each "
            f"text, -1 for none{swapped}"
        )
    owners = as_array(image_of_text, "image_of_text")
    if owners.shape != (texts,) or not np.issubdtype(owners.dtype, np.integer):
        raise ShapeError(
            f"image_of_text: has shape {owners.shape} and dtype {owners.dtype}; pass one integer "
            f"for each of the {texts:,} texts"
        )
    wrong = np.flatnonzero((owners < -1) | (owners >= images))
    if len(wrong):
        raise DataError(
            f"image_of_text, row {wrong[0]}: is {owners[wrong[0]]}, but images have the numbers 0 "
            f"to {images - 1}; -1 is for none"
        )
    return owners
