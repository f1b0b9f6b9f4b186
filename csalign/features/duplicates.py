"""Find near-duplicate images by their embeddings, alike on every machine and in any row order.

Groups grow the closest pair first, and two of them become one only if at least half of the pairs
between them are near, so that a series in which each picture is like the next does not become one
group.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.core.arrays import Doubles, Ints
from csalign.core.progress import tick
from csalign.features import schema
from csalign.features.checks import check_directions
from csalign.features.join import first_alike, hash_rows
from csalign.features.reader import FeatureTable, batch_vectors
from csalign.features.streaming import MIB, MemoryBudget

Products = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int16]
Hashes = npt.NDArray[np.uint64]

NEAR = 0.9
"""Least cosine of near-duplicates, between standardised unit rows. In encoders tried, recoloured
and redrawn versions of a picture have 0.9 to 0.97, and unrelated pictures less than 0.85."""

LARGEST = 0.999  # a threshold above it could not be resolved: only copies are found
CHANCE = 0.01  # most expected neighbours of an image, beyond the threshold, that are unrelated
NORM = 4_000  # of a row of whole numbers, whose products float32 adds without rounding (< 2^24)
FLATTEST = 1e-3  # a coordinate that varies less, relative to the others, is left out
EXACT_ROWS = 50_000
CELL_ROWS = 1_000  # of a cell on average, beyond `EXACT_ROWS`
ROUNDS = 4  # of cells, since a pair may fall into different cells
SAMPLE_ROWS = 2_048
PASSES = 3  # over the embeddings
BLOCK = 1 << 24  # products at a time
MOST_PAIRS = 10_000_000  # of near rows; only the closest of more are used
BATCH = 8_192
MEMORY = 2_048 * MIB  # of the rows; more are mapped from a file in TMPDIR


class Links:
    """Groups of `n` rows, made by linking pairs of them."""

    def __init__(self, n: int) -> None:
        self._parents = np.arange(n)

    def add(self, first: Ints, second: Ints) -> None:
        """Put `first[k]` and `second[k]` (k,) into one group, for all k."""
        while True:
            left, right = self._roots(first), self._roots(second)
            apart = left != right
            if not apart.any():
                return
            first, second, left, right = (part[apart] for part in (first, second, left, right))
            np.minimum.at(self._parents, np.maximum(left, right), np.minimum(left, right))

    def groups(self) -> Ints:
        """Return the number of each row's group, (n,), which is that of its first row."""
        return self._roots(np.arange(len(self._parents)))

    def _roots(self, rows: Ints) -> Ints:
        found = self._parents[rows]
        while not np.array_equal(above := self._parents[found], found):
            found = above
        self._parents[rows] = found  # so that paths stay short
        return found


def link_near_duplicates(
    table: FeatureTable, hashes: Hashes, links: Links, *, exact_rows: int = EXACT_ROWS
) -> float | None:
    """Link the images that are copies or near-duplicates of each other.

    Rows are scaled to norm 1, standardised per coordinate, so that neither the mean nor a few large
    coordinates decide, scaled to `NORM` and rounded. The threshold on their cosine is `NEAR`, or
    more where unrelated rows come as close, in few effective dimensions.

    Args:
        table: of the images, n rows.
        hashes: of their ids, (n,), which choose samples and cells.
        links: receives the pairs.
        exact_rows: up to so many rows all pairs are compared; more are compared within `ROUNDS`
            divisions into cells around some of the rows, which find nearly all pairs.

    Returns:
        The threshold; None if the embeddings allow none, so that only equal rows were linked.

    Raises:
        DataError: an embedding has no direction.
        SchemaError: a file is damaged.
    """
    copies = first_alike(_hash_embeddings(table))
    links.add(np.arange(len(table)), copies)
    kept = np.unique(copies)
    np.minimum.at(least_hashes := hashes.copy(), copies, hashes)  # whichever copy is first
    order = np.argsort(least_hashes[kept])  # in which nothing depends on that of the rows
    rows = _whole_numbers(table, kept, np.argsort(order))
    kept, hashes = kept[order], least_hashes[kept[order]]
    threshold = _threshold(rows[:SAMPLE_ROWS], len(kept))
    if threshold is None:
        return None
    cells = [np.arange(len(kept))] if len(kept) <= exact_rows else _cells(rows, hashes)
    total = len(kept) * (1 if len(kept) <= exact_rows else ROUNDS)
    groups = merge_pairs(len(kept), *_near_pairs(rows, cells, threshold * NORM**2, total))
    links.add(kept, kept[groups])
    return threshold


def _hash_embeddings(table: FeatureTable) -> Ints:
    found = [np.empty(0, np.int64)]
    for first, batch in table.read(schema.ID, schema.EMBEDDING):
        vectors = batch_vectors(batch, schema.EMBEDDING)
        check_directions(vectors, batch.column(schema.ID), f"{table.folder}: images")
        found.append(hash_rows(vectors))
        tick("reading: images", first + len(vectors), PASSES * len(table))
    return np.concatenate(found)


def _unit_rows(table: FeatureTable, rows: Ints) -> Iterator[tuple[slice, Doubles]]:
    """Stream rows (ascending) scaled to norm 1, in float64 so that rounding leaves no trace."""
    for places, local, batch in table.parts([schema.EMBEDDING], rows):
        wide = batch_vectors(batch, schema.EMBEDDING)[local].astype(np.float64)
        yield places, wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _whole_numbers(table: FeatureTable, rows: Ints, at: Ints) -> Integers:
    """Standardise rows (n, d), scale them to `NORM`, round, and put row k at place ``at[k]``."""
    sums, squares = np.zeros((2, table.width))
    for places, unit in _unit_rows(table, rows):
        sums += unit.sum(axis=0)
        squares += np.square(unit).sum(axis=0)
        tick("reading: images", len(table) + places.stop, PASSES * len(table))
    mean = sums / len(rows)
    deviation = np.sqrt(np.maximum(0, squares / len(rows) - mean**2))
    varies = deviation > FLATTEST * np.sqrt(np.mean(deviation**2))
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=varies)
    budget = MemoryBudget(MEMORY, Path(tempfile.gettempdir()), is_shared=False)
    found: Integers = budget.rows((len(rows), table.width), np.dtype(np.int16))
    for places, unit in _unit_rows(table, rows):
        unit = (unit - mean) * scale
        norms = np.linalg.norm(unit, axis=1, keepdims=True)
        found[at[places]] = np.rint(NORM * np.divide(unit, norms, out=unit, where=norms > 0))
        tick("reading: images", 2 * len(table) + places.stop, PASSES * len(table))
    return found


def _threshold(sample: Integers, n: int) -> float | None:
    """Return the cosine that `n` unrelated rows hardly reach, at least `NEAR`.

    A mean squared cosine of 1 / d is that of random directions in d dimensions, of which less than
    (1 - t^2)^((d - 1) / 2) / 2 have a cosine above t.
    """
    if len(sample) < 3:
        return NEAR
    values = sample.astype(np.float32)
    cosines = (values @ values.T).astype(np.float64) / NORM**2
    np.fill_diagonal(cosines, 0)
    mean_square = np.square(cosines).sum() / (len(sample) * (len(sample) - 1))
    freedom = max(1e-3, 1 / max(mean_square, 1e-9) - 1)
    reached = float(np.sqrt(1 - (2 * CHANCE / n) ** (2 / freedom)))
    threshold = round(max(NEAR, reached), 4)
    return threshold if threshold <= LARGEST else None


def _cells(rows: Integers, hashes: Hashes) -> Iterator[Ints]:
    """Divide rows (n, d) into cells around some of them, `ROUNDS` times."""
    for number in range(ROUNDS):
        chosen = np.argsort(mix(hashes, number))[: len(rows) // CELL_ROWS + 1]
        centres = rows[chosen].astype(np.float32)
        nearest = np.empty(len(rows), np.int64)
        for start in range(0, len(rows), BATCH):
            block = rows[start : start + BATCH].astype(np.float32)
            nearest[start : start + BATCH] = np.argmax(block @ centres.T, axis=1)
        order = np.argsort(nearest, kind="stable")
        yield from np.split(order, np.cumsum(np.bincount(nearest, minlength=len(chosen)))[:-1])


def _near_pairs(
    rows: Integers, cells: Iterable[Ints], least: float, total: int
) -> tuple[Ints, Ints]:
    """Return pairs of rows (k,) of one cell whose product is above `least`, the largest first.

    Of pairs beyond `MOST_PAIRS` the smaller products are left out. Ties are in the order of rows.
    """
    found: list[tuple[Ints, Products]] = [(np.empty(0, np.int64), np.empty(0, np.float32))]
    count = done = 0

    def gathered() -> tuple[Ints, Products]:
        pairs, products = map(np.concatenate, zip(*found, strict=True))
        pairs, places = np.unique(pairs, return_index=True)  # several cells may have a pair
        order = np.argsort(-products[places], kind="stable")
        return pairs[order], products[places][order]

    for cell in cells:
        values = rows[cell].astype(np.float32)
        step = max(1, BLOCK // max(1, len(cell)))
        for start in range(0, len(cell), step):
            block = values[start : start + step] @ values[start:].T
            first, second = np.nonzero(np.triu(block > least, 1))
            pairs = np.sort(cell[np.stack([start + first, start + second])], axis=0)
            found.append((pairs[0] * len(rows) + pairs[1], block[first, second]))
            count += len(first)
            if count > MOST_PAIRS:
                pairs, products = gathered()
                least = float(products[: MOST_PAIRS // 2].min())
                count = int((products > least).sum())
                found = [(pairs[:count], products[:count])]
            done += len(block)
            tick("comparing: images", done, total)
    keys = gathered()[0]
    return keys // len(rows), keys % len(rows)


def merge_pairs(n: int, first: Ints, second: Ints) -> Ints:
    """Merge `n` rows into groups, by pairs (k,) of near rows, the closest first.

    Two groups become one once at least half of the pairs between them have come. Returns a row of
    each row's group, (n,).
    """
    parents, sizes = list(range(n)), [1] * n
    shared: dict[int, dict[int, int]] = {}  # pairs between two groups so far

    def group(row: int) -> int:
        while (above := parents[row]) != row:
            parents[row] = row = parents[above]
        return row

    for left, right in zip(map(group, first.tolist()), second.tolist(), strict=True):
        right = group(right)
        if left == right:
            continue
        counts = shared.setdefault(left, {})
        counts[right] = counts.get(right, 0) + 1
        others = shared.setdefault(right, {})
        others[left] = counts[right]
        if 2 * counts[right] < sizes[left] * sizes[right]:
            continue
        if len(counts) < len(others):
            left, right, counts, others = right, left, others, counts
        parents[right] = left
        sizes[left] += sizes[right]
        del counts[right], others[left], shared[right]
        for other, count in others.items():
            del shared[other][right]
            counts[other] = shared[other][left] = counts.get(other, 0) + count
    return np.array([group(row) for row in range(n)], np.int64)


def hash_ids(images: FeatureTable) -> Hashes:
    """Hash the id of each image, (n,), alike on every machine."""
    return hash_names(images.column(schema.ID))


def hash_names(names: Any) -> Hashes:
    """Hash n names of Arrow, (n,), alike on every machine."""
    parts = [
        hashlib.blake2b(name.encode(), digest_size=8).digest()
        for start in range(0, len(names), BATCH)
        for name in names[start : start + BATCH].to_pylist()
    ]
    return np.frombuffer(b"".join(parts), "<u8").astype(np.uint64)


def mix(hashes: Hashes, number: int) -> Hashes:
    """Hash hashes again, differently for each number (splitmix64)."""
    step = (0x9E3779B97F4A7C15 * (number + 1)) % 2**64
    found = hashes + np.uint64(step)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ (found >> np.uint64(shift))) * np.uint64(factor)
    return found ^ (found >> np.uint64(31))
