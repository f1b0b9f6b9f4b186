"""The matrix of all scores, a tile at a time, and the wrong items ahead of each match in it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from csalign.core import distributed

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

Block = tuple[range, int]  # first columns of tiles side by side, and the first row of all

DEVICE_SIDE = 8_192  # 256 MB of scores
# On the CPU, products of so many rows run at full speed; they are counted by shares of 1 MB, which
# stay in a core's cache. Counts of a share's rows fit a byte, as those of an eighth of its columns.
# Matches of single captions lie in the fewest tiles where these are square.
SHARE_ROWS = 240
TILE_ROWS = TILE_COLUMNS = 4 * SHARE_ROWS
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


class Matrix:
    """The matrix of all scores as tiles, and who has matches in which.

    Every tile is a product of the same shape, filled up where the matrix ends: products of other
    shapes may round differently, and equal rows would no longer tie.
    """

    def __init__(self, images: Floats, texts: Floats, stairs: Staircase, most: tuple[int, int]):
        """Divide it.

        Args:
            images: (n, d).
            texts: (m, d).
            stairs: the order of both.
            most: rows and columns of a tile, at most.
        """
        self.images, self.texts, self.stairs = images, texts, stairs
        self.rows, self.columns = _even(len(images), most[0]), _even(len(texts), most[1])
        self._starts = stairs.starts

    def blocks(self) -> Iterator[Block]:
        """Tiles side by side that make it up; the same columns of all rows first."""
        columns = range(0, len(self.texts), self.columns)
        runs = (columns[start : start + RUN] for start in range(0, len(columns), RUN))
        return product(runs, range(0, len(self.images), self.rows))

    def matched_blocks(self) -> Iterator[Block]:
        """The tiles that hold all matches, one by one."""
        owners = self.stairs.owners
        for column in range(0, len(owners), self.columns):
            here = owners[column : column + self.columns]
            for row in range(here[0] - here[0] % self.rows, here[-1] + 1, self.rows):
                yield range(column, column + 1), row

    def load_images(self, row: int, into: Tensor) -> None:
        """Copy the rows of a tile; what lies beyond the last is left as it was."""
        _load(self.images, self.stairs.image_order[row : row + self.rows], into)

    def load_texts(self, column: int, into: Tensor) -> None:
        """Copy the columns of a tile; what lies beyond the last is left as it was."""
        _load(self.texts, self.stairs.text_order[column : column + self.columns], into)

    def matched(self, row: int, column: int) -> tuple[slice, Ints, Ints]:
        """The matched pairs that lie in a tile, and their rows and columns in it."""
        owners = self.stairs.owners[column : column + self.columns]
        first, last = np.searchsorted(owners, [row, row + self.rows])
        return (
            slice(column + first, column + last),
            owners[first:last] - row,
            np.arange(first, last),
        )

    def captions(self, row: int, rows: int) -> Iterator[Ints]:
        """Pairs of the first so many images from `row` on: their first texts, then second ones."""
        some = slice(row, row + rows)
        counts, starts = self.stairs.caption_counts[some], self._starts[some]
        for nth in range(counts.max(initial=0)):
            yield starts[: np.count_nonzero(counts > nth)] + nth  # the first, as the counts fall


class Tile:
    """Room for a tile of scores on any device that torch has, and what is done with them."""

    def __init__(self, matrix: Matrix, device: torch.device, adding: Lock) -> None:
        """Make room.

        Args:
            matrix: what tiles are of.
            device: where to multiply and count.
            adding: held to add to counts that other tiles add to.
        """
        self._matrix, self._device, self._adding = matrix, device, adding
        width = matrix.images.shape[1]
        self._left = torch.zeros(matrix.rows, width)
        self._right = torch.zeros(matrix.columns, width)
        self._held: tuple[range, list[Tensor]] = range(0), []
        self._scores = torch.empty(matrix.rows, matrix.columns, device=device)

    def read_own(self, blocks: Iterable[Block], own: Tensor) -> None:
        """Fill in the scores of the matches in some blocks, (pairs,) as the stairs' owners."""
        for row, column in self.multiply(blocks):
            pairs, *where = self._matrix.matched(row, column)
            own[pairs] = self._scores[self._at(where)]

    def count_wrong(self, blocks: Iterable[Block], own: Tensor, wrong: Tensor) -> None:
        """Add to (2, pairs) the wrong texts and images that score at least as high as a match."""
        matrix = self._matrix
        for row, column in self.multiply(blocks):
            self._scores[len(matrix.images) - row :] = -torch.inf
            self._scores[:, len(matrix.texts) - column :] = -torch.inf
            # Without the matches what is left are the wrong items.
            _, *where = matrix.matched(row, column)
            self._scores[self._at(where)] = -torch.inf
            self._count(row, slice(column, column + matrix.columns), own, wrong)

    def multiply(self, blocks: Iterable[Block]) -> Iterator[tuple[int, int]]:
        """Have the scores of each tile of some blocks, one after the other."""
        for columns, row in blocks:
            if columns != self._held[0]:
                self._held = columns, [self._texts(column) for column in columns]
            self._matrix.load_images(row, self._left)
            left = self._left.to(self._device)
            for column, right in zip(*self._held, strict=True):
                torch.mm(left, right.T, out=self._scores)
                yield row, column

    def _texts(self, column: int) -> Tensor:
        self._matrix.load_texts(column, self._right)
        return self._right.to(self._device, copy=True)

    def _at(self, where: Sequence[Ints]) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(index).to(self._device) for index in where)

    def _count(self, row: int, texts: slice, own: Tensor, wrong: Tensor) -> None:
        """Add a tile's wrong texts and wrong images of each pair."""
        for nth in self._matrix.captions(row, self._matrix.rows):
            pairs = torch.from_numpy(nth).to(self._device)
            wrong[0, pairs] += (self._scores[: len(pairs)] >= own[pairs, None]).sum(1)
        of_texts = own[texts]
        wrong[1, texts] += (self._scores[:, : len(of_texts)] >= of_texts).sum(0)


class HostTile(Tile):
    """A tile on the CPU, counted by numpy at a fraction of the product's time."""

    def __init__(self, matrix: Matrix, device: torch.device, adding: Lock) -> None:
        """Make room; arguments as of `Tile`."""
        super().__init__(matrix, device, adding)
        self._above = np.empty((SHARE_ROWS, matrix.columns), np.bool_)

    def _count(self, row: int, texts: slice, own: Tensor, wrong: Tensor) -> None:
        wrong_texts, wrong_images = wrong.numpy()
        scores, own_scores = self._scores.numpy(), own.numpy()
        of_texts = own_scores[texts]
        have = len(of_texts)
        by_text = np.zeros(have, np.int64)
        for start in range(0, len(scores), SHARE_ROWS):
            share = scores[start : start + SHARE_ROWS]
            for pairs in self._matrix.captions(row + start, len(share)):
                above = self._above[: len(pairs)]
                np.greater_equal(share[: len(pairs)], own_scores[pairs, None], out=above)
                by_image = _true_in_rows(above)
                with self._adding:
                    wrong_texts[pairs] += by_image
            above = self._above[: len(share), :have]
            np.greater_equal(share[:, :have], of_texts, out=above)
            by_text += np.add.reduce(above.view(np.uint8), axis=0, dtype=np.uint8)
        with self._adding:
            wrong_images[texts] += by_text


def wrong_ahead(
    images: Floats,
    texts: Floats,
    stairs: Staircase,
    device: torch.device | None = None,
    *,
    divided: bool = False,
) -> tuple[Ints, Ints]:
    """Wrong items that score at least as high as each matched pair.

    On the CPU each thread has a tile of its own, and takes the next block when it is done with one:
    threads that share a product wait for each other, twice a tile.

    Args:
        images: (n, d).
        texts: (m, d).
        stairs: the order of both.
        device: where to multiply and count (default: the CPU).
        divided: whether each process of the job counts in a part of the tiles.

    Returns:
        Wrong texts for the pair's image, and wrong images for its text, (pairs,) each, in the order
        of the stairs' owners.
    """
    device = device or torch.device("cpu")
    on_host = device.type == "cpu"
    threads = torch.get_num_threads() if on_host else 1
    rows = min(TILE_ROWS, -(-len(images) // threads))
    most = (rows, TILE_COLUMNS) if on_host else (DEVICE_SIDE, DEVICE_SIDE)
    matrix, adding = Matrix(images, texts, stairs, most), Lock()
    kind = HostTile if on_host else Tile
    tiles = [kind(matrix, device, adding) for _ in range(threads)]
    own = torch.empty(len(stairs.owners), device=device)
    wrong = torch.zeros(2, len(own), dtype=torch.int64, device=device)
    _spread(tiles, matrix.matched_blocks(), lambda tile, blocks: tile.read_own(blocks, own))
    job = distributed.world() if divided else distributed.World()
    blocks = islice(matrix.blocks(), job.rank, None, job.size)
    _spread(tiles, blocks, lambda tile, blocks: tile.count_wrong(blocks, own, wrong))
    if divided:
        distributed.all_reduce_sum(wrong)
    wrong_texts, wrong_images = wrong.cpu().numpy()
    return wrong_texts, wrong_images


class _Shared:
    """Blocks that threads take in turn."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks, self._taking = blocks, Lock()

    def __iter__(self) -> Iterator[Block]:
        return self

    def __next__(self) -> Block:
        with self._taking:
            return next(self._blocks)

    def stop(self) -> None:
        with self._taking:
            self._blocks = iter(())


def _spread(
    tiles: Sequence[Tile], blocks: Iterator[Block], work: Callable[[Tile, Iterable[Block]], None]
) -> None:
    """Do what is to be done with some blocks, each tile in a thread if there are several."""
    if len(tiles) == 1:
        work(tiles[0], blocks)
        return
    shared, threads = _Shared(blocks), torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(tiles), initializer=partial(torch.set_num_threads, 1)) as pool:
            try:
                done = [pool.submit(work, tile, shared) for tile in tiles]
                wait(done, return_when=FIRST_EXCEPTION)
            finally:
                shared.stop()  # or a signal would be heard after the last block
        for found in done:
            found.result()
    finally:
        torch.set_num_threads(threads)  # threads to come would take over what the pool's were told


def _load(values: Floats, order: Ints, into: Tensor) -> None:
    """Copy the next rows to where a product takes them from; those after the last one stay."""
    np.take(values, order, axis=0, out=into.numpy()[: len(order)], mode="clip")


def _even(length: int, most: int) -> int:
    """Side of the fewest tiles that cover a length, so that hardly any of it is filling."""
    tiles = -(-length // most)
    return -(-length // (tiles * STEP)) * STEP


def _true_in_rows(values: npt.NDArray[np.bool_]) -> Ints:
    """How many of each row are true; eight bytes at a time, none of which overflows."""
    sums = values.view(np.uint64).sum(axis=1)
    counts: Ints = sums.view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.int64)
    return counts
