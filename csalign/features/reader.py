"""Read a feature set: whole embeddings as one array, or any columns in a stream."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import DataError, SchemaError
from csalign.core.paths import is_remote
from csalign.features import schema
from csalign.features.manifest import EncoderInfo, Manifest, Shard, read_manifest

Array = npt.NDArray[Any]
Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class RowGroup:
    """Rows of a table that are read at once.

    Attributes:
        shard: the file that they are in.
        index: which of its row groups.
        rows: how many.
        bytes: of the column asked for, before compression, its nesting included: about what it
            takes in memory, and a little more.
    """

    shard: Shard
    index: int
    rows: int
    bytes: int


@dataclass(frozen=True)
class FeatureTable:
    """One side of a feature set on disk; reads nothing until asked.

    Attributes:
        folder: the feature set.
        modality: which side.
        made_by: the encoder, None where the feature set has no such side.
        dtype: stored number format, "float16" or "float32".
        shards: its files, in row order.
    """

    folder: Path
    modality: Modality
    made_by: EncoderInfo | None
    dtype: str
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def encoder(self) -> EncoderInfo:
        """What made it.

        Raises:
            DataError: the feature set has no such side.
        """
        if self.made_by is None:
            raise DataError(f"{self.folder}: has no {self.modality.plural}; this needs both sides")
        return self.made_by

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.encoder.width

    @property
    def has_tokens(self) -> bool:
        """Whether tokens are stored."""
        return self.made_by is not None and self.made_by.token_width is not None

    @cached_property
    def _schema(self) -> pa.Schema:
        return schema.table_schema(self.modality, self.dtype, self.width, self.encoder.token_width)

    def check(self) -> None:
        """Compare files, sizes, row counts and columns with the manifest; reads footers only.

        Raises:
            SchemaError: a shard is missing, cut short, or holds other columns; it is named.
        """
        named = {self._path(shard).name for shard in self.shards}
        side = self.folder / self.modality.plural
        for path in sorted(side.glob("*.parquet") if side.exists() else ()):
            if path.name not in named:
                raise SchemaError(
                    f"{path}: is not in the manifest, though other readers would take it for a "
                    "part of the set; remove it"
                )
        for shard in self.shards:
            path = self._path(shard)
            if not path.is_file():
                raise SchemaError(f"{path}: is missing; make the feature set again")
            size = path.stat().st_size
            if size != shard.bytes:
                raise SchemaError(
                    f"{path}: has {size} bytes, the manifest says {shard.bytes}: the shard was cut "
                    "short or changed; make the feature set again"
                )
            with self._open(shard) as file:
                if file.metadata.num_rows != shard.rows:
                    raise SchemaError(
                        f"{path}: has {file.metadata.num_rows} rows, the manifest says {shard.rows}"
                    )
                self._check_schema(path, file.schema_arrow)

    def _check_schema(self, path: Path, found: pa.Schema) -> None:
        for expected in self._schema:
            index = found.get_field_index(expected.name)
            if index < 0:
                raise SchemaError(f"{path}: has no column {expected.name!r}")
            kind = found.field(index).type
            if kind != expected.type:
                raise SchemaError(
                    f"{path}: column {expected.name!r} is {kind}, the manifest says {expected.type}"
                )

    def verify(self) -> None:
        """Compare every file's content with its checksum.

        Raises:
            SchemaError: a shard does not agree; it is named.
        """
        for shard in self.shards:
            path = self._path(shard)
            if atomic.sha256_file(path) != shard.sha256:
                raise SchemaError(
                    f"{path}: the content does not agree with the manifest's checksum: the shard "
                    "was changed or is damaged; make the feature set again"
                )

    def embeddings(self) -> Array:
        """All embeddings, (n, d), in the stored dtype, C-contiguous, maybe read-only.

        Tokens are not touched. Each row group is decoded into its place; where the set is a
        single row group the array is Arrow's own memory.

        Raises:
            SchemaError: a shard is damaged.
        """
        if not self.has_tokens:
            # The embeddings are then all but a few bytes of the file, so the full checksum costs
            # little; beside tokens the page checksums have to do.
            self.verify()
        whole: Array | None = None
        row = 0
        for values in self._embedding_groups():
            if len(values) == len(self):
                return values
            if whole is None:
                whole = np.empty((len(self), self.width), schema.DTYPES[self.dtype])
            whole[row : row + len(values)] = values
            row += len(values)
        if whole is None:
            return np.empty((0, self.width), schema.DTYPES[self.dtype])
        return whole

    def _embedding_groups(self) -> Iterator[Array]:
        for batch in self.batches([schema.EMBEDDING]):
            yield batch_vectors(batch, schema.EMBEDDING)

    def column(self, name: str) -> pa.ChunkedArray:
        """One string column, whole, in row order."""
        chunks = [batch.column(name) for batch in self.batches([name])]
        return pa.chunked_array(chunks, pa.string())

    def split_counts(self) -> Counter[str | None]:
        """Rows of each split; None is no split."""
        counts: Counter[str | None] = Counter()
        for _, batch in self.blocks([schema.SPLIT], lambda first, last: first < last):
            for entry in batch.column(schema.SPLIT).value_counts().to_pylist():
                counts[entry["values"]] += entry["counts"]
        return counts

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The given columns, a row group at a time, in row order.

        Raises:
            SchemaError: a shard is damaged.
        """
        for shard in self.shards:
            with self._open(shard) as file:
                for group in range(file.metadata.num_row_groups):
                    table = file.read_row_group(group, columns=list(columns), use_threads=True)
                    yield from table.combine_chunks().to_batches()

    def blocks(
        self, columns: Sequence[str], is_wanted: Callable[[int, int], bool]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The given columns of some row groups, with the number of the first row of each.

        Args:
            columns: to read.
            is_wanted: told the first row of a group and the first after it, whether to read it.

        Raises:
            SchemaError: a shard is damaged.
        """
        first = 0
        for shard in self.shards:
            if not is_wanted(first, first + shard.rows):
                first += shard.rows
                continue
            # What is read of a mapped file stays resident until it is closed.
            with self._open(shard, mapped=False) as file:
                for group in range(file.metadata.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    if is_wanted(first, last):
                        table = file.read_row_group(group, columns=list(columns), use_threads=True)
                        for batch in table.combine_chunks().to_batches():
                            yield first, batch
                            first += len(batch)
                    first = last

    def strings(self, name: str, rows: Ints | None = None) -> pa.Array:
        """A string column as one array of large strings, which may be more than 2 GiB.

        Args:
            name: of the column.
            rows: which rows, ascending; None for all.

        Raises:
            SchemaError: a shard is damaged.
        """
        kind = pa.large_string()
        parts = [
            batch.column(name).take(local).cast(kind)
            for _, local, batch in self.parts([name], rows)
        ]
        return pa.concat_arrays(parts) if parts else pa.array([], kind)

    def parts(
        self, columns: Sequence[str], rows: Ints | None
    ) -> Iterator[tuple[slice, Ints, pa.RecordBatch]]:
        """The row groups that some rows are in.

        Args:
            columns: to read.
            rows: which rows, ascending; None for all.

        Yields:
            Positions in `rows`, where those are in the batch, and the batch.
        """

        def is_wanted(first: int, last: int) -> bool:
            return first < last if rows is None else len(places_within(rows, first, last)[1]) > 0

        for first, batch in self.blocks(columns, is_wanted):
            positions, local = places_within(rows, first, first + len(batch))
            if len(local):
                yield positions, local, batch

    def row_groups(self, column: str) -> list[RowGroup]:
        """All row groups in row order; reads footers only.

        Args:
            column: whose size is told.

        Raises:
            SchemaError: a shard is damaged.
        """
        found = []
        for shard in self.shards:
            with self._open(shard) as file:
                for index in range(file.metadata.num_row_groups):
                    group = file.metadata.row_group(index)
                    chunks = map(group.column, range(group.num_columns))
                    size = sum(
                        chunk.total_uncompressed_size
                        for chunk in chunks
                        if chunk.path_in_schema.split(".")[0] == column
                    )
                    found.append(RowGroup(shard, index, group.num_rows, size))
        return found

    def read_group(
        self, group: RowGroup, columns: Sequence[str], rows: int
    ) -> Iterator[pa.RecordBatch]:
        """The given columns of one row group, a few rows at a time.

        Decoding takes several times the memory of what is decoded, so this needs little.

        Args:
            group: of this table.
            columns: to read.
            rows: of a batch, at most.

        Raises:
            SchemaError: the shard is damaged.
        """
        with self._open(group.shard) as file:
            yield from file.iter_batches(
                rows, row_groups=[group.index], columns=list(columns), use_threads=False
            )

    def _path(self, shard: Shard) -> Path:
        path = self.folder.joinpath(*shard.path.split("/"))
        outside = ".." in shard.path.split("/") or PurePosixPath(shard.path).is_absolute()
        if outside or not (is_remote(path) or path.resolve().is_relative_to(self.folder.resolve())):
            raise SchemaError(f"{self.folder}: the manifest names {shard.path!r}, outside of it")
        return path

    @contextmanager
    def _open(self, shard: Shard, *, mapped: bool = True) -> Iterator[pq.ParquetFile]:
        path = self._path(shard)
        try:
            with ExitStack() as stack:
                # A store answers slowly, so what is needed of a row group is fetched at once.
                away = is_remote(path)
                opened: Any = stack.enter_context(path.open("rb")) if away else path
                yield stack.enter_context(
                    pq.ParquetFile(
                        opened,
                        memory_map=mapped and not away,
                        pre_buffer=away,
                        page_checksum_verification=True,
                    )
                )
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SchemaError(
                f"{path}: cannot be read ({reason}); make the feature set again"
            ) from error


@dataclass(frozen=True)
class FeatureSet:
    """A feature set on disk: two tables and what the manifest says of them."""

    path: Path
    manifest: Manifest
    images: FeatureTable
    texts: FeatureTable

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a feature set and check that its files agree with its manifest.

        Args:
            path: the folder.

        Raises:
            DataError: there is no feature set at `path`.
            SchemaError: it does not agree with itself; the file is named.
        """
        manifest = read_manifest(path)
        parts = {
            Modality.IMAGE: (manifest.shards.images, manifest.counts.images),
            Modality.TEXT: (manifest.shards.texts, manifest.counts.texts),
        }
        tables = []
        for side, (shards, count) in parts.items():
            made_by = manifest.encoders.side(side)
            table = FeatureTable(path, side, made_by, manifest.dtype, tuple(shards))
            table.check()
            if len(table) != count:
                raise SchemaError(
                    f"{path}: the shards hold {len(table)} {side.plural}, "
                    f"the manifest counts {count}"
                )
            tables.append(table)
        return cls(path, manifest, *tables)

    def table(self, modality: Modality) -> FeatureTable:
        """The table of one side."""
        return self.images if modality is Modality.IMAGE else self.texts

    def verify(self) -> None:
        """Compare the content of every shard with its checksum."""
        self.images.verify()
        self.texts.verify()

    def splits(self) -> dict[str | None, dict[str, int]]:
        """Rows by split: ``{"train": {"images": n, "texts": m}, ...}``; None is no split."""
        found: dict[str | None, dict[str, int]] = {}
        for table in (self.images, self.texts):
            for split, count in table.split_counts().items():
                counts = found.setdefault(split, {"images": 0, "texts": 0})
                counts[table.modality.plural] = count
        return dict(sorted(found.items(), key=lambda item: (item[0] is None, item[0] or "")))


def places_within(rows: Ints | None, first: int, last: int) -> tuple[slice, Ints]:
    """Which of some rows, ascending, are from `first` to before `last`; None is all rows.

    Returns:
        Their positions in `rows`, and their places, counted from `first`.
    """
    if rows is None:
        return slice(first, last), np.arange(last - first)
    start, stop = np.searchsorted(rows, [first, last]).tolist()
    return slice(start, stop), rows[start:stop] - first


def batch_vectors(batch: pa.RecordBatch, name: str) -> Array:
    """A fixed-size-list column of a batch as (n, d), without a copy.

    Raises:
        SchemaError: a row or a value is null.
    """
    column = batch.column(name)
    values = column.flatten()
    if column.null_count or values.null_count:
        raise SchemaError(f"column {name!r} holds nulls")
    flat: Array = values.to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)


def batch_tokens(batch: pa.RecordBatch) -> list[Array]:
    """The tokens column of a batch: n arrays (t_i, d_t), views of one decoded block."""
    vectors, offsets = flat_tokens(batch)
    return [vectors[start:end] for start, end in pairwise(offsets)]


def flat_tokens(batch: pa.RecordBatch) -> tuple[Array, Array]:
    """The tokens column of a batch without a copy: (k, d_t), and (n + 1,) where each row begins.

    Raises:
        SchemaError: a row or a value is null.
    """
    column = batch.column(schema.TOKENS)
    values = column.values.values
    if column.null_count or column.values.null_count or values.null_count:
        raise SchemaError(f"column {schema.TOKENS!r} holds nulls")
    flat: Array = values.to_numpy(zero_copy_only=True)
    offsets: Array = column.offsets.to_numpy()
    return flat.reshape(-1, column.type.value_type.list_size), offsets
