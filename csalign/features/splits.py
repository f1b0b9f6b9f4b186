"""Divide a feature set into splits by image, near-duplicates and shared captions kept together.

The splits are stored in files of their own, which stand for the column that is stored with the
rows, so that a set can be divided without writing its vectors again; see `schema.Splits`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csalign.core import atomic
from csalign.core.arrays import Ints, Mask
from csalign.core.enums import AnySide, Modality, usual_split
from csalign.core.errors import DataError
from csalign.core.figures import counted
from csalign.core.results import SplitResult
from csalign.features import schema
from csalign.features.duplicates import Hashes, Links, hash_ids, hash_names, mix
from csalign.features.duplicates import link_near_duplicates as link_near
from csalign.features.join import ALL, Joined, first_alike, join_ids, text_keys
from csalign.features.reader import FeatureSet, FeatureTable, batch_vectors
from csalign.features.schema import Splits, SplitSettings
from csalign.features.sides import item_column, number_items

log = logging.getLogger(__name__)

TRAIN = "train"
MOST_SHARING = 5  # images of a caption that keeps them together


def usual_splits(column: pa.Array) -> pa.Array:
    """Spell the splits of rows, (n,), as train, val and test where they are named so otherwise."""
    coded = column.dictionary_encode()
    names = coded.dictionary.to_pylist()
    usual = [usual_split(name) or name for name in names]
    changes = [f"{a!r} as {b!r}" for a, b in zip(names, usual, strict=True) if a != b]
    if not changes:
        return column
    log.info("splits are stored by their usual names: %s", ", ".join(changes))
    return pa.array(usual, column.type).take(coded.indices)


def make_splits(features: FeatureSet, settings: SplitSettings) -> SplitResult:
    """Divide images without a split, or in "train", and store the splits of all rows.

    Texts go with their image. Near-duplicate images and images that share a caption form a group,
    which stays on one side, see `group_images`; texts without an image follow their caption. Only
    images with texts are counted and chosen, unless the set has no texts; all other rows are for
    training, and so are groups of which a part is in another split, or that are too large. Rows in
    other splits keep them. The result follows from ids, embeddings and captions, not from the row
    order.

    Args:
        features: opened with `stored_splits`.
        settings: the splits to make.

    Raises:
        DataError: there are no images or pairs, too few of them, or nothing to divide.
        SchemaError: a file is damaged.
    """
    path, images, texts = features.path, features.images, features.texts
    if _noun(features) == "items":
        return _split_items(features, settings)
    if not len(images):
        raise DataError(f"{path}: contains texts only; splits are made by image")
    joined = join_ids(features, ALL)
    if len(texts) and not (joined.text_image >= 0).any():
        raise DataError(f"{path}: has no pairs; splits are made of images with texts")
    stored = images.column(schema.SPLIT).combine_chunks()
    is_free = _is_free(stored)
    is_candidate = is_free & (joined.caption_counts > 0) if len(texts) else is_free
    sizes = _sizes(features, settings, int(is_candidate.sum()))
    if settings.group:
        grouped = group_images(features, joined)
    else:
        grouped = Grouped(np.arange(len(images)), hash_ids(images))
    split = _placed(features, settings, grouped, sizes, is_candidate, stored)
    files: dict[AnySide, schema.Shard] = {}
    files[Modality.IMAGE] = write_splits(path, images.modality, images.column(schema.ID), split)
    if len(texts):
        of_texts = _split_texts(features, joined, split, grouped.keys)
        files[Modality.TEXT] = write_splits(path, texts.modality, texts.column(schema.ID), of_texts)
    return _finish(features, settings, grouped, files)


def _placed(
    features: FeatureSet,
    settings: SplitSettings,
    grouped: "Grouped",
    sizes: Mapping[str, int],
    is_candidate: Mask,
    stored: pa.Array,
) -> pa.Array:
    """Return the split of each image or item, (n,), which `stored` may say already."""
    is_free = _is_free(stored)
    placed = grouped.place(is_free, is_candidate, sizes, settings.seed)
    _check_placed(features, grouped.groups, is_candidate, placed, sizes)
    _warn_of_stored(features, grouped.groups, is_free, stored)
    made = pa.array([TRAIN, *sizes]).take(pa.array(placed))
    return pc.if_else(pa.array(is_free), made, stored)


def _finish(
    features: FeatureSet,
    settings: SplitSettings,
    grouped: "Grouped",
    files: Mapping[AnySide, schema.Shard],
) -> SplitResult:
    """Write the manifest with the files of splits, and describe them."""
    sizes = np.bincount(grouped.groups)
    several = sizes[sizes > 1]
    made = Splits(
        settings=settings,
        threshold=grouped.threshold,
        groups=len(several),
        grouped=int(several.sum()),
        images=files.get(Modality.IMAGE),
        texts=files.get(Modality.TEXT),
        sides={side: own for side, own in files.items() if not isinstance(side, Modality)},
    )
    schema.write_manifest(features.path, features.manifest.model_copy(update={"splits": made}))
    return describe_splits(FeatureSet.open(features.path))


def describe_splits(features: FeatureSet) -> SplitResult:
    """Describe the splits that `make_splits` stored."""
    made = features.manifest.splits
    if made is None:
        raise DataError(f"{features.path}: no splits were made of it")
    counts = {name or "(none)": own for name, own in features.splits().items()}
    order = {TRAIN: 0, "val": 1, "test": 2}
    counts = dict(sorted(counts.items(), key=lambda item: (order.get(item[0], 3), item[0])))
    if _noun(features) == "items":
        for name, number in _items_by_split(features).items():
            counts[name]["items"] = number
    return SplitResult(
        features.path,
        counts,
        made.groups,
        made.grouped,
        made.threshold,
        names=features.manifest.names,
    )


def _items_by_split(features: FeatureSet) -> dict[str, int]:
    """Count the items with rows of two sides or more, by split."""
    items, keys = _numbered(features)
    names = pa.array([*features.splits()], pa.string())
    split = np.empty(len(keys), np.int64)
    for side, of in items.items():
        column = features.table(side).column(schema.SPLIT)
        split[of] = pc.index_in(column, value_set=names).to_numpy()
    counts = np.bincount(split[_sides_of(items, len(keys)) > 1], minlength=len(names))
    return {
        name or "(none)": int(count) for name, count in zip(names.to_pylist(), counts, strict=True)
    }


def _numbered(features: FeatureSet) -> tuple[dict[AnySide, Ints], pa.Array]:
    """Number the items of all sides; see `number_items`."""
    columns = {side: item_column(features, side) for side in features.sides}
    return number_items(features, columns, dict.fromkeys(columns))


def _sides_of(items: Mapping[AnySide, Ints], count: int) -> Ints:
    """Count the sides that each of so many items has rows of, (count,)."""
    found: Ints = np.sum([np.bincount(of, minlength=count) > 0 for of in items.values()], axis=0)
    return found


@dataclass(frozen=True)
class Grouped:
    """Images in groups that stay together."""

    groups: Ints  # (n,), the number of each image's group, below n
    hashes: Hashes  # (n,), of their ids, which order the groups
    threshold: float | None = None  # of `link_near_duplicates`
    keys: Ints | None = None  # caption keys of the texts, (m,)

    def place(self, is_free: Mask, is_candidate: Mask, sizes: Mapping[str, int], seed: int) -> Ints:
        """Choose a split for each image, (n,): 0 to train, else one more than its place in `sizes`.

        Groups are taken in the order of their least hash, mixed with the seed, each into the first
        split that has room for it.

        Args:
            is_free: images that may be placed, (n,); groups of others are not.
            is_candidate: images that count, (n,).
            sizes: how many images each split is to have.
            seed: of the order.
        """
        n = len(self.groups)
        counts = np.bincount(self.groups[is_candidate], minlength=n)
        counts[self.groups[~is_free]] = 0
        least = np.full(n, np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(least, self.groups, self.hashes)
        chosen = np.flatnonzero(counts)
        chosen = chosen[np.argsort(mix(least[chosen], seed), kind="stable")]
        left, of_group = [*sizes.values()], np.zeros(n, np.int64)
        for group, count in zip(chosen.tolist(), counts[chosen].tolist(), strict=True):
            room = next((place for place, free in enumerate(left) if count <= free), None)
            if room is not None:
                left[room] -= count
                of_group[group] = room + 1
                if not any(left):
                    break
        return np.where(is_free, of_group[self.groups], 0)


def group_images(features: FeatureSet, joined: Joined, *, near: bool = True) -> Grouped:
    """Group images that are near-duplicates, unless `near` is false, or share a caption.

    Captions of more than `MOST_SHARING` images, such as keywords, are ignored.
    """
    images = features.images
    hashes, links, threshold = hash_ids(images), Links(len(images)), None
    if near:
        threshold = link_near(images, hashes, links)
    rows = np.arange(len(images)) if joined.image_rows is None else joined.image_rows
    keys = _caption_keys(features.texts)
    keys = keys if joined.text_rows is None else keys[joined.text_rows]
    paired = np.flatnonzero(joined.text_image >= 0)
    link_sharing(links, keys[paired], rows[joined.text_image[paired]], len(images))
    return Grouped(first_alike(links.groups()[rows]), hashes[rows], threshold, keys)


def link_sharing(links: Links, keys: Ints, owners: Ints, count: int) -> None:
    """Link the images or items (m,), of `count`, whose rows have equal keys (m,).

    A key of more than `MOST_SHARING` of them, such as a keyword, is ignored.
    """
    # Each key once per image, so that counts are of images.
    values, of = np.divmod(np.unique(first_alike(keys) * count + owners), count)
    counts = np.bincount(values, minlength=1)[values]
    is_shared = (counts > 1) & (counts <= MOST_SHARING)
    values, of = values[is_shared], of[is_shared]
    links.add(of, of[first_alike(values)])


def _is_free(stored: pa.Array) -> Mask:
    free: Mask = pc.is_in(stored, value_set=pa.array([TRAIN, None], pa.string())).to_numpy(
        zero_copy_only=False
    )
    return free


def _split_items(features: FeatureSet, settings: SplitSettings) -> SplitResult:
    """Divide the items of a set of any number of sides, with all of their rows.

    Items with rows of two sides or more are counted and chosen. An item in another split than
    train keeps it, for all of its rows.
    """
    tables = {side: features.table(side) for side in features.sides}
    items, keys = _numbered(features)
    count = len(keys)
    chunks = [part for table in tables.values() for part in table.column(schema.SPLIT).chunks]
    rows, of = pa.concat_arrays(chunks), np.concatenate([items[side] for side in tables])
    held, row_of = np.flatnonzero(~_is_free(rows))[::-1], np.full(count, -1)
    row_of[of[held]] = held  # the first of each item
    stored = rows.take(pa.array(row_of, mask=row_of < 0))
    is_paired = _sides_of(items, count) > 1
    if not is_paired.any():
        raise DataError(f"{features.path}: no item has rows of two sides; splits are made by item")
    is_candidate = is_paired & (row_of < 0)
    sizes = _sizes(features, settings, int(is_candidate.sum()))
    hashes, links, threshold = hash_names(pc.fill_null(keys, "")), Links(count), None
    if settings.group:
        threshold = _link_items(tables, items, count, links)
    grouped = Grouped(links.groups(), hashes, threshold)
    split = _placed(features, settings, grouped, sizes, is_candidate, stored)
    files = {
        side: write_splits(
            features.path, side, table.column(schema.ID), split.take(pa.array(items[side]))
        )
        for side, table in tables.items()
    }
    return _finish(features, settings, grouped, files)


def _link_items(
    tables: Mapping[AnySide, FeatureTable], items: Mapping[AnySide, Ints], count: int, links: Links
) -> float | None:
    """Link some of `count` items by shared captions, and by near-duplicates of all but texts.

    What more than `MOST_SHARING` items share, but copies of an image, is ignored. Returns the
    threshold of near-duplicates.
    """
    threshold = None
    for side, table in tables.items():
        of, is_text = items[side], side == Modality.TEXT
        if not len(table):
            continue
        if is_text or (side != Modality.IMAGE and not table.column(schema.CAPTION).null_count):
            link_sharing(links, _caption_keys(table), of, count)
        if is_text:
            continue
        own = Links(len(table))
        threshold = link_near(table, hash_ids(table), own) or threshold
        if side == Modality.IMAGE:
            links.add(of, of[own.groups()])
        else:
            link_sharing(links, own.groups(), of, count)
    return threshold


def _sizes(features: FeatureSet, settings: SplitSettings, count: int) -> dict[str, int]:
    """Return how many of `count` images each new split is to have."""
    path, there = features.path, features.splits()
    asked = {"test": settings.test, "val": settings.val}
    parts = {name: part for name, part in asked.items() if part is not None and name not in there}
    sizes = {
        name: max(1, round(part * count)) if part < 1 else int(part) for name, part in parts.items()
    }
    if not sizes:
        listed = ", ".join(name for name in there if name is not None)
        raise DataError(
            f"{path}: is divided already, into {listed}; only rows without a split or in train are "
            "divided, so ask for a split that is missing, or leave out --val and --test"
        )
    for name in asked:
        if asked[name] is not None and name in there:
            log.info("%s: kept %d stored images", name, there[name]["images"])
    if sum(sizes.values()) >= count:
        wanted = " and ".join(f"{name} {size:,}" for name, size in sizes.items())
        what = "images with texts" if len(features.texts) else "images"
        what = "items of two sides or more" if _noun(features) == "items" else what
        raise DataError(
            f"{path}: {wanted} {_noun(features)} would leave nothing to train on, of {count:,} "
            f"{what} that can be divided; ask for fewer"
        )
    return sizes


def _caption_keys(texts: FeatureTable) -> Ints:
    """Hash each text, (m,); equal for equal captions, or for equal embeddings without captions."""
    if not len(texts):
        return np.empty(0, np.int64)
    captions = texts.column(schema.CAPTION)
    is_known = captions.null_count == 0
    columns = [schema.CAPTION] if is_known else [schema.CAPTION, schema.EMBEDDING]
    found = []
    for _, batch in texts.read(*columns):
        vectors = np.empty((0, 1)) if is_known else batch_vectors(batch, schema.EMBEDDING)
        found.append(text_keys(batch.column(schema.CAPTION), vectors))
    return np.concatenate(found)


def _noun(features: FeatureSet) -> str:
    return "items" if features.is_sided or features.manifest.items else "images"


def _check_placed(
    features: FeatureSet, groups: Ints, is_candidate: Mask, placed: Ints, sizes: Mapping[str, int]
) -> None:
    """Warn of splits that are smaller than asked for, as groups are large; refuse empty ones."""
    largest = int(np.bincount(groups[is_candidate]).max())
    if largest > max(sizes.values()):
        log.info(
            "a group of %s %s is too large to be held out, and stays in train",
            *(largest, _noun(features)),
        )
    for place, (name, size) in enumerate(sizes.items(), 1):
        found = int((is_candidate & (placed == place)).sum())
        problem = (
            f"{name} has {found:,} of {size:,} {_noun(features)}, since groups of near-duplicates "
            f"and shared captions stay together and the largest has {largest:,}; pass --no-group "
            "to divide them"
        )
        if not found:
            raise DataError(f"{features.path}: {problem}")
        if found < size:
            log.warning("%s", problem)


def _warn_of_stored(features: FeatureSet, groups: Ints, is_free: Mask, stored: pa.Array) -> None:
    """Warn of images or items for training whose group is also in a split that is stored."""
    in_stored, in_train = (np.isin(groups, groups[own]) & ~own for own in (~is_free, is_free))
    if in_stored.any():
        names = stored.filter(pa.array(in_train)).unique().to_pylist()
        log.warning(
            "%s: %s in train, where copies, near-duplicates or captions of them are in %s, as "
            "stored; remove these from train, or make the splits from a set without stored ones",
            features.path,
            counted(int(in_stored.sum()), _noun(features).removesuffix("s")),
            " and ".join(sorted(names)),
        )


def _split_texts(
    features: FeatureSet, joined: Joined, of_images: pa.Array, keys: Ints | None
) -> pa.Array:
    """Return the split of each text, (m,): that of its image, or its own, or of its caption.

    A text without an image and a split takes the one that its caption is held out in, if it is.
    """
    owners = joined.text_image
    is_paired = owners >= 0
    stored = features.texts.column(schema.SPLIT).combine_chunks()
    with_image = of_images.take(pa.array(owners, mask=~is_paired))
    found = pc.if_else(pa.array(is_paired), with_image, stored)
    is_free, held = _is_free(found), np.full(len(owners), -1)
    if keys is not None and len(owners):
        first, rows = first_alike(keys), np.flatnonzero(~is_free)
        rows = rows[pc.sort_indices(found.take(pa.array(rows))).to_numpy()[::-1]]
        held[first[rows]] = rows  # with each caption, of the split that comes first
        held = held[first]
    held = np.where(is_free & ~is_paired, held, np.arange(len(owners)))
    return pc.fill_null(found.take(pa.array(held, mask=held < 0)), TRAIN)


def write_splits(folder: Path, side: AnySide, ids: pa.Array, split: pa.Array) -> schema.Shard:
    """Write the file of a side's splits, n strings each, in the order of its rows."""
    name = f"{schema.SPLITS}/{side.plural}.parquet"
    rows = pa.table({schema.ID: ids, schema.SPLIT: split}).cast(schema.splits_schema())
    with atomic.atomic_path(folder / name) as temporary:
        pq.write_table(
            rows,
            temporary,
            compression="zstd",
            use_dictionary=[schema.SPLIT],
            write_page_checksum=True,
        )
        size, sha256 = temporary.stat().st_size, atomic.sha256_file(temporary)
    return schema.Shard(path=name, rows=len(rows), bytes=size, sha256=sha256)


def divide(folder: Path, settings: SplitSettings, *, overwrite: bool = False) -> SplitResult:
    """Call `make_splits` for a finished set, unless it has these very splits.

    Raises:
        DataError: it has other splits that were made, and `overwrite` is false.
    """
    made = schema.read_manifest(folder).splits
    if made is not None and not overwrite:
        if made.settings != settings:
            raise DataError(
                f"{folder}: is divided by {made.settings.options}, not {settings.options}; replace "
                f"the splits: csalign split {folder} {settings.options} --overwrite"
            )
        return describe_splits(FeatureSet.open(folder))
    return make_splits(FeatureSet.open(folder, stored_splits=True), settings)
