"""Which image meets which caption: weighted pairs for the closed form, batches for training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from csalign.features.join import Pairs, compact

Array = npt.NDArray[Any]
CaptionUse = Literal["first", "sample", "all"]
Ints = npt.NDArray[Any]

WINDOW_BYTES = 256 << 20  # of embeddings that are shuffled together
BLOCK_BYTES = 1 << 20  # that lie together, and come into one window


@dataclass(frozen=True)
class Batch:
    """Rows of one optimiser step.

    Attributes:
        images: (b,) image rows.
        texts: (m,) rows of the captions that the pairwise loss sees.
        owner: (m,) the image of each, as a position in `images`; None where m = b and text i is a
            caption of image i.
        others: (b,) another caption of the same image, -1 for none; None where not asked for.
        further: (k,) rows of all captions of these images that are in neither, each caption once.
    """

    images: Ints
    texts: Ints
    owner: Ints | None
    others: Ints | None
    further: Ints


class Order(Protocol):
    """In which order an epoch shows the images."""

    def __call__(self, images: Ints, rng: np.random.Generator) -> Ints:
        """A permutation of the positions in `images`, (k,) image rows."""
        ...


def uniform(images: Ints, rng: np.random.Generator) -> Ints:
    """Any order is as likely as any other."""
    return rng.permutation(len(images))


@dataclass(frozen=True)
class BlockOrder:
    """Blocks of images in random order, and the images of some blocks at a time shuffled.

    Attributes:
        block: images a block.
        window: images that are shuffled together, a multiple of `block`.
    """

    block: int
    window: int

    def __call__(self, images: Ints, rng: np.random.Generator) -> Ints:
        """See `Order`."""
        order = compact(np.arange(len(images)))
        blocks = rng.permutation(-(-len(images) // self.block))
        together = self.window // self.block
        parts = []
        for start in range(0, len(blocks), together):
            firsts = blocks[start : start + together, None] * self.block
            window = (firsts + np.arange(self.block)).ravel()
            parts.append(rng.permutation(order[window[window < len(images)]]))
        return np.concatenate([order[:0], *parts])


def order_of(rows: Pairs) -> Order:
    """In which order to go through rows: any, if all of them are no more than a window.

    It follows from the rows alone, not from whether they are in memory, and so does what is
    trained.
    """
    size = bytes_an_image(rows)
    if size * len(np.flatnonzero(rows.caption_counts)) <= WINDOW_BYTES:
        return uniform
    block = max(1, BLOCK_BYTES // size)
    return BlockOrder(block, max(1, WINDOW_BYTES // (block * size)) * block)


def bytes_an_image(rows: Pairs) -> int:
    """Of embeddings, its captions' included, on average, rounded up; at least 1."""
    total: int = sum(
        len(side) * side.shape[1] * int(side.dtype.itemsize) for side in (rows.images, rows.texts)
    )
    return max(1, -(-total // max(1, int((rows.caption_counts > 0).sum()))))


class PairSampler:
    """Draws pairs of a set of rows.

    Args:
        rows: images with their captions.
        captions: "first" learns from an image's first caption, which queries are often like (a
            title) while the others (descriptions, keywords) are less so; "sample" from any of
            them, drawn anew each epoch; "all" from all of them at once.
        other_weight: weight of the captions after the first; 0 leaves them out. Of no meaning for
            the pairs of "sample" and "all", whose captions weigh 1 each.
        once: count a caption that many images share once: in the closed form its f pairs weigh
            1 / f, and an epoch holds one of them. Otherwise each pair counts.
        order: of the images in an epoch.
    """

    def __init__(
        self,
        rows: Pairs,
        captions: CaptionUse,
        *,
        other_weight: float,
        once: bool,
        order: Order = uniform,
    ) -> None:
        self._images = compact(np.flatnonzero(rows.caption_counts))
        self._counts = rows.caption_counts[self._images]
        # Row of the j-th caption of the i-th image: _texts[_starts[i] + j].
        self._texts = rows.texts_by_image
        self._starts = compact(np.cumsum(self._counts) - self._counts)
        self._owners = rows.text_image
        self._captions = captions
        self._weight = float(other_weight)
        self._once = once
        self._order = order
        self._keys = rows.caption_keys if once else compact(np.arange(len(rows.texts)))

    def __len__(self) -> int:
        return len(self._images)

    def weighted_pairs(self) -> tuple[tuple[Ints, Ints], npt.NDArray[np.float64]]:
        """All pairs with a weight, as image rows and text rows, and the weights."""
        images = np.repeat(self._images, self._counts)
        weights = np.full(len(images), self._weight if self._captions == "first" else 1.0)
        weights[self._starts] = 1.0
        used = weights > 0
        images, texts, weights = images[used], self._texts[used], weights[used]
        weights /= np.bincount(self._keys[texts])[self._keys[texts]]
        return (images, texts), weights

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """One pass: the images in `order`, each with one caption, in batches of like size.

        With `once`, of the images that drew the same caption only one is kept, so that a batch
        holds no caption twice and so no false negatives of that kind.
        """
        order = compact(self._order(self._images, rng))
        drawn = np.zeros(len(order), self._starts.dtype)
        if self._captions == "sample":
            drawn = compact(rng.integers(0, self._counts[order]))
        texts = self._texts[self._starts[order] + drawn]
        if self._once:
            kept = self._first_of_all(texts)
            order, drawn, texts = order[kept], drawn[kept], texts[kept]
        parts = -(-len(order) // batch_size)
        least, more = divmod(len(order), parts)
        for number in range(parts):
            start = number * least + min(number, more)
            part = slice(start, start + least + (number < more))
            yield self._batch(order[part], drawn[part], texts[part], rng)

    def _batch(self, images: Ints, drawn: Ints, texts: Ints, rng: np.random.Generator) -> Batch:
        rows, texts = self._images[images].astype(np.int64), texts.astype(np.int64)
        if self._captions == "all":
            texts = np.concatenate([texts, self._further(images, texts)])
            by_row = np.argsort(rows)
            found = np.searchsorted(rows, self._owners[texts], sorter=by_row)
            return Batch(rows, texts, by_row[found], None, texts[:0])
        others = self._others(images, drawn, rng) if self._weight else None
        seen = texts if others is None else np.concatenate([texts, others[others >= 0]])
        return Batch(rows, texts, None, others, self._further(images, seen))

    def _further(self, images: Ints, seen: Ints) -> Ints:
        """All captions of some images but for those that were seen, no caption twice."""
        counts = self._counts[images]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        own = self._texts[np.repeat(self._starts[images], counts) + within]
        every = np.concatenate([seen, own])
        kept = self._first_of_each(every)
        return every[kept[kept >= len(seen)]]

    def _others(self, images: Ints, drawn: Ints, rng: np.random.Generator) -> Ints:
        """For each image a caption that is not the drawn one, no caption twice; -1 for none."""
        counts = self._counts[images]
        step = rng.integers(1, np.maximum(counts, 2))
        texts = self._texts[self._starts[images] + (drawn + step) % counts]
        several = np.flatnonzero(counts > 1)
        chosen = several[self._first_of_each(texts[several])]
        others = np.full(len(images), -1)
        others[chosen] = texts[chosen]
        return others

    def _first_of_all(self, texts: Ints) -> Ints:
        """The same for many, without sorting them."""
        positions = compact(np.arange(len(texts)))
        keys = self._keys[texts]
        first = np.empty(len(self._keys), positions.dtype)
        first[keys[::-1]] = positions[::-1]  # of those with one key the first is written last
        return compact(np.flatnonzero(first[keys] == positions))

    def _first_of_each(self, texts: Ints) -> Ints:
        """Positions in `texts`, ascending, of the first text with each caption."""
        return np.sort(np.unique(self._keys[texts], return_index=True)[1])


class Batches:
    """The batches of epoch after epoch, without end.

    Args:
        sampler: gives epochs.
        batch_size: see `PairSampler.epoch`.
        seed: of all epochs.
    """

    def __init__(self, sampler: PairSampler, batch_size: int, seed: int) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self._rng = np.random.default_rng(seed)
        self._begin_epoch()

    def __next__(self) -> Batch:
        while (batch := next(self._epoch, None)) is None:
            self._begin_epoch()
        self._drawn += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where it is, as plain values: the generator at the epoch's start and batches since."""
        return {"generator": self._at_epoch, "drawn": self._drawn}

    def go_to(self, state: dict[str, Any]) -> None:
        """Go on from what `state` said."""
        self._rng.bit_generator.state = state["generator"]
        self._begin_epoch()
        for _ in range(state["drawn"]):
            next(self)

    def _begin_epoch(self) -> None:
        self._at_epoch = dict(self._rng.bit_generator.state)
        self._epoch = self._sampler.epoch(self._batch_size, self._rng)
        self._drawn = 0
