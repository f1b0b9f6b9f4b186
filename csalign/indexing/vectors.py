"""The vectors of an index: corrected for hubs, then built, mapped and searched by FAISS."""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np

from csalign.core.arrays import Doubles, Floats, Ints
from csalign.core.errors import ConfigError, DataError, OutputError, SchemaError
from csalign.core.paths import stand_in
from csalign.indexing.manifest import REMEDY, Correction
from csalign.metrics.retrieval import SCALES, centred, penalty

MEANS = "query.npy"
EXACT_ROWS = 50_000  # an exact search of that many takes milliseconds
ROWS_PER_CELL = 64  # to train IVF on; FAISS warns below 39
MIN_SAMPLE = 16_384  # rows to train on, enough for codes of 8 bits
MAX_EF_SEARCH = 1_024
GROWTH = 1.5  # memory that FAISS needs while its lists grow, per byte of the index
TIED = 1e-6  # scores that differ by less are equal


def choose_factory(rows: int) -> str:
    """Choose the index for a number of rows: Flat up to `EXACT_ROWS`, then 4 sqrt(rows) cells."""
    return "Flat" if rows <= EXACT_ROWS else f"IVF{int(4 * math.sqrt(rows))},Flat"


class VectorIndex:
    """A FAISS index in memory or mapped from disk; scores are inner products."""

    def __init__(self, factory: str, index: Any) -> None:
        self.factory = factory
        self.effort: dict[str, int] = {}
        self.is_exact = isinstance(index, faiss.IndexFlat)
        self.width = int(index.d)
        self._index = index
        self._effort_name, self.max_effort = _effort_of(index)

    @classmethod
    def create(cls, factory: str, width: int) -> Self:
        """Create an empty index; ConfigError if FAISS has none of that name for inner products."""
        try:
            return cls(factory, faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT))
        except RuntimeError as error:
            raise ConfigError(
                f"--factory: FAISS cannot build {factory!r} for width {width} ({_reason(error)}); "
                "use Flat, IVF4096,Flat, HNSW32 or another string of its index factory"
            ) from None

    @classmethod
    def open(cls, path: Path, factory: str) -> Self:
        """Map an index that `save` wrote: vectors stay on disk. SchemaError if it is damaged."""
        flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY
        try:
            return cls(factory, faiss.read_index(str(path), flags))
        except RuntimeError as error:
            problem = stand_in(path) or f"cannot be read ({_reason(error)}); {REMEDY}"
            raise SchemaError(f"{path}: {problem}") from None

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def keeps_vectors(self) -> bool:
        """Whether the vectors are stored as they were added."""
        return re.fullmatch(r"(IVF\d+,)?R?Flat|HNSW\d*(,Flat)?", self.factory) is not None

    def set_effort(self, value: int) -> None:
        """Set nprobe or efSearch, at most the maximum; does nothing for other indexes."""
        if self._effort_name is not None:
            self.effort = {self._effort_name: (value := min(value, self.max_effort))}
            faiss.ParameterSpace().set_index_parameter(self._index, self._effort_name, value)

    def training_rows(self, rows: int) -> int:
        """Count the rows to train on, of so many; 0 if none are needed."""
        cells = self.max_effort if self._effort_name == "nprobe" else 0
        return 0 if self._index.is_trained else min(rows, max(ROWS_PER_CELL * cells, MIN_SAMPLE))

    def build_bytes(self, rows: int) -> int:
        """Estimate the memory in bytes that building with so many rows takes."""
        vector = 4 * self.width + 300  # of a graph, with its links
        with suppress(RuntimeError):  # FAISS does not say it of a graph
            vector = int(self._index.sa_code_size()) + 8
        return int(GROWTH * rows * vector) + 8 * self.width * self.training_rows(rows)

    def train(self, sample: Floats) -> None:
        """Train cells and codes on some of the rows, (s, d); DataError if they are too few."""
        try:
            self._index.train(np.ascontiguousarray(sample))
        except RuntimeError as error:
            raise DataError(
                f"{len(sample)} rows are too few to train {self.factory} ({_reason(error)}); use "
                "--factory Flat or fewer cells and codes"
            ) from None

    def add(self, rows: Floats) -> None:
        """Append rows, (n, d) float32."""
        self._index.add(np.ascontiguousarray(rows))

    def save(self, path: Path) -> None:
        """Write the index; OutputError if it cannot be written."""
        try:
            faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            raise OutputError(
                f"{path}: cannot be written ({_reason(error)}); free some space, or choose "
                "another --out"
            ) from None

    def search(self, queries: Floats, top: int) -> tuple[Floats, Ints]:
        """Find the best rows of each query (q, d), best first.

        Returns:
            Scores and rows, (q, k) each, with k the smaller of `top` and the number of rows; the
            row is -1 where fewer were found.
        """
        scores, rows = self._index.search(np.ascontiguousarray(queries), min(top, len(self)))
        if len(rows) and int(rows.max()) >= len(self):
            raise SchemaError(f"the index is damaged: it refers to rows beyond its end; {REMEDY}")
        return scores, rows

    def search_with_vectors(self, queries: Floats, top: int) -> tuple[Ints, Floats]:
        """Find the best rows of each query (q, d), (q, k), and their vectors, (q, k, d)."""
        queries = np.ascontiguousarray(queries, np.float32)
        try:
            _, rows, vectors = self._index.search_and_reconstruct(queries, min(top, len(self)))
        except RuntimeError as error:
            raise ConfigError(
                f"{self.factory}: cannot return its vectors ({_reason(error)}), which a query of "
                "several sides needs; build an index with --factory Flat or IVF4096,Flat"
            ) from None
        return rows, vectors

    def recall(self, queries: Floats, scores: Floats, rows: Ints) -> float:
        """Measure the share of the exact nearest rows that a search finds among as many.

        Where an index keeps whole vectors, a row that ties with the last of them counts too. The
        exact neighbours of the queries (q, d) are `rows` (q, k), with their descending `scores`.
        """
        own, found = self.search(queries, rows.shape[1])
        right = (found[:, :, None] == rows[:, None, :]).any(axis=2)
        if re.search(r"(^|,)R?Flat$|^HNSW\d*$", self.factory):
            right |= (found >= 0) & (own >= scores[:, -1:] - TIED)
        return float(right.mean())

    def tune(self, queries: Floats, scores: Floats, rows: Ints, *, target: float) -> float:
        """Double the effort until the `recall` reaches a target or the effort its maximum."""
        effort = 32 if self._effort_name == "efSearch" else 8
        self.set_effort(effort)
        while (recall := self.recall(queries, scores, rows)) < target and effort < self.max_effort:
            effort *= 2
            self.set_effort(effort)
        return recall


def exact_neighbours(queries: Floats, parts: Iterator[Floats], top: int) -> tuple[Floats, Ints]:
    """Return scores, descending, and rows, (q, top) each, of queries (q, d) among rows (n, d)."""
    heap, seen = faiss.ResultHeap(len(queries), top, keep_max=True), 0
    for part in parts:
        rows = np.ascontiguousarray(part)
        count = min(top, len(rows))
        scores, found = faiss.knn(queries, rows, count, metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, found + seen)
        seen += len(rows)
    heap.finalize()
    return heap.D, heap.I


@dataclass(frozen=True)
class HubCorrection:
    """Map unit rows to vectors whose inner products are corrected scores."""

    name: Correction | None  # None leaves the rows as they are
    means: Doubles | None = None  # (2, d), items' and other side, for "centre"
    references: Floats | None = None  # (r, d) of the other side, for the penalties of items

    def items(self, rows: Floats) -> Floats:
        """Map items to vectors, (n, d) or with a penalty (n, d + 1)."""
        if self.name is None or self.means is not None:
            return rows if self.means is None else centred(rows, self.means[0])
        assert self.references is not None
        return self._extended(rows, -penalty(rows, self.references, self.name))

    def queries(self, rows: Floats, *, of_items_side: bool) -> Floats:
        """Map queries to vectors; the query's own penalty is omitted, since it changes no rank."""
        if self.name is None or self.means is not None:
            return rows if self.means is None else centred(rows, self.means[int(not of_items_side)])
        return self._extended(rows, np.ones(len(rows), np.float32))

    def _extended(self, rows: Floats, column: Floats) -> Floats:
        return np.hstack([np.float32(np.sqrt(SCALES[str(self.name)])) * rows, column[:, None]])

    def save(self, folder: Path) -> None:
        """Write what queries need."""
        if self.means is not None:
            np.save(folder / MEANS, self.means, allow_pickle=False)


def load_correction(folder: Path, name: Correction | None) -> HubCorrection:
    """Load the correction of an index, for its queries; SchemaError if it is damaged."""
    path = folder / MEANS
    try:
        means = np.load(path, allow_pickle=False) if name == "centre" else None
        return HubCorrection(name, means)
    except (OSError, ValueError) as error:
        raise SchemaError(f"{path}: cannot be read ({error}); {REMEDY}") from None


def _effort_of(index: Any) -> tuple[str | None, int]:
    """Name and maximum of the parameter that trades speed for recall, if there is one."""
    for name in ("nprobe", "efSearch"):
        with suppress(RuntimeError):  # the index does not have that parameter
            faiss.ParameterSpace().set_index_parameter(index, name, 1)
            is_ivf = name == "nprobe"
            return name, int(faiss.extract_index_ivf(index).nlist) if is_ivf else MAX_EF_SEARCH
    return None, 0


def _reason(error: RuntimeError) -> str:
    """Extract the reason from an error of FAISS, which begins with its place in the source."""
    line = str(error).splitlines()[-1].rpartition("Error: ")[2]
    return re.sub(r"^Error in .*? at \S+:\d+: |^'.*?' failed: ", "", line)
