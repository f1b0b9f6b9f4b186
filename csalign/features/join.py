"""Rows of a feature set: splits selected, texts joined to images by id."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.arrays import Array, Ints, Mask
from csalign.core.enums import Modality
from csalign.core.errors import DataError, SchemaError, ShapeError
from csalign.features import schema
from csalign.features.reader import AGAIN, FeatureSet, FeatureTable

_MIX = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Embeddings of some images and texts, and which belong together."""

    name: str  # the feature set and its split, for messages
    images: Array  # (n, d) in the stored dtype
    texts: Array  # (m, e) in the stored dtype
    text_image: Ints  # (m,) int64, row of the image that a text belongs to, -1 for none
    image_rows: Ints | None = None  # (n,) ints, rows of the image table; None for all in order
    text_rows: Ints | None = None  # (m,) ints, likewise of the text table
    keys: Ints | None = None  # (m,) ints, see `caption_keys`; None if all captions differ

    @property
    def caption_keys(self) -> Ints:
        """Number below m per text, (m,), equal for equal captions; see `text_keys`."""
        return np.arange(len(self.texts)) if self.keys is None else self.keys

    def embeddings(self, side: Modality) -> Array:
        """Return the embeddings of one side."""
        return self.images if Modality.of(side) is Modality.IMAGE else self.texts

    def table_rows(self, side: Modality) -> Ints:
        """Return the rows of one side's table, int64."""
        rows = self.image_rows if Modality.of(side) is Modality.IMAGE else self.text_rows
        return np.arange(len(self.embeddings(side))) if rows is None else rows

    @property
    def pairs(self) -> int:
        """Number of texts that belong to an image here."""
        return int((self.text_image >= 0).sum())

    @cached_property
    def caption_counts(self) -> Ints:
        """Number of texts of each image, (n,)."""
        return _count(self.text_image, len(self.images))

    @cached_property
    def texts_by_image(self) -> Ints:
        """Rows of the paired texts, (pairs,), image by image, in stored order within an image."""
        paired = np.flatnonzero(self.text_image >= 0)
        owners = self.text_image[paired]
        if not (owners[1:] >= owners[:-1]).all():
            paired = paired[np.argsort(owners, kind="stable")]
        return compact(paired)

    def take(self, mask: Mask) -> "Pairs":
        """Take the images where `mask` (n,) is true and the texts that belong to them."""
        images = np.flatnonzero(mask)
        texts = np.flatnonzero(mask[self.text_image] & (self.text_image >= 0))
        return Pairs(
            name=self.name,
            images=self.images[images],
            texts=self.texts[texts],
            text_image=(np.cumsum(mask) - 1)[self.text_image[texts]],
            image_rows=self.table_rows(Modality.IMAGE)[images],
            text_rows=self.table_rows(Modality.TEXT)[texts],
            keys=compact(first_alike(self.caption_keys[texts])),
        )


@dataclass(frozen=True, kw_only=True)
class PairedRows(Pairs):
    """Pairs with their strings."""

    image_ids: pa.Array  # (n,)
    text_ids: pa.Array  # (m,)
    captions: pa.Array  # (m,), null if unknown

    @cached_property
    def caption_keys(self) -> Ints:
        """See `Pairs`."""
        keys = text_keys(self.captions, self.texts)
        return compact(first_alike(keys))

    def take_texts(self, texts: Ints) -> "PairedRows":
        """Take all images, and the texts of these rows in this order."""
        return replace(
            self,
            texts=self.texts[texts],
            text_ids=self.text_ids.take(texts),
            captions=self.captions.take(texts),
            text_image=self.text_image[texts],
            text_rows=self.table_rows(Modality.TEXT)[texts],
        )


@dataclass(frozen=True)
class Joined:
    """Rows of some splits, joined by id, without embeddings and strings; see `Pairs`."""

    name: str
    n_images: int  # how many images
    text_image: Ints
    image_rows: Ints | None  # ascending, as `text_rows`
    text_rows: Ints | None

    @property
    def n_texts(self) -> int:
        """Number of texts."""
        return len(self.text_image)

    @cached_property
    def caption_counts(self) -> Ints:
        """Number of texts of each image, (n,)."""
        return _count(self.text_image, self.n_images)

    def side(self, side: Modality) -> tuple[Ints | None, int]:
        """Return the selected rows of one side's table (None for all), and how many."""
        if Modality.of(side) is Modality.IMAGE:
            return self.image_rows, self.n_images
        return self.text_rows, self.n_texts

    def _rows(self, side: Modality) -> Ints:
        rows, count = self.side(side)
        return np.arange(count) if rows is None else rows

    def take_images(self, keep: Mask, *, unpaired_texts: bool = False) -> "Joined":
        """Take the images where `keep` (n,) is true, their texts, and maybe unpaired texts."""
        position = np.where(keep, np.cumsum(keep) - 1, -1)
        is_unpaired = self.text_image < 0
        texts = np.flatnonzero(np.where(is_unpaired, unpaired_texts, keep[self.text_image]))
        text_image = np.where(is_unpaired[texts], -1, position[self.text_image[texts]])
        images = np.flatnonzero(keep)
        image_rows = images if self.image_rows is None else self.image_rows[images]
        text_rows = texts if self.text_rows is None else self.text_rows[texts]
        return Joined(self.name, len(images), text_image, compact(image_rows), compact(text_rows))

    def add(self, other: "Joined") -> tuple["Joined", Mask]:
        """Add the captioned images of another split, in the order of the tables; and a mask."""
        other = other.take_images(other.caption_counts > 0)
        image_rows, text_rows = (
            np.concatenate([self._rows(side), other._rows(side)]) for side in Modality
        )
        image_order, text_order = np.argsort(image_rows), np.argsort(text_rows)
        owners = np.concatenate([self.text_image, other.text_image + self.n_images])[text_order]
        places = np.argsort(image_order)
        text_image = np.where(owners < 0, -1, places[owners])
        rows = compact(image_rows[image_order]), compact(text_rows[text_order])
        joined = Joined(self.name, len(image_rows), text_image, *rows)
        return joined, image_order >= self.n_images

    def with_embeddings(self, features: FeatureSet, images: Array, texts: Array) -> PairedRows:
        """Add embeddings, (n, d) and (m, e), and the stored strings."""
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


def split_names(split: str, available: Collection[str | None]) -> set[str | None]:
    """Parse a ``--split`` value: comma-separated names, or "all" of the available ones."""
    if split == ALL:
        return set(available)
    return {name.strip() for name in split.split(",")}


def load_rows(features: FeatureSet, split: str) -> PairedRows:
    """Read the embeddings of some splits and join texts to images by id.

    Raises:
        DataError: no such split, or it has no pairs.
        SchemaError: an id repeats, the image of a text is missing or in another split, or a shard
            is damaged.
    """
    joined = join_pairs(features, split)
    return joined.with_embeddings(
        features,
        _take(features.images.embeddings(), joined.image_rows),
        _take(features.texts.embeddings(), joined.text_rows),
    )


def load_side(features: FeatureSet, split: str, side: Modality) -> PairedRows:
    """Call `load_rows` for one side: the other one is empty, and there may be no rows."""
    joined = join_ids(features, split)
    none = np.empty(0, np.int64)
    values = _take(features.table(side).embeddings(), joined.side(side)[0])
    if Modality.of(side) is Modality.IMAGE:
        own = replace(joined, text_image=none, text_rows=none)
        return own.with_embeddings(features, values, values[:0])
    own = replace(joined, n_images=0, image_rows=none, text_image=np.full(len(values), -1))
    return own.with_embeddings(features, values[:0], values)


def join_pairs(features: FeatureSet, split: str) -> Joined:
    """Call `join_ids`; raises DataError if the split does not exist, or it has no pairs."""
    joined = join_ids(features, split)
    if not (joined.text_image >= 0).any():
        raise DataError(_no_pairs(features, split, joined))
    return joined


def _no_pairs(features: FeatureSet, split: str, joined: Joined) -> str:
    """Word why a split has no pairs."""
    path, there = features.path, features.splits()
    stored = [side.plural for side in Modality if len(features.table(side))]
    if len(stored) < 2:
        found = f"contains {stored[0]} only" if stored else "is empty"
        return f"{path}: {found}, but both sides are needed; create a set with images and texts"
    if not features.manifest.counts.pairs:
        return (
            f"{path}: has no pairs, since no text has the id of an image as its image_id; import "
            "it again with --pairs, or with as many texts as images"
        )
    if set(there) == {None}:
        options = f"--{split} 0.1" if split in ("val", "test") else "--val 0.1 --test 0.1"
        return (
            f"{path}: has no splits, so none is named {split}; leave out the option, or make some "
            f"with csalign split {path} {options}"
        )
    listed = ", ".join(
        f"{name or 'without a split'}: {counts['images']} images, {counts['texts']} texts"
        for name, counts in there.items()
    )
    return f"{joined.name}: has no pairs; the splits of the set are {listed}; choose one of them"


def join_ids(features: FeatureSet, split: str) -> Joined:
    """Select splits ("all", or comma-separated) and join texts to images; reads no embeddings.

    Raises:
        SchemaError: an id repeats, or the image of a text is missing or in another split.
    """
    names = None if split == ALL else sorted(str(name) for name in split_names(split, ()))
    name = f"{features.path}" + ("" if names is None else f" (split {split})")
    texts = features.texts
    image_rows, text_rows = (select_rows(table, names) for table in (features.images, texts))
    for table in (texts, features.images):
        images = table.column(schema.ID)
        if len(repeated := repeated_ids(images)):
            raise SchemaError(
                f"{features.path}: {table.modality} id {repeated[0].as_py()!r} appears more than "
                f"once; ids must be unique, {AGAIN}"
            )
    if image_rows is not None:
        images = features.images.column(schema.ID, image_rows)
    owners = texts.column(schema.IMAGE_ID, text_rows)
    text_image, missing = find_images(owners, images)
    if len(missing):
        image = owners[int(missing[0])].as_py()
        place = missing[:1] if text_rows is None else text_rows[missing[:1]]
        elsewhere = pc.index(features.images.column(schema.ID), image).as_py() >= 0
        raise SchemaError(
            f"{name}: text {texts.column(schema.ID, place)[0].as_py()!r} belongs to image "
            f"{image!r}, which is {'in another split' if elsewhere else 'missing'} "
            f"({len(missing)} such texts); {AGAIN}"
        )
    return Joined(name, len(images), text_image, image_rows, text_rows)


def find_images(owners: pa.ChunkedArray, images: pa.ChunkedArray) -> tuple[Ints, Ints]:
    """Find the image id of each text (m,), null for none, among the ids of images (n,).

    Returns:
        Its position, (m,), -1 for none; and the texts whose image is missing, ascending.
    """
    if owners.equals(images):
        return np.arange(len(images)), np.empty(0, np.int64)
    owners, images = (ids.cast(pa.large_string()) for ids in (owners, images))  # beyond 2 GiB
    found = pc.index_in(owners, value_set=images)
    missing = np.flatnonzero(pc.and_(found.is_null(), owners.is_valid()).to_numpy())
    return found.fill_null(-1).to_numpy().astype(np.int64), missing


def repeated_ids(ids: pa.ChunkedArray) -> pa.Array:
    """Return the ids that appear more than once."""
    ids = ids.cast(pa.large_string())  # hash tables of strings end at 2 GiB
    if pc.count_distinct(ids).as_py() == len(ids):  # takes less memory than counts
        return ids[:0].combine_chunks()
    counted = ids.value_counts()
    return counted.filter(pc.greater(counted.field("counts"), 1)).field("values")


def select_rows(table: FeatureTable, names: Collection[str | None] | None) -> Ints | None:
    """Select rows by split, ascending, where the name None means no split; None for all rows."""
    if names is None:
        return None
    found = pc.is_in(table.column(schema.SPLIT), value_set=pa.array(list(names), pa.string()))
    return compact(np.flatnonzero(found.to_numpy()))


def item_columns(features: FeatureSet, joined: Joined, side: Modality) -> dict[str, pa.Array]:
    """Read what is shown of each row of one side when a search finds it.

    That is id; image_id, of texts; caption, of images that of their first text; and source, of
    texts that of their image.
    """
    sources = features.images.strings(schema.SOURCE, joined.image_rows)
    captions = features.texts.strings(schema.CAPTION, joined.text_rows)
    rows = joined.side(side)[0]
    found = {schema.ID: features.table(side).strings(schema.ID, rows)}
    if Modality.of(side) is Modality.IMAGE:
        first = np.full(joined.n_images, -1, np.int64)
        paired = np.flatnonzero(joined.text_image >= 0)[::-1]
        first[joined.text_image[paired]] = paired
        found[schema.IMAGE_ID] = pa.nulls(joined.n_images, pa.large_string())
        found[schema.CAPTION] = captions.take(pa.array(first, mask=first < 0))
        found[schema.SOURCE] = sources
    else:
        owners = joined.text_image
        found[schema.IMAGE_ID] = features.texts.strings(schema.IMAGE_ID, rows)
        found[schema.CAPTION] = captions
        found[schema.SOURCE] = sources.take(pa.array(owners, mask=owners < 0))
    return found


def check_same_width(rows: PairedRows) -> None:
    """Raise ShapeError unless images and texts have one width."""
    if rows.images.shape[1] != rows.texts.shape[1]:
        raise ShapeError(
            f"{rows.name}: images are {rows.images.shape[1]} wide and texts {rows.texts.shape[1]}, "
            "so they can only be compared through an adapter; pass --adapter closed-form, or a run"
        )


def text_keys(captions: pa.Array, embeddings: Array) -> Ints:
    """Hash each text, (m,) int64: its caption, else its embedding.

    Captions are equal up to case, outer space and Unicode form.

    Two of ten million different texts share a hash with a probability of three in a million.
    """
    plain = pc.utf8_lower(pc.utf8_trim_whitespace(pc.utf8_normalize(captions, "NFC"))).to_pylist()
    found = np.fromiter(map(hash, plain), np.int64, len(plain))
    unknown = np.flatnonzero(captions.is_null().to_numpy(zero_copy_only=False))
    found[unknown] = hash_rows(_take(embeddings, unknown if len(unknown) < len(plain) else None))
    return found


def first_alike(keys: Ints) -> Ints:
    """Return for each key (n,) the position of the first equal one, whatever the hashes are."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return first[group]


def hash_rows(rows: Array, chunk: int = 4_096) -> Ints:
    """Hash the bytes of each row, (n,) int64."""
    found = np.zeros(len(rows), np.uint64)
    for start in range(0, len(rows), chunk):
        own, part = found[start : start + chunk], np.ascontiguousarray(rows[start : start + chunk])
        words = part.view(np.uint8).reshape(len(part), -1)
        if words.shape[1] % 8:
            words = np.pad(words, ((0, 0), (0, -words.shape[1] % 8)))
        for column in np.ascontiguousarray(words.view(np.uint64).T):
            # Each step maps hashes one to one, and mixes the upper bits into the lower ones.
            own ^= column
            own *= _MIX[0]
            own ^= own >> np.uint64(32)
            own *= _MIX[1]
    return found.view(np.int64)


def compact(positions: Array) -> Array:
    """Store positions in 32 bits if they fit, since there may be tens of millions."""
    fits = int(positions.max(initial=0)) <= np.iinfo(np.int32).max
    return positions.astype(np.int32 if fits else np.int64, copy=False)


def _count(text_image: Ints, images: int) -> Ints:
    return compact(np.bincount(text_image[text_image >= 0], minlength=images))


def _take(values: Array, rows: Ints | None) -> Array:
    return values if rows is None else values[rows]
