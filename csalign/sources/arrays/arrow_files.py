"""Tables with columns of vectors: Parquet, Arrow and Feather, and folders of Hugging Face."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.core.paths import is_remote
from csalign.core.records import parse_json
from csalign.sources.arrays.base import EITHER_NAMES, Array, Labels, Part, Vectors, check_dtype
from csalign.sources.arrays.base import IMAGE_NAMES as IMAGE_VECTORS
from csalign.sources.arrays.base import TEXT_NAMES as TEXT_VECTORS
from csalign.sources.records.tables import CAPTION_NAMES, IMAGE_NAMES

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather")

_BUFFER = 4 << 20
_LABEL_ROWS = 65_536

# What the columns beside the vectors may be called, the likeliest first.
_LABELS: dict[Modality, dict[str, tuple[str, ...]]] = {
    Modality.IMAGE: {
        "id": ("image_id", "id", "key"),
        "source": ("source", *IMAGE_NAMES),
        "split": ("split",),
    },
    Modality.TEXT: {
        "id": ("text_id", "id", "key"),
        "image_id": ("image_id",),
        "caption": CAPTION_NAMES,
        "split": ("split",),
    },
}


@dataclass(frozen=True)
class TableFile:
    """A table on disk that can be streamed.

    Attributes:
        path: the file.
        rows: how many it has.
        schema: its columns.
        split: of all its rows, None where a column says it or nothing does.
    """

    path: Path
    rows: int
    schema: pa.Schema
    split: str | None = None

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Some of the columns, at most `rows` rows at a time.

        Raises:
            DataError: the file is damaged.
        """
        with _reading(self.path) as file:
            if _is_parquet(self.path):
                yield from _parquet(file).iter_batches(rows, columns=list(columns))
                return
            for batch in _arrow_batches(file):
                for start in range(0, batch.num_rows, rows):
                    yield batch.select(list(columns)).slice(start, rows)


def open_table(path: Path, split: str | None = None) -> TableFile:
    """Look at a .parquet, .arrow or .feather; reads no vectors of a Parquet file.

    Raises:
        DataError: it is damaged.
    """
    with _reading(path) as file:
        if _is_parquet(path):
            found = _parquet(file)
            return TableFile(path, found.metadata.num_rows, found.schema_arrow, split)
        batches = _arrow_batches(file)
        first = next(batches, None)
        if first is None:
            raise DataError(f"{path}: has no rows")
        rows = first.num_rows + sum(batch.num_rows for batch in batches)
        return TableFile(path, rows, first.schema, split)


def dataset_tables(folder: Path) -> list[TableFile] | None:
    """The files of a folder that ``datasets.save_to_disk`` wrote, None where it is another.

    Raises:
        DataError: the folder is damaged, or its rows are a selection that was never written out.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _read_json(splits).get("splits", [])
        found = [dataset_tables_of(folder / str(name), str(name)) for name in names]
        return list(chain.from_iterable(found))
    if (folder / "state.json").is_file():
        return dataset_tables_of(folder, None)
    return None


def dataset_tables_of(folder: Path, split: str | None) -> list[TableFile]:
    """The files of one split; arguments and errors as in `dataset_tables`."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: is a selection of a dataset; write it out with "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    named = [str(entry.get("filename")) for entry in state.get("_data_files") or []]
    if not named:
        raise DataError(f"{folder}: names no data files in state.json; save the dataset again")
    return [open_table(folder / Path(name).name, split) for name in named]


def read_tables(
    name: str, tables: Sequence[TableFile], modality: Modality, wanted: str | None
) -> Vectors:
    """One side's embeddings in one or more tables of like columns, with what stands beside them.

    Args:
        name: of the tables as the user named them.
        tables: in order.
        modality: which side.
        wanted: column of the vectors, None to recognise it.

    Raises:
        DataError: no column can be told to be the one.
        ShapeError: it is none of vectors, or not of floats.
    """
    vectors = _vector_column(name, tables[0], modality, wanted)
    filled = [table for table in tables if table.rows] or list(tables)
    parts = tuple(_part(table, vectors) for table in filled)
    labels = read_labels(name, filled, _label_columns(filled, modality))
    return Vectors(name, parts, labels)


def has_vectors(table: TableFile, modality: Modality) -> bool:
    """Whether a table has a column that is by its name of this side's vectors."""
    names = IMAGE_VECTORS if modality is Modality.IMAGE else TEXT_VECTORS
    return _first_of(names, _list_columns(table.schema)) is not None


def read_labels(name: str, tables: Sequence[TableFile], columns: Mapping[str, str]) -> Labels:
    """Columns of strings, whole.

    Args:
        name: of the tables, for messages.
        tables: in order.
        columns: the column in the file by what it is: ``id``, ``caption``, ...

    Raises:
        DataError: a table is damaged.
    """
    found: dict[str, list[str | None]] = {known: [] for known in columns}
    for table in tables:
        with _reading_of(table.path):
            for batch in table.batches(list(dict.fromkeys(columns.values())), _LABEL_ROWS):
                for known, column in columns.items():
                    found[known] += _strings(batch.column(column))
    splits = [table.split for table in tables for _ in range(table.rows)]
    if "split" not in found and any(split is not None for split in splits):
        found["split"] = splits
    return Labels(name, len(splits), found, _row_namer(tables))


def _row_namer(tables: Sequence[TableFile]) -> Callable[[int], str]:
    ends = np.cumsum([table.rows for table in tables])

    def where(row: int) -> str:
        position = int(np.searchsorted(ends, row, side="right"))
        return f"{tables[position].path}, row {row - int(ends[position]) + tables[position].rows}"

    return where


def _part(table: TableFile, column: str) -> Part:
    name = str(table.path)
    if column not in table.schema.names:
        listed = ", ".join(table.schema.names)
        raise DataError(f"{name}: has no column {column!r} (columns: {listed})")
    kind = table.schema.field(column).type
    if not _is_list(kind):
        raise ShapeError(f"{name}: column {column!r} is {kind}, and embeddings are lists of floats")
    number = str(kind.value_type).replace("halffloat", "float16").replace("double", "float64")
    check_dtype(f"{name}: column {column!r}", {"float": "float32"}.get(number, number))
    width = _width(table, column, kind)

    def read(step: int) -> Iterator[Array]:
        start = 0
        for batch in table.batches([column], step):
            yield _matrix(batch.column(column), width, name, start)
            start += batch.num_rows

    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    return Part(name, (table.rows, width), dtype, read)


def _width(table: TableFile, column: str, kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    first = next(table.batches([column], 1), None)
    if first is None or not first.num_rows:
        return 1
    return int(pc.list_value_length(first.column(0))[0].as_py() or 1)


def _matrix(column: Any, width: int, name: str, start: int) -> Array:
    """A batch's lists as (n, width); refuses rows that are null, ragged, or hold nulls."""
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(lengths != width)
    if len(bad):
        row, length = int(bad[0]), int(lengths[bad[0]])
        reason = "has no embedding" if length < 0 else f"is {length} wide, the first is {width}"
        raise DataError(
            f"{name}, row {start + row}: {reason}; leave the row out or encode it again"
        )
    flat = column.flatten()
    if flat.null_count:
        row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // width
        raise DataError(
            f"{name}, row {start + row}: holds nulls; leave the row out or encode it again"
        )
    values: Array = flat.to_numpy(zero_copy_only=False)
    return values.reshape(len(column), width)


def _vector_column(name: str, table: TableFile, modality: Modality, wanted: str | None) -> str:
    if wanted is not None:
        return wanted
    lists = _list_columns(table.schema)
    own, other = (
        (IMAGE_VECTORS, TEXT_VECTORS)
        if modality is Modality.IMAGE
        else (TEXT_VECTORS, IMAGE_VECTORS)
    )
    found = _first_of((*own, *EITHER_NAMES), lists)
    if found is None and len(lists) == 1 and _first_of(other, lists) is None:
        found = lists[0]
    if found is None:
        raise DataError(
            f"{name}: no column looks like the {modality} embeddings (columns: "
            f"{', '.join(table.schema.names) or 'none'}); name it with --{modality}-column"
        )
    return found


def _label_columns(tables: Sequence[TableFile], modality: Modality) -> dict[str, str]:
    """The columns of strings or integers that all tables have, by what they are."""
    plain = [
        field.name
        for field in tables[0].schema
        if is_plain(field.type) and all(field.name in table.schema.names for table in tables)
    ]
    found = {known: _first_of(names, plain) for known, names in _LABELS[modality].items()}
    return {known: column for known, column in found.items() if column is not None}


def _first_of(names: Sequence[str], there: Sequence[str]) -> str | None:
    by_name = {name.lower(): name for name in reversed(there)}
    return next((by_name[name] for name in names if name in by_name), None)


def _list_columns(schema: pa.Schema) -> list[str]:
    return [
        field.name
        for field in schema
        if _is_list(field.type) and not _is_string(field.type.value_type)
    ]


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # A view is what polars writes into Arrow files.
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_plain(kind: pa.DataType) -> bool:
    """Whether a column's values can be labels: strings or integers."""
    return _is_string(kind) or bool(pa.types.is_integer(kind))


def _strings(column: Any) -> list[str | None]:
    return [None if value is None else str(value) or None for value in column.to_pylist()]


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in PARQUET


def _parquet(file: Any) -> pq.ParquetFile:
    # Neither whole row groups nor whole columns are held: their size is the writer's choice.
    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)


def _arrow_batches(file: Any) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file, or of an Arrow stream, which is what `datasets` writes."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(file)
        return
    reader = pa.ipc.open_file(file)
    for position in range(reader.num_record_batches):
        yield reader.get_batch(position)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the dataset again") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: is no JSON object; save the dataset again")
    return document


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    with _reading_of(path):
        # An Arrow file is mapped, so that passing over its rows does not read them.
        mapped = not is_remote(path) and not _is_parquet(path)
        with pa.memory_map(str(path)) if mapped else path.open("rb") as file:
            yield file


@contextmanager
def _reading_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read ({reason}); write it again") from None
