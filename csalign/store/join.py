"""Rows of a feature set in memory: splits selected, texts joined to images by id."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from csalign.enums import Modality
from csalign.errors import DataError, SchemaError, ShapeError
from csalign.store import schema
from csalign.store.reader import FeatureSet, FeatureTable

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

ALL = "all"
CHECKED_ROWS = 65_536  # at a time, so that a check needs no second copy of everything


@dataclass(frozen=True)
class PairedRows:
    """Some images and texts of a feature set, and which belong together.

    Attributes:
        name: where they come from, for messages: the feature set and its split.
        images: (n, d) in the stored dtype.
        texts: (m, e) in the stored dtype.
        image_ids: n ids.
        text_ids: m ids.
        captions: m captions, null where unknown.
        text_image: (m,) int64, row of the image that a text belongs to, -1 for none.
        image_rows: (n,) int64, where the images are in the image table; None for all in order.
        text_rows: (m,) int64, likewise of the texts.
    """

    name: str
    images: Array
    texts: Array
    image_ids: pa.Array
    text_ids: pa.Array
    captions: pa.Array
    text_image: Ints
    image_rows: Ints | None = None
    text_rows: Ints | None = None

    def embeddings(self, side: Modality) -> Array:
        """The embeddings of one side."""
        return self.images if side is Modality.IMAGE else self.texts

    def table_rows(self, side: Modality) -> Ints:
        """Where the rows of one side are in its table, int64."""
        rows = self.image_rows if side is Modality.IMAGE else self.text_rows
        return np.arange(len(self.embeddings(side))) if rows is None else rows

    @property
    def pairs(self) -> int:
        """Texts that belong to an image here."""
        return int((self.text_image >= 0).sum())

    @cached_property
    def caption_counts(self) -> Ints:
        """How many texts each image has, (n,)."""
        return np.bincount(self.text_image[self.text_image >= 0], minlength=len(self.images))

    @cached_property
    def texts_by_image(self) -> Ints:
        """Rows of the paired texts, (pairs,), image by image, in stored order within an image."""
        paired = np.flatnonzero(self.text_image >= 0)
        return paired[np.argsort(self.text_image[paired], kind="stable")]

    @cached_property
    def caption_keys(self) -> Ints:
        """A number for each text (m,), equal where captions are but for case and outer space.

        A text without a caption is told by its embedding's bytes.
        """
        folded = pc.utf8_lower(pc.utf8_trim_whitespace(self.captions))
        keys = folded.dictionary_encode().indices.fill_null(-1)
        numbers: Ints = keys.to_numpy(zero_copy_only=False).astype(np.int64)
        unknown = np.flatnonzero(numbers < 0)
        if len(unknown):
            digests = [blake2b(self.texts[row], digest_size=16).digest() for row in unknown]
            keys = pa.array(digests, pa.binary(16)).dictionary_encode().indices
            numbers[unknown] = keys.to_numpy() + numbers.max() + 1
        return numbers

    def take_images(self, keep: npt.NDArray[np.bool_], *, lone_texts: bool = False) -> "PairedRows":
        """The images where `keep` (n,) is true, and their texts.

        Args:
            keep: (n,).
            lone_texts: whether to keep the texts without an image as well.
        """
        position = np.where(keep, np.cumsum(keep) - 1, -1)
        is_lone = self.text_image < 0
        texts = np.flatnonzero(np.where(is_lone, lone_texts, keep[self.text_image]))
        return PairedRows(
            name=self.name,
            images=self.images[keep],
            texts=self.texts[texts],
            image_ids=self.image_ids.filter(pa.array(keep)),
            text_ids=self.text_ids.take(texts),
            captions=self.captions.take(texts),
            text_image=np.where(is_lone[texts], -1, position[self.text_image[texts]]),
            image_rows=self.table_rows(Modality.IMAGE)[keep],
            text_rows=self.table_rows(Modality.TEXT)[texts],
        )

    def take_texts(self, texts: Ints) -> "PairedRows":
        """All images, and the texts of these rows in this order."""
        return replace(
            self,
            texts=self.texts[texts],
            text_ids=self.text_ids.take(texts),
            captions=self.captions.take(texts),
            text_image=self.text_image[texts],
            text_rows=self.table_rows(Modality.TEXT)[texts],
        )


def split_names(split: str, there: Collection[str | None]) -> set[str | None]:
    """The splits that a ``--split`` value means: names by comma, or "all" of those there are."""
    if split == ALL:
        return set(there)
    return {name.strip() for name in split.split(",")}


def load_rows(features: FeatureSet, split: str) -> PairedRows:
    """Read the embeddings of some splits and join texts to images by id.

    Args:
        features: an open feature set.
        split: names of splits, comma-separated, or "all" for every row whatever its split.

    Raises:
        DataError: the split is not there, or holds no pairs.
        SchemaError: an id repeats, a text names an image that is not there or is in another split,
            or a shard is damaged.
    """
    joined = join_ids(features, split)
    if not (joined.text_image >= 0).any():
        raise DataError(f"{joined.name}: holds no pairs; {_splits_there(features)}")
    return PairedRows(
        name=joined.name,
        images=_rows(features.images.embeddings(), joined.image_rows),
        texts=_rows(features.texts.embeddings(), joined.text_rows),
        image_ids=joined.image_ids,
        text_ids=joined.text_ids,
        captions=_take(_column(features.texts, schema.CAPTION), joined.text_rows),
        text_image=joined.text_image,
        image_rows=joined.image_rows,
        text_rows=joined.text_rows,
    )


def load_side(features: FeatureSet, split: str, side: Modality) -> PairedRows:
    """Read the embeddings of one side of some splits, for what needs no pairs.

    The other side has no rows. Arguments and errors are those of `load_rows`, but that there may
    be no rows and no pairs.
    """
    joined = join_ids(features, split)
    is_image = side is Modality.IMAGE
    rows = joined.image_rows if is_image else joined.text_rows
    values = _rows(features.table(side).embeddings(), rows)
    none, no_ids = values[:0], joined.image_ids[:0]
    return PairedRows(
        name=joined.name,
        images=values if is_image else none,
        texts=none if is_image else values,
        image_ids=joined.image_ids if is_image else no_ids,
        text_ids=no_ids if is_image else joined.text_ids,
        captions=no_ids
        if is_image
        else _take(_column(features.texts, schema.CAPTION), joined.text_rows),
        text_image=np.full(0 if is_image else len(values), -1),
        image_rows=joined.image_rows,
        text_rows=joined.text_rows,
    )


@dataclass(frozen=True)
class JoinedIds:
    """Rows of some splits, joined by id; attributes as in `PairedRows`.

    Attributes:
        name: the feature set and its split, for messages.
        image_rows: the selected rows of the image table, None for all of them.
        text_rows: likewise of the text table.
        image_ids: n ids.
        text_ids: m ids.
        text_image: (m,) int64.
    """

    name: str
    image_rows: Ints | None
    text_rows: Ints | None
    image_ids: pa.Array
    text_ids: pa.Array
    text_image: Ints


def join_ids(features: FeatureSet, split: str) -> JoinedIds:
    """Select splits and join texts to images, without reading embeddings.

    Raises:
        SchemaError: an id repeats, or a text names an image that is not there or in another split.
    """
    names = None if split == ALL else sorted(str(name) for name in split_names(split, ()))
    image_rows, text_rows = (_select(table, names) for table in (features.images, features.texts))
    all_image_ids = _unique_ids(features.images)
    text_ids = _take(_unique_ids(features.texts), text_rows)
    image_ids = _take(all_image_ids, image_rows)
    owner = _take(_column(features.texts, schema.IMAGE_ID), text_rows)
    text_image = _positions(owner, image_ids)
    where = f"{features.path}" + ("" if names is None else f" (split {split})")
    _check_owners(where, owner, text_image, all_image_ids, text_ids)
    return JoinedIds(where, image_rows, text_rows, image_ids, text_ids, text_image)


def image_sources(features: FeatureSet, ids: Sequence[str]) -> list[str | None]:
    """Where the pixels of some images can be found again, None where that is unknown."""
    rows = pc.index_in(
        pa.array(ids, pa.large_string()), value_set=_column(features.images, schema.ID)
    )
    sources: list[str | None] = _column(features.images, schema.SOURCE).take(rows).to_pylist()
    return sources


def unit_rows(values: Array, ids: pa.Array, name: str) -> npt.NDArray[np.float32]:
    """Rows scaled to norm 1, in float32.

    Args:
        values: (n, d), any float dtype.
        ids: n ids, for the message.
        name: what the rows are, for the message.

    Raises:
        DataError: a row is not finite or has norm 0, and so no direction.
    """
    check_directions(values, ids, name)
    wide = values.astype(np.float32)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return wide


def check_directions(values: Array, ids: pa.Array, name: str) -> None:
    """Raise DataError if a row is not finite or has norm 0; arguments as for `unit_rows`."""
    for start in range(0, len(values), CHECKED_ROWS):
        norms = np.linalg.norm(values[start : start + CHECKED_ROWS].astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
        if len(bad):
            what = "has norm 0" if norms[bad[0]] == 0 else "is not finite"
            raise DataError(
                f"{name}: the embedding of {ids[start + int(bad[0])].as_py()!r} {what}; encode it "
                "again or leave it out"
            )


def check_same_width(rows: PairedRows) -> None:
    """Raise ShapeError unless images and texts have one width."""
    if rows.images.shape[1] != rows.texts.shape[1]:
        raise ShapeError(
            f"{rows.name}: images are {rows.images.shape[1]} wide and texts {rows.texts.shape[1]}, "
            "so they can only be compared through an adapter; train one and give it with --adapter"
        )


def _select(table: FeatureTable, names: Sequence[str] | None) -> Ints | None:
    """Rows whose split is among the names; None is all rows."""
    if names is None:
        return None
    chosen = pc.is_in(_column(table, schema.SPLIT), value_set=pa.array(names, pa.large_string()))
    return np.flatnonzero(chosen.to_numpy(zero_copy_only=False))


def _column(table: FeatureTable, name: str) -> pa.Array:
    # Large strings, since 32-bit offsets end at 2 GiB of captions.
    return table.column(name).cast(pa.large_string()).combine_chunks()


def _take(column: pa.Array, rows: Ints | None) -> pa.Array:
    return column if rows is None else column.take(pa.array(rows))


def _rows(values: Array, rows: Ints | None) -> Array:
    return values if rows is None else values[rows]


def _unique_ids(table: FeatureTable) -> pa.Array:
    ids = _column(table, schema.ID)
    if pc.count_distinct(ids).as_py() != len(ids):
        counts = ids.value_counts()
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise SchemaError(
            f"{table.folder}: {table.modality} id {twice!r} appears more than once; ids must be "
            "unique, make the feature set again"
        )
    return ids


def _positions(owner: pa.Array, image_ids: pa.Array) -> Ints:
    found = pc.index_in(owner, value_set=image_ids, skip_nulls=True)
    positions: Ints = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return positions


def _check_owners(
    where: str,
    owner: pa.Array,
    text_image: Ints,
    all_image_ids: pa.Array,
    text_ids: pa.Array,
) -> None:
    lost = np.flatnonzero((text_image < 0) & owner.is_valid().to_numpy(zero_copy_only=False))
    if not len(lost):
        return
    row = int(lost[0])
    text, image = text_ids[row].as_py(), owner[row].as_py()
    elsewhere = pc.is_in(owner[row], value_set=all_image_ids).as_py()
    reason = "is in another split" if elsewhere else "is not there"
    raise SchemaError(
        f"{where}: text {text!r} belongs to image {image!r}, which {reason} "
        f"({len(lost)} such texts); make the feature set again"
    )


def _splits_there(features: FeatureSet) -> str:
    listed = ", ".join(
        f"{name or '(none)'}: {counts['images']} images, {counts['texts']} texts"
        for name, counts in features.splits().items()
    )
    return f"its splits are {listed or 'none, it is empty'}; name one of them"
