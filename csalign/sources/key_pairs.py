"""Columns of texts and images that may be one key, compared by name and by value."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.enums import Modality
from csalign.sources.arrays.naming import (
    ITEM_IDS,
    PATHS,
    REFERENCES,
    is_id,
    is_key,
    label_side,
    plain_name,
)
from csalign.sources.image_rows import ImageRows, keys_of_images
from csalign.sources.keys import Keys, Match, examples, match
from csalign.sources.labels import Ints, Labels
from csalign.sources.records.tables import CAPTION_NAMES, SPLIT_NAME

REFERENCE, OWN, VALUES = 3, 6, 7  # ranks of `KeyPair`
ROW = "image_row"  # always a row number from 0, as text_row


@dataclass(frozen=True)
class KeyPair:
    """A column of the texts and one of the images, None for row numbers, and where they match."""

    rank: int  # how likely their names make them one key, the likeliest first
    name: str
    other: str | None
    wanted: Keys
    known: Keys
    owners: Ints | None  # (n,) image of each known key
    is_key: bool  # whether the images' column is one key per image
    found: Match

    @property
    def images(self) -> Ints:
        """Image of each text, -1 for none, (m,)."""
        return self.found.among(self.owners)

    @property
    def is_same(self) -> bool:
        """Whether the columns have one name."""
        return plain_name(self.name) == plain_name(self.other or "")

    @property
    def is_strong(self) -> bool:
        """Whether the names say that each text's key is that of an image."""
        is_named = (self.is_same and is_id(self.name)) or plain_name(self.name) in PATHS
        return self.rank <= REFERENCE or (self.rank <= OWN and is_named)

    @property
    def is_most(self) -> bool:
        """Whether most keys of the texts are known."""
        return self.found.found * 2 > len(self.wanted.values) - self.wanted.values.null_count

    @cached_property
    def is_chance(self) -> bool:
        """Whether the images' keys are numbers that count, as those of any table may do."""
        return self.known.are_counted

    def is_fit(self, images: int) -> bool:
        """Return whether a complete match pairs texts with rows of images, and not by chance."""
        wanted = self.wanted.values
        if not (self.is_strong or wanted.null_count * 2 < len(wanted)):
            return False
        if self.rank <= REFERENCE or not self.is_chance:
            return True
        is_counter = len(wanted) != images and (self.images == np.arange(len(wanted))).all()
        return self.is_same and self.rank <= OWN and not is_counter

    @property
    def is_reordered(self) -> bool:
        """Whether both columns have the same values, in another order."""
        rows = self.images
        is_one_to_one = len(np.unique(rows)) == len(rows) == self.known.distinct
        return is_one_to_one and not np.array_equal(rows, np.arange(len(rows)))

    def unknown(self, where: str) -> str:
        """Name the first text whose key is unknown."""
        named = f"by {self.other or 'row number'}, or else by row number from 0"
        where = f"{where}: {self.name}"
        return unknown_key(self.found, self.wanted.values, self.known.values, where, named)


def key_pairs(images: ImageRows, labels: Labels, only: str | None = None) -> Iterator[KeyPair]:
    """Compare the columns of texts and images, the likeliest pairs first.

    Ranks are at most `REFERENCE` for columns that refer to images by name, `OWN` for ids that may
    be the texts' own, and more where only values can decide. Columns of images most of whose values
    repeat, such as classes, are left out; so are all without the name `only`, if given.
    """
    own = images.labels
    names = [name for name in labels.names if not _is_content(name)]
    others = [name for name in (own.names if own else ()) if not _is_content(name)]
    if own is not None and own.name == labels.name and only is None:  # columns of both sides
        names = [name for name in names if name not in others]
    if only is None and own is not None:
        few = [n for n in others if n != images.key and _are_few(own.column(n))]
        others = [name for name in others if name not in few]
    ranked: list[tuple[int, int, str, str | None]] = []
    for name in names:
        plain = plain_name(name)
        order = REFERENCES.index(plain) if plain in REFERENCES else len(REFERENCES)
        if plain == ROW or (plain in REFERENCES and images.key is None):
            ranked.append((0 if plain == ROW else REFERENCE, order, name, None))
        if plain != ROW:
            ranked += [(_rank(name, other, images.key), order, name, other) for other in others]
    texts: dict[str, Keys] = {}
    known: dict[str | None, tuple[Keys, Ints | None, bool]] = {}
    for rank, _, name, other in sorted(ranked, key=lambda entry: entry[:2]):
        if only not in (None, name, other):
            continue
        wanted = texts.setdefault(name, Keys(labels.column(name)))
        if other not in known:
            values, owners = keys_of_images(images, other)
            is_key = values is not None
            raw = values if is_key or own is None else own.column(str(other))
            known[other] = Keys(raw), owners, is_key
        if rank < VALUES or wanted.may_be_among(known[other][0]):
            yield KeyPair(rank, name, other, wanted, *known[other], match(wanted, known[other][0]))


def _rank(name: str, other: str, key: str | None) -> int:
    plain, is_same = plain_name(name), plain_name(name) == plain_name(other)
    is_text = label_side(name) is Modality.TEXT
    if plain in REFERENCES or (is_id(name) and label_side(name) is Modality.IMAGE):
        return (1 if is_same else 2) if is_key(other) else VALUES
    if plain in ITEM_IDS or (is_key(name) and is_text):
        is_likely = is_key(other) if key is None else other == key
        return OWN if is_same or is_likely else VALUES
    if is_key(name) and is_key(other):
        return 4 if is_same else 5
    return VALUES if is_same else VALUES + 1


def _are_few(keys: pa.Array) -> bool:
    """Return whether most values repeat, such as classes or users."""
    return bool(pc.count_distinct(keys).as_py() * 2 <= len(keys))


def _is_content(name: str) -> bool:
    return plain_name(name) in (*CAPTION_NAMES, SPLIT_NAME)


def unknown_key(found: Match, wanted: pa.Array, known: pa.Array, where: str, named: str) -> str:
    """Name the first text whose key is unknown."""
    row = int(found.missing[0])
    shown = (
        f"{examples(wanted)} of the texts, {examples(known)} of the images"
        if not found.found
        else f"images are named {named}"
    )
    return (
        f"{where}: image {wanted[row].as_py()!r:.200} of text row {row} is unknown "
        f"({len(found.missing)} texts name unknown images); {shown}; correct the keys, pass "
        "--pairs TABLE, or ignore them with --pair-by order"
    )
