"""What is told of the items of an index: an Arrow file that is mapped, never read whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from csalign.core.errors import SchemaError

ITEMS = "items.arrow"
COLUMNS = ("id", "image_id", "caption", "source")
SCHEMA = pa.schema([pa.field(name, pa.string()) for name in COLUMNS])

Ints = npt.NDArray[np.int64]


class ItemWriter:
    """Writes items in the order of the vectors; a context manager.

    Args:
        folder: of the index.
    """

    def __init__(self, folder: Path) -> None:
        self._sink = pa.OSFile(str(folder / ITEMS), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def write(self, columns: Mapping[str, Sequence[str | None] | pa.Array]) -> None:
        """Append items: every column of `COLUMNS`, of one length."""
        arrays = [
            column.cast(pa.string()) if isinstance(column, pa.Array) else pa.array(column, "string")
            for column in (columns[name] for name in COLUMNS)
        ]
        self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))

    def copy(self, items: "Items") -> None:
        """Append those of another file."""
        for batch in items.batches():
            self._writer.write_batch(batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._writer.close()
        self._sink.close()


class Items:
    """The items of an index, mapped from disk.

    Args:
        folder: of the index.
        rows: how many there have to be.

    Raises:
        SchemaError: the file cannot be read, or holds something else.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._path = folder / ITEMS
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(self._path)))
            counts = [
                self._file.get_batch(i).num_rows for i in range(self._file.num_record_batches)
            ]
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self._damaged(reason) from None
        self._starts = np.cumsum([0, *counts])
        if self._file.schema != SCHEMA or self._starts[-1] != rows:
            raise self._damaged(f"it should hold {rows} items")

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The items of some rows, in that order: a value or None for each of `COLUMNS`.

        Raises:
            SchemaError: the file is damaged.
        """
        found = []
        for row in rows:
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            place = row - int(self._starts[number])
            try:
                one = self._file.get_batch(number).slice(place, 1).to_pylist()[0]
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise self._damaged(str(error)) from None
            found.append(one)
        return found

    def batches(self) -> list[pa.RecordBatch]:
        """All of them, still on disk."""
        return [self._file.get_batch(i) for i in range(self._file.num_record_batches)]

    def ids(self) -> set[str]:
        """All ids."""
        return {name for batch in self.batches() for name in batch.column("id").to_pylist()}

    def _damaged(self, reason: str) -> SchemaError:
        return SchemaError(f"{self._path}: is damaged ({reason}); build the index again")
