"""The images of an array's rows: their ids, and rows that repeat one image."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.arrays import Floats, Ints, Mask
from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.figures import counted
from csalign.sources.arrays.naming import (
    IMAGE_IDS,
    ITEM_IDS,
    PATHS,
    first_of,
    is_key,
    label_side,
    plain_name,
)
from csalign.sources.labels import Labels, check_no_null, first_repeated, first_rows
from csalign.sources.records.tables import IMAGE_NAMES, SPLIT_NAME

_SAME = 1e-2  # distance of the sketches of one embedding that was computed twice

Sketch = Callable[[], Floats]
Digests = Callable[[], Ints]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRows:
    """The images of an array's rows."""

    columns: dict[str, pa.Array]  # id, which is unique, source, split, (n,); null where unknown
    owners: Ints  # (r,) image of each row of the array
    labels: Labels  # of the rows of the array
    key: str | None = None  # column of `labels` that the ids are, None if they are row numbers
    kept: Mask | None = None  # (r,) first row of each image, None for all

    @property
    def ids(self) -> pa.Array:
        """Ids of the images, (n,)."""
        return self.columns["id"]


def describe_images(
    count: int,
    labels: Labels | None,
    sketch: Sketch | None = None,
    id_column: str | None = None,
    digests: Digests | None = None,
) -> ImageRows:
    """Find the images of `count` rows: rows of one key are one image.

    The key is `id_column`, or an image id, or the first path or URL that repeats with equal
    embeddings, or another id. Otherwise rows are numbered, and those of equal embeddings are one
    image if `digests` is given, unless a column names each row.

    Args:
        count: number of rows.
        labels: of the rows, or None.
        sketch: returns a few coordinates per row, (count, k), that show equal embeddings; None
            if no key may repeat.
        id_column: name of the key.
        digests: returns integers (count,) that are equal where embeddings are; None if equal
            embeddings may be several images.

    Raises:
        DataError: `labels` has another number of rows; an id is missing, or repeats with another
            embedding.
    """
    none = pa.nulls(count, pa.large_string())
    labels = Labels("the images", count, str) if labels is None else labels
    labels.check_rows(count, "images")
    columns = {
        "id": row_numbers(count),
        "source": labels.find(("source", *IMAGE_NAMES), none),
        "split": labels.find((SPLIT_NAME,), none),
    }
    rows = ImageRows(columns, np.arange(count), labels)
    if id_column is not None and id_column not in labels.names:
        remedy = "correct --id-column" if labels.names else "pass --image-table TABLE"
        raise DataError(
            f"{labels.name}: has no column {id_column!r} (columns: "
            f"{', '.join(labels.names) or 'none'}); {remedy}"
        )
    image_ids = first_of(IMAGE_IDS, labels.names)
    if image_ids is not None and labels.column(image_ids).null_count == count:
        image_ids = None  # as in the texts of a feature set without images
    key = (
        id_column or image_ids or _repeated_path(labels, sketch) or first_of(ITEM_IDS, labels.names)
    )
    found = rows if key is None else _by_key(rows, key, sketch)
    return found if found.kept is not None else _by_digest(found, digests)


def keys_of_images(images: ImageRows, name: str | None) -> tuple[pa.Array, Ints | None]:
    """Return the values of a column, and the image of each; None if they are not keys.

    A value that repeats is a key only if the images with it are one image. Without a name, keys
    are the numbers of the rows.
    """
    if name is None:
        return row_numbers(len(images.owners)), images.owners
    if name == images.key:
        return images.ids, np.arange(len(images.ids))
    keys = images.labels.column(name)
    is_key = not keys.null_count and (images.owners[first_rows(keys)] == images.owners).all()
    return keys, images.owners if is_key else None


def _repeated_path(labels: Labels, sketch: Sketch | None) -> str | None:
    for path in [name for name in labels.names if plain_name(name) in PATHS]:
        keys = labels.column(path)
        if keys.null_count or sketch is None or pc.count_distinct(keys).as_py() == len(keys):
            continue
        if _first_unlike(keys, sketch()) is None:
            return path
        log.warning(
            "%s: %s repeats with different embeddings, so it does not name images",
            *(labels.name, path),
        )
    return None


def _by_key(rows: ImageRows, name: str, sketch: Sketch | None) -> ImageRows:
    """Make the values of a column the ids of images; rows of one value are one image."""
    keys = check_no_null(rows.labels, name, name)
    named = replace(rows, columns=rows.columns | {"id": keys}, key=name)
    repeated = first_repeated(keys)
    if repeated is None:
        return named
    if sketch is not None:
        repeated = _first_unlike(keys, sketch())
    if repeated is not None:
        row, first = map(rows.labels.where, repeated)
        raise DataError(
            f"{row}: duplicate {name} {keys[repeated[0]].as_py()!r:.200}, also in {first} with "
            "another embedding; for several captions per image, give each text its own id and an "
            "image_id"
        )
    return _merged(named, first_rows(keys))


def _by_digest(rows: ImageRows, digests: Digests | None) -> ImageRows:
    """Make rows of equal embeddings one image, unless a column gives each row a name of its own.

    Where many rows are one embedding, as of blank pictures, all stay as they are.
    """
    if digests is None:
        return rows
    _, first, codes, sizes = np.unique(
        digests(), return_index=True, return_inverse=True, return_counts=True
    )
    usual = np.median(sizes) if len(sizes) > 1 else 0
    if len(first) == len(codes) or sizes.max() > max(10, len(codes) / 10, 5 * usual):
        return rows  # the latter are blank pictures or a collapse rather than captions of one image
    unique = (
        name
        for name in rows.labels.names
        if is_key(name)
        and label_side(name) is not Modality.TEXT
        and first_repeated(rows.labels.column(name)) is None
    )
    if (own := rows.key or next(unique, None)) is not None:
        log.warning(
            "%s: %s image rows have %s embeddings, but each its own %s, so equal images compete in "
            "evaluation; name the column that images share with --id-column",
            *(rows.labels.name, f"{len(codes):,}", f"{len(first):,}", own),
        )
        return rows
    return _merged(rows, first[codes])


def _merged(rows: ImageRows, first: Ints) -> ImageRows:
    """Make rows with the same first row one image."""
    first_row, owners = np.unique(first, return_inverse=True)
    counts, labels = (f"{len(first):,}", counted(len(first_row), "image")), rows.labels
    if rows.key is None:
        log.info("%s image rows are %s, by equal embeddings", *counts)
    else:
        log.info("%s: %s rows, %s, by %s", labels.name, *counts, rows.key)
    columns = {name: column.take(first_row) for name, column in rows.columns.items()}
    splits = rows.columns["split"]
    columns["split"], of_rows, bad = fill_splits(columns["split"], splits, owners)
    if bad is not None:
        raise DataError(
            f"{labels.where(bad)}: is in split {splits[bad].as_py()!r}, and another row of the "
            f"same image in {of_rows[bad].as_py()!r}; give an image one split"
        )
    kept = np.isin(rows.owners, first_row)
    return replace(rows, columns=columns, owners=owners, kept=kept)


def fill_splits(
    known: pa.Array, splits: pa.Array, owners: Ints
) -> tuple[pa.Array, pa.Array, int | None]:
    """Give images (n,) without a split the first one of their rows (m,), and vice versa.

    Returns those of images, those of rows, and the first row whose image has another one.
    """
    rows = np.flatnonzero((owners >= 0) & splits.is_valid().to_numpy(zero_copy_only=False))
    images, first = np.unique(owners[rows], return_index=True)
    places = np.full(len(known), -1)
    places[images] = rows[first]
    known = pc.coalesce(known, splits.take(pa.array(places, mask=places < 0)))
    of_rows = pc.coalesce(known.take(pa.array(owners, mask=owners < 0)), splits)
    bad = pc.not_equal(splits, of_rows).index(True).as_py()
    return known, of_rows, None if bad < 0 else bad


def _first_unlike(keys: pa.Array, sketch: Floats) -> tuple[int, int] | None:
    """Return the first row whose embedding differs from the first one of its key, and that one."""
    first = first_rows(keys)
    # Rows that are not finite compare as equal here; they are refused when they are written.
    unlike = np.flatnonzero(np.abs(sketch - sketch[first]).max(axis=1) > _SAME)
    return (int(unlike[0]), int(first[unlike[0]])) if len(unlike) else None


def row_numbers(count: int) -> pa.Array:
    """Return "0", "1", ... as large_string."""
    return pa.array(np.arange(count)).cast(pa.large_string())
