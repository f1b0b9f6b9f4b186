"""Write a feature set: shards of both sides, row group by row group, and the manifest last."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core import __version__, atomic
from csalign.core.arrays import Array
from csalign.core.enums import AnySide, Modality, Side, side_of
from csalign.core.errors import DataError, ShapeError
from csalign.features import schema
from csalign.features.checks import find_unusable
from csalign.features.join import find_images, repeated_ids
from csalign.features.pages import VectorFile, fixed_lists
from csalign.features.schema import EncoderInfo, Shard

# Small enough to shuffle by and to hold one in memory, large enough to read at full speed.
ROW_GROUP_ROWS = 8_192
ROW_GROUP_BYTES = 32 << 20
SHARD_BYTES = 512 << 20

Strings = Sequence[str | None]


@dataclass(frozen=True)
class Rows:
    """Some rows of one side."""

    # n values of each of `schema.string_columns`, arrays of Arrow or lists; omitted is null
    columns: Mapping[str, Strings | pa.Array]
    embeddings: Array  # (n, d), any float dtype, finite, no row of norm 0
    tokens: Sequence[Array] | None = None  # n arrays (t_i, d_t), any float dtype
    where: Callable[[int], str] | None = None  # names a row for messages, None for its id

    def column(self, name: str) -> pa.Array:
        """Return the n values of a string column."""
        values = self.columns.get(name)
        if values is None:
            return pa.nulls(len(self.embeddings), pa.string())
        if isinstance(values, pa.Array):
            return values.cast(pa.string())
        return pa.array(values, pa.string())

    def strings(self, name: str) -> list[str | None]:
        """Return the n values of a string column as a list."""
        return self.column(name).to_pylist()  # type: ignore[no-any-return]

    def stored(self, side: AnySide, dtype: str) -> Array:
        """Cast the embeddings; raises DataError if one has no direction, as given or cast."""
        for row, reason in find_unusable(self.embeddings, dtype).items():
            name = f"{side} {self.column(schema.ID)[row].as_py()!r}"
            raise DataError(f"{self.where(row) if self.where else name}: {reason}")
        return np.ascontiguousarray(self.embeddings, schema.DTYPES[dtype])


class ShardWriter:
    """Write one Parquet file of one side; `close` completes it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        modality: AnySide,
        info: EncoderInfo,
        dtype: str,
        *,
        items: bool = False,
    ) -> None:
        self.modality = modality
        self._names = schema.string_columns(modality, items=items)
        self._shown = schema.folder_of(modality)
        self.bytes = 0  # of the rows written, in memory; about as many as on disk
        self._rows = 0
        self._info = info
        self._dtype = dtype
        self._path = folder / self._shown / f"{name}.parquet"
        self._schema = schema.table_schema(
            modality, dtype, info.width, info.token_width, items=items
        )
        self._pending: list[pa.RecordBatch] = []
        self._stack = ExitStack()
        self._temporary: Path | None = None
        self._file: VectorFile | None = None

    def write(self, rows: Rows) -> None:
        """Append rows.

        Raises:
            DataError: an embedding has no direction, or a token is not finite, once stored.
            ShapeError: the arrays do not match the columns or the encoder's widths.
        """
        shape, expected = rows.embeddings.shape, (len(rows.columns[schema.ID]), self._info.width)
        if shape != expected:
            raise ShapeError(f"{self.modality} embeddings have shape {shape}, expected {expected}")
        arrays = [rows.column(name) for name in self._names]
        embeddings = rows.stored(self.modality, self._dtype)
        arrays.append(fixed_lists(embeddings, self._schema.field(schema.EMBEDDING).type))
        if self._info.token_width is not None:
            arrays.append(self._tokens(rows))
        self.append(pa.record_batch(arrays, schema=self._schema))

    def append(self, batch: pa.RecordBatch) -> None:
        """Append rows as they are stored."""
        self._pending.append(batch)
        self._flush(complete=False)

    def close(self) -> Shard | None:
        """Commit the file under its name; return None, without a file, if nothing was written."""
        self._flush(complete=True)
        if self._file is None or self._temporary is None:
            return None
        with atomic.translate_os_errors(self._path):
            self._file.close()
            self._stack.close()
        path = f"{self._shown}/{self._path.name}"
        return Shard(
            path=path, rows=self._rows, bytes=self._file.bytes, sha256=self._file.sha256.hexdigest()
        )

    def abort(self, error: BaseException) -> None:
        """Remove what was written, because of `error`."""
        with suppress(pa.ArrowException, OSError):  # of closing a file that is thrown away
            self._stack.__exit__(type(error), error, error.__traceback__)

    def _tokens(self, rows: Rows) -> pa.Array:
        ids, width = rows.columns[schema.ID], self._info.token_width
        if rows.tokens is None or len(rows.tokens) != len(ids):
            raise ShapeError(f"{self.modality}: {len(ids)} embeddings need as many token arrays")
        with np.errstate(over="ignore"):  # an overflow is reported
            values = np.concatenate(rows.tokens).astype(schema.DTYPES[self._dtype])
        if values.shape[1:] != (width,) or not np.isfinite(values).all():
            raise DataError(
                f"{self.modality} tokens of {ids[0]!r} to {ids[-1]!r}: shape {values.shape}, "
                f"expected width {width} and finite values; use --dtype float32 if they overflow"
            )
        kind = self._schema.field(schema.TOKENS).type
        starts = pa.array(np.cumsum([0, *map(len, rows.tokens)], dtype=np.int32))
        return pa.ListArray.from_arrays(starts, fixed_lists(values, kind.value_type), type=kind)

    def _flush(self, *, complete: bool) -> None:
        """Write pending rows in whole row groups, or all of them."""
        table = pa.Table.from_batches(self._pending, self._schema)
        row_bytes = max(1, table.nbytes // max(1, table.num_rows))
        limit = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes))
        written = table.num_rows if complete else table.num_rows // limit * limit
        if not written:
            return
        with atomic.translate_os_errors(self._path):
            if self._file is None:
                self._temporary = self._stack.enter_context(atomic.atomic_path(self._path))
                strings = list(self._names)
                file = VectorFile(
                    self._temporary,
                    self._schema,
                    schema.EMBEDDING,
                    # Vectors hardly shrink and decode several times slower when compressed.
                    compression=dict.fromkeys(strings, "zstd"),
                    use_dictionary=[n for n in strings if n in (schema.SPLIT, schema.SOURCE)],
                    write_statistics=strings,
                    write_page_checksum=True,  # of use where one column is read
                    write_batch_size=1 << 16,  # values, of which a vector has hundreds
                )
                self._stack.callback(file.discard)
                self._file = file
            for start in range(0, written, limit):
                self._file.write_rows(table[start : min(written, start + limit)])
        self._pending = table[written:].to_batches()
        self._rows += written
        self.bytes += written * row_bytes


class FeatureWriter:
    """Write the sides of a feature set; use as a context manager.

    Leaving the block without an exception checks the ids and writes the manifest.

    Args:
        folder: an empty folder, as `outputs.atomic_folder` gives.
        encoders: of each side; a side that is missing is not stored.
        dtype: "float16" or "float32".
        names: of the sides, if not image and text.
        source_root: folder that relative sources start from, if known.
        pairing: how texts were paired with images, if known; see `schema.Manifest`.
        items: whether images and texts get a column of items, as further sides have.

    Raises:
        DataError: at the end, an id repeats or the image of a text is missing.
    """

    def __init__(
        self,
        folder: Path,
        encoders: Mapping[Any, EncoderInfo],
        dtype: str,
        names: Mapping[Modality, str] | None = None,
        source_root: str | None = None,
        pairing: str | None = None,
        *,
        items: bool = False,
    ) -> None:
        self._pairing, self._items = pairing, items
        self._names = None if names is None else dict(names)
        self._source_root = source_root
        self._folder = folder
        self._encoders: dict[AnySide, EncoderInfo] = {
            side_of(side): info for side, info in encoders.items()
        }
        sides = dict.fromkeys([*Modality, *self._encoders])
        self._dtype = dtype
        self._writers: dict[AnySide, ShardWriter] = {}
        self._shards: dict[AnySide, list[Shard]] = {side: [] for side in sides}
        self._ids: dict[AnySide, list[pa.Array]] = {side: [] for side in sides}
        self._image_ids: list[pa.Array] = []
        (folder / schema.FAILURES).touch()

    def write(self, side: str, rows: Rows) -> None:
        """Append rows to one side; raises DataError if an id is missing, and as `ShardWriter`."""
        modality = side_of(side) if side in self._encoders else Modality.of(side)
        ids = rows.column(schema.ID)
        if (row := pc.fill_null(pc.equal(ids, ""), True).index(True).as_py()) >= 0:
            raise DataError(f"{modality} {row}: has no id")
        if modality not in self._writers:
            name, info = f"part-{len(self._shards[modality]):05d}", self._encoders[modality]
            self._writers[modality] = ShardWriter(
                self._folder, name, modality, info, self._dtype, items=self._items
            )
        self._writers[modality].write(rows)
        self._ids[modality].append(ids)
        if modality is Modality.TEXT:
            self._image_ids.append(rows.column(schema.IMAGE_ID))
        if self._writers[modality].bytes >= SHARD_BYTES:
            self._close(modality)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                for side in list(self._writers):
                    self._close(side)
                self._finish()
        except BaseException as failure:
            error = failure
            raise
        finally:
            if error is not None:
                for writer in self._writers.values():
                    writer.abort(error)

    def _close(self, side: AnySide) -> None:
        if (shard := self._writers[side].close()) is not None:
            self._shards[side].append(shard)
        del self._writers[side]  # one that fails stays, to be aborted

    def _finish(self) -> None:
        all_ids = {side: pa.chunked_array(own, pa.string()) for side, own in self._ids.items()}
        images, texts = (all_ids[side] for side in Modality)
        for side, ids in all_ids.items():
            if side is Modality.TEXT and texts.equals(images):
                continue
            if len(repeated := repeated_ids(ids)):
                name = repeated[0].as_py()
                raise DataError(f"{side} id {name!r} appears more than once; ids must be unique")
        image_ids = pa.chunked_array(self._image_ids, pa.string())
        rows, missing = find_images(image_ids, images)
        if len(missing):
            text, image = (column[int(missing[0])].as_py() for column in (texts, image_ids))
            raise DataError(
                f"text {text!r} belongs to image {image!r}, which is missing ({len(missing)} such "
                "texts); add the image or leave image_id empty"
            )
        pairs = int((rows >= 0).sum())
        image, text = (self._encoders.get(side) for side in Modality)
        manifest = schema.Manifest(
            csalign_version=__version__,
            names=self._names,
            source_root=self._source_root,
            pairing=self._pairing,
            dtype=self._dtype,
            encoders=schema.Encoders(image=image, text=text),
            counts=schema.Counts(images=len(images), texts=len(texts), pairs=pairs, failures=0),
            shards=schema.Shards(**{side.plural: self._shards[side] for side in Modality}),
            sides={
                side: schema.SideEntry(encoder=info, rows=len(all_ids[side]), shards=shards)
                for side, info in self._encoders.items()
                for shards in [self._shards[side]]
                if isinstance(side, Side)
            },
            items=self._items,
        )
        schema.write_manifest(self._folder, manifest)
