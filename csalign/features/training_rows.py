"""Rows to train on: in memory while there is room, else in a mapped file; no strings kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.core import distributed
from csalign.core.enums import Modality
from csalign.features import schema
from csalign.features.join import Ints, Joined, PairedRows, Pairs, check_directions
from csalign.features.keys import Keys, compact, first_alike, text_keys
from csalign.features.memory_map import Room, Vectors
from csalign.features.reader import FeatureSet, FeatureTable, batch_vectors, places_within

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TrainingRows(Pairs):
    """Rows of which nothing is kept that training does not use.

    The texts are in the order of their images, those without one last, whatever order they are
    stored in: so rows that are used together lie together.

    Attributes:
        keys: (m,), the caption keys; None where they are not asked for, and no two are equal.
    """

    keys: Ints | None

    @property
    def caption_keys(self) -> Ints:
        """See `Pairs`."""
        return np.arange(len(self.texts)) if self.keys is None else self.keys


@dataclass(frozen=True)
class Target:
    """Rows of a table, and where they go.

    Attributes:
        name: of the rows, for messages.
        rows: which, ascending; None for all.
        out: (k, d), to be filled.
        places: (k,) where each goes in `out`; None keeps the order.
        keys: (k,), the caption keys, to be filled likewise; None if not asked for.
    """

    name: str
    rows: Ints | None
    out: Vectors
    places: Ints | None = None
    keys: Keys | None = None


def fill(table: FeatureTable, targets: Sequence[Target]) -> None:
    """Read embeddings once, a row group at a time, into all places that they go to.

    Args:
        table: the rows are of.
        targets: which rows, and where to.

    Raises:
        DataError: a row has no direction.
        SchemaError: a shard is damaged; it is named.
    """
    columns = [schema.ID, schema.EMBEDDING]
    if any(target.keys is not None for target in targets):
        columns.append(schema.CAPTION)

    def is_wanted(first: int, last: int) -> bool:
        return any(len(places_within(target.rows, first, last)[1]) for target in targets)

    for first, batch in table.blocks(columns, is_wanted):
        vectors = batch_vectors(batch, schema.EMBEDDING)
        for target in targets:
            positions, local = places_within(target.rows, first, first + len(batch))
            if not len(local):
                continue
            own = vectors if len(local) == len(vectors) else vectors[local]
            check_directions(own, batch.column(schema.ID).take(local), target.name)
            at = positions if target.places is None else target.places[positions]
            target.out[at] = own
            if target.keys is not None:
                target.keys[at] = text_keys(batch.column(schema.CAPTION).take(local), own)


def load_training(
    features: FeatureSet,
    joined: Joined,
    held_out: Joined | None,
    room: Room,
    *,
    with_keys: bool,
) -> tuple[TrainingRows, PairedRows | None]:
    """Read the embeddings of training rows, and of the rows that are held out from them.

    Of several processes one on each machine reads, and all have the training rows.

    Args:
        features: they are all of.
        joined: the training rows.
        held_out: rows to validate on, which are few; None for none, and in a process that does
            not validate.
        room: for the training rows.
        with_keys: whether the caption keys are asked for.

    Raises:
        DataError: a row has no direction.
        SchemaError: a shard is damaged; it is named.
        OutputError: the rows fit neither into memory nor on the disk.
    """
    text_order = _by_image(joined)
    keys = np.empty(joined.texts, np.uint64) if with_keys else None
    filled: dict[Modality, Vectors] = {}
    validated: dict[Modality, Array] = {}
    for side in Modality:
        table = features.table(side)
        rows = joined.image_rows if side is Modality.IMAGE else joined.text_rows
        count = joined.images if side is Modality.IMAGE else joined.texts
        out = filled[side] = room.rows((count, table.width), schema.DTYPES[features.manifest.dtype])
        if side is Modality.IMAGE:
            targets = [Target(f"{joined.name}: images", rows, out)]
        else:
            places = _inverse(text_order)
            targets = [Target(f"{joined.name}: texts", rows, out, places, keys)]
        if held_out is not None:
            own = held_out.image_rows if side is Modality.IMAGE else held_out.text_rows
            size = held_out.images if side is Modality.IMAGE else held_out.texts
            validated[side] = np.empty((size, table.width), out.dtype)
            targets.append(Target(f"{held_out.name}: {side.plural}", own, validated[side]))
        if not room.fills:
            continue
        if isinstance(out, np.ndarray) and not table.has_tokens:
            table.verify()  # cheap where it is no second reading; pages have checksums besides
        fill(table, targets)
    distributed.barrier()
    if keys is not None:
        distributed.broadcast_array(keys)
    text_image, text_rows = joined.text_image, joined.text_rows
    if text_order is not None:
        text_image = text_image[text_order]
        text_rows = text_order if text_rows is None else text_rows[text_order]
    training = TrainingRows(
        name=joined.name,
        images=filled[Modality.IMAGE],
        texts=filled[Modality.TEXT],
        text_image=text_image,
        image_rows=joined.image_rows,
        text_rows=text_rows,
        keys=None if keys is None else first_alike(keys),
    )
    if held_out is None:
        return training, None
    return training, held_out.told(features, validated[Modality.IMAGE], validated[Modality.TEXT])


def load_vectors(table: FeatureTable, rows: Ints | None, room: Room, name: str) -> Vectors:
    """Read the embeddings of some rows of a table, in order.

    Raises:
        DataError: a row has no direction.
        SchemaError: a shard is damaged; it is named.
        OutputError: the rows fit neither into memory nor on the disk.
    """
    count = len(table) if rows is None else len(rows)
    out = room.rows((count, table.width), schema.DTYPES[table.dtype])
    if room.fills:
        fill(table, [Target(name, rows, out)])
    distributed.barrier()
    return out


def _by_image(joined: Joined) -> Ints | None:
    """The texts in the order of their images, those without one last; None if they are so."""
    owners = joined.text_image
    last = np.where(owners < 0, joined.images, owners)
    if (last[1:] >= last[:-1]).all():
        return None
    return compact(np.argsort(last, kind="stable"))


def _inverse(order: Ints | None) -> Ints | None:
    """Where each goes that an order takes."""
    if order is None:
        return None
    places = np.empty_like(order)
    places[order] = np.arange(len(order), dtype=order.dtype)
    return places
