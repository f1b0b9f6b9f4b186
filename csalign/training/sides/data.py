"""Rows of several sides to train on and to validate on."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from csalign.core.arrays import Ints, Mask
from csalign.core.enums import AnySide
from csalign.core.errors import DataError
from csalign.core.progress import tick
from csalign.features.duplicates import Links
from csalign.features.join import ALL, first_alike, hash_rows, select_rows, split_names
from csalign.features.reader import FeatureSet
from csalign.features.sides import SidedRows, in_order, load_sides
from csalign.features.splits import MOST_SHARING
from csalign.training.config import DataOptions
from csalign.training.data import LEAST_TO_HOLD_OUT, LEAST_TO_REFIT, MAX_VALIDATION_IMAGES

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
    def together(self) -> Mask:
        """Which items have rows of two sides or more, (items,)."""
        return belongs(self.rows)

    @property
    def trained(self) -> int:
        """Number of items with two sides or more that are trained on before a refit."""
        return int((self.together & ~self.held_out).sum())


def belongs(rows: SidedRows) -> Mask:
    """Return which items have rows of two sides or more, (items,)."""
    found: Mask = rows.present.sum(1) >= 2
    return found


def load_sides_data(
    features: FeatureSet, options: DataOptions, sides: tuple[AnySide, ...], seed: int
) -> SidesData:
    """Load the rows of some sides to train and validate on.

    Raises:
        DataError: no item has two sides, a split is both trained and validated on, or a row has no
            direction.
        SchemaError: a shard is damaged.
    """
    tick("reading")
    there = features.splits()
    never_split = set(there) == {None}
    split = ALL if options.train_split == "train" and never_split else options.train_split
    trained, val_split = split_names(split, there), options.val_split
    if val_split is None and "val" in there and "val" not in trained:
        val_split = "val"
    validated = split_names(val_split, there) if val_split else set()
    if both := trained & validated:
        raise DataError(
            f"{', '.join(sorted(name or '(rows without a split)' for name in both))}: would be "
            "both trained and validated on; name other splits with --train-split and --val-split"
        )
    names = f"{split},{val_split}" if val_split else split
    rows = in_order(features, load_sides(features, names, sides))
    rows = replace(rows, name=f"{features.path}" + ("" if never_split else f" (split {split})"))
    keys = {side: hash_rows(own.embeddings) for side, own in rows.sides.items()}
    held_out = np.zeros(rows.count, bool)
    for side, own in rows.sides.items() if validated else ():
        of_val = np.zeros(len(features.table(side)), bool)
        of_val[select_rows(features.table(side), validated)] = True
        held_out[own.items[of_val[own.table_rows]]] = True
    together = belongs(rows)
    if not (together & ~held_out).any():
        raise DataError(
            f"{rows.name}: no item has rows of two of the sides {', '.join(rows.sides)}; import "
            "them again with --pairs, or name other sides with --sides"
        )
    for side, own in rows.sides.items():
        if not (together & ~held_out)[own.items].any():
            raise DataError(
                f"{rows.name}: no row of {side} belongs to an item with another side; leave it out "
                "with --sides, or import it again with --pairs"
            )
    if val_split is None:
        held_out = hold_out(rows, keys, seed)
    val = rows.take(_some(held_out & together, seed)) if (held_out & together).any() else None
    left, out = int((together & ~held_out).sum()), int((together & held_out).sum())
    no_refit = "" if options.refit else "--no-refit"
    if options.refit and val is None:
        no_refit = "all items are trained on already"
    elif options.refit and out < LEAST_TO_REFIT * (left + out):
        no_refit = f"the {out:,} items held out are few beside all {left + out:,}"
    if val is None:
        log.warning(
            "%s: too few items with two sides to hold some out, so the run is not validated and "
            "saves its last weights",
            rows.name,
        )
    refit_split = None if no_refit else names
    return SidesData(features, split, rows, val, held_out, refit_split, no_refit, keys)


def hold_out(rows: SidedRows, keys: Mapping[AnySide, Ints], seed: int) -> Mask:
    """Hold out some items with two sides or more: 10 % (100 to 1,000), or 25 % of fewer than 400.

    Items of which a row is a copy are on one side, unless a row is shared by many.

    Returns:
        A mask of the items, (items,), which depends on their keys and rows, and on the number of
        items; nothing is held out of fewer than 20.
    """
    candidates = np.flatnonzero(belongs(rows))
    n, held_out = len(candidates), np.zeros(rows.count, bool)
    if n < LEAST_TO_HOLD_OUT:
        return held_out
    count = min(n // 4, max(100, min(1_000, n // 10)))
    groups = group_items(rows, keys)[candidates]
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)  # groups in the order of their first items in it
    first = np.full(rows.count, n)
    np.minimum.at(first, groups[order], np.arange(n))
    order = np.argsort(first[groups], kind="stable")
    sizes = np.bincount(groups, minlength=rows.count)[groups[order]]
    small = order[sizes <= max(1, count // 10)]
    if 2 * len(small[:count]) < count:
        log.warning(
            "%s: most items share rows, so items that are held out for validation may be like "
            "items to train on",
            rows.name,
        )
        small = rng.permutation(n)
    chosen = small[:count]
    same = np.isin(groups[small[count:]], groups[chosen[-1:]])  # the rest of the last group
    held_out[candidates[np.concatenate([chosen, small[count:][same]])]] = True
    return held_out


def group_items(rows: SidedRows, keys: Mapping[AnySide, Ints]) -> Ints:
    """Group the items that share a row of some side, (items,), but not what many share."""
    links = Links(rows.count)
    for side, own in rows.sides.items():
        alike = first_alike(keys[side])
        common = np.bincount(alike, minlength=1)[alike] <= MOST_SHARING
        links.add(own.items[common], own.items[alike[common]])
    return links.groups()


def announce_sides(data: SidesData) -> None:
    """Log what is trained and validated on."""
    sides = ", ".join(f"{side} {len(own.items):,}" for side, own in data.rows.sides.items())
    log.info("training on %s items of two sides or more: %s", f"{data.trained:,}", data.rows.name)
    log.info("rows: %s", sides)
    if data.val is not None:
        log.info("validating on %s items", f"{data.val.count:,}")
    if "test" not in data.features.splits():
        log.info(
            "no test split; to measure the run on rows it has not seen, hold one out first with "
            "csalign split %s --test 0.1",
            data.features.path,
        )


def _some(items: Mask, seed: int) -> Mask:
    """Keep at most `MAX_VALIDATION_IMAGES` of the items."""
    there = np.flatnonzero(items)
    if len(there) <= MAX_VALIDATION_IMAGES:
        return items
    chosen = np.random.default_rng(seed).choice(there, MAX_VALIDATION_IMAGES, replace=False)
    found = np.zeros_like(items)
    found[chosen] = True
    return found


Drawn = dict[AnySide, tuple[Ints, Ints]]
"""A batch: by side its rows, and the places in it of the items that have them, both (k,)."""


class Sampler:
    """Items of two sides or more to draw rows of, and the rows of items of one side.

    Args:
        data: all rows.
        leave_out: (items,) items that are omitted.
        once: whether equal rows of a side count once in an epoch, in one item.

    Attributes:
        items: (m,) that are drawn of.
        pools: by side, rows (k,) of items of one side.
    """

    def __init__(self, data: SidesData, leave_out: Mask | None, *, once: bool) -> None:
        used = np.ones(data.rows.count, bool) if leave_out is None else ~leave_out
        together = belongs(data.rows) & used
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
