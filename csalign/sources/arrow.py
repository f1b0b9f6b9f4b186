"""Read Parquet, Arrow and Feather files in batches of bounded size; every error names the file."""

import logging
import mmap
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csalign.core.arrays import Array, Ints
from csalign.core.errors import DataError, reason_of
from csalign.core.paths import is_remote, stand_in
from csalign.sources.records.files import local_copy, open_file, translate_errors

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather")

log = logging.getLogger(__name__)

_LEAST_WIDTH = 8  # columns that are one vector
_SHORTENED = r"\.\.\.|\u2026"  # by NumPy or torch, by polars
_REMEDY = "write or download it again"
_KINDS = {
    "text": ("string", "large_string", "string_view"),
    "bytes": ("binary", "large_binary", "fixed_size_binary", "binary_view"),
    "list": ("list", "large_list", "fixed_size_list", "list_view", "large_list_view"),
    "struct": ("struct",),
    "integer": ("integer",),
    "number": ("floating", "decimal"),
    "null": ("null",),
}


class DamagedError(DataError):
    """The content of a file is not valid."""


class InvalidText:
    """In place of a text that is not UTF-8."""

    def __repr__(self) -> str:
        return "invalid UTF-8"


@dataclass(frozen=True)
class ArrowFile:
    """An open Parquet, Arrow or Feather file."""

    path: Path  # of the file
    schema: pa.Schema  # its columns
    names: tuple[str, ...]  # of the columns
    group_ends: Ints  # cumulative rows of the row groups or batches
    rows: int  # as the file states, which may be more than its groups contain
    _read: Callable[[int, list[str], int], Iterator[pa.RecordBatch]]

    def batches(
        self, columns: Sequence[str], size: int, start: int = 0
    ) -> Iterator[pa.RecordBatch]:
        """Stream some columns from row `start` on, at most `size` rows at a time.

        Raises:
            DamagedError: the content is damaged.
        """
        group = int(np.searchsorted(self.group_ends, start, side="right"))
        row = int(self.group_ends[group - 1]) if group else 0
        with _named_errors(self.path, pa.ArrowException, OSError):
            for batch in self._read(group, list(columns), size):
                skipped = max(0, start - row)
                row += len(batch)
                if row > start:
                    yield batch[skipped:]

    def end_of_group(self, row: int) -> int:
        """Return the end of the group that contains a row; damage does not extend beyond it."""
        group = int(np.searchsorted(self.group_ends, row, side="right"))
        return int(self.group_ends[group]) if group < len(self.group_ends) else self.rows


@contextmanager
def open_arrow(path: Path) -> Iterator[ArrowFile]:
    """Open an .arrow or .feather, or else a Parquet file; reads its metadata only.

    Raises:
        DamagedError: it is not of the format that its suffix states.
        DataError: it cannot be opened.
    """
    with ExitStack() as stack:
        # An object store that fails is not a damaged file: another attempt may succeed.
        damage = () if is_remote(path) else (OSError, ValueError)
        with _named_errors(path, pa.ArrowException, *damage):
            if path.suffix.lower() in ARROW:
                local = stack.enter_context(local_copy(path))
                file = _open_ipc(path, stack.enter_context(open_file(local)).fileno())
            else:
                content = stack.enter_context(path.open("rb")) if is_remote(path) else path
                file = _open_parquet(path, stack, content)
        yield file


def _open_parquet(path: Path, stack: ExitStack, content: Any) -> ArrowFile:
    # Buffered, so that a large row group is read piece by piece.
    parquet = stack.enter_context(pq.ParquetFile(content, buffer_size=1 << 20, pre_buffer=False))
    metadata, schema = parquet.metadata, parquet.schema_arrow
    groups = range(parquet.num_row_groups)
    ends = np.cumsum([metadata.row_group(group).num_rows for group in groups], dtype=np.int64)

    def read(group: int, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
        rest = list(groups[group:])
        return parquet.iter_batches(size, rest, columns, use_threads=False)  # type: ignore[no-any-return]

    return ArrowFile(path, schema, tuple(schema.names), ends, metadata.num_rows, read)


def _open_ipc(path: Path, descriptor: int) -> ArrowFile:
    # Mapped into memory, so that skipped rows are not read.
    content = pa.py_buffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    is_file = content.slice(0, 6).to_pybytes() == b"ARROW1"

    def batches() -> Iterator[pa.RecordBatch]:
        if not is_file:
            yield from pa.ipc.open_stream(content)
            return
        reader = pa.ipc.open_file(content)
        yield from map(reader.get_batch, range(reader.num_record_batches))

    def read(group: int, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
        for index, batch in enumerate(batches()):
            for start in range(0, len(batch) if index >= group else 0, size):
                yield batch.select(columns)[start : start + size]

    schema = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(content).schema
    ends = np.cumsum([len(batch) for batch in batches()], dtype=np.int64)
    rows = int(ends[-1]) if len(ends) else 0
    return ArrowFile(path, schema, tuple(schema.names), ends, rows, read)


@contextmanager
def _named_errors(path: Path, *damage: type[Exception]) -> Iterator[None]:
    with translate_errors(path):
        try:
            yield
        except damage as error:
            reason = getattr(error, "strerror", None) or reason_of(error)
            problem = stand_in(path) or f"cannot be read ({reason}); {_REMEDY}"
            raise DamagedError(f"{path}: {problem}") from None


def kind_of(held: pa.DataType) -> str:
    """Return the kind of a column: text, bytes, list, struct, integer, number, null or other."""
    if pa.types.is_dictionary(held):
        held = held.value_type
    if isinstance(held, pa.BaseExtensionType):
        held = held.storage_type
    for kind, names in _KINDS.items():
        if any(getattr(pa.types, f"is_{name}")(held) for name in names):
            return kind
    return "other"


def column_values(column: pa.Array) -> list[Any]:
    """Convert a column to Python values, with an `InvalidText` for text that is not UTF-8."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return InvalidText()


def to_strings(column: pa.Array, name: str, path: Path, start: int = 0) -> pa.Array:
    """Convert n texts, numbers, times, bytes, or structs or lists of one of them to large_string.

    "" and NaN become null.

    Equal values of different types become equal strings: 7, 7.0, Decimal("7.00") and b"7" are "7".

    Raises:
        DataError: a text is not UTF-8, a list has several values, or a float is above 2**53.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        values = column.dictionary
        if kind_of(values.type) == "text":  # string views, as of polars, cannot be taken
            values = values.cast(pa.large_string())
        column = values.take(column.indices)
    kind = kind_of(column.type)
    if kind == "struct":
        field = max(0, column.type.get_field_index("path"))
        return to_strings(pc.struct_field(column, [field]), name, path, start)
    if kind == "list":
        lengths = pc.list_value_length(column)
        if (row := pc.greater(lengths, 1).index(True).as_py()) >= 0:
            raise DataError(
                f"{path}, row {start + row}: {name} has {lengths[row]} values; give every row one"
            )
        values = to_strings(column.flatten(), name, path, start)
        has_one = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False) > 0
        return values.take(pa.array(np.cumsum(has_one) - 1, mask=~has_one))
    if kind == "bytes":
        strings = _decoded(column)
    elif kind == "number":
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
            size = pc.abs(column.cast(pa.float64()))
            is_inexact = pc.and_(pc.greater_equal(size, 2.0**53), pc.less(size, 2.0**64))
            if (row := is_inexact.index(True).as_py()) >= 0:
                raise DataError(
                    f"{path}, row {start + row}: {name} is {column[row]}, and floats above 2**53 "
                    "do not keep every integer; store integers or texts"
                )
        with suppress(pa.ArrowInvalid):  # a fraction remains what it is
            column = column.cast(pa.int64())
        strings = pc.replace_substring_regex(column.cast(pa.large_string()), r"\.0*$", "")
    else:
        strings = column.cast(pa.large_string())
    if kind == "text":
        try:
            strings.validate(full=True)
        except pa.ArrowInvalid:
            bad = [isinstance(value, InvalidText) for value in column_values(column)]
            where = f"{path}, row {start + bad.index(True)}"
            raise DataError(f"{where}: {name} is not UTF-8; correct it") from None
    return pc.if_else(pc.equal(strings, ""), pa.scalar(None, strings.type), strings)


def _decoded(column: pa.Array) -> pa.Array:
    """Decode bytes as UTF-8, or write all of them as UUIDs or hexadecimal numbers."""
    with suppress(pa.ArrowInvalid):
        text = column.cast(pa.large_binary()).cast(pa.large_string())
        if not pc.any(pc.match_substring_regex(text, r"[\x00-\x08\x0e-\x1f]")).as_py():
            return text
    values = column.to_pylist()
    is_uuid = all(value is None or len(value) == 16 for value in values)
    write = (lambda value: str(uuid.UUID(bytes=value))) if is_uuid else bytes.hex
    return pa.array([None if v is None else write(v) for v in values], pa.large_string())


def gather_columns(file: ArrowFile) -> ArrowFile:
    """Present series of columns of floats, such as e0 to e511, as one column of lists each.

    Nothing changes in a file that has columns of lists.
    """
    series: dict[str, dict[int, str]] = {}
    for field in file.schema:
        if kind_of(field.type) == "list":
            return file
        name = re.fullmatch(r"(.*?)[_\-. ]*(\d+)", field.name)
        if name and pa.types.is_floating(field.type):
            series.setdefault(name[1] or "embedding", {})[int(name[2])] = field.name
    columns = {
        stem: [own[number] for number in sorted(own)]
        for stem, own in series.items()
        if len(own) >= _LEAST_WIDTH and min(own) in (0, 1) and max(own) - min(own) < len(own)
        if stem not in file.names
    }
    used = {name for own in columns.values() for name in own}
    fields = [field for field in file.schema if field.name not in used]
    for stem, own in columns.items():
        _inform(file.path, own[0], own[-1])
        fields.append(pa.field(stem, pa.list_(pa.float32(), len(own))))

    def read(group: int, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
        stored = [own for name in names for own in columns.get(name, [name])]
        for batch in file._read(group, stored, size):
            arrays = [
                _rows_of(batch.select(columns[name])) if name in columns else batch[name]
                for name in names
            ]
            yield pa.record_batch(arrays, names)

    schema = pa.schema(fields)
    return replace(file, schema=schema, names=tuple(schema.names), _read=read) if used else file


@cache
def _inform(path: Path, first: str, last: str) -> None:
    """Say once that columns are vectors, as a file is opened several times."""
    log.info("%s: columns %s to %s are read as vectors", path, first, last)


def _rows_of(batch: pa.RecordBatch) -> pa.Array:
    rows = np.column_stack(batch.columns).astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])


def describe(
    file: ArrowFile, known: Collection[str], are_vectors: Callable[[str], bool]
) -> dict[str, str]:
    """Return the types of all columns but the known ones; of texts named as vectors the start."""
    found = {own.name: str(own.type) for own in file.schema if own.name not in known}
    for name in filter(are_vectors, found):
        if kind_of(file.schema.field(name).type) == "text":
            for batch in islice(file.batches([name], 1), 1):
                first = batch[0][0].as_py() or ""
                found[name] += f" {first[:32]}{'...' if re.search(_SHORTENED, first) else ''}"
    return found


def lists_from(name: str, described: str) -> str:
    """Say how to convert a column to lists of floats, by its description from `describe`."""
    if described.endswith("..."):
        return "it was shortened when it was printed, and numbers are lost; write the vectors again"
    forms = {
        r"list": "df[{0!r}].str[0]",
        r"binary": "[numpy.frombuffer(v, 'float32') for v in df[{0!r}]]",
        r"string \[[^ ]*, ?": "df[{0!r}].map(json.loads)",
        r"string \[": "[numpy.fromstring(v.strip('[]'), sep=' ') for v in df[{0!r}]]",
        r"string [\w+/]{32}": "[numpy.frombuffer(b64decode(v), 'float32') for v in df[{0!r}]]",
    }
    form = next((form for pattern, form in forms.items() if re.search(pattern, described)), "")
    how = f": df[{name!r}] = {form.format(name)}" if form else ""
    return f"store one list of floats per row{how}"


def list_width(file: ArrowFile, column: str) -> int:
    """Return the width of a column of lists: fixed, or that of the first row, at least 1."""
    held = file.schema.field(column).type
    if pa.types.is_fixed_size_list(held):
        return int(held.list_size)
    first = next(file.batches([column], 1), None)
    return 1 if first is None else pc.list_value_length(first[0])[0].as_py() or 1


def to_matrix(column: pa.Array, width: int, name: str, start: int) -> Array:
    """Convert a column of (fixed-size) lists to an (n, width) array.

    Raises:
        DataError: a row is null, has another length, or contains a null.
    """
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    values = column.flatten()
    bad = np.flatnonzero(lengths != width)
    if len(bad):
        row, length = int(bad[0]), int(lengths[bad[0]])
        reason = "has no embedding" if length < 0 else f"has width {length}, the first has {width}"
    elif values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // width
        reason = "contains nulls"
    else:
        matrix: Array = values.to_numpy(zero_copy_only=False).reshape(-1, width)
        return matrix
    raise DataError(f"{name}, row {start + row}: {reason}; omit the row or encode it again")
