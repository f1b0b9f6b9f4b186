"""Rows of several sides to train on and to validate on."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from csalign.core import distributed
from csalign.core.arrays import Ints, Mask
from csalign.core.enums import AnySide
from csalign.core.errors import DataError
from csalign.core.progress import tick
from csalign.features.duplicates import Links
from csalign.features.join import ALL, hash_rows, select_rows, split_names
from csalign.features.reader import FeatureSet
from csalign.features.sides import SidedRows, in_order, load_sides
from csalign.features.splits import Grouped, link_sharing
from csalign.training.advice import advise_test_split
from csalign.training.config import DataOptions
from csalign.training.data import (
    MAX_VALIDATION_IMAGES,
    choose_val_split,
    count_to_hold_out,
    mark_some,
    why_no_refit,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SidesData:
    """Rows of a training run, in an order that depends on their items and ids alone.

    `rows` are those that it may learn from; `held_out` marks items among them that only a refit
    learns from, and `val` are the rows of these, or some of them.
    """

    features: FeatureSet  # the feature set
    split: str  # the split(s) of it that are trained on
    rows: SidedRows
    together: Mask  # (items,), those with two sides or more, of which one is that to add
    val: SidedRows | None  # held out; None if none are
    held_out: Mask  # (items,)
    refit_split: str | None  # the split(s) that a refit learns from; None without one
    no_refit: str  # why there is none
    keys: Mapping[AnySide, Ints] = field(repr=False)  # (n,) equal for equal rows, by side

    @property
    def refits(self) -> bool:
        """Whether the held-out items are to be learned from at the end."""
        return self.refit_split is not None

    @property
    def trained(self) -> int:
        """Number of items with two sides or more that are trained on before a refit."""
        return int((self.together & ~self.held_out).sum())


def load_sides_data(
    features: FeatureSet,
    options: DataOptions,
    sides: tuple[AnySide, ...],
    seed: int,
    added: AnySide | None = None,
) -> SidesData:
    """Load the rows of some sides to train and validate on.

    With a side that is `added` to the others, the items that have it and another are those that
    count: to learn from, and to hold out.

    Raises:
        DataError: no item has two sides, a split is both trained and validated on, or a row has no
            direction.
        SchemaError: a shard is damaged.
    """
    tick("reading")
    there = features.splits()
    never_split = set(there) == {None}
    split = ALL if options.train_split == "train" and never_split else options.train_split
    val_split = choose_val_split(features, split, options)
    names = f"{split},{val_split}" if val_split else split
    rows = in_order(features, load_sides(features, names, sides))
    rows = replace(rows, name=f"{features.path}" + ("" if never_split else f" (split {split})"))
    keys = {side: hash_rows(own.embeddings) for side, own in rows.sides.items()}
    held_out, together = np.zeros(rows.count, bool), rows.present.sum(1) >= 2
    if added is not None:
        together &= rows.present[:, [*rows.sides].index(added)]
    if val_split:
        validated = split_names(val_split, there)
        for side, own in rows.sides.items():
            of_val = np.zeros(len(features.table(side)), bool)
            of_val[select_rows(features.table(side), validated)] = True
            held_out[own.items[of_val[own.table_rows]]] = True
    if not (together & ~held_out).any():
        listed = ", ".join(rows.sides)
        pair = f"two of the sides {listed}" if added is None else f"{added} and another of {listed}"
        raise DataError(
            f"{rows.name}: no item has rows of {pair}; import them again with --pairs, or name "
            "other sides with --sides"
        )
    for side, own in rows.sides.items() if added is None else ():
        if not (together & ~held_out)[own.items].any():
            raise DataError(
                f"{rows.name}: no row of {side} belongs to an item with another side; leave it out "
                "with --sides, or import it again with --pairs"
            )
    if not val_split:
        held_out = hold_out(rows, keys, together, seed)
    val, total = None, int(together.sum())
    no_refit = "all items are trained on already" if options.refit else "--no-refit"
    if len(chosen := np.flatnonzero(held_out & together)):
        no_refit = why_no_refit(options, "items", len(chosen), total)
        most = min(len(chosen), MAX_VALIDATION_IMAGES)
        val = rows.take(mark_some(rows.count, chosen, most, seed))
    refit_split = None if no_refit else names
    return SidesData(features, split, rows, together, val, held_out, refit_split, no_refit, keys)


def hold_out(rows: SidedRows, keys: Mapping[AnySide, Ints], candidates: Mask, seed: int) -> Mask:
    """Hold out some items of the candidates (items,); see `count_to_hold_out`.

    Items that share a row of some side are on one side, but not those that share what many do.

    Returns:
        A mask of the items, (items,), which depends on their keys and rows, and on the number of
        items.
    """
    if not (count := count_to_hold_out(int(candidates.sum()))):
        return np.zeros(rows.count, bool)
    links, everything = Links(rows.count), np.ones(rows.count, bool)
    for side, own in rows.sides.items():
        link_sharing(links, keys[side], own.items, rows.count)
    order = np.random.default_rng(seed).permutation(rows.count).astype(np.uint64)
    grouped = Grouped(links.groups(), order)
    held_out: Mask = grouped.place(everything, candidates, {"val": count}, seed) > 0
    if 2 * (held_out & candidates).sum() >= count:
        return held_out
    if distributed.is_main_process():
        log.warning(
            "%s: most items share rows, so items that are held out for validation may be like "
            "items to train on",
            rows.name,
        )
    return mark_some(rows.count, np.flatnonzero(candidates), count, seed)


def announce_sides(data: SidesData) -> None:
    """Log what is trained and validated on."""
    sides = ", ".join(f"{side} {len(own.items):,}" for side, own in data.rows.sides.items())
    log.info("training on %s items of two sides or more: %s", f"{data.trained:,}", data.rows.name)
    log.info("rows: %s", sides)
    if data.val is not None:
        log.info("validating on %s items", f"{data.val.count:,}")
    else:
        log.warning(
            "%s: too few items with two sides to hold some out, so the run is not validated and "
            "saves its last weights",
            data.rows.name,
        )
    advise_test_split(data.features)


Drawn = dict[AnySide, tuple[Ints, Ints]]
"""A batch: by side its rows, and the places in it of the items that have them, both (k,)."""


class Sampler:
    """Items to draw rows of two sides or more of, and the rows of the other items.

    Args:
        data: all rows.
        leave_out: (items,) items that are omitted.
        once: whether equal rows of a side count once in an epoch, in one item.

    Attributes:
        items: (m,) that are drawn of.
        pools: by side, rows (k,) of the other items.
    """

    def __init__(self, data: SidesData, leave_out: Mask | None, *, once: bool) -> None:
        used = np.ones(data.rows.count, bool) if leave_out is None else ~leave_out
        together = data.together & used
        self.items = np.flatnonzero(together)
        self.pools: dict[AnySide, Ints] = {}
        self._found: dict[AnySide, tuple[Ints, Ints]] = {}  # first row of each item, and how many
        self._keys: dict[AnySide, Ints] = {}  # of sides with equal rows
        for side, own in data.rows.sides.items():
            self.pools[side] = np.flatnonzero((used & ~together)[own.items])
            first, end = (np.searchsorted(own.items, self.items, at) for at in ("left", "right"))
            self._found[side] = first, end - first
            keys = data.keys[side][together[own.items]]
            if once and len(np.unique(keys)) < len(keys):
                self._keys[side] = data.keys[side]

    def __len__(self) -> int:
        return len(self.items)

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[Drawn]:
        """Iterate once over the items in batches of similar size, each with a row of each side.

        Of several rows of an item one is drawn. Items that are left with one side are omitted.
        """
        order, drawn = rng.permutation(len(self.items)), {}
        for side, (first, counts) in self._found.items():
            several = counts[order]
            more = rng.integers(0, np.maximum(several, 1)) if (counts > 1).any() else 0
            rows = np.where(several > 0, first[order] + more, -1)
            if side in self._keys:
                there = np.flatnonzero(rows >= 0)
                kept = np.unique(self._keys[side][rows[there]], return_index=True)[1]
                rows[np.delete(there, kept)] = -1
            drawn[side] = rows
        left = np.flatnonzero(np.sum([rows >= 0 for rows in drawn.values()], 0) >= 2)
        for part in np.array_split(left, max(1, -(-len(left) // batch_size))):
            places = {side: np.flatnonzero(rows[part] >= 0) for side, rows in drawn.items()}
            yield {side: (drawn[side][part[own]], own) for side, own in places.items()}
