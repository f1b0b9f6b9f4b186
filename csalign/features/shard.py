"""Write one file of one side of a feature set, row group by row group."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.features import schema
from csalign.features.manifest import EncoderInfo, Shard

# Small enough to shuffle by and to hold one in memory, large enough to read at full speed.
ROW_GROUP_ROWS = 8_192
ROW_GROUP_BYTES = 32 << 20

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Some rows of one side.

    Attributes:
        columns: the string columns of `schema.STRING_COLUMNS` by name, each with n values; a
            column that is left out is null.
        embeddings: (n, d), any float dtype, finite, no row of norm 0.
        tokens: n arrays (t_i, d_t), any float dtype, or None where none are stored.
    """

    columns: Mapping[str, Sequence[str | None]]
    embeddings: Array
    tokens: Sequence[Array] | None = None


class ShardWriter:
    """Writes one file of one side; `close` completes it.

    Args:
        folder: the feature set, local or in an object store.
        name: of the file, without its suffix: ``part-00000``.
        modality: whose rows.
        info: what made them.
        dtype: "float16" or "float32".

    Attributes:
        rows: written so far.
        bytes: of these rows in memory, about what they will take on disk.
    """

    def __init__(
        self, folder: Path, name: str, modality: Modality, info: EncoderInfo, dtype: str
    ) -> None:
        self.modality = modality
        self.rows = self.bytes = 0
        self._info = info
        self._dtype = dtype
        self._folder = folder
        self._path = f"{modality.plural}/{name}.parquet"
        self._schema = schema.table_schema(modality, dtype, info.width, info.token_width)
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._arrival = ExitStack()
        self._temporary: Path | None = None
        self._file: pq.ParquetWriter | None = None

    @property
    def _final(self) -> Path:
        return self._folder.joinpath(*self._path.split("/"))

    def write(self, rows: Rows) -> None:
        """Append rows.

        Raises:
            DataError: an embedding or token is not finite (as given, or after the cast to the
                stored dtype), or an embedding has norm 0.
            ShapeError: the arrays do not fit the columns or the encoder's width.
        """
        ids = rows.columns[schema.ID]
        embeddings = self._embeddings(rows, ids)
        arrays: list[pa.Array] = [
            pa.array(rows.columns.get(name, [None] * len(ids)), pa.string())
            for name in schema.STRING_COLUMNS[self.modality]
        ]
        arrays.append(_fixed_lists(embeddings, self._schema.field(schema.EMBEDDING).type))
        if self._info.token_width is not None:
            arrays.append(self._tokens(rows, ids))
        self._append(pa.record_batch(arrays, schema=self._schema))

    def close(self) -> Shard | None:
        """Let the file appear under its name; None, and no file, if nothing was written."""
        self._flush()
        if self._file is None or self._temporary is None:
            return None
        with atomic.translate_os_errors(self._final):
            self._file.close()
        shard = Shard(
            path=self._path,
            rows=self.rows,
            bytes=self._temporary.stat().st_size,
            sha256=atomic.sha256_file(self._temporary),
        )
        with atomic.translate_os_errors(self._final):
            self._arrival.close()
        return shard

    def abort(self, error: BaseException) -> None:
        """Remove what was written, since the block around failed with `error`."""
        try:
            if self._file is not None:
                self._file.close()
        except (pa.ArrowException, OSError):
            pass  # of a file that is thrown away
        finally:
            self._arrival.__exit__(type(error), error, error.__traceback__)

    def _embeddings(self, rows: Rows, ids: Sequence[str | None]) -> Array:
        expected = (len(ids), self._info.width)
        if rows.embeddings.shape != expected:
            raise ShapeError(
                f"{self.modality} embeddings have shape {rows.embeddings.shape}, "
                f"expected {expected}"
            )
        bad = first_unusable(rows.embeddings, self._dtype)
        if bad is not None:
            raise DataError(
                f"{self.modality} {ids[bad[0]]!r}: {bad[1]}; leave the row out or encode it again"
            )
        return _cast(rows.embeddings, self._dtype)

    def _tokens(self, rows: Rows, ids: Sequence[str | None]) -> pa.Array:
        if rows.tokens is None or len(rows.tokens) != len(ids):
            raise ShapeError(f"{self.modality}: {len(ids)} embeddings need as many token arrays")
        lengths = [len(tokens) for tokens in rows.tokens]
        values = _cast(np.concatenate(rows.tokens), self._dtype)
        if values.shape[1:] != (self._info.token_width,) or not np.isfinite(values).all():
            raise DataError(
                f"{self.modality} tokens of {ids[0]!r} to {ids[-1]!r}: shape {values.shape}, "
                f"expected width {self._info.token_width} and finite values; use --dtype float32 "
                "if they overflow"
            )
        kind = self._schema.field(schema.TOKENS).type
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, _fixed_lists(values, kind.value_type), type=kind)

    def _append(self, batch: pa.RecordBatch) -> None:
        row_bytes = max(1, batch.nbytes // max(1, batch.num_rows))
        limit = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes))
        while batch.num_rows:
            if self._pending_rows >= limit:
                self._flush()  # wider rows than before may have lowered the limit
            head = batch.slice(0, limit - self._pending_rows)
            batch = batch.slice(head.num_rows)
            self._pending.append(head)
            self._pending_rows += head.num_rows
        if self._pending_rows >= limit:
            self._flush()

    def _flush(self) -> None:
        if not self._pending_rows:
            return
        table = pa.Table.from_batches(self._pending, self._schema)
        self._pending, self._pending_rows = [], 0
        with atomic.translate_os_errors(self._final):
            if self._file is None:
                self._file = self._open()
            self._file.write_table(table, row_group_size=table.num_rows)
        self.rows += table.num_rows
        self.bytes += table.nbytes

    def _open(self) -> pq.ParquetWriter:
        self._temporary = self._arrival.enter_context(atomic.atomic_path(self._final))
        strings = [*schema.STRING_COLUMNS[self.modality]]
        return pq.ParquetWriter(
            self._temporary,
            self._schema,
            # Vectors hardly shrink and decode several times slower when compressed.
            compression=dict.fromkeys(strings, "zstd"),
            use_dictionary=[name for name in strings if name in (schema.SPLIT, schema.SOURCE)],
            write_statistics=strings,
            # Lets a reader of some columns notice damage without hashing the whole file.
            write_page_checksum=True,
        )


def _fixed_lists(values: Array, kind: pa.DataType) -> pa.Array:
    flat = pa.array(values.reshape(-1), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _cast(values: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):  # an overflow is reported with its row
        return np.ascontiguousarray(values, dtype=schema.DTYPES[dtype])


def first_unusable(embeddings: Array, dtype: str) -> tuple[int, str] | None:
    """The first row that cannot be stored, and why; None where all can.

    Args:
        embeddings: (n, d), any float dtype.
        dtype: "float16" or "float32", as it would be stored.
    """
    stored = _cast(embeddings, dtype)
    finite = np.asarray(np.isfinite(stored).all(axis=1))
    usable = np.asarray(finite & stored.any(axis=1))
    largest = np.abs(stored).max(axis=1, initial=0).astype(np.float64)
    usable &= (largest > schema.LEAST_NORM) & (largest < schema.MOST_VALUE)
    if usable.all():
        return None
    row = int(np.flatnonzero(~usable)[0])
    if finite[row] and largest[row]:
        return row, f"has {largest[row]:.3g} for its largest value ({schema.RESCALE})"
    reason = "has norm 0" if finite[row] else "holds NaN or infinity"
    if np.isfinite(embeddings[row]).all() and embeddings[row].any():
        remedy = "use --dtype float32" if dtype == "float16" else "scale it down"
        reason += f" once stored as {dtype} ({remedy})"
    return row, reason
