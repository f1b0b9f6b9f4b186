"""Rows to train on and to validate on, their tokens, and the validation score."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csalign.adapters.model import find_kind
from csalign.adapters.side import SideShape
from csalign.core import distributed
from csalign.core.arrays import Array, Ints, Mask
from csalign.core.devices import available_bytes
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.core.progress import tick
from csalign.evaluation.agreement import COMPARED
from csalign.features import join
from csalign.features.arrays import IN_MEMORY
from csalign.features.checks import warn_of_repeats, warn_of_rows
from csalign.features.reader import FeatureSet
from csalign.features.splits import group_images
from csalign.features.streaming import MIB, MappedRows, MemoryBudget, load_training, load_vectors
from csalign.features.tokens import TokenCache, TokenRows
from csalign.runs.load import check_encoder
from csalign.training.advice import advise_test_split, warn_of_few, warn_of_pairs
from csalign.training.config import DataOptions, ObjectiveOptions, TokenOptions

log = logging.getLogger(__name__)


MAX_VALIDATION_IMAGES = 2_000  # of a validation split, since it is measured many times
LEAST_UNPAIRED = 300  # rows per side to match; fewer have few true matches among them
LEAST_TO_HOLD_OUT = 20  # captioned images
FEW_IMAGES = 1_500  # captioned; of fewer, several hold-outs choose the closed form
HOLD_OUTS = 5  # of few images
LEAST_TO_REFIT = 0.02  # share of the captioned images that are held out; fewer add nothing
MOST_TO_COMPARE = 20_000  # images, some seconds; csalign split compares more


@dataclass(frozen=True)
class TrainingData:
    """Rows of a training run.

    `rows` are those that it may learn from. `held_out` marks images among them that only a refit
    learns from. `folds` are the hold-outs to choose a closed form by: none if `rows` contains
    nothing held out; else `held_out`, of which `val` is all or a sample, and more of few images.
    """

    features: FeatureSet  # the feature set
    split: str  # the split(s) of it that are trained on
    rows: join.Pairs
    val: join.PairedRows | None  # held out; None if none are, and outside of the main process
    unpaired: "Unpaired"  # rows that the distribution term uses besides
    folds: tuple[Mask, ...] = ()  # each (n,)
    refit_split: str | None = None  # the split(s) that a refit learns from; None without one
    no_refit: str = ""  # why there is none

    @property
    def held_out(self) -> Mask | None:
        """Mask of the images that are not trained on before a refit, (n,); None for none."""
        return self.folds[0] if self.folds else None

    @property
    def refits(self) -> bool:
        """Whether the held-out images are to be learned from at the end."""
        return self.refit_split is not None

    @property
    def trained(self) -> tuple[int, int]:
        """Number of pairs and of images that are trained on before a refit."""
        left = self.rows.caption_counts[slice(0) if self.held_out is None else self.held_out]
        return self.rows.pairs - int(left.sum()), len(self.rows.images) - len(left)


def load_data(options: DataOptions, *, out: Path, seed: int) -> TrainingData:
    """Load training, held-out and unpaired rows; what does not fit into memory is kept near `out`.

    Raises:
        DataError: a split has no pairs, and fewer than 300 rows of a side; or it is both trained
            and validated on; a row has no direction.
        ShapeError: a further set has embeddings of other widths.
        OutputError: the rows fit neither into memory nor on the disk.
    """
    tick("reading")
    features = FeatureSet.open(options.features)
    for other in map(FeatureSet.open, options.unpaired):
        pairs = {
            side: (own, features.table(side).encoder)
            for side in Modality
            if (own := other.table(side).info) is not None
        }
        if IN_MEMORY not in (other.path.name, features.path.name):  # which name no encoder
            remedy = "extract again with --{side}-encoder {spec}"
            reference, insist = f"{features.path} come from", options.any_encoder
            check_encoder(pairs, str(other.path), reference, remedy, any_encoder=insist)
    there = features.splits()
    never_split = set(there) == {None}
    split = join.ALL if options.train_split == "train" and never_split else options.train_split
    chosen = _split(features, split, options, seed)
    memory = available_bytes() // 2 if options.memory is None else options.memory * MIB
    next_to_run = next(folder for folder in out.resolve().parents if folder.is_dir())
    budget = MemoryBudget(memory, Path(os.environ.get("TMPDIR") or next_to_run))
    validated = chosen.val if distributed.is_main_process() else None
    with_keys = options.caption_weights
    rows, val = load_training(features, chosen.rows, validated, budget, with_keys=with_keys)
    if distributed.is_main_process():
        warn_of_rows(features)
        warn_of_repeats(rows, rows.name)
    if any(isinstance(side, MappedRows) for side in (rows.images, rows.texts)):
        log.info("%s: larger than the memory, read from a file in %s", rows.name, budget.folder)
    unpaired = gather_unpaired(rows, options.unpaired, split, budget)
    return TrainingData(features, split, rows, val, unpaired, *chosen[2:])


def announce_rows(data: TrainingData) -> None:
    """Log what is trained and validated on; warn if it is too little, or looks random."""
    rows, val, features = data.rows, data.val, data.features
    counted = "{:,} pairs of {:,} images".format
    if not rows.pairs:
        sides = len(rows.images), len(rows.texts), rows.name
        log.info("training on %d images and %d texts without pairs: %s", *sides)
        return
    log.info("training on %s: %s", counted(*data.trained), rows.name)
    if val is not None:
        source = "held out from these images" if val.name == rows.name else val.name
        log.info("validating on %s: %s", counted(val.pairs, len(val.images)), source)
    advise_test_split(features)
    if val is not None:
        warn_of_few(int((val.caption_counts > 0).sum()))
    warn_of_pairs(rows, data.unpaired.sample(COMPARED))


class _Split(NamedTuple):
    """Rows to learn from and to validate on; see `TrainingData`."""

    rows: join.Joined
    val: join.Joined | None
    folds: tuple[Mask, ...]
    refit_split: str | None
    no_refit: str


def _split(features: FeatureSet, split: str, options: DataOptions, seed: int) -> _Split:
    """Join the rows to learn from and those to validate on."""
    val_split = choose_val_split(features, split, options)
    joined = join.join_ids(features, split)
    if not joined.caption_counts.any():
        if options.val_split or min(joined.n_images, joined.n_texts) < LEAST_UNPAIRED:
            join.join_pairs(features, split)  # refused
        if distributed.is_main_process():
            log.warning(
                "%s: no pairs: aligning the distributions of both sides alone; if images have "
                "texts, import them again with --pairs",
                joined.name,
            )
        return _Split(joined, None, (), None, "there are no pairs")
    if val_split is None:
        folds = hold_out(features, joined, seed)
        if not folds:
            if distributed.is_main_process():
                log.warning(
                    "%s: too few pairs to hold some out, so the run is not validated and saves its "
                    "last weights",
                    joined.name,
                )
            return _Split(joined, None, (), None, "all pairs are trained on already")
        val = others = joined.take_images(folds[0])
    else:
        others = join.join_pairs(features, val_split)
        val, folds = subsample(others, seed), ()
    learned, held_out = (int(np.count_nonzero(own.caption_counts)) for own in (joined, others))
    total = learned + (held_out if val_split else 0)
    no_refit = why_no_refit(options, "images", held_out, total)
    if val_split is None and (len(folds) > 1 or not no_refit):
        # An image without a caption that is held out as a near-duplicate is nothing to learn from.
        keep = ~folds[0] | (joined.caption_counts > 0)
        joined = joined.take_images(keep, unpaired_texts=True)
        folds = tuple(fold[keep] for fold in folds)
    elif val_split is None:
        joined, folds = joined.take_images(~folds[0], unpaired_texts=True), ()
    elif not no_refit:
        joined, added = joined.add(others)
        folds, split = (added,), f"{split},{val_split}"
    return _Split(joined, val, folds, None if no_refit else split, no_refit)


def choose_val_split(features: FeatureSet, split: str, options: DataOptions) -> str | None:
    """Return the split(s) to validate on, by default "val"; None to hold out rows of `split`.

    Raises:
        DataError: rows would be both trained and validated on.
    """
    there = features.splits()
    trained, val_split = join.split_names(split, there), options.val_split
    if val_split is None:
        return "val" if "val" in there and "val" not in trained else None
    if both := trained & join.split_names(val_split, there):
        raise DataError(
            f"{', '.join(sorted(name or '(rows without a split)' for name in both))}: would be "
            "both trained and validated on; name other splits with --train-split and --val-split"
        )
    return val_split


def why_no_refit(options: DataOptions, what: str, held_out: int, total: int) -> str:
    """Return why what was held out is not learned from at the end, "" if it is."""
    if not options.refit:
        return "--no-refit"
    if held_out >= LEAST_TO_REFIT * total:
        return ""
    return f"the {held_out:,} {what} held out are few beside all {total:,}"


def count_to_hold_out(total: int) -> int:
    """Return how many to hold out: 10 % (100 to 1,000), 25 % of fewer than 400, 0 of under 20."""
    if total < LEAST_TO_HOLD_OUT:
        return 0
    return min(total // 4, max(100, min(1_000, total // 10)))


def hold_out(features: FeatureSet, rows: join.Joined, seed: int) -> tuple[Mask, ...]:
    """Hold out some of the captioned images: 10 % (100 to 1,000), or 25 % of fewer than 400.

    Images that share a caption are on one side, and so are near-duplicates, unless there are more
    than `MOST_TO_COMPARE` images.

    Returns:
        A mask of the held-out images, (n,), or of fewer than 1,500 several hold-outs, of this seed
        and the next ones; none if fewer than 20 images have captions.
    """
    is_captioned = rows.caption_counts > 0
    n = int(is_captioned.sum())
    if not (count := count_to_hold_out(n)):
        return ()
    folds = np.zeros((HOLD_OUTS if n < FEW_IMAGES else 1, rows.n_images), np.bool_)
    if distributed.is_main_process():
        grouped = group_images(features, rows, near=len(features.images) <= MOST_TO_COMPARE)
        everything = np.ones_like(is_captioned)
        is_alike = False
        for number, fold in enumerate(folds):
            fold[:] = grouped.place(everything, is_captioned, {"val": count}, seed + number) > 0
            if 2 * (fold & is_captioned).sum() < count:
                captioned, is_alike = np.flatnonzero(is_captioned), True
                fold[:] = mark_some(rows.n_images, captioned, count, seed + number)
        if is_alike:
            log.warning(
                "%s: most images are near-duplicates or share captions, so images that are held "
                "out for validation may be like images to train on",
                rows.name,
            )
    distributed.broadcast_array(folds)
    return tuple(folds)


def subsample(rows: join.Joined, seed: int) -> join.Joined:
    """Take at most `MAX_VALIDATION_IMAGES` of the captioned images."""
    captioned = np.flatnonzero(rows.caption_counts)
    if len(captioned) <= MAX_VALIDATION_IMAGES:
        return rows
    log.info(
        "%s: validating on %d of its %d images", rows.name, MAX_VALIDATION_IMAGES, len(captioned)
    )
    return rows.take_images(mark_some(rows.n_images, captioned, MAX_VALIDATION_IMAGES, seed))


def mark_some(total: int, candidates: Ints, count: int, seed: int) -> Mask:
    """Draw some of the candidates, as a mask (total,)."""
    marks = np.zeros(total, np.bool_)
    marks[np.random.default_rng(seed).choice(candidates, count, replace=False)] = True
    return marks


class Part(NamedTuple):
    """Some rows (k,) of the embeddings (n, d) of one encoder, in memory or mapped."""

    values: Array
    rows: Array


@dataclass(frozen=True)
class Unpaired:
    """A pool of rows without a partner, in parts by side."""

    parts: Mapping[Modality, Sequence[Part]]

    def count(self, side: Modality) -> int:
        """Count the rows of one side."""
        return sum(len(part.rows) for part in self.parts[side])

    def draw(self, side: Modality, count: int, rng: np.random.Generator) -> Ints:
        """Draw row numbers of one side with replacement, ascending; none of an empty side."""
        total = self.count(side)
        return np.sort(rng.integers(0, total, count if total else 0))

    def sample(self, most: int) -> dict[Modality, Array]:
        """Take at most some rows of each side, spread evenly."""
        counts = {side: self.count(side) for side in self.parts}
        return {
            side: self.take(side, np.linspace(0, n - 1, min(n, most)).astype(np.int64))
            for side, n in counts.items()
            if n
        }

    def locate(self, side: Modality, chosen: Ints) -> Iterator[tuple[int, Array]]:
        """Yield the number of each part of a side, and the rows in it of ascending row numbers."""
        start = 0
        for number, (_, rows) in enumerate(self.parts[side]):
            own = slice(*np.searchsorted(chosen, (start, start + len(rows))))
            yield number, rows[chosen[own] - start]
            start += len(rows)

    def take(self, side: Modality, chosen: Ints) -> Array:
        """Take rows by ascending number; (k, d) float32."""
        parts = self.parts[side]
        found = [parts[number].values[rows] for number, rows in self.locate(side, chosen)]
        return np.concatenate(found, dtype=np.float32)


def gather_unpaired(
    rows: join.Pairs, others: Sequence[Path], train_split: str, budget: MemoryBudget
) -> Unpaired:
    """Gather the training rows without a partner, and the rows of further feature sets.

    All rows of a further set are used, paired or not, except those in splits of its own that are
    not trained on, such as val and test.

    Raises:
        DataError: no such feature set, it has no rows to use, or a row has no direction.
        ShapeError: a set has embeddings of other widths.
        OutputError: the rows fit neither into memory nor on the disk.
    """
    parts = {
        Modality.IMAGE: [Part(rows.images, np.flatnonzero(rows.caption_counts == 0))],
        Modality.TEXT: [Part(rows.texts, np.flatnonzero(rows.text_image < 0))],
    }
    for path in others:
        features = FeatureSet.open(path)
        there = features.splits()
        names = (join.split_names(train_split, there) | {None}) & set(there)
        found = 0
        for side, own in parts.items():
            table, width = features.table(side), rows.embeddings(side).shape[1]
            if table.info is None or not len(table):
                continue
            if table.width != width:
                raise ShapeError(
                    f"{features.path}: {side} embeddings are {table.width} wide, those to train on "
                    f"{width}; extract both with the same encoder"
                )
            chosen = join.select_rows(table, names)
            vectors = load_vectors(table, chosen, budget, f"{features.path}: {side.plural}")
            own.append(Part(vectors, join.compact(np.arange(len(vectors)))))
            found += len(vectors)
        if not found:
            raise DataError(f"{path}: has no rows in split {train_split}, nor any without a split")
    return Unpaired(parts)


@dataclass(frozen=True)
class StoredTokens:
    """Tokens of a feature set, and the limits on those of a batch."""

    features: FeatureSet  # the feature set
    sources: Mapping[Modality, TokenRows]  # of sides that train with them; one cache
    mixed: frozenset[Modality]  # sides whose adapter mixes tokens into the embedding
    pairs: int  # most pairs per step in the token term; 0 without one
    samples: int  # most tokens per row and step

    @property
    def cache(self) -> TokenCache:
        """Cache of all sources."""
        return next(iter(self.sources.values())).cache

    @property
    def bytes(self) -> int:
        """Bytes of all tokens."""
        return sum(group.bytes for source in self.sources.values() for group in source.groups)

    @property
    def widths(self) -> dict[Modality, int]:
        """Token width of each side that trains with tokens."""
        widths = {side: self.features.table(side).encoder.token_width for side in self.sources}
        return {side: width for side, width in widths.items() if width is not None}


def open_tokens(
    path: Path,
    options: TokenOptions,
    objective: ObjectiveOptions,
    kinds: Mapping[Modality, str],
    *,
    unpaired: Sequence[Path] = (),
    sub_batch: int | None = None,
) -> StoredTokens | None:
    """Open the tokens of each side that trains with them; None if none does.

    With a token term both sides do, else those whose kind mixes tokens into the embedding.

    Raises:
        ConfigError: tokens would change nothing, or cannot be combined with another option.
        DataError: a side that needs tokens stores none.
        ShapeError: a side's tokens are of a width that its kind cannot take.
    """
    if not (objective.token_weight or options.tokens):
        return None
    features = FeatureSet.open(path)
    classes = {side: find_kind(kind, allow=set(kinds.values())) for side, kind in kinds.items()}
    mixed = [side for side in Modality if classes[side].mixes_tokens()]
    if not (objective.token_weight or mixed):
        raise ConfigError(
            f"--tokens: neither side embeds with them ({' and '.join(sorted({*kinds.values()}))}); "
            "use --adapter transformer, or add a token term with --token-weight"
        )
    if distributed.world().size > 1:
        raise ConfigError(
            "--tokens: train in a single process; start it without torchrun, or omit --tokens and "
            "--token-weight"
        )
    if sub_batch is not None:
        raise ConfigError(
            "--sub-batch: cannot be combined with tokens, which pass an adapter all at once; omit "
            "it, or use a smaller --batch-size"
        )
    for name, given in (("mixing", objective.mixing), ("unpaired", unpaired)):
        if mixed and given:
            raise ConfigError(
                f"--{name}: such rows have no tokens, which {kinds[mixed[0]]} embeds with; omit "
                f"--{name}, or use another --adapter"
            )
    cache, sources = TokenCache(options.token_memory * MIB), {}
    for side in Modality if objective.token_weight else mixed:
        table = features.table(side)
        token_width = table.encoder.token_width
        if token_width is None:
            raise DataError(
                f"{features.path}: stores no {side} tokens; extract it again with csalign extract "
                "--tokens both, or train without --token-weight and --tokens"
            )
        shape = SideShape(kinds[side], table.width, table.width, token_width=token_width)
        classes[side].check(shape)
        sources[side] = TokenRows(table, cache)
    pairs = options.token_pairs if objective.token_weight else 0
    return StoredTokens(features, sources, frozenset(mixed), pairs, options.token_samples)
