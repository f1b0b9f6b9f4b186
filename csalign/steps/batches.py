"""Which image meets which caption: weighted pairs for the closed form, batches for training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.store.join import PairedRows

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Rows of one optimiser step.

    Attributes:
        images: (b,) image rows.
        texts: (b,) text rows; entry i is a caption of image i.
    """

    images: Ints
    texts: Ints


class PairSampler:
    """Draws pairs of a set of rows.

    Args:
        rows: images with their captions.
        other_weight: weight of each caption after an image's first, whose weight is 1. Queries
            are often like the first one (a title) and less like the others (a description).
        once: count a caption that many images share once: in the closed form its f pairs weigh
            1 / f, and an epoch holds one of them. Otherwise each pair counts.
    """

    def __init__(self, rows: PairedRows, *, other_weight: float, once: bool) -> None:
        self._images = np.flatnonzero(rows.caption_counts)
        self._counts = rows.caption_counts[self._images]
        # Row of the j-th caption of the i-th image: _texts[_starts[i] + j].
        self._texts = rows.texts_by_image
        self._starts = np.cumsum(self._counts) - self._counts
        self._weight = other_weight
        self._once = once
        self._keys = rows.caption_keys

    def __len__(self) -> int:
        return len(self._images)

    def weighted_pairs(self) -> tuple[tuple[Ints, Ints], npt.NDArray[np.float64]]:
        """All pairs with a weight, as image rows and text rows, and the weights."""
        images = np.repeat(self._images, self._counts)
        weights = np.full(len(images), self._weight)
        weights[self._starts] = 1.0
        used = weights > 0
        images, texts, weights = images[used], self._texts[used], weights[used]
        if self._once:
            weights /= np.bincount(self._keys[texts])[self._keys[texts]]
        return (images, texts), weights

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """One pass: the images in random order, each with one caption, in batches of like size.

        With `once`, of the images that drew the same caption only one is kept, so that a batch
        holds no caption twice and so no false negatives of that kind.
        """
        order = rng.permutation(len(self._images))
        texts = self._texts[self._starts[order] + self._draw(self._counts[order], rng)]
        if self._once:
            _, kept = np.unique(self._keys[texts], return_index=True)
            kept.sort()  # keep the random order
            order, texts = order[kept], texts[kept]
        for part in np.array_split(np.arange(len(order)), -(-len(order) // batch_size)):
            yield Batch(self._images[order[part]], texts[part])

    def _draw(self, counts: Ints, rng: np.random.Generator) -> Ints:
        """A caption number for each image, in proportion to the weights."""
        point = rng.random(len(counts)) * (1 + self._weight * (counts - 1))
        beyond = np.maximum(point - 1, 0)
        others = 1 + np.floor(beyond / self._weight) if self._weight else np.zeros(len(counts))
        drawn = np.where(point < 1, 0, np.minimum(others, counts - 1))
        return drawn.astype(np.int64)
