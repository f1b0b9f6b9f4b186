"""Cross-modal retrieval: the exact ranks of all matches, both ways, from one pass of tiles."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

RECALL_AT = (1, 5, 10)
# Products of so many rows run at full speed; they are counted by shares of 1 MB, which stay in a
# core's cache. Counts of a share's rows fit a byte, and so do those of an eighth of the columns.
SHARE_ROWS = 240
SHARES = 4
TILE_COLUMNS = 1_024
STEP = 16  # sides are multiples: a product of one row is made by other code, which rounds otherwise


@dataclass(frozen=True)
class DirectionRanks:
    """Where each query's matches were found, in one direction.

    Attributes:
        first: (q,) int64, 1-based rank of the best-placed match of each query.
        average_precision: (q,) float64 in [0, 1].
        recalled: (q, 3) float64, share of a query's matches among the first 1, 5 and 10.
        r_precision: (q,) float64, share of right items among the first R, R being how many
            matches the query has.
    """

    first: Ints
    average_precision: npt.NDArray[np.float64]
    recalled: npt.NDArray[np.float64]
    r_precision: npt.NDArray[np.float64]

    def by_query(self) -> dict[str, npt.NDArray[Any]]:
        """What each query adds to the figures that are means over queries, (q,) each.

        R@K is 1 where at least one match is among the first K, as the CLIP papers count it;
        true_recall@K the share of the matches that are (mteb's recall).
        """
        shares = self.recalled.T
        return {
            **{f"R@{k}": self.first <= k for k in RECALL_AT},
            **{f"true_recall@{k}": share for k, share in zip(RECALL_AT, shares, strict=True)},
            "r_precision": self.r_precision,
            "mean_rank": self.first,
            "mrr": 1 / self.first,
            "map": self.average_precision,
        }

    def summary(self) -> dict[str, float]:
        """The figures of `by_query` over all queries, and the median of the first ranks."""
        means = {name: float(values.mean()) for name, values in self.by_query().items()}
        return means | {"median_rank": float(np.median(self.first))}

    def take(self, queries: npt.NDArray[Any]) -> "DirectionRanks":
        """Those of some queries, by number or where true."""
        return DirectionRanks(*(values[queries] for values in self._fields()))

    @staticmethod
    def joined(parts: Sequence["DirectionRanks"]) -> "DirectionRanks":
        """Those of several sets of queries, in order."""
        fields = zip(*(part._fields() for part in parts), strict=True)
        return DirectionRanks(*(np.concatenate(values) for values in fields))

    def _fields(self) -> tuple[npt.NDArray[Any], ...]:
        return self.first, self.average_precision, self.recalled, self.r_precision


def rank_both_ways(
    images: Floats, texts: Floats, text_image: Ints
) -> tuple[DirectionRanks, DirectionRanks]:
    """Rank every text for every image that has texts, and every image for every paired text.

    A match's rank is 1 + the wrong items that score at least as high (ties against the model) +
    the other matches that are placed before it. Scores are inner products, and one product serves
    both directions; no more than a tile of it is held.

    Args:
        images: (n, d) float32, unit rows: the gallery of the texts.
        texts: (m, d) float32, unit rows: the gallery of the images.
        text_image: (m,) row of the image that each text belongs to, -1 for none.

    Returns:
        Image-to-text over the images with texts, and text-to-image over the paired texts, in row
        order.
    """
    tiles = _Tiles.lay(images, texts, text_image)
    wrong_texts, wrong_images = tiles.count_wrong(tiles.own_scores())
    counts = tiles.caption_counts
    in_row_order = np.argsort(tiles.image_order[: len(counts)])  # out of that of the tiles
    wrong_images = wrong_images[np.argsort(tiles.text_order[: len(wrong_images)])]
    return (
        _of_runs(wrong_texts, counts).take(in_row_order),
        _of_runs(wrong_images, np.ones(len(wrong_images), np.int64)),
    )


def _of_runs(wrong: Ints, counts: Ints) -> DirectionRanks:
    """What follows from the wrong items ahead of each match.

    Args:
        wrong: (pairs,) of consecutive runs of matches, a run a query.
        counts: (q,) their lengths, all positive.
    """
    starts = np.cumsum(counts) - counts
    query = np.repeat(np.arange(len(counts)), counts)
    wrong = wrong[np.lexsort((wrong, query))]  # the best match of each query first
    position = np.arange(len(wrong)) - starts[query] + 1
    ranks = position + wrong

    def mean(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        sums: npt.NDArray[np.float64] = np.add.reduceat(values, starts, dtype=np.float64)
        return sums / counts

    return DirectionRanks(
        first=ranks[starts],
        average_precision=mean(position / ranks),
        recalled=np.stack([mean(ranks <= k) for k in RECALL_AT], axis=1),
        r_precision=mean(ranks <= counts[query]),
    )


@dataclass
class _Tiles:
    """The matrix of all scores, in an order where matches lie along a staircase, a tile at a time.

    Every tile is a product of the same shape, filled up with zeros where the matrix ends: products
    of other shapes may round differently, and equal rows would no longer tie.

    Attributes:
        images: (n, d).
        texts: (m, d).
        image_order: (n,) image rows; those with the most texts first, those without last.
        text_order: (m,) text rows; image by image in that order, those without an image last.
        caption_counts: (q,) texts of each image that has some, falling.
        owners: (pairs,) place in `image_order` of each paired text in `text_order`, rising.
    """

    images: Floats
    texts: Floats
    image_order: Ints
    text_order: Ints
    caption_counts: Ints
    owners: Ints

    def __post_init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._rows = _even(len(self.images), SHARE_ROWS * max(SHARES, self._threads))
        self._columns = _even(len(self.texts), TILE_COLUMNS)
        width = self.images.shape[1]
        self._left = np.zeros((self._rows, width), np.float32)
        self._right = np.zeros((self._columns, width), np.float32)
        self._scores = np.empty((self._rows, self._columns), np.float32)
        self._above = np.empty(self._scores.shape, np.bool_)
        self._starts = np.cumsum(self.caption_counts) - self.caption_counts

    @classmethod
    def lay(cls, images: Floats, texts: Floats, text_image: Ints) -> "_Tiles":
        """Find the order; arguments as of `rank_both_ways`."""
        counts = np.bincount(text_image[text_image >= 0], minlength=len(images))
        image_order = np.argsort(-counts, kind="stable")
        place = np.argsort(image_order)
        owners = np.where(text_image >= 0, place[text_image], len(images))
        text_order = np.argsort(owners, kind="stable")
        falling = counts[image_order]
        return cls(
            images=images,
            texts=texts,
            image_order=image_order,
            text_order=text_order,
            caption_counts=falling[falling > 0],
            owners=owners[text_order[: falling.sum()]],
        )

    def own_scores(self) -> Floats:
        """Score of each matched pair, (pairs,), in the order of `owners`."""
        own = np.empty(len(self.owners), np.float32)
        for column in range(0, len(own), self._columns):
            self._load_texts(column)
            owners = self.owners[column : column + self._columns]
            for row in range(owners[0] - owners[0] % self._rows, owners[-1] + 1, self._rows):
                self._multiply(row)
                pairs, where = self._matched(row, column)
                own[pairs] = self._scores[where]
        return own

    def count_wrong(self, own: Floats) -> tuple[Ints, Ints]:
        """Wrong items that score at least as high as each matched pair.

        Args:
            own: what `own_scores` gave.

        Returns:
            Wrong texts for the pair's image, and wrong images for its text, (pairs,) each.
        """
        wrong_texts, wrong_images = np.zeros((2, len(own)), np.int64)
        shares = range(0, self._rows, SHARE_ROWS)
        with ThreadPoolExecutor(self._threads) as pool:
            for column in range(0, len(self.texts), self._columns):
                self._load_texts(column)
                texts = slice(column, column + self._columns)
                for row in range(0, len(self.images), self._rows):
                    self._multiply(row)
                    self._scores[len(self.images) - row :] = -np.inf
                    self._scores[:, len(self.texts) - column :] = -np.inf
                    # Without the matches what is left are the wrong items.
                    self._scores[self._matched(row, column)[1]] = -np.inf
                    count = partial(self._count_share, row, own, own[texts], wrong_texts)
                    for counts in pool.map(count, shares):
                        wrong_images[texts] += counts
        return wrong_texts, wrong_images

    def _load_texts(self, column: int) -> None:
        rows = self.text_order[column : column + self._columns]
        np.take(self.texts, rows, axis=0, out=self._right[: len(rows)], mode="clip")

    def _multiply(self, row: int) -> None:
        """Fill the tile with the scores of the loaded texts and the images from `row` on."""
        rows = self.image_order[row : row + self._rows]
        np.take(self.images, rows, axis=0, out=self._left[: len(rows)], mode="clip")
        left, right, out = map(torch.from_numpy, (self._left, self._right, self._scores))
        torch.mm(left, right.T, out=out)

    def _matched(self, row: int, column: int) -> tuple[slice, tuple[Ints, Ints]]:
        """The matched pairs that lie in a tile, and where in it."""
        owners = self.owners[column : column + self._columns]
        first, last = np.searchsorted(owners, [row, row + self._rows])
        return (
            slice(column + first, column + last),
            (owners[first:last] - row, np.arange(first, last)),
        )

    def _count_share(
        self, row: int, own: Floats, of_texts: Floats, wrong_texts: Ints, start: int
    ) -> Ints:
        """One thread's rows of a tile: adds to `wrong_texts`, gives the wrong images by text."""
        share = slice(start, start + SHARE_ROWS)
        scores, above = self._scores[share], self._above[share]
        images = slice(row + start, row + start + len(scores))
        counts, starts = self.caption_counts[images], self._starts[images]
        for nth in range(counts.max(initial=0)):
            have = np.count_nonzero(counts > nth)  # they are the first, as the counts fall
            pairs = starts[:have] + nth
            np.greater_equal(scores[:have], own[pairs, None], out=above[:have])
            wrong_texts[pairs] += _true_in_rows(above[:have])
        width = len(of_texts)
        np.greater_equal(scores[:, :width], of_texts, out=above[:, :width])
        by_text: Ints = np.add.reduce(above[:, :width].view(np.uint8), axis=0, dtype=np.uint8)
        return by_text


def _even(length: int, most: int) -> int:
    """Side of the fewest tiles that cover a length, so that hardly any of it is filling."""
    tiles = -(-length // most)
    return -(-length // (tiles * STEP)) * STEP


def _true_in_rows(values: npt.NDArray[np.bool_]) -> Ints:
    """How many of each row are true; eight bytes at a time, none of which overflows."""
    sums = values.view(np.uint64).sum(axis=1)
    counts: Ints = sums.view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.int64)
    return counts


def mean_recall(*directions: dict[str, Any]) -> float:
    """Mean of R@1, R@5 and R@10 over the given directions' summaries."""
    return float(np.mean([summary[f"R@{k}"] for summary in directions for k in RECALL_AT]))
