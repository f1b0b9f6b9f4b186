"""The vectors of an index: faiss builds, writes, maps and searches them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt

from csalign.core.errors import OutputError, SchemaError
from csalign.search.plan import CHUNK_ROWS, LINKS, SUBVECTOR, IndexKind, Plan

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

VECTORS = "vectors.faiss"
RESCORED = "vectors.npy"
CANDIDATES = 100  # of pq that are scored again, at least
TIED = 1e-6  # scores that differ by less
BUILDING = 80  # neighbours that HNSW looks at for a new item's links


@dataclass(frozen=True)
class Effort:
    """How far a search goes; what a kind does not know is None.

    Attributes:
        probes: cells that ivf and pq look into.
        beam: neighbours that hnsw keeps in sight.
        candidates: items of pq that are scored again.
    """

    probes: int | None = None
    beam: int | None = None
    candidates: int | None = None

    def to_json(self) -> dict[str, int]:
        """What is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class VectorIndex:
    """An index in memory or mapped from disk; scores are inner products.

    Args:
        kind: of the index.
        index: faiss's own.
        stored: (n, d) float16 that pq scores again by, or None.
        effort: how far a search goes.
    """

    def __init__(
        self, kind: IndexKind, index: Any, stored: npt.NDArray[Any] | None, effort: Effort
    ) -> None:
        self.kind = kind
        self._index = index
        self._stored = stored
        self._filled = 0 if stored is None else index.ntotal
        self.effort = effort

    @classmethod
    def empty(cls, plan: Plan, folder: Path) -> Self:
        """An index without rows, to be trained if its plan says so, and filled.

        Args:
            plan: what to build.
            folder: where what goes to disk at once is written.
        """
        ip, width = faiss.METRIC_INNER_PRODUCT, plan.width
        stored = None
        index: Any
        if plan.kind == "exact":
            index = faiss.IndexFlatIP(width)
        elif plan.kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, LINKS, ip)
            index.hnsw.efConstruction = BUILDING
        elif plan.kind == "ivf":
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, plan.cells, ip)
        else:
            padded = plan.codes * SUBVECTOR
            centroids = faiss.IndexFlatIP(padded)
            index = faiss.IndexIVFPQ(centroids, padded, plan.cells, plan.codes, plan.bits, ip)
            stored = _grown(folder / RESCORED, None, plan.rows, width)
        own = cls(plan.kind, index, stored, Effort())
        own._filled = 0
        own.effort = own.ladder()[0]
        return own

    @classmethod
    def open(cls, folder: Path, kind: IndexKind, effort: Effort, *, mapped: bool = True) -> Self:
        """Open what `save` wrote.

        Args:
            folder: of the index.
            kind: of the index.
            effort: how far a search goes.
            mapped: leave the vectors on disk and read what a search needs; else into memory.

        Raises:
            SchemaError: it cannot be read.
        """
        flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY if mapped else 0
        path = folder / VECTORS
        try:
            index = faiss.read_index(str(path), flags)
            stored = None
            if kind == "pq":
                path = folder / RESCORED
                stored = np.load(path, mmap_mode="r", allow_pickle=False)
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
            raise SchemaError(f"{path}: cannot be read ({reason}); build the index again") from None
        return cls(kind, index, stored, effort)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def width(self) -> int:
        """Width of a vector."""
        return int(self._index.d if self._stored is None else self._stored.shape[1])

    def train(self, sample: Floats) -> None:
        """Make cells and codes from some of the rows, (s, d)."""
        self._index.train(self._fitted(sample))

    def add(self, rows: Floats) -> None:
        """Append rows, (n, d) float32."""
        self._index.add(self._fitted(rows))
        if self._stored is not None:
            self._stored[self._filled : self._filled + len(rows)] = rows
            self._filled += len(rows)

    def make_room(self, folder: Path, rows: int) -> None:
        """Before so many rows are added to an index that was opened: what of them goes to disk."""
        if self._stored is not None:
            self._stored = _grown(
                folder / RESCORED, self._stored, len(self) + rows, self._stored.shape[1]
            )

    def save(self, folder: Path) -> None:
        """Write it into a folder.

        Raises:
            OutputError: it cannot be written.
        """
        path = folder / VECTORS
        try:
            faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise OutputError(f"{path}: cannot be written ({reason})") from None
        if isinstance(self._stored, np.memmap):
            self._stored.flush()

    def search(self, queries: Floats, top: int) -> tuple[Floats, Ints]:
        """The best rows of each query, best first.

        Args:
            queries: (q, d) float32.
            top: how many.

        Returns:
            Scores and rows, (q, k) each, k being `top` or all there are; where fewer were found
            the row is -1.

        Raises:
            SchemaError: the index names rows that it does not have.
        """
        top = min(top, len(self))
        self._set_effort(top)
        wanted = top if self._stored is None else min(max(top, self._candidates(top)), len(self))
        scores, rows = self._index.search(self._fitted(queries), wanted)
        if len(rows) and int(rows.max()) >= len(self):
            raise SchemaError("the index is damaged: it names rows that it does not have")
        if self._stored is not None:
            return self._scored_again(queries, rows, top)
        return scores, rows

    def ladder(self) -> list[Effort]:
        """How far a search may go, from least to most."""
        if self.kind == "exact":
            return [Effort()]
        if self.kind == "hnsw":
            return [Effort(beam=2**power) for power in range(5, 11)]
        cells = int(self._index.nlist)
        doubled = [2**power for power in range(int(math.log2(cells)) + 1)] + [cells]
        start = [probes for probes in doubled if probes >= min(cells, 8)]
        steps = [Effort(probes=probes) for probes in dict.fromkeys(start)]
        if self.kind == "ivf":
            return steps
        few = [replace(step, candidates=CANDIDATES) for step in steps]
        more = [replace(steps[-1], candidates=factor * CANDIDATES) for factor in (4, 16)]
        return few + more

    def rows(self) -> Iterator[Floats]:
        """All vectors in order, some at a time; those of pq as float16 keeps them."""
        if self._stored is None and self.kind == "ivf":
            self._index.make_direct_map()
        for start in range(0, len(self), CHUNK_ROWS):
            count = min(CHUNK_ROWS, len(self) - start)
            if self._stored is None:
                yield self._index.reconstruct_n(start, count)
            else:
                yield self._stored[start : start + count].astype(np.float32)

    def _candidates(self, top: int) -> int:
        return max(self.effort.candidates or 0, 10 * top if top > 10 else 0)

    def _set_effort(self, top: int) -> None:
        if self.effort.probes is not None:
            self._index.nprobe = self.effort.probes
        if self.effort.beam is not None:
            self._index.hnsw.efSearch = max(self.effort.beam, top)

    def _fitted(self, rows: Floats) -> Floats:
        """As faiss takes them: contiguous and, for pq, padded to whole codes with zeros."""
        rows = np.ascontiguousarray(rows, np.float32)
        missing = int(self._index.d) - rows.shape[1]
        return np.pad(rows, ((0, 0), (0, missing))) if missing else rows

    def _scored_again(self, queries: Floats, rows: Ints, top: int) -> tuple[Floats, Ints]:
        assert self._stored is not None
        scores = np.full((len(queries), top), -np.inf, np.float32)
        best = np.full((len(queries), top), -1, np.int64)
        for query, found in enumerate(rows):
            there = np.sort(found[found >= 0])  # in the order of the file
            own = self._stored[there].astype(np.float32) @ queries[query]
            order = np.argsort(-own, kind="stable")[:top]
            scores[query, : len(order)], best[query, : len(order)] = own[order], there[order]
        return scores, best


class Nearest:
    """The exact nearest rows of some queries, kept while the rows go by.

    Args:
        queries: (q, d) float32.
        top: how many to keep.
    """

    def __init__(self, queries: Floats, top: int) -> None:
        self.queries = np.ascontiguousarray(queries)
        self._top = top
        self.scores = np.full((len(queries), 0), -np.inf, np.float32)
        self.rows: Ints = np.empty((len(queries), 0), np.int64)
        self._seen = 0

    def see(self, rows: Floats) -> None:
        """Take in the next rows, (n, d)."""
        scores, found = faiss.knn(
            self.queries,
            np.ascontiguousarray(rows),
            min(self._top, len(rows)),
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        self.scores = np.concatenate([self.scores, scores], axis=1)
        self.rows = np.concatenate([self.rows, found + self._seen], axis=1)
        order = np.argsort(-self.scores, axis=1, kind="stable")[:, : self._top]
        self.scores = np.take_along_axis(self.scores, order, axis=1)
        self.rows = np.take_along_axis(self.rows, order, axis=1)
        self._seen += len(rows)


def recall(index: VectorIndex, nearest: Nearest, queries: slice) -> float:
    """Share of the truly nearest rows that the index lists among as many, over some queries.

    A row that is as near as the last of them is as good, which is known where scores are exact.
    """
    truth = nearest.rows[queries]
    scores, found = index.search(nearest.queries[queries], truth.shape[1])
    right = (found[:, :, None] == truth[:, None, :]).any(axis=2)
    if index.kind != "pq":
        right |= (found >= 0) & (scores >= nearest.scores[queries][:, -1:] - TIED)
    return float(right.mean())


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let faiss use so many threads; None leaves them as they are."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _grown(path: Path, old: npt.NDArray[Any] | None, rows: int, width: int) -> np.memmap[Any, Any]:
    """A float16 file of so many rows, which begins with the old ones."""
    new: np.memmap[Any, Any] = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float16, shape=(rows, width)
    )
    for start in range(0, 0 if old is None else len(old), CHUNK_ROWS):
        assert old is not None
        part = old[start : start + CHUNK_ROWS]
        new[start : start + len(part)] = part
    return new
