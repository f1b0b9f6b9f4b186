"""Cross-modal retrieval: exact ranks of all matches in both directions, hubness, corrections."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock, local
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from csalign.core import distributed
from csalign.core.arrays import Array, Doubles, Floats, Ints
from csalign.core.progress import tick, track
from csalign.features.checks import scaled
from csalign.metrics.neighbours import NEIGHBOURS, TIE, Both, Neighbours, largest, unpacked
from csalign.objective.products import product

RECALL_AT = (1, 5, 10)
INVERSE_TEMPERATURE = 30.0
SCALES = {"csls": 2.0, "inverted-softmax": 1.0}  # factor on the cosine in a corrected score
CPU_TILE = 1_024  # 4 MB of scores, which stay in a cache
DEVICE_TILE = 8_192  # 256 MB of scores
STEP = 16  # tile sides are multiples of it: kernels for odd sides may round differently
STRIP_BYTES = 16 << 20  # larger tables get new pages each time


class DirectionRanks(NamedTuple):
    """Ranks of each query's matches, in one direction."""

    first: Ints  # (q,) int64, 1-based rank of the best-placed match of each query
    average_precision: Doubles  # (q,) float64 in [0, 1]
    recalled: Doubles  # (q, 3) float64, share of a query's matches among the first 1, 5 and 10
    r_precision: Doubles  # (q,) float64, share of a query's R matches among the first R

    def by_query(self) -> dict[str, Array]:
        """Return the contribution of each query to metrics that are means over queries, (q,).

        R@K is 1 where at least one match is among the first K, as the CLIP papers count it;
        true_recall@K is the share of the matches among the first K (mteb's recall).
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
        """Return means of `by_query` over all queries, and the median of the first ranks."""
        means = {name: float(values.mean()) for name, values in self.by_query().items()}
        return means | {"median_rank": float(np.median(self.first))}

    def take(self, queries: Array) -> "DirectionRanks":
        """Select queries by index or by mask."""
        return DirectionRanks._make(values[queries] for values in self)

    @staticmethod
    def joined(parts: Sequence["DirectionRanks"]) -> "DirectionRanks":
        """Concatenate the queries of several parts, in order."""
        fields = zip(*parts, strict=True)
        return DirectionRanks._make(np.concatenate(values) for values in fields)


def rank_both_ways(
    images: Floats,
    texts: Floats,
    text_image: Ints,
    device: torch.device | None = None,
    *,
    divided: bool = False,
    tile: int | None = None,
    neighbours: Both | None = None,
) -> tuple[DirectionRanks, DirectionRanks]:
    """Rank every text for every image that has texts, and every image for every paired text.

    A match's rank is 1 + the wrong items that score at least as high (ties count against the
    model) + the other matches placed before it. Scores are inner products; both directions share
    one product, computed tile by tile.

    Args:
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) row of the image that each text belongs to, -1 for none.
        device: where to multiply and count (default: the CPU). Scores that differ in their last
            digits may change places, since devices round differently.
        divided: share the tiles among the processes of the job, all of which must pass the same
            arguments; each returns all ranks.
        tile: rows and columns of a tile, at most (default: 1,024 on the CPU, 8,192 elsewhere).
        neighbours: of all images and of all texts, empty, to which the scores are added, those of
            matches less twice `neighbours.TIE`.

    Returns:
        Image-to-text over the images with texts, and text-to-image over the paired texts, in row
        order.
    """
    device = device or torch.device("cpu")
    tile = tile or (CPU_TILE if device.type == "cpu" else DEVICE_TILE)
    matrix = _ScoreMatrix(images, texts, text_image, device, tile, neighbours)
    wrong_texts, wrong_images = matrix.wrong_ahead(divided)
    if neighbours is not None:
        neighbours[0].number(matrix.image_order, matrix.text_order)
        neighbours[1].number(matrix.text_order, matrix.image_order)
    counts = matrix.counts[matrix.counts > 0]
    in_row_order = np.argsort(matrix.image_order[: len(counts)])
    wrong_images = wrong_images[np.argsort(matrix.text_order[: len(wrong_images)])]
    return (
        _ranks_of(wrong_texts, counts).take(in_row_order),
        _ranks_of(wrong_images, np.ones(len(wrong_images), np.int64)),
    )


def _ranks_of(wrong: Ints, counts: Ints) -> DirectionRanks:
    """Compute ranks from the wrong items ahead of each match, (pairs,), in runs of counts (q,)."""
    starts = np.cumsum(counts) - counts
    query = np.repeat(np.arange(len(counts)), counts)
    wrong = wrong[np.lexsort((wrong, query))]  # the best match of each query first
    position = np.arange(len(wrong)) - starts[query] + 1
    ranks = position + wrong

    def mean(values: Array) -> Doubles:
        sums: Doubles = np.add.reduceat(values, starts, dtype=np.float64)
        return sums / counts

    return DirectionRanks(
        first=ranks[starts],
        average_precision=mean(position / ranks),
        recalled=np.stack([mean(ranks <= k) for k in RECALL_AT], axis=1),
        r_precision=mean(ranks <= counts[query]),
    )


class _ScoreMatrix:
    """Scores of all images and texts in equal tiles, sorted so that matches form a staircase.

    Images come in falling order of their number of texts, texts in the order of their images. All
    tiles are products of one padded shape: products of other shapes may round differently, and
    equal rows would no longer tie. For the same reason a match's own score is read from the tile
    in which the wrong items are compared with it.
    """

    def __init__(
        self,
        images: Floats,
        texts: Floats,
        text_image: Ints,
        device: torch.device,
        tile: int,
        neighbours: Both | None,
    ) -> None:
        self._images, self._texts = (torch.from_numpy(own).to(device) for own in (images, texts))
        self._device, self._neighbours = device, neighbours
        self._rows, self._columns = _tile_side(len(images), tile), _tile_side(len(texts), tile)
        counts = np.bincount(text_image[text_image >= 0], minlength=len(images))
        self.image_order = np.argsort(-counts, kind="stable")
        self.counts = counts[self.image_order]
        starts = np.cumsum(self.counts) - self.counts
        owners = np.where(text_image >= 0, np.argsort(self.image_order)[text_image], len(images))
        self.text_order = np.argsort(owners, kind="stable")
        self._owners = owners[self.text_order[: self.counts.sum()]]  # (pairs,), rising
        self._own = torch.empty(len(self._owners), device=device)
        self._wrong = torch.zeros(2, len(self._owners), dtype=torch.int64, device=device)
        self._image_order, self._text_order, self._starts_there, self._owners_there = (
            torch.from_numpy(own).to(device)
            for own in (self.image_order, self.text_order, starts, self._owners)
        )
        self._buffers, self._adding = local(), Lock()

    def wrong_ahead(self, divided: bool) -> tuple[Ints, Ints]:
        """Count the wrong texts and wrong images that score at least as high as each match."""
        columns = range(0, len(self._texts), self._columns)
        rows = range(0, len(self._images), self._rows)
        job = distributed.world() if divided else distributed.World()
        self._each_tile(self._read_own, list(self._matched_tiles()))
        self._each_tile(self._count, list(itertools.product(columns, rows))[job.rank :: job.size])
        if divided:
            distributed.all_reduce_sum(self._wrong)
            for own in self._neighbours or ():
                own.merge_processes()
        wrong_texts, wrong_images = self._wrong.cpu().numpy()
        return wrong_texts, wrong_images

    def _matched_tiles(self) -> Iterator[tuple[int, int]]:
        for column in range(0, len(self._owners), self._columns):
            owners = self._owners[column : column + self._columns]
            first = int(owners[0] - owners[0] % self._rows)
            yield from ((column, row) for row in range(first, owners[-1] + 1, self._rows))

    def _each_tile(
        self, work: Callable[[tuple[int, int]], None], tiles: list[tuple[int, int]]
    ) -> None:
        """Do some work on each tile (first column, first row), on the CPU one tile per thread."""
        if self._device.type != "cpu":
            for tile in track(tiles, "ranking: blocks", len(tiles)):
                work(tile)
            return
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
                done = pool.map(work, tiles)  # an exception cancels what has not started
                for _ in track(done, "ranking: blocks", len(tiles)):
                    pass
        finally:
            torch.set_num_threads(threads)  # new threads would inherit the pool's setting

    def _read_own(self, tile: tuple[int, int]) -> None:
        scores, (pairs, at) = self._scores(tile), self._matches(tile)
        self._own[pairs] = scores[at]

    def _count(self, tile: tuple[int, int]) -> None:
        """Add the tile's wrong items that score at least as high as each match."""
        (column, row), scores, (_, at) = tile, self._scores(tile), self._matches(tile)
        if self._neighbours is not None:
            scores[at] -= 2 * TIE  # where others tie, they come first
            there = scores[: len(self._images) - row, : len(self._texts) - column]
            self._neighbours[0].add(row, column, there)
            self._neighbours[1].add(column, row, there.T)
        scores[at] = -torch.inf  # without the matches, all that remains are the wrong items
        scores[len(self._images) - row :] = -torch.inf
        scores[:, len(self._texts) - column :] = -torch.inf
        above, own = self._buffers.above, self._own[column : column + self._columns]
        torch.ge(scores[:, : len(own)], own, out=above[:, : len(own)])
        # 0 and 1 as floats are compared and added faster than booleans, and exactly.
        of_texts = above[:, : len(own)].sum(0).long()
        of_images = []
        some = slice(row, row + self._rows)
        for nth in range(self.counts[some].max(initial=0)):
            # The images that have an nth text are the first ones, as counts fall.
            number = int((self.counts[some] > nth).sum())
            owned = self._starts_there[row : row + number] + nth
            torch.ge(scores[: len(owned)], self._own[owned, None], out=above[: len(owned)])
            of_images.append((owned, above[: len(owned)].sum(1).long()))
        with self._adding:
            self._wrong[1, column : column + self._columns] += of_texts
            for owned, counted in of_images:
                self._wrong[0, owned] += counted

    def _matches(self, tile: tuple[int, int]) -> tuple[slice, tuple[Tensor, Tensor]]:
        """Find the matched pairs in a tile, and their rows and columns in it."""
        column, row = tile
        owners = self._owners[column : column + self._columns]
        first, last = np.searchsorted(owners, [row, row + self._rows]).tolist()
        pairs = slice(column + first, column + last)
        columns = torch.arange(first, last, device=self._device)
        return pairs, (self._owners_there[pairs] - row, columns)

    def _scores(self, tile: tuple[int, int]) -> Tensor:
        """Compute a tile's scores, from rows that are gathered into this thread's buffers."""
        (column, row), own = tile, self._buffers
        if not hasattr(own, "above"):
            own.images, own.texts = (
                self._images.new_zeros(side, self._images.shape[1])
                for side in (self._rows, self._columns)
            )
            own.above = self._images.new_empty(self._rows, self._columns)
            own.column = None
        if own.column != column:
            self._gather(self._texts, self._text_order[column : column + self._columns], own.texts)
            own.column = column
        self._gather(self._images, self._image_order[row : row + self._rows], own.images)
        return product(own.images, own.texts)

    @staticmethod
    def _gather(table: Tensor, rows: Tensor, into: Tensor) -> None:
        torch.index_select(table, 0, rows, out=into[: len(rows)])


def _tile_side(length: int, most: int) -> int:
    """Find the side of the fewest equal tiles that cover a length."""
    return -(-length // (-(-length // most) * STEP)) * STEP


def mean_recall(*directions: dict[str, Any]) -> float:
    """Average R@1, R@5 and R@10 over the given directions' summaries."""
    return float(np.mean([summary[f"R@{k}"] for summary in directions for k in RECALL_AT]))


def hubness(images: Floats, texts: Floats, *, strip_bytes: int = STRIP_BYTES) -> dict[str, float]:
    """Compute the skewness of the 10-occurrence, both ways (Radovanovic et al. 2010).

    N(g) counts the queries that have item g among their 10 nearest; the skewness is
    E[(N - mean)^3] / std^3, 0 where all N are equal. All rows of images (n, d) and texts (m, d) are
    queries. Of items that tie for the tenth place any may be counted. "image_to_text" is that of
    texts as items. Tables of scores have about `strip_bytes`.
    """
    found, done = (Neighbours(len(images)), Neighbours(len(texts))), 0
    for scores in score_strips(images, texts, strip_bytes):
        found[0].add(done, 0, scores)
        found[1].add(0, done, scores.T)
        done += len(scores)
        tick("hubness: rows", done, len(images))
    return hubness_of(found)


def hubness_of(neighbours: Both) -> dict[str, float]:
    """Return what `hubness` does, from the neighbours of all images and of all texts."""
    forth, back = neighbours
    return {"image_to_text": forth.skewness(len(back)), "text_to_image": back.skewness(len(forth))}


def corrected(images: Floats, texts: Floats, name: str) -> tuple[Floats, Floats]:
    """Compute rows whose inner products are corrected scores, up to a term of the query alone.

    csls (Conneau et al. 2018): 2 cos(x, y) - r(x) - r(y), r being the mean cosine of a row to its
    10 nearest of the other modality. inverted-softmax (Smith et al. 2017): exp(b cos(x, y)) over
    its sum for all queries, b = 30 as in MUSE; here log(...) / b, for both directions at once.
    centre (Suzuki et al. 2013): cosines after subtracting the mean of its modality from each row.

    Corrections use the evaluated rows themselves, as their papers do, so they show what the model
    could reach if all these queries were known together. From unit rows (n, d) and (m, d) float32
    it makes rows of d or d + 2 columns.
    """
    if name == "centre":
        means = (rows.mean(axis=0, dtype=np.float64) for rows in (images, texts))
        x, y = (centred(rows, mean) for rows, mean in zip((images, texts), means, strict=True))
        return x, y
    factor = np.float32(np.sqrt(SCALES[name]))
    x_penalty, y_penalty = penalty(images, texts, name), penalty(texts, images, name)
    # Two columns subtract the penalties of both rows from their inner product.
    x_extra = np.stack([-x_penalty, np.ones_like(x_penalty)], axis=1)
    y_extra = np.stack([np.ones_like(y_penalty), -y_penalty], axis=1)
    return np.hstack([factor * images, x_extra]), np.hstack([factor * texts, y_extra])


def penalty(rows: Floats, others: Floats, name: str, *, strip_bytes: int = STRIP_BYTES) -> Floats:
    """Compute the term (n,) that a correction subtracts from each row's scores with all others.

    For csls the mean cosine to the 10 nearest, for inverted-softmax log sum exp(b cos) / b, of
    unit rows (n, d) with the other modality's (m, d). A corrected score is ``SCALES[name]`` times
    the cosine less the penalties of both rows. Tables of scores have about `strip_bytes`.
    """
    b, nearest, parts = INVERSE_TEMPERATURE, min(NEIGHBOURS, len(others)), []
    for scores in score_strips(rows, others, strip_bytes):
        if name == "csls":
            parts.append(unpacked(largest(scores, nearest))[0].mean(1))
        else:
            parts.append((b * scores).logsumexp(1) / b)
    found: Floats = torch.cat(parts).numpy()
    return found


def centred(rows: Floats, mean: Doubles) -> Floats:
    """Subtract a mean (d,) from rows (n, d) and normalise; 0 where nothing remains."""
    return scaled(rows - mean)


def score_strips(queries: Floats, gallery: Floats, strip_bytes: int) -> Iterator[Tensor]:
    """Multiply some queries at a time with the gallery, (some, g)."""
    items = torch.from_numpy(gallery)
    step = max(1, strip_bytes // (4 * len(gallery)))
    for rows in torch.split(torch.from_numpy(queries), step):
        yield product(rows, items)
