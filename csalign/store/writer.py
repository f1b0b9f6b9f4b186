"""Write a feature set: row groups into shards, a checksum each, the manifest last."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from csalign import __version__, files
from csalign.enums import Modality
from csalign.errors import DataError, ShapeError
from csalign.store import schema
from csalign.store.manifest import (
    FAILURES,
    Counts,
    EncoderInfo,
    Encoders,
    Manifest,
    Shard,
    Shards,
    write_manifest,
)

# Small enough to shuffle by and to hold one in memory, large enough to read at full speed.
ROW_GROUP_ROWS = 8_192
ROW_GROUP_BYTES = 32 << 20
SHARD_BYTES = 512 << 20

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


class FeatureWriter:
    """Writes both sides of a feature set into a folder; use as a context manager.

    Leaving the block without an exception completes the set with its manifest.

    Args:
        folder: an empty folder, as `files.staged_folder` gives.
        encoders: what made each side.
        dtype: "float16" or "float32".
    """

    def __init__(self, folder: Path, encoders: Mapping[Modality, EncoderInfo], dtype: str) -> None:
        self._folder = folder
        self._encoders = dict(encoders)
        self._dtype = dtype
        self._failures = 0
        (folder / FAILURES).touch()
        self._sides = {
            side: _SideWriter(folder, side, info, dtype) for side, info in encoders.items()
        }

    def write(self, modality: Modality, rows: Rows) -> None:
        """Append rows to one side.

        Raises:
            DataError: an id is missing or was written before; an embedding or token is not finite
                (as given, or after the cast to the stored dtype), or an embedding has norm 0.
            ShapeError: the arrays do not fit the columns or the encoder's width.
        """
        self._sides[modality].write(rows)

    def fail(self, source: str, row: int | None, reason: str) -> None:
        """List an input that was left out, in ``failures.jsonl``.

        Args:
            source: file that it came from.
            row: 1-based line of it, None if the file as a whole.
            reason: why, in a few words.
        """
        self._failures += 1
        line = json.dumps({"source": source, "row": row, "reason": reason}, ensure_ascii=False)
        with (self._folder / FAILURES).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def failures(self) -> int:
        """Inputs that were listed as left out so far."""
        return self._failures

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for side in self._sides.values():
            side.close(complete=kind is None)
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        images, texts = self._sides[Modality.IMAGE], self._sides[Modality.TEXT]
        dangling = texts.image_ids.keys() - images.ids
        if dangling:
            image = min(dangling)
            raise DataError(
                f"text {texts.image_ids[image]!r} belongs to image {image!r}, which is not there "
                f"({len(dangling)} such images in all); add the image or leave image_id empty"
            )
        manifest = Manifest(
            csalign_version=__version__,
            dtype=self._dtype,
            encoders=Encoders(
                image=self._encoders[Modality.IMAGE], text=self._encoders[Modality.TEXT]
            ),
            counts=Counts(
                images=len(images.ids),
                texts=len(texts.ids),
                pairs=texts.paired,
                failures=self._failures,
            ),
            shards=Shards(images=images.shards, texts=texts.shards),
        )
        write_manifest(self._folder, manifest)


@dataclass
class _SideWriter:
    folder: Path
    modality: Modality
    info: EncoderInfo
    dtype: str
    ids: set[str] = field(default_factory=set)
    image_ids: dict[str, str] = field(default_factory=dict)  # image -> one text of it
    paired: int = 0
    shards: list[Shard] = field(default_factory=list)
    _pending: list[pa.RecordBatch] = field(default_factory=list)
    _pending_rows: int = 0
    _shard_rows: int = 0
    _shard_bytes: int = 0
    _file: pq.ParquetWriter | None = None
    _path: str = ""

    def __post_init__(self) -> None:
        self.schema = schema.table_schema(
            self.modality, self.dtype, self.info.width, self.info.token_width
        )

    def write(self, rows: Rows) -> None:
        ids = self._new_ids(rows)
        embeddings = self._embeddings(rows, ids)
        arrays: list[pa.Array] = [
            pa.array(rows.columns.get(name, [None] * len(ids)), pa.string())
            for name in schema.STRING_COLUMNS[self.modality]
        ]
        arrays.append(_fixed_lists(embeddings, self.schema.field(schema.EMBEDDING).type))
        if self.info.token_width is not None:
            arrays.append(self._tokens(rows, ids))
        self._append(pa.record_batch(arrays, schema=self.schema))
        for text_id, image_id in zip(ids, rows.columns.get(schema.IMAGE_ID, ()), strict=False):
            if image_id is not None:
                self.paired += 1
                self.image_ids.setdefault(image_id, text_id)

    def _new_ids(self, rows: Rows) -> list[str]:
        ids: list[str] = []
        for position, value in enumerate(rows.columns[schema.ID]):
            if not value:
                raise DataError(f"{self.modality} {position}: has no id")
            if value in self.ids:
                raise DataError(f"{self.modality} id {value!r} appears twice; ids must be unique")
            self.ids.add(value)
            ids.append(value)
        return ids

    def _embeddings(self, rows: Rows, ids: list[str]) -> Array:
        expected = (len(ids), self.info.width)
        if rows.embeddings.shape != expected:
            raise ShapeError(
                f"{self.modality} embeddings have shape {rows.embeddings.shape}, "
                f"expected {expected}"
            )
        bad = first_unusable(rows.embeddings, self.dtype)
        if bad is not None:
            raise DataError(
                f"{self.modality} {ids[bad[0]]!r}: {bad[1]}; leave the row out or encode it again"
            )
        return _cast(rows.embeddings, self.dtype)

    def _tokens(self, rows: Rows, ids: list[str]) -> pa.Array:
        if rows.tokens is None or len(rows.tokens) != len(ids):
            raise ShapeError(f"{self.modality}: {len(ids)} embeddings need as many token arrays")
        lengths = [len(tokens) for tokens in rows.tokens]
        values = _cast(np.concatenate(rows.tokens), self.dtype)
        if values.shape[1:] != (self.info.token_width,) or not np.isfinite(values).all():
            raise DataError(
                f"{self.modality} tokens of {ids[0]!r} to {ids[-1]!r}: shape {values.shape}, "
                f"expected width {self.info.token_width} and finite values; use --dtype float32 "
                "if they overflow"
            )
        kind = self.schema.field(schema.TOKENS).type
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
        table = pa.Table.from_batches(self._pending, self.schema)
        self._pending, self._pending_rows = [], 0
        if self._file is None:
            self._open()
        assert self._file is not None
        self._file.write_table(table, row_group_size=table.num_rows)
        self._shard_rows += table.num_rows
        self._shard_bytes += table.nbytes
        if self._shard_bytes >= SHARD_BYTES:
            self._close_shard()

    def _open(self) -> None:
        side = self.folder / self.modality.plural
        side.mkdir(exist_ok=True)
        self._path = f"{self.modality.plural}/part-{len(self.shards):05d}.parquet"
        strings = [*schema.STRING_COLUMNS[self.modality]]
        self._file = pq.ParquetWriter(
            self.folder / f"{self._path}.tmp",
            self.schema,
            # Vectors hardly shrink and decode several times slower when compressed.
            compression=dict.fromkeys(strings, "zstd"),
            use_dictionary=[name for name in strings if name in (schema.SPLIT, schema.SOURCE)],
            write_statistics=strings,
            # Lets a reader of some columns notice damage without hashing the whole file.
            write_page_checksum=True,
        )

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        temporary = self.folder / f"{self._path}.tmp"
        files.fsync_path(temporary)
        self.shards.append(
            Shard(
                path=self._path,
                rows=self._shard_rows,
                bytes=temporary.stat().st_size,
                sha256=files.sha256_file(temporary),
            )
        )
        temporary.rename(self.folder / self._path)
        self._shard_rows = self._shard_bytes = 0

    def close(self, *, complete: bool) -> None:
        if complete:
            self._flush()
            self._close_shard()
        elif self._file is not None:
            self._file.close()


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
    if usable.all():
        return None
    row = int(np.flatnonzero(~usable)[0])
    reason = "has norm 0" if finite[row] else "holds NaN or infinity"
    if np.isfinite(embeddings[row]).all() and embeddings[row].any():
        remedy = "use --dtype float32" if dtype == "float16" else "scale it down"
        reason += f" once stored as {dtype} ({remedy})"
    return row, reason
