"""Rows of a feature set: splits selected, texts joined to images by id."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.enums import Modality
from csalign.core.errors import DataError, SchemaError, ShapeError
from csalign.features import schema
from csalign.features.keys import Keys, compact, first_alike, string_keys, text_keys
from csalign.features.memory_map import Vectors
from csalign.features.reader import FeatureSet, FeatureTable

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

ALL = "all"
CHECKED_ROWS = 65_536  # at a time, so that a check needs no second copy of everything


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Embeddings of some images and texts, and which belong together.

    Attributes:
        name: where they come from, for messages: the feature set and its split.
        images: (n, d) in the stored dtype.
        texts: (m, e) in the stored dtype.
        text_image: (m,) int64, row of the image that a text belongs to, -1 for none.
        image_rows: (n,) ints, where the images are in the image table; None for all in order.
        text_rows: (m,) ints, likewise of the texts.
    """

    name: str
    images: Vectors
    texts: Vectors
    text_image: Ints
    image_rows: Ints | None = None
    text_rows: Ints | None = None

    @property
    def caption_keys(self) -> Ints:
        """A number for each text (m,), equal where captions are but for case and outer space.

        A text without a caption is told by its embedding's bytes.
        """
        raise NotImplementedError

    def embeddings(self, side: Modality) -> Vectors:
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
        return caption_counts(self.text_image, len(self.images))

    @cached_property
    def texts_by_image(self) -> Ints:
        """Rows of the paired texts, (pairs,), image by image, in stored order within an image."""
        paired = np.flatnonzero(self.text_image >= 0)
        owners = self.text_image[paired]
        if (owners[1:] >= owners[:-1]).all():
            return compact(paired)
        return compact(paired[np.argsort(owners, kind="stable")])


@dataclass(frozen=True, kw_only=True)
class PairedRows(Pairs):
    """The same in memory, with all that is told of them.

    Attributes:
        image_ids: n ids.
        text_ids: m ids.
        captions: m captions, null where unknown.
    """

    images: Array
    texts: Array
    image_ids: pa.Array
    text_ids: pa.Array
    captions: pa.Array

    def embeddings(self, side: Modality) -> Array:
        """The embeddings of one side."""
        return self.images if side is Modality.IMAGE else self.texts

    @cached_property
    def caption_keys(self) -> Ints:
        """See `Pairs`."""
        parts = [
            text_keys(
                self.captions[start : start + CHECKED_ROWS], self.texts[start:][:CHECKED_ROWS]
            )
            for start in range(0, len(self.texts), CHECKED_ROWS)
        ]
        return first_alike(np.concatenate([np.empty(0, np.uint64), *parts]))

    def take_images(self, keep: npt.NDArray[np.bool_], *, lone_texts: bool = False) -> "PairedRows":
        """The images where `keep` (n,) is true, and their texts.

        Args:
            keep: (n,).
            lone_texts: whether to keep the texts without an image as well.
        """
        texts, text_image = _texts_of(self.text_image, keep, lone_texts=lone_texts)
        return PairedRows(
            name=self.name,
            images=self.images[keep],
            texts=self.texts[texts],
            image_ids=self.image_ids.filter(pa.array(keep)),
            text_ids=self.text_ids.take(texts),
            captions=self.captions.take(texts),
            text_image=text_image,
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
    joined = join_pairs(features, split)
    return joined.told(
        features,
        _rows(features.images.embeddings(), joined.image_rows),
        _rows(features.texts.embeddings(), joined.text_rows),
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
    none, no_ids = values[:0], pa.array([], pa.large_string())
    return PairedRows(
        name=joined.name,
        images=values if is_image else none,
        texts=none if is_image else values,
        image_ids=features.images.strings(schema.ID, rows) if is_image else no_ids,
        text_ids=no_ids if is_image else features.texts.strings(schema.ID, rows),
        captions=no_ids if is_image else features.texts.strings(schema.CAPTION, rows),
        text_image=np.full(0 if is_image else len(values), -1),
        image_rows=joined.image_rows,
        text_rows=joined.text_rows,
    )


@dataclass(frozen=True)
class Joined:
    """Rows of some splits, joined by id, without what is stored of them; see `Pairs`.

    Attributes:
        name: the feature set and its split, for messages.
        images: how many.
        text_image: (m,) int64.
        image_rows: the selected rows of the image table, ascending; None for all of them.
        text_rows: likewise of the text table.
    """

    name: str
    images: int
    text_image: Ints
    image_rows: Ints | None
    text_rows: Ints | None

    @property
    def texts(self) -> int:
        """How many."""
        return len(self.text_image)

    @cached_property
    def caption_counts(self) -> Ints:
        """How many texts each image has, (n,)."""
        return caption_counts(self.text_image, self.images)

    def take_images(self, keep: npt.NDArray[np.bool_], *, lone_texts: bool = False) -> "Joined":
        """See `PairedRows.take_images`."""
        texts, text_image = _texts_of(self.text_image, keep, lone_texts=lone_texts)
        images = np.flatnonzero(keep)
        return Joined(
            self.name,
            len(images),
            text_image,
            compact(images if self.image_rows is None else self.image_rows[images]),
            compact(texts if self.text_rows is None else self.text_rows[texts]),
        )

    def told(self, features: FeatureSet, images: Array, texts: Array) -> PairedRows:
        """With their embeddings, and the strings that are stored of them."""
        return PairedRows(
            name=self.name,
            images=images,
            texts=texts,
            image_ids=features.images.strings(schema.ID, self.image_rows),
            text_ids=features.texts.strings(schema.ID, self.text_rows),
            captions=features.texts.strings(schema.CAPTION, self.text_rows),
            text_image=self.text_image,
            image_rows=self.image_rows,
            text_rows=self.text_rows,
        )


def join_pairs(features: FeatureSet, split: str) -> Joined:
    """Like `join_ids`, for what needs pairs.

    Raises:
        DataError: the split is not there, or holds no pairs.
    """
    joined = join_ids(features, split)
    if not (joined.text_image >= 0).any():
        raise DataError(f"{joined.name}: holds no pairs; {_splits_there(features)}")
    return joined


def join_ids(features: FeatureSet, split: str) -> Joined:
    """Select splits and join texts to images, without reading embeddings.

    Raises:
        SchemaError: an id repeats, or a text names an image that is not there or in another split.
    """
    names = None if split == ALL else sorted(str(name) for name in split_names(split, ()))
    image_rows, text_rows = (
        select_rows(table, names) for table in (features.images, features.texts)
    )
    _unique_keys(features.texts)
    all_images, salt = _unique_keys(features.images)
    images = all_images if image_rows is None else all_images[image_rows]
    owners, is_owned = _owners(features.texts, text_rows, salt)
    text_image = _positions(owners, is_owned, images)
    where = f"{features.path}" + ("" if names is None else f" (split {split})")
    lost = np.flatnonzero((text_image < 0) & is_owned)
    if len(lost):
        row = int(lost[0]) if text_rows is None else int(text_rows[lost[0]])
        elsewhere = bool((all_images == owners[lost[0]]).any())
        raise _lost(features.texts, where, row, len(lost), elsewhere=elsewhere)
    return Joined(where, len(images), text_image, image_rows, text_rows)


def image_sources(features: FeatureSet, ids: Sequence[str]) -> list[str | None]:
    """Where the pixels of some images can be found again, None where that is unknown."""
    rows = pc.index_in(
        pa.array(ids, pa.large_string()), value_set=features.images.strings(schema.ID)
    )
    sources: list[str | None] = features.images.strings(schema.SOURCE).take(rows).to_pylist()
    return sources


def told_of(features: FeatureSet, joined: Joined, side: Modality) -> dict[str, pa.Array]:
    """What people want to know of each row of one side, found in a search.

    Returns:
        The columns id; image_id, of texts; caption, of images that of their first text; and
        source, of texts that of their image.
    """
    table = features.table(side)
    is_image = side is Modality.IMAGE
    rows = joined.image_rows if is_image else joined.text_rows
    found = {schema.ID: table.strings(schema.ID, rows)}
    if is_image:
        first = np.full(joined.images, -1, np.int64)
        paired = np.flatnonzero(joined.text_image >= 0)[::-1]
        first[joined.text_image[paired]] = paired
        captions = features.texts.strings(schema.CAPTION, joined.text_rows)
        found[schema.IMAGE_ID] = pa.nulls(joined.images, pa.large_string())
        found[schema.CAPTION] = _taken(captions, first)
        found[schema.SOURCE] = table.strings(schema.SOURCE, rows)
    else:
        sources = features.images.strings(schema.SOURCE, joined.image_rows)
        found |= {name: table.strings(name, rows) for name in (schema.IMAGE_ID, schema.CAPTION)}
        found[schema.SOURCE] = _taken(sources, joined.text_image)
    return found


def _taken(values: pa.Array, rows: Ints) -> pa.Array:
    """Values by row, null where the row is -1."""
    return values.take(pa.array(rows, mask=rows < 0))


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


def check_directions(values: Vectors, ids: pa.Array, name: str) -> None:
    """Raise DataError if a row is not finite or has norm 0; arguments as for `unit_rows`."""
    for start in range(0, len(values), CHECKED_ROWS):
        part = values[start : start + CHECKED_ROWS]
        norms = np.linalg.norm(part.astype(np.float32), axis=1)
        bad = np.flatnonzero(~((norms > schema.LEAST_NORM) & (norms < schema.MOST_NORM)))
        if len(bad):
            what = "encode it again or leave it out"
            row = part[bad[0]]
            if not np.isfinite(row).all():
                what = f"is not finite; {what}"
            elif not row.any():
                what = f"has norm 0; {what}"
            else:
                size = np.linalg.norm(row.astype(np.float64))
                what = f"has norm {size:.3g}; {schema.RESCALE}"
            raise DataError(f"{name}: the embedding of {ids[start + int(bad[0])].as_py()!r} {what}")


def check_same_width(rows: PairedRows) -> None:
    """Raise ShapeError unless images and texts have one width."""
    if rows.images.shape[1] != rows.texts.shape[1]:
        raise ShapeError(
            f"{rows.name}: images are {rows.images.shape[1]} wide and texts {rows.texts.shape[1]}, "
            "so they can only be compared through an adapter; train one and give it with --adapter"
        )


def caption_counts(text_image: Ints, images: int) -> Ints:
    """How many texts each of so many images has, (images,)."""
    return compact(np.bincount(text_image[text_image >= 0], minlength=images))


def select_rows(table: FeatureTable, names: Collection[str | None] | None) -> Ints | None:
    """Rows whose split is among the names, ascending, where None is no split; None for all rows."""
    if names is None:
        return None
    wanted = pa.array(list(names), pa.string())
    parts = [
        positions.start + np.flatnonzero(_is_in(batch.column(schema.SPLIT), wanted))
        for positions, _, batch in table.parts([schema.SPLIT], None)
    ]
    return compact(np.concatenate([np.empty(0, np.int64), *parts]))


def _is_in(column: pa.Array, wanted: pa.Array) -> Array:
    found: Array = pc.is_in(column, value_set=wanted).to_numpy(zero_copy_only=False)
    return found


def _texts_of(
    text_image: Ints, keep: npt.NDArray[np.bool_], *, lone_texts: bool
) -> tuple[Ints, Ints]:
    """The texts of the images where `keep` is true, and which of those images each belongs to."""
    position = np.where(keep, np.cumsum(keep) - 1, -1)
    is_lone = text_image < 0
    texts = np.flatnonzero(np.where(is_lone, lone_texts, keep[text_image]))
    return texts, np.where(is_lone[texts], -1, position[text_image[texts]])


def _rows(values: Array, rows: Ints | None) -> Array:
    return values if rows is None else values[rows]


def _unique_keys(table: FeatureTable) -> tuple[Keys, int]:
    """A key for each id of a table, and the salt with which no two ids share one."""
    for salt in count():
        parts = [
            string_keys(batch.column(schema.ID), salt)
            for _, _, batch in table.parts([schema.ID], None)
        ]
        keys = np.concatenate([np.empty(0, np.uint64), *parts])
        ordered = np.sort(keys)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(twice):
            return keys, salt
        rows = np.flatnonzero(np.isin(keys, twice[:CHECKED_ROWS]))
        counts = table.strings(schema.ID, rows).value_counts()
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            raise SchemaError(
                f"{table.folder}: {table.modality} id {repeated[0].as_py()!r} appears more than "
                "once; ids must be unique, make the feature set again"
            )
    raise AssertionError


def _owners(texts: FeatureTable, rows: Ints | None, salt: int) -> tuple[Keys, Array]:
    """For some texts the key of their image's id, and whether they have an image."""
    size = len(texts) if rows is None else len(rows)
    keys, is_owned = np.zeros(size, np.uint64), np.zeros(size, np.bool_)
    for positions, local, batch in texts.parts([schema.IMAGE_ID], rows):
        column = batch.column(schema.IMAGE_ID).take(local)
        keys[positions] = string_keys(column, salt)
        is_owned[positions] = column.is_valid().to_numpy(zero_copy_only=False)
    return keys, is_owned


def _positions(owners: Keys, is_owned: Array, images: Keys) -> Ints:
    """Where in `images` each owner is, -1 for nowhere."""
    found = np.full(len(owners), -1, np.int64)
    if not len(images):
        return found
    order = compact(np.argsort(images))
    ordered = images[order]
    for start in range(0, len(owners), CHECKED_ROWS):
        part = slice(start, start + CHECKED_ROWS)
        places = np.searchsorted(ordered, owners[part]).clip(max=len(images) - 1)
        is_there = is_owned[part] & (ordered[places] == owners[part])
        found[part][is_there] = order[places[is_there]]
    return found


def _lost(texts: FeatureTable, where: str, row: int, total: int, *, elsewhere: bool) -> SchemaError:
    """What to say of a text whose image is not there."""
    text, image = (
        texts.strings(name, np.array([row]))[0].as_py() for name in (schema.ID, schema.IMAGE_ID)
    )
    reason = "is in another split" if elsewhere else "is not there"
    return SchemaError(
        f"{where}: text {text!r} belongs to image {image!r}, which {reason} "
        f"({total} such texts); make the feature set again"
    )


def _splits_there(features: FeatureSet) -> str:
    listed = ", ".join(
        f"{name or '(none)'}: {counts['images']} images, {counts['texts']} texts"
        for name, counts in features.splits().items()
    )
    return f"its splits are {listed or 'none, it is empty'}; name one of them"
