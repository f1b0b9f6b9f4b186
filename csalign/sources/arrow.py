"""An open Parquet or Arrow file, read in batches from any row on."""

import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csalign.core.errors import DataError
from csalign.core.paths import is_remote
from csalign.sources.records.files import local_file, translate_errors


class DamagedError(DataError):
    """A file that was read and is none."""


class Shelf(NamedTuple):
    """An open file: its schema, its rows, and its batches from one row on.

    `stop` tells where the piece that a row is in ends, behind which damage does not reach.
    """

    schema: pa.Schema
    rows: int
    stop: Callable[[int], int]
    batches: Callable[[int, list[str], int], Iterator[tuple[int, pa.RecordBatch]]]


@contextmanager
def opened(path: Path) -> Iterator[Shelf]:
    """Open a file by its suffix.

    Raises:
        DamagedError: it is not what its suffix says.
        DataError: it cannot be opened.
    """
    with ExitStack() as stack:
        with translate_errors(path):
            try:
                if path.suffix.lower() == ".arrow":
                    shelf = _arrow_shelf(stack.enter_context(local_file(path)))
                else:
                    file = stack.enter_context(path.open("rb")) if is_remote(path) else path
                    shelf = _parquet_shelf(stack, file)
            except pa.ArrowException as error:
                reason = f"{path}: cannot be read ({_line(error)}); write or download it again"
                raise DamagedError(reason) from None
        yield shelf


def _parquet_shelf(stack: ExitStack, file: Any) -> Shelf:
    # Buffered, so that a large row group is read piece by piece rather than whole.
    parquet = stack.enter_context(pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False))
    groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])

    def batches(start: int, names: list[str], size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        group = int(np.searchsorted(starts, start, side="right")) - 1
        row = int(starts[group])
        rest = list(range(group, len(groups)))
        for batch in parquet.iter_batches(size, row_groups=rest, columns=names, use_threads=False):
            if row + len(batch) > start:
                yield row, batch
            row += len(batch)

    def stop(row: int) -> int:
        group = int(np.searchsorted(starts, row, side="right"))
        return int(starts[min(group, len(groups))])  # a file may say more rows than its groups hold

    return Shelf(parquet.schema_arrow, parquet.metadata.num_rows, stop, batches)


def _arrow_shelf(file: Any) -> Shelf:
    # Mapped, so that nothing is in memory before it is needed.
    content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        table = pa.ipc.open_stream(content).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_file(content).read_all()

    def batches(start: int, names: list[str], size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        row = start
        for batch in table.select(names).slice(start).to_batches(max_chunksize=size):
            yield row, batch
            row += len(batch)

    return Shelf(table.schema, len(table), lambda _: len(table), batches)


def guarded(
    path: Path, batches: Iterator[tuple[int, pa.RecordBatch]]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of a file; damage met on the way is told as a `DamagedError`."""
    with translate_errors(path):
        try:
            yield from batches
        except (pa.ArrowException, OSError) as error:
            reason = f"{path}: is damaged ({_line(error)}); write it again"
            raise DamagedError(reason) from None


class Broken(str):
    """Why a value cannot be had; stands where it would."""

    __slots__ = ()


def column_values(column: pa.Array) -> list[Any]:
    """A column's values; a `Broken` stands for text that is not UTF-8."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Broken("holds text that is not UTF-8")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
