"""The images of an array's rows: their ids, and rows that repeat one image."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.errors import DataError
from csalign.sources.arrays.base import Labels
from csalign.sources.arrays.naming import IMAGE_IDS, ITEM_IDS, PATHS, first_of, plain_name
from csalign.sources.keys import Ints
from csalign.sources.labels import check_rows, find_column
from csalign.sources.records.tables import IMAGE_NAMES, SPLIT_NAME

SOURCE_NAMES = ("source", *IMAGE_NAMES)
_SAME = 1e-2  # distance of the sketches of one embedding that was computed twice

Sketch = Callable[[], npt.NDArray[np.float32]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRows:
    """The images of an array's rows.

    Attributes:
        ids: (n,) large_string, unique, as all columns.
        sources: null where unknown.
        splits: null where unknown.
        labels: of the rows of the array, or None.
        key: column of `labels` that the ids are, None if they are row numbers.
        owners: (r,) image of each row of the array.
        kept: (r,) mask of the first row of each image, None if no image repeats.
    """

    ids: pa.Array
    sources: pa.Array
    splits: pa.Array
    labels: Labels | None
    key: str | None
    owners: Ints
    kept: npt.NDArray[np.bool_] | None


def describe_images(
    count: int,
    labels: Labels | None,
    sketch: Sketch | None = None,
    id_column: str | None = None,
) -> ImageRows:
    """Find the images of `count` rows: rows of one key are one image.

    The key is `id_column`, or an image id, or the first path or URL that repeats with equal
    embeddings, or another id; otherwise rows are images, and are numbered.

    Args:
        count: number of rows.
        labels: of the rows, or None.
        sketch: returns a few coordinates per row, (count, k), that show equal embeddings; None
            if no key may repeat.
        id_column: name of the key.

    Raises:
        DataError: `labels` has another number of rows; an id is missing, or repeats with another
            embedding.
    """
    none = pa.nulls(count, pa.large_string())
    if labels is None:
        if id_column is not None:
            raise DataError(
                f"--id-column {id_column}: the images have no columns; pass --image-table TABLE"
            )
        return ImageRows(row_numbers(count), none, none, None, None, np.arange(count), None)
    check_rows(labels, count, "images")
    rows = ImageRows(
        row_numbers(count),
        column_or(find_column(labels, SOURCE_NAMES), none),
        column_or(find_column(labels, (SPLIT_NAME,)), none),
        labels,
        None,
        np.arange(count),
        None,
    )
    named = id_column or first_of(IMAGE_IDS, labels.names)
    if id_column is not None and id_column not in labels.names:
        listed = ", ".join(labels.names) or "none"
        raise DataError(
            f"{labels.name}: has no column {id_column!r} (columns: {listed}); correct --id-column"
        )
    if named is None:
        for path in [name for name in labels.names if plain_name(name) in PATHS]:
            keys = labels.column(path)
            if keys.null_count or pc.count_distinct(keys).as_py() == count or sketch is None:
                continue
            if _first_unlike(keys, sketch()) is None:
                named = path
                break
            log.warning(
                "%s: %s repeats with different embeddings, so each row is an image of its own",
                *(labels.name, path),
            )
    named = named or first_of(ITEM_IDS, labels.names)
    return rows if named is None else _by_key(rows, named, sketch)


def keys_of_images(images: ImageRows, name: str | None) -> tuple[pa.Array | None, Ints | None]:
    """Return the keys of images in a column, and the image of each; None if they are no keys.

    A key that repeats is one only if the images with it are one image.
    """
    if name is None or name == images.key:
        return images.ids, None
    assert images.labels is not None
    keys = images.labels.column(name)
    if keys.null_count:
        return None, None
    coded = keys.dictionary_encode()
    codes = coded.indices.to_numpy()
    first = np.unique(codes, return_index=True)[1]
    if not (images.owners[first][codes] == images.owners).all():
        return None, None
    return coded.dictionary, images.owners[first]


def _by_key(rows: ImageRows, name: str, sketch: Sketch | None) -> ImageRows:
    """Make the values of a column the ids of images; rows of one value are one image."""
    assert rows.labels is not None
    labels, keys = rows.labels, rows.labels.column(name)
    if keys.null_count:
        row = keys.is_null().index(True).as_py()
        raise DataError(f"{labels.where(row)}: has no {name}; give every row one, or none")
    coded = keys.dictionary_encode()
    if len(coded.dictionary) == len(keys):
        return replace(rows, ids=keys, key=name)
    unlike = (1, 0) if sketch is None else _first_unlike(keys, sketch())
    if unlike is not None:
        row, first = unlike
        if sketch is None:
            row, first = first_repeated(coded)
        raise DataError(
            f"{labels.where(row)}: duplicate {name} {keys[row].as_py()!r:.200}, also in "
            f"{labels.where(first)} with another embedding; for several captions per image, give "
            "each text its own id and an image_id"
        )
    owners = coded.indices.to_numpy().astype(np.int64)
    first_rows = np.unique(owners, return_index=True)[1]
    kept = np.zeros(len(keys), np.bool_)
    kept[first_rows] = True
    log.info(
        "%s: %s rows, %s images, by %s",
        *(labels.name, f"{len(keys):,}", f"{len(coded.dictionary):,}", name),
    )
    return replace(
        rows,
        ids=coded.dictionary,
        sources=rows.sources.take(first_rows),
        splits=rows.splits.take(first_rows),
        key=name,
        owners=owners,
        kept=kept,
    )


def first_repeated(coded: pa.DictionaryArray) -> tuple[int, int]:
    """Return the first row whose value another row has, and that other row."""
    codes = coded.indices.to_numpy()
    first = np.unique(codes, return_index=True)[1][codes]
    row = int(np.flatnonzero(first != np.arange(len(codes)))[0])
    return row, int(first[row])


def _first_unlike(keys: pa.Array, sketch: npt.NDArray[np.float32]) -> tuple[int, int] | None:
    """Return the first row whose embedding differs from the first one of its key, and that one."""
    codes = keys.dictionary_encode().indices.to_numpy()
    first = np.unique(codes, return_index=True)[1][codes]
    # Rows that are not finite compare as equal here; they are refused when they are written.
    unlike = np.flatnonzero(np.abs(sketch - sketch[first]).max(axis=1) > _SAME)
    return (int(unlike[0]), int(first[unlike[0]])) if len(unlike) else None


def row_numbers(count: int) -> pa.Array:
    """Return "0", "1", ... as large_string."""
    return pa.array(np.arange(count)).cast(pa.large_string())


def column_or(
    column: pa.Array | None, otherwise: pa.Array, rows: pa.Array | None = None
) -> pa.Array:
    """Return some rows of a column, null where the row is null; `otherwise` without a column."""
    if column is None:
        return otherwise
    return column if rows is None else column.take(rows)
