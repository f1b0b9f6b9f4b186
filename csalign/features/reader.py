"""Read a feature set: embeddings as one array, or any columns as a stream of row groups."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csalign.core.arrays import Array, Indices
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import ConfigError, DataError, SchemaError, reason_of
from csalign.core.paths import is_remote, stand_in
from csalign.core.progress import tick, track
from csalign.features import schema, verified
from csalign.features.pages import fixed_lists, read_vectors
from csalign.features.schema import EncoderInfo, Manifest, Shard, Splits, read_manifest

AGAIN = "create the feature set again"


class RowGroup(NamedTuple):
    """Rows that are read at once."""

    shard: Shard
    first: int  # number of its first row in the table
    rows: int
    bytes: int  # of its tokens, uncompressed: a little more than they take in memory


@dataclass(frozen=True)
class FeatureTable:
    """One side of a feature set on disk; reads nothing until asked."""

    folder: Path  # the feature set
    modality: AnySide
    info: EncoderInfo | None  # its encoder; None if the feature set has no such side
    dtype: str  # as stored, "float16" or "float32"
    shards: tuple[Shard, ...]  # in row order
    splits: Splits | None = None  # which stand for the stored column of splits
    items: bool = False  # whether images and texts have a column of items

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def encoder(self) -> EncoderInfo:
        """The encoder; raises DataError if the feature set has no such side."""
        if self.info is None:
            raise DataError(f"{self.folder}: has no {self.modality.plural}; both sides are needed")
        return self.info

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.encoder.width

    @property
    def has_tokens(self) -> bool:
        """True if tokens are stored."""
        return self.info is not None and self.info.token_width is not None

    def check(self) -> None:
        """Compare files, sizes, row counts and columns with the manifest; reads footers only.

        Raises:
            SchemaError: a shard is missing, truncated, not listed, or has other columns.
        """
        listed = {self._path(shard).name for shard in self.shards}
        side = self.folder / schema.folder_of(self.modality)
        for path in sorted(side.glob("*.parquet") if side.exists() else ()):
            if path.name not in listed:
                raise SchemaError(
                    f"{path}: is not listed in the manifest, though other readers would read it as "
                    "part of the set; remove it"
                )
        for shard in self.shards:
            info = self.encoder
            columns = schema.table_schema(
                self.modality, self.dtype, info.width, info.token_width, items=self.items
            )
            self._check_file(shard, columns, AGAIN)
        if (file := self._split_file) is not None:
            self._check_file(file, schema.splits_schema(), self._divide_again)
            if file.rows != len(self):
                raise SchemaError(
                    f"{self._path(file)}: has {file.rows} rows for {len(self)} "
                    f"{self.modality.plural}; {self._divide_again}"
                )

    def _check_file(self, file: Shard, columns: pa.Schema, remedy: str) -> None:
        for defect in self._defects(file, columns, remedy):
            raise SchemaError(f"{self._path(file)}: {defect}; {remedy}")

    def _defects(self, shard: Shard, columns: pa.Schema, remedy: str) -> Iterator[str]:
        path = self._path(shard)
        if not path.is_file():
            yield "is missing"
        if (size := path.stat().st_size) != shard.bytes:
            yield f"has {size} bytes, the manifest says {shard.bytes}"
        with self._open(shard, remedy) as file:
            rows, found = file.metadata.num_rows, file.schema_arrow
        if rows != shard.rows:
            yield f"has {rows} rows, the manifest says {shard.rows}"
        for expected in columns:
            if (index := found.get_field_index(expected.name)) < 0:
                yield f"has no column {expected.name!r}"
            elif (kind := found.field(index).type) != expected.type:
                yield f"column {expected.name!r} is {kind}, the manifest says {expected.type}"

    @property
    def _split_file(self) -> Shard | None:
        return None if self.splits is None else self.splits.side(self.modality)

    @property
    def _divide_again(self) -> str:
        options = "" if self.splits is None else self.splits.settings.options
        return f"make the splits again: csalign split {self.folder} {options} --overwrite"

    @cached_property
    def _split_names(self) -> pa.Array | None:
        """The column of splits that stands for the stored one; None if there is none."""
        if (file := self._split_file) is None:
            return None
        self._verify_file(file, self._divide_again)
        with self._open(file, self._divide_again) as opened:
            column = opened.read([schema.SPLIT]).column(0)
        return column.cast(pa.string()).combine_chunks()

    def verify(self, *, again: bool = True) -> None:
        """Compare files with their checksums, `again` or if changed; raises SchemaError."""
        for shard in track(self.shards, "verifying: files", len(self.shards)):
            self._verify_file(shard, AGAIN, again=again)
        if (file := self._split_file) is not None:
            self._verify_file(file, self._divide_again, again=again)

    def _verify_file(self, file: Shard, remedy: str, *, again: bool = False) -> None:
        path = self._path(file)
        if not verified.matches(path, file.sha256, again=again):
            raise SchemaError(
                f"{path}: does not match the manifest's checksum, so it was changed or is "
                f"damaged; {remedy}"
            )

    def embeddings(self) -> Array:
        """Read all embeddings, (n, d), in the stored dtype, but no tokens.

        Raises:
            SchemaError: a shard is damaged.
        """
        if not self.has_tokens:  # else hashing would read much more, and pages have checksums
            self.verify(again=False)
        out = np.empty((len(self), self.width), schema.DTYPES[self.dtype])
        for first, batch in self._read(
            [schema.EMBEDDING], None, out, is_verified=not self.has_tokens
        ):
            values = batch_vectors(batch, schema.EMBEDDING)
            if not np.may_share_memory(values, out):
                out[first : first + len(values)] = values
            tick("reading: rows", first + len(values), len(self))
        return out

    def read(
        self, *columns: str, rows: Indices | None = None
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Stream columns of the row groups of `rows` (ascending), and the row each begins with."""
        return self._read(columns, rows)

    def _read(
        self,
        columns: Sequence[str],
        rows: Indices | None,
        out: Array | None = None,
        *,
        is_verified: bool = False,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Stream columns, the embeddings through `out` (n, d) where they are plain pages."""
        first = 0
        for shard in self.shards:
            if not _is_wanted(rows, first, first + shard.rows):
                first += shard.rows
                continue
            with self._open(shard) as file, ExitStack() as stack:
                path, raw, trusted = self._path(shard), None, is_verified
                if schema.EMBEDDING in columns and not is_remote(path):
                    raw = stack.enter_context(path.open("rb", buffering=0))
                    trusted = trusted or verified.is_remembered(path, shard.sha256)
                for group in range(file.metadata.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    if _is_wanted(rows, first, last):
                        vectors: Array | None = None
                        if raw is not None and last - first <= shard.rows:
                            shape, dtype = (last - first, self.width), schema.DTYPES[self.dtype]
                            vectors = np.empty(shape, dtype) if out is None else out[first:last]
                            if not _is_filled(vectors, file, group, raw, trusted):
                                vectors = None
                        for batch in _batches(file, group, columns, vectors):
                            _check_nulls(batch, path)
                            yield first, self._with_splits(batch, first)
                            first += len(batch)
                    first = last

    def _with_splits(self, batch: pa.RecordBatch, first: int) -> pa.RecordBatch:
        place = batch.schema.get_field_index(schema.SPLIT)
        if place < 0 or self._split_names is None:
            return batch
        own = self._split_names.slice(first, len(batch))
        return batch.set_column(place, batch.schema.field(place), own)

    def parts(
        self, columns: Sequence[str], rows: Indices | None
    ) -> Iterator[tuple[slice, Indices, pa.RecordBatch]]:
        """Yield for each row group with some rows their positions in `rows`, and in the batch."""
        for first, batch in self.read(*columns, rows=rows):
            positions, local = places_within(rows, first, first + len(batch))
            if len(local):
                yield positions, local, batch

    def take(self, rows: Indices | None) -> Array:
        """Read the embeddings of some rows (ascending), (k, d), in the stored dtype."""
        parts = [
            batch_vectors(batch, schema.EMBEDDING)[local]
            for _, local, batch in self.parts([schema.EMBEDDING], rows)
        ]
        return np.concatenate(parts or [np.empty((0, self.width), schema.DTYPES[self.dtype])])

    def column(self, name: str, rows: Indices | None = None) -> pa.ChunkedArray:
        """Read a string column, all of it or some rows (ascending)."""
        chunks = [
            batch.column(name) if len(local) == len(batch) else batch.column(name).take(local)
            for _, local, batch in self.parts([name], rows)
        ]
        return pa.chunked_array(chunks, pa.string())

    def strings(self, name: str, rows: Indices | None = None) -> pa.Array:
        """Read a string column as one array of large strings, which may exceed 2 GiB."""
        return self.column(name, rows).cast(pa.large_string()).combine_chunks()

    def row_groups(self) -> list[RowGroup]:
        """List all row groups in row order; reads footers only."""
        found: list[RowGroup] = []
        first = 0
        for shard in self.shards:
            with self._open(shard) as file:
                groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            for group in groups:
                columns = map(group.column, range(group.num_columns))
                tokens = (c for c in columns if c.path_in_schema.split(".")[0] == schema.TOKENS)
                size = sum(column.total_uncompressed_size for column in tokens)
                found.append(RowGroup(shard, first, group.num_rows, size))
                first += group.num_rows
        return found

    def _path(self, shard: Shard) -> Path:
        path = self.folder.joinpath(*shard.path.split("/"))
        outside = ".." in shard.path.split("/") or PurePosixPath(shard.path).is_absolute()
        if outside or not (is_remote(path) or path.resolve().is_relative_to(self.folder.resolve())):
            raise SchemaError(
                f"{self.folder}: the manifest lists {shard.path!r}, outside of the set; {AGAIN}"
            )
        return path

    @contextmanager
    def _open(self, shard: Shard, remedy: str = AGAIN) -> Iterator[pq.ParquetFile]:
        path = self._path(shard)
        remote = is_remote(path)
        try:
            with ExitStack() as stack:
                opened: Any = stack.enter_context(path.open("rb")) if remote else path
                # A store answers slowly, so all that is needed of a row group is fetched at once.
                file = pq.ParquetFile(opened, pre_buffer=remote, page_checksum_verification=True)
                yield stack.enter_context(file)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            problem = stand_in(path) or f"cannot be read ({reason_of(error)}); {remedy}"
            raise SchemaError(f"{path}: {problem}") from error


@dataclass(frozen=True)
class FeatureSet:
    """A feature set on disk: its manifest and a table per side."""

    path: Path
    manifest: Manifest
    images: FeatureTable
    texts: FeatureTable
    further: dict[str, FeatureTable] = field(default_factory=dict)  # sides by name

    @classmethod
    def open(cls, path: Path, *, stored_splits: bool = False) -> Self:
        """Open a feature set and check its files against its manifest.

        `stored_splits` ignores the splits that were made after the rows were written.

        Raises:
            DataError: there is no feature set at `path`.
            SchemaError: a file does not match the manifest.
        """
        manifest = read_manifest(path)
        if stored_splits:
            manifest = manifest.model_copy(update={"splits": None})
        found: dict[AnySide, FeatureTable] = {}

        def add(side: AnySide, info: EncoderInfo | None, shards: list[Shard], count: int) -> None:
            table = FeatureTable(
                *(path, side, info, manifest.dtype, tuple(shards)),
                *(manifest.splits, manifest.items),
            )
            table.check()
            if len(table) != count:
                raise SchemaError(
                    f"{path}: the shards have {len(table)} {side.plural}, the manifest counts "
                    f"{count}; {AGAIN}"
                )
            found[side] = table

        for side, count in zip(
            Modality, (manifest.counts.images, manifest.counts.texts), strict=True
        ):
            add(side, manifest.encoders.side(side), manifest.shards.side(side), count)
        for name in sorted(manifest.sides):
            entry = manifest.sides[name]
            add(name, entry.encoder, entry.shards, entry.rows)
        images, texts, *_ = found.values()
        further = {str(side): table for side, table in [*found.items()][len(Modality) :]}
        return cls(path, manifest, images, texts, further)

    @property
    def sides(self) -> tuple[AnySide, ...]:
        """The sides that are stored: images, texts, then the others by name."""
        return self.manifest.side_names

    @property
    def is_sided(self) -> bool:
        """Whether there are sides beside images and texts."""
        return bool(self.further)

    def table(self, side: str) -> FeatureTable:
        """Return the table of one side; ConfigError for a name that is not a side of this set."""
        if side in self.further:
            return self.further[side]
        if self.further and side_of(side) not in (*Modality, *self.further):
            raise ConfigError(
                f"{self.path}: has no side {side!r}; its sides are {', '.join(self.sides)}"
            )
        return self.images if Modality.of(side) is Modality.IMAGE else self.texts

    def verify(self) -> None:
        """Compare every shard with its checksum."""
        for table in (self.images, self.texts, *self.further.values()):
            table.verify()

    def splits(self) -> dict[str | None, dict[str, int]]:
        """Count rows by split: ``{"train": {"images": n, "texts": m}, ...}``; None is no split."""
        found: dict[str | None, dict[str, int]] = {}
        tables = (self.images, self.texts, *self.further.values())
        for table in tables:
            for entry in table.column(schema.SPLIT).value_counts().to_pylist():
                none = {own.modality.plural: 0 for own in tables}
                counts = found.setdefault(entry["values"], none)
                counts[table.modality.plural] = entry["counts"]
        return dict(sorted(found.items(), key=lambda item: (item[0] is None, item[0] or "")))


def places_within(rows: Indices | None, first: int, last: int) -> tuple[slice, Indices]:
    """Find the rows (ascending; None is all) from `first` to before `last`.

    Returns their positions in `rows`, and their places counted from `first`.
    """
    if rows is None:
        return slice(first, last), np.arange(last - first)
    start, stop = np.searchsorted(rows, [first, last]).tolist()
    return slice(start, stop), rows[start:stop] - first


def _is_wanted(rows: Indices | None, first: int, last: int) -> bool:
    return first < last and (rows is None or len(places_within(rows, first, last)[1]) > 0)


def _is_filled(
    vectors: Array, file: pq.ParquetFile, group: int, raw: IO[bytes], trusted: bool
) -> bool:
    """Read a row group's embeddings into an array (n, d); false if they are not plain pages."""
    found = file.metadata.row_group(group)
    paths = [file.schema.column(index).path for index in range(found.num_columns)]
    if (path := f"{schema.EMBEDDING}.list.element") not in paths:
        return False
    place = paths.index(path)
    column = file.schema.column(place)
    return read_vectors(raw, found.column(place), column, vectors, verified=trusted)


def _batches(
    file: pq.ParquetFile, group: int, columns: Sequence[str], vectors: Array | None
) -> list[pa.RecordBatch]:
    """Read columns of a row group, besides the embeddings if they are given, (n, d)."""
    others = [name for name in columns if vectors is None or name != schema.EMBEDDING]
    table = file.read_row_group(group, columns=others, use_threads=True)
    if vectors is not None:
        kind = schema.vector_type(vectors.dtype, vectors.shape[1])
        table = table.append_column(schema.EMBEDDING, fixed_lists(vectors, kind))
    return table.combine_chunks().to_batches()  # type: ignore[no-any-return]


def batch_vectors(batch: pa.RecordBatch, name: str) -> Array:
    """Return a vector column of a batch, (n, d), not copied."""
    column = batch.column(name)
    values: Array = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), column.type.list_size)


def batch_tokens(batch: pa.RecordBatch) -> list[Array]:
    """Return the tokens of a batch: n arrays (t_i, d_t), views of one decoded block."""
    vectors, starts = flat_tokens(batch)
    return [vectors[start:end] for start, end in pairwise(starts)]


def flat_tokens(batch: pa.RecordBatch) -> tuple[Array, Array]:
    """Return all tokens of a batch, (k, d_t), and where each row's begin, (n + 1,)."""
    column = batch.column(schema.TOKENS)
    flat: Array = column.values.values.to_numpy(zero_copy_only=True)
    return flat.reshape(-1, column.type.value_type.list_size), column.offsets.to_numpy()


def _check_nulls(batch: pa.RecordBatch, path: Path) -> None:
    for name in {schema.ID, schema.EMBEDDING, schema.TOKENS}.intersection(batch.schema.names):
        column = batch.column(name)
        if column.null_count or (name == schema.TOKENS and column.values.null_count):
            raise SchemaError(f"{path}: column {name!r} has null values; {AGAIN}")
