"""Which kind of index suits how many vectors, and what it will take in memory and on disk."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from csalign.core.errors import ConfigError, DataError

IndexKind = Literal["exact", "ivf", "hnsw", "pq"]
KINDS: tuple[IndexKind, ...] = get_args(IndexKind)

EXACT_ROWS = 50_000  # up to here a search through all of them takes some milliseconds
CHUNK_ROWS = 8_192  # that are embedded and added at a time
LINKS = 32  # of an item, in HNSW
ROWS_A_CELL = 39  # to train on; faiss warns of poor cells where there are fewer
SUBVECTOR = 4  # dimensions that share a code of PQ
GROWTH = 1.5  # how much faiss takes at most while its lists grow


@dataclass(frozen=True)
class Plan:
    """An index to be built.

    Attributes:
        kind: exact, all vectors one by one; ivf, cells around centroids, of which some are
            searched; hnsw, a graph; pq, cells of codes, whose best are scored again by float16
            vectors on disk.
        rows: how many vectors.
        width: of a vector.
        cells: of ivf and pq, else 0.
        bits: of a code of pq, else 0.
        training_rows: vectors that cells and codes are made from.
    """

    kind: IndexKind
    rows: int
    width: int
    cells: int
    bits: int
    training_rows: int

    @property
    def codes(self) -> int:
        """Codes that a vector becomes in pq."""
        return -(-self.width // SUBVECTOR)

    @property
    def index_bytes(self) -> int:
        """Size of the index proper, which is also that of its file."""
        vector = 4 * self.width
        row = {
            "exact": vector,
            "ivf": vector + 8,
            "hnsw": vector + 4 * (2 * LINKS + 2) + 16,
            "pq": self.codes * self.bits // 8 + 8,
        }[self.kind]
        books = self.cells * vector + (2**self.bits * vector if self.bits else 0)
        return self.rows * row + books

    @property
    def memory_bytes(self) -> int:
        """What building it takes beside the process itself and the adapter."""
        sample = 2 * 4 * self.width * self.training_rows
        chunks = 6 * 4 * self.width * CHUNK_ROWS
        return int(max(sample, GROWTH * self.index_bytes)) + chunks

    @property
    def disk_bytes(self) -> int:
        """What its vectors take on disk."""
        return self.index_bytes + (2 * self.width * self.rows if self.kind == "pq" else 0)


def plan_index(kind: Literal["auto"] | IndexKind, rows: int, width: int, memory: int) -> Plan:
    """Choose an index, or take the kind that is asked for.

    By itself: exact for up to `EXACT_ROWS` rows, ivf above, and pq where that would not fit.

    Args:
        kind: what was asked for.
        rows: how many vectors.
        width: of a vector.
        memory: bytes that building may take.

    Raises:
        ConfigError: it would take more.
        DataError: there are too few rows for that kind.
    """
    if not rows:
        raise DataError("there are no rows to index")
    if kind == "auto":
        kind = "exact" if rows <= EXACT_ROWS else "ivf"
        if _plan(kind, rows, width).memory_bytes > memory:
            kind = "pq" if _code_bits(rows) else kind
    plan = _plan(kind, rows, width)
    if plan.kind == "pq" and not plan.bits:
        raise DataError(f"{rows} rows are too few for pq; use --kind exact")
    if plan.memory_bytes > memory:
        smaller = "" if plan.kind == "pq" else ", or use --kind pq"
        raise ConfigError(
            f"{plan.kind}: {rows:,} x {width} need {readable(plan.memory_bytes)} of memory, "
            f"{readable(memory)} may be taken; allow more with --memory{smaller}"
        )
    return plan


def _plan(kind: IndexKind, rows: int, width: int) -> Plan:
    cells = 0
    bits = _code_bits(rows) if kind == "pq" else 0
    if kind in ("ivf", "pq"):
        cells = max(1, min(int(4 * math.sqrt(rows)), rows // ROWS_A_CELL))
    wanted = ROWS_A_CELL * max(cells, 2**bits if bits else 0)
    return Plan(kind, rows, width, cells, bits, min(rows, wanted) if cells else 0)


def _code_bits(rows: int) -> int:
    """Bits of a code that so many rows can train: 8, 4 or, for too few, 0."""
    return next((bits for bits in (8, 4) if rows >= ROWS_A_CELL * 2**bits), 0)


def readable(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
