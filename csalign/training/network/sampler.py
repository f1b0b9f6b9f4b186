"""Pairs of an epoch in random order, and batches of them as tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core import distributed
from csalign.core.arrays import Doubles, Indices, Mask
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.features.join import Pairs, compact
from csalign.features.streaming import MIB
from csalign.features.tokens import PaddedTokens, Wanted, take_together
from csalign.objective.pairwise import mix_pairs
from csalign.training.config import DataOptions
from csalign.training.data import StoredTokens, Unpaired
from csalign.training.network.device_rows import Picked, Pieces, PlannedBatch, upload
from csalign.training.network.loader import EpochLoader

WINDOW_BYTES = 256 * MIB  # of embeddings that are shuffled together
BLOCK_BYTES = MIB  # of embeddings that are stored together and come into one window


@dataclass(frozen=True)
class BatchRows:
    """Row numbers of one batch."""

    images: Indices  # (b,) image rows
    texts: Indices  # (m,) rows of the captions in the pairwise loss
    owner: Indices | None  # (m,) position of each text's image; None if text i belongs to image i
    others: Indices | None  # (b,) another caption of each image, -1 for none; None if unused
    further: Indices  # (k,) all other captions of these images, each caption once


Order = Callable[[Indices, np.random.Generator], Indices]
"""Maps (k,) image rows to a permutation of their positions, the order of an epoch."""


def uniform(images: Indices, rng: np.random.Generator) -> Indices:
    """Return a uniformly random permutation."""
    return rng.permutation(len(images))


@dataclass(frozen=True)
class BlockOrder:
    """Blocks of images in random order, shuffled together within windows of several blocks."""

    block: int  # images per block
    window: int  # images per window, a multiple of `block`

    def __call__(self, images: Indices, rng: np.random.Generator) -> Indices:
        """See `Order`."""
        blocks = np.arange(len(images)) // self.block
        windows = rng.permutation(-(-len(images) // self.block)) // (self.window // self.block)
        return np.lexsort((rng.random(len(images)), windows[blocks]))


def order_for(
    rows: Pairs,
    tokens: StoredTokens | None = None,
    *,
    leave_out: Mask | None = None,
    window_bytes: int = WINDOW_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> Order:
    """Return the order of an epoch: uniform if the rows fit into one window, else by blocks.

    It depends on the sizes alone, not on what is in memory. Tokens beyond their cache's budget set
    the window instead: then few row groups are decoded again, if texts are stored in the order of
    their images.

    Raises:
        ConfigError: the token cache is too small for a row group of each side.
    """
    out = slice(0) if leave_out is None else leave_out
    left = rows.caption_counts[out]
    images = int((rows.caption_counts > 0).sum() - (left > 0).sum())
    sides = ((rows.images, len(left)), (rows.texts, int(left.sum())))
    total = sum((len(x) - n) * x.shape[1] * int(x.dtype.itemsize) for x, n in sides)
    size = max(1, -(-total // max(1, images)))  # bytes per captioned image, with its captions
    if tokens is not None and tokens.bytes > (budget := tokens.cache.budget):
        groups = [[group.bytes for group in source.groups] for source in tokens.sources.values()]
        if (least := sum(map(max, groups))) > budget:
            raise ConfigError(
                f"--token-memory: a row group of each side takes {-(-least // MIB)} MiB, more than "
                f"{budget // MIB}; raise --token-memory"
            )
        # Blocks do not begin where row groups do, so that half of the cache is for the rest.
        size, window_bytes = -(-tokens.bytes // max(1, images)), budget // 2
        block_bytes = min(window_bytes, tokens.bytes // max(map(len, groups)))
    if size * images <= window_bytes:
        return uniform
    block = max(1, block_bytes // size)
    return BlockOrder(block, max(1, window_bytes // (block * size)) * block)


class PairSampler:
    """Sampler of the pairs of a set of rows.

    Args:
        rows: images with their captions.
        captions: "first" learns from an image's first caption, "sample" from a random one per
            epoch, "all" from all of them at once.
        other_weight: weight of the captions after the first; 0 omits them. Ignored for the pairs
            of "sample" and "all", whose captions weigh 1 each.
        once: count a caption that f images share once: in the closed form its pairs weigh 1 / f,
            and an epoch contains one of them.
        order: of the images in an epoch.
        leave_out: (n,) images that are omitted with their captions.
    """

    def __init__(
        self,
        rows: Pairs,
        captions: str,
        *,
        other_weight: float,
        once: bool,
        order: Order = uniform,
        leave_out: Mask | None = None,
    ) -> None:
        counts, texts = rows.caption_counts, rows.texts_by_image
        if leave_out is not None:
            counts = np.where(leave_out, 0, counts)
            texts = texts[~leave_out[rows.text_image[texts]]]
        self._images = compact(np.flatnonzero(counts))
        self._counts = counts[self._images]
        # Row of the j-th caption of the i-th image: _texts[_starts[i] + j].
        self._texts = texts
        self._starts = compact(np.cumsum(self._counts) - self._counts)
        self._owners = rows.text_image
        self._captions = captions
        self._weight = float(other_weight)
        self._once = once
        self._order = order
        self._keys = rows.caption_keys if once else compact(np.arange(len(rows.texts)))

    def __len__(self) -> int:
        return len(self._images)

    def weighted_pairs(self) -> tuple[tuple[Indices, Indices], Doubles]:
        """Return all pairs as image rows and text rows, and their weights."""
        images = np.repeat(self._images, self._counts)
        weights = np.full(len(images), self._weight if self._captions == "first" else 1.0)
        weights[self._starts] = 1.0
        used = weights > 0
        images, texts, weights = images[used], self._texts[used], weights[used]
        weights /= np.bincount(self._keys[texts])[self._keys[texts]]
        return (images, texts), weights

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[BatchRows]:
        """Iterate once over the images in batches of similar size, each with one caption.

        With `once`, only one of the images that drew the same caption is kept, so that a batch
        contains no caption twice and no false negatives of that kind.
        """
        order = compact(self._order(self._images, rng))
        drawn = np.zeros(len(order), self._starts.dtype)
        if self._captions == "sample":
            drawn = compact(rng.integers(0, self._counts[order]))
        texts = self._texts[self._starts[order] + drawn]
        if self._once:
            kept = self._first_of_each(texts)
            order, drawn, texts = order[kept], drawn[kept], texts[kept]
        parts = -(-len(order) // batch_size)
        least, more = divmod(len(order), parts)
        for number in range(parts):
            start = number * least + min(number, more)
            part = slice(start, start + least + (number < more))
            yield self._batch(order[part], drawn[part], texts[part], rng)

    def _batch(
        self, images: Indices, drawn: Indices, texts: Indices, rng: np.random.Generator
    ) -> BatchRows:
        rows, texts = self._images[images].astype(np.int64), texts.astype(np.int64)
        if self._captions == "all":
            texts = np.concatenate([texts, self._further(images, texts)])
            by_row = np.argsort(rows)
            found = np.searchsorted(rows, self._owners[texts], sorter=by_row)
            return BatchRows(rows, texts, by_row[found], None, texts[:0])
        others = self._others(images, drawn, rng) if self._weight else None
        seen = texts if others is None else np.concatenate([texts, others[others >= 0]])
        return BatchRows(rows, texts, None, others, self._further(images, seen))

    def _further(self, images: Indices, seen: Indices) -> Indices:
        """Return the captions of some images that are not in `seen`, no caption twice."""
        counts = self._counts[images]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        own = self._texts[np.repeat(self._starts[images], counts) + within]
        every = np.concatenate([seen, own])
        kept = self._first_of_each(every)
        return every[kept[kept >= len(seen)]]

    def _others(self, images: Indices, drawn: Indices, rng: np.random.Generator) -> Indices:
        """Return for each image a caption that was not drawn, no caption twice; -1 for none."""
        counts = self._counts[images]
        step = rng.integers(1, np.maximum(counts, 2))
        texts = self._texts[self._starts[images] + (drawn + step) % counts]
        several = np.flatnonzero(counts > 1)
        chosen = several[self._first_of_each(texts[several])]
        others = np.full(len(images), -1)
        others[chosen] = texts[chosen]
        return others

    def _first_of_each(self, texts: Indices) -> Indices:
        """Return the positions, ascending, of the first text with each caption."""
        return np.sort(np.unique(self._keys[texts], return_index=True)[1])


def make_sampler(
    options: DataOptions,
    other_weight: float,
    rows: Pairs,
    tokens: StoredTokens | None,
    leave_out: Mask | None = None,
) -> PairSampler:
    """Build the sampler of training rows, in an order that suits where they are read from.

    The images of `leave_out` (n,) are omitted.
    """
    return PairSampler(
        rows,
        options.captions,
        other_weight=other_weight,
        once=options.caption_weights,
        order=order_for(rows, tokens, leave_out=leave_out),
        leave_out=leave_out,
    )


class SideBatch(NamedTuple):
    """One side of a batch.

    Attributes:
        rows: (n, input_width) float32, this process's share (at least 1 row) of the rows of the
            pairs, of other captions, of further captions, and of unpaired rows, in this order.
        counts: how many there are of each in all processes.
        tokens: (k, t, token_width) values and (k, t) mask; of all rows if the side's adapter mixes
            tokens into embeddings, else of the pairs in the token term; None without tokens.
    """

    rows: Tensor
    counts: list[int]
    tokens: tuple[Tensor, Tensor] | None


class Batch(NamedTuple):
    """One batch, as tensors on the device."""

    images: SideBatch  # the image side; its pairs are b
    texts: SideBatch  # the text side; its pairs are m
    owner: Tensor | None  # (m,) position of each text's image; None where text i belongs to image i
    others: Tensor  # (k,) positions of the images whose other captions there are
    token_pairs: tuple[Tensor, Tensor]  # (p,) positions of images and texts


@dataclass
class BatchLoader(EpochLoader[BatchRows, PlannedBatch, Batch]):
    """Loader of images and texts."""

    rows: Pairs
    sampler: PairSampler
    batch_size: int
    seed: int
    device: torch.device
    unpaired: Unpaired
    unpaired_rows: int = 0  # unpaired rows to draw per side
    further_captions: bool = False  # whether to add all other captions
    mixing: float = 0.0  # Beta parameter of the mixup of pairs (FuseMix); 0 disables
    tokens: StoredTokens | None = None  # to sample from; None without tokens

    def __post_init__(self) -> None:
        sides = self.tokens.sources if self.tokens else ()
        self._table_rows = {side: self.rows.table_rows(side) for side in sides}
        pool = self.unpaired.parts
        arrays = {
            side: [self.rows.embeddings(side), *(part.values for part in pool[side])]
            for side in Modality
        }
        self.open(arrays, self.device)

    def epoch(self, rng: np.random.Generator) -> Iterator[BatchRows]:
        """See `EpochLoader.epoch`."""
        return self.sampler.epoch(self.batch_size, rng)

    def plan(
        self, rows: BatchRows, place: dict[str, int], rng: np.random.Generator
    ) -> PlannedBatch:
        """See `EpochLoader.plan`."""
        has_other = np.flatnonzero(rows.others >= 0) if rows.others is not None else rows.texts[:0]
        if len(has_other) < 2:  # the pairwise loss needs a negative
            has_other = has_other[:0]
        others = rows.texts[:0] if rows.others is None else rows.others[has_other]
        further = rows.further if self.further_captions else rows.further[:0]
        stored = {
            Modality.IMAGE: [rows.images, rows.images[:0], rows.images[:0]],
            Modality.TEXT: [rows.texts, others, further],
        }
        mixed = self.tokens.mixed if self.tokens else frozenset()
        drawn = {
            side: self.unpaired.draw(side, 0 if side in mixed else self.unpaired_rows, rng)
            for side in Modality
        }
        token_pairs, tokens = self._sample_tokens(rows, stored, rng)
        counts = {side: [*map(len, stored[side]), len(drawn[side])] for side in Modality}
        shares, picked = {}, {}
        for side, own in counts.items():
            share = distributed.share_of(sum(own))
            shares[side] = share if share.stop > share.start else slice(0, 1)
            part = slice(0, sum(own)) if self.mixing else shares[side]
            picked[side] = self._pick(side, np.concatenate(stored[side]), drawn[side], part)
        partner, coefficient = rows.images[:0], 1.0
        if self.mixing:
            partner = rng.permutation(len(rows.images))
            coefficient = float(rng.beta(self.mixing, self.mixing))
        pairs = rows.owner, has_other, token_pairs
        return PlannedBatch(place, picked, counts, shares, *pairs, tokens, partner, coefficient)

    def _pick(self, side: Modality, stored: Indices, drawn: Indices, part: slice) -> list[Picked]:
        """Pick the rows of a part of one side: the stored rows, pairs first, then the drawn."""
        first, last = (max(0, end - len(stored)) for end in (part.start, part.stop))
        located = self.unpaired.locate(side, drawn[first:last])
        picked = [Picked(0, stored[part]), *(Picked(n + 1, own) for n, own in located)]
        return [own for own in picked if len(own.rows)]

    def tensors(self, planned: PlannedBatch, pieces: Pieces | None) -> Batch:
        """See `EpochLoader.tensors`; with mixing, each pair is mixed with another."""
        device = self.device
        owner = planned.others[:0] if planned.owner is None else planned.owner
        numbers = [owner, planned.others, *planned.token_pairs, planned.partner]
        joined, (owners, others, x, y, partner) = self.rows_of(planned, pieces, numbers)
        if self.mixing:
            pairs = len(partner)
            units = [normalize(own[:pairs], dim=1) for own in joined.values()]
            mixed = mix_pairs(units[0], units[1], planned.coefficient, partner)
            for (side, own), pair in zip(joined.items(), mixed, strict=True):
                joined[side] = torch.cat([pair, own[pairs:]])[planned.shares[side]]
        tokens = {
            side: (upload(own.values, device).float(), upload(own.mask, device))
            for side, own in planned.tokens.items()
        }
        images, texts = (
            SideBatch(joined[side], planned.counts[side], tokens.get(side)) for side in Modality
        )
        return Batch(images, texts, None if planned.owner is None else owners, others, (x, y))

    def _sample_tokens(
        self, rows: BatchRows, stored: Mapping[Modality, list[Indices]], rng: np.random.Generator
    ) -> tuple[tuple[Indices, Indices], dict[Modality, PaddedTokens]]:
        """Draw the pairs of the token term, and read some tokens of each row that needs any."""
        if self.tokens is None:
            return (rows.images[:0], rows.images[:0]), {}
        texts = np.arange(len(rows.texts))
        if len(texts) > self.tokens.pairs:
            texts = np.sort(rng.choice(len(texts), self.tokens.pairs, replace=False))
        images = texts if rows.owner is None else rows.owner[texts]
        chosen = {Modality.IMAGE: rows.images[images], Modality.TEXT: rows.texts[texts]}
        wanted = []
        for side, source in self.tokens.sources.items():
            own = np.concatenate(stored[side]) if side in self.tokens.mixed else chosen[side]
            draws = rng.random((len(own), self.tokens.samples))
            wanted.append(Wanted(source, self._table_rows[side][own], draws))
        return (images, texts), dict(zip(self._table_rows, take_together(wanted), strict=True))
