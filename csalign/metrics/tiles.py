"""The matrix of all scores, a tile at a time, and the wrong items ahead of each match in it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from csalign import processes

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DEVICE_SIDE = 8_192  # 256 MB of scores
# On the CPU, products of so many rows run at full speed; they are counted by shares of 1 MB, which
# stay in a core's cache. Counts of a share's rows fit a byte, as those of an eighth of its columns.
# Matches of single captions lie in the fewest tiles where these are square.
SHARE_ROWS = 240
SHARES = 4
TILE_COLUMNS = SHARES * SHARE_ROWS
RUN = 8  # tiles side by side whose texts are held, so that the images are fetched less often
STEP = 16  # sides are multiples: a product of one row is made by other code, which rounds otherwise


@dataclass(frozen=True)
class Staircase:
    """An order of images and texts in which matches lie along a staircase.

    Attributes:
        image_order: (n,) image rows; those with the most texts first, those without last.
        text_order: (m,) text rows; image by image in that order, those without an image last.
        caption_counts: (q,) texts of each image that has some, falling.
        owners: (pairs,) place in `image_order` of each paired text in `text_order`, rising.
    """

    image_order: Ints
    text_order: Ints
    caption_counts: Ints
    owners: Ints

    @classmethod
    def lay(cls, images: int, text_image: Ints) -> "Staircase":
        """Find the order.

        Args:
            images: how many there are.
            text_image: (m,) row of the image that each text belongs to, -1 for none.
        """
        counts = np.bincount(text_image[text_image >= 0], minlength=images)
        image_order = np.argsort(-counts, kind="stable")
        place = np.argsort(image_order)
        owners = np.where(text_image >= 0, place[text_image], images)
        text_order = np.argsort(owners, kind="stable")
        falling = counts[image_order]
        return cls(
            image_order=image_order,
            text_order=text_order,
            caption_counts=falling[falling > 0],
            owners=owners[text_order[: falling.sum()]],
        )

    @property
    def starts(self) -> Ints:
        """(q,) place in `owners` of each image's first text."""
        starts: Ints = np.cumsum(self.caption_counts) - self.caption_counts
        return starts


class Tiles:
    """Tiles of scores on any device that torch has.

    Every tile is a product of the same shape, filled up where the matrix ends: products of other
    shapes may round differently, and equal rows would no longer tie.
    """

    rows, columns = DEVICE_SIDE, DEVICE_SIDE  # at most

    def __init__(
        self,
        images: Floats,
        texts: Floats,
        stairs: Staircase,
        device: torch.device | None = None,
        *,
        divided: bool = False,
    ) -> None:
        """Make room for a tile.

        Args:
            images: (n, d).
            texts: (m, d).
            stairs: the order of both.
            device: where to multiply and count (default: the CPU).
            divided: whether each process of the job counts in a part of the tiles.
        """
        self._images, self._texts, self._stairs = images, texts, stairs
        self._divided = divided
        self._device = device or torch.device("cpu")
        self._starts = stairs.starts
        self._rows = _even(len(images), self.rows)
        self._columns = _even(len(texts), self.columns)
        width = images.shape[1]
        self._left = torch.zeros(self._rows, width)
        tiles = min(RUN, -(-len(texts) // self._columns))
        self._rights = torch.zeros(tiles, self._columns, width)
        self._scores = torch.empty(self._rows, self._columns, device=self._device)

    def own_scores(self) -> Tensor:
        """Score of each matched pair, (pairs,) float32, in the order of the stairs' owners."""
        owners = self._stairs.owners
        own = torch.empty(len(owners), device=self._device)
        for column in range(0, len(owners), self._columns):
            here = owners[column : column + self._columns]
            rows = range(here[0] - here[0] % self._rows, here[-1] + 1, self._rows)
            for row, _ in self._multiply(rows, [column]):
                pairs, where = self._matched(row, column)
                own[pairs] = self._scores[where]
        return own

    def count_wrong(self, own: Tensor) -> tuple[Ints, Ints]:
        """Wrong items that score at least as high as each matched pair.

        Args:
            own: what `own_scores` gave.

        Returns:
            Wrong texts for the pair's image, and wrong images for its text, (pairs,) each.
        """
        wrong = torch.zeros(2, len(own), dtype=torch.int64, device=self._device)
        rows = range(0, len(self._images), self._rows)
        if self._divided:
            rows = rows[processes.world().rank :: processes.world().size]
        columns = range(0, len(self._texts), self._columns)
        for start in range(0, len(columns), RUN):
            for row, column in self._multiply(rows, columns[start : start + RUN]):
                self._scores[len(self._images) - row :] = -torch.inf
                self._scores[:, len(self._texts) - column :] = -torch.inf
                # Without the matches what is left are the wrong items.
                self._scores[self._matched(row, column)[1]] = -torch.inf
                self._count(row, slice(column, column + self._columns), own, wrong)
        if self._divided:
            processes.sum_(wrong)
        wrong_texts, wrong_images = wrong.cpu().numpy()
        return wrong_texts, wrong_images

    def _multiply(self, rows: range, columns: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Fill a tile with the scores of each of some images and texts, one after the other."""
        rights = []
        for column, right in zip(columns, self._rights, strict=False):
            _load(self._texts, self._stairs.text_order[column:], right)
            rights.append(right.to(self._device))
        for row in rows:
            _load(self._images, self._stairs.image_order[row:], self._left)
            left = self._left.to(self._device)
            for column, right in zip(columns, rights, strict=True):
                torch.mm(left, right.T, out=self._scores)
                yield row, column

    def _matched(self, row: int, column: int) -> tuple[slice, tuple[Tensor, Tensor]]:
        """The matched pairs that lie in a tile, and where in it."""
        owners = self._stairs.owners[column : column + self._columns]
        first, last = np.searchsorted(owners, [row, row + self._rows])
        rows = torch.from_numpy(owners[first:last] - row).to(self._device)
        columns = torch.arange(first, last, device=self._device)
        return slice(column + first, column + last), (rows, columns)

    def _captions(self, row: int, rows: int) -> Iterator[Ints]:
        """Pairs of the first so many images from `row` on: their first texts, then second ones."""
        some = slice(row, row + rows)
        counts, starts = self._stairs.caption_counts[some], self._starts[some]
        for nth in range(counts.max(initial=0)):
            yield starts[: np.count_nonzero(counts > nth)] + nth  # the first, as the counts fall

    def _count(self, row: int, texts: slice, own: Tensor, wrong: Tensor) -> None:
        """Add a tile's wrong texts and wrong images of each pair."""
        for nth in self._captions(row, self._rows):
            pairs = torch.from_numpy(nth).to(self._device)
            wrong[0, pairs] += (self._scores[: len(pairs)] >= own[pairs, None]).sum(1)
        of_texts = own[texts]
        wrong[1, texts] += (self._scores[:, : len(of_texts)] >= of_texts).sum(0)


class HostTiles(Tiles):
    """Tiles on the CPU, counted by numpy on all threads, at a fraction of the product's time."""

    def __init__(
        self, images: Floats, texts: Floats, stairs: Staircase, *, divided: bool = False
    ) -> None:
        """Make room for a tile; arguments as of `Tiles`."""
        self._threads = torch.get_num_threads()
        self.rows, self.columns = SHARE_ROWS * max(SHARES, self._threads), TILE_COLUMNS
        super().__init__(images, texts, stairs, divided=divided)
        self._above = np.empty(self._scores.shape, np.bool_)

    def count_wrong(self, own: Tensor) -> tuple[Ints, Ints]:
        """See `Tiles`."""
        with ThreadPoolExecutor(self._threads) as self._pool:
            return super().count_wrong(own)

    def _count(self, row: int, texts: slice, own: Tensor, wrong: Tensor) -> None:
        wrong_texts, wrong_images = wrong.numpy()
        count = partial(self._count_share, row, own.numpy(), own.numpy()[texts], wrong_texts)
        spread = map if self._threads == 1 else self._pool.map
        for counts in spread(count, range(0, self._rows, SHARE_ROWS)):
            wrong_images[texts] += counts

    def _count_share(
        self, row: int, own: Floats, of_texts: Floats, wrong_texts: Ints, start: int
    ) -> Ints:
        """One thread's rows of a tile: adds to `wrong_texts`, gives the wrong images by text."""
        share = slice(start, start + SHARE_ROWS)
        scores, above = self._scores.numpy()[share], self._above[share]
        for pairs in self._captions(row + start, len(scores)):
            have = len(pairs)
            np.greater_equal(scores[:have], own[pairs, None], out=above[:have])
            wrong_texts[pairs] += _true_in_rows(above[:have])
        width = len(of_texts)
        np.greater_equal(scores[:, :width], of_texts, out=above[:, :width])
        by_text: Ints = np.add.reduce(above[:, :width].view(np.uint8), axis=0, dtype=np.uint8)
        return by_text


def _load(values: Floats, order: Ints, into: Tensor) -> None:
    """Copy the next rows to where a product takes them from; those after the last one stay."""
    rows = order[: len(into)]
    np.take(values, rows, axis=0, out=into.numpy()[: len(rows)], mode="clip")


def _even(length: int, most: int) -> int:
    """Side of the fewest tiles that cover a length, so that hardly any of it is filling."""
    tiles = -(-length // most)
    return -(-length // (tiles * STEP)) * STEP


def _true_in_rows(values: npt.NDArray[np.bool_]) -> Ints:
    """How many of each row are true; eight bytes at a time, none of which overflows."""
    sums = values.view(np.uint64).sum(axis=1)
    counts: Ints = sums.view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.int64)
    return counts
