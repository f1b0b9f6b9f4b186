"""The vectors of Parquet files, read and written as plain pages beside Arrow, without its lists."""

import hashlib
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csalign.core.arrays import Array

# Of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 3, 4, 5, 6, 8, 9, 12
_DATA_PAGE, _PLAIN, _RLE = 0, 0, 3
_PHYSICAL = {"<f2": (7, "FIXED_LEN_BYTE_ARRAY"), "<f4": (4, "FLOAT")}
_BLOCK = 256 << 10  # bytes that a CPU's caches hold
_HEAD = 16 << 10  # bytes of a page, most often with its levels
_NOT_SO = (KeyError, IndexError, ValueError, TypeError, RecursionError)


def fixed_lists(values: Array, kind: pa.DataType) -> pa.Array:
    """Return rows (n, d) as lists of Arrow, not copied."""
    flat = pa.array(values.reshape(-1), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def read_vectors(file: IO[bytes], chunk: Any, column: Any, out: Array, *, verified: bool) -> bool:
    """Read the vectors of a row group into an array if they are stored as plain pages.

    Args:
        file: unbuffered.
        chunk: metadata of the column in the row group.
        column: its schema.
        out: (n, d), contiguous, filled if true is returned.
        verified: omit the checksums of the pages.

    Returns:
        False if they are stored in any other form, or are damaged.
    """
    form = (column.max_definition_level, column.max_repetition_level, column.physical_type)
    physical = _PHYSICAL.get(out.dtype.str, (0, ""))[1]
    # Not `chunk.compression`, which ends the process if it is damaged: the levels and sizes of a
    # compressed page are not these.
    is_usual = not chunk.has_dictionary_page and not chunk.file_path
    if not is_usual or form != (1, 1, physical) or chunk.num_values != out.size:
        return False
    if physical != "FLOAT" and column.length != out.itemsize:
        return False
    at, done = chunk.data_page_offset, 0
    end = at + chunk.total_compressed_size
    try:
        while done < len(out):
            header, start = _decode(head := _read(file, at, min(_HEAD, end - at)))
            kind, size, unpacked = (header[field][1] for field in (1, 3, 2))
            count, *encodings = (header[5][1][field][1] for field in (1, 2, 3, 4))
            rows, rest = divmod(count, out.shape[1])
            levels = full_levels(rows, out.shape[1])
            values = out[done : done + rows].reshape(-1).view(np.uint8)
            is_usual = (kind, *encodings, rest) == (_DATA_PAGE, _PLAIN, _RLE, _RLE, 0)
            stored = size == unpacked == len(levels) + count * out.itemsize
            if not (is_usual and stored) or rows > len(out) - done or at + start + size > end:
                return False
            if start + len(levels) > len(head):
                head = _read(file, at, start + len(levels))
            file.seek(at + start + len(levels))
            found = head[start : start + len(levels)]
            if found != levels or file.readinto(values) != values.nbytes:  # type: ignore[attr-defined]
                return False
            own = None if verified else zlib.crc32(values.data, zlib.crc32(found))
            if own is not None and own != header[4][1] & 0xFFFFFFFF:
                return False
            at, done = at + start + size, done + rows
    except _NOT_SO:
        return False
    return bool(at == end)


def _read(file: IO[bytes], start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


@lru_cache(maxsize=64)
def full_levels(rows: int, width: int) -> bytes:
    """Return the levels of a page of `rows` lists of `width` values, where none is null."""
    if not 0 < rows * width < 1 << 31:
        raise ValueError(f"{rows} x {width}")
    first = b"\2\0", width - 1  # a run of one 0, for a list that begins
    if width % 8 == 0 and width > 8:
        first = b"\3\xfe", width - 8  # as Arrow has it: eight bits
    repetition = (first[0] + (_varint(first[1] << 1) + b"\1" if first[1] else b"")) * rows
    definition = _varint(rows * width << 1) + b"\1"
    return b"".join(len(own).to_bytes(4, "little") + own for own in (repetition, definition))


class VectorFile:
    """Write a Parquet file whose column `name` has vectors without nulls; Arrow writes the others.

    Attributes:
        bytes: written so far.
        sha256: updated with all of them.
    """

    def __init__(self, path: Path, columns: pa.Schema, name: str, **options: Any) -> None:
        self.bytes, self.sha256 = 0, hashlib.sha256()
        self._name, self._place = name, columns.get_field_index(name)
        self._chunks: list[tuple[int, dict[int, Any]]] = []
        self._tail: list[bytes] | None = None
        empty = pa.BufferOutputStream()
        pq.ParquetWriter(empty, columns, **options).close()
        self._columns = _footer(empty.getvalue().to_pybytes())
        self._file = path.open("wb", buffering=0)
        others = columns.remove(self._place)
        self._others = pq.ParquetWriter(pa.PythonFile(self, "w"), others, **options)

    def write(self, data: Any) -> None:
        """Append bytes; Arrow calls this."""
        if self._tail is not None:
            self._tail.append(bytes(data))
            return
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        while len(view):
            written = self._file.write(view[:_BLOCK])
            self.sha256.update(view[:written])
            view = view[written:]

    @property
    def closed(self) -> bool:
        """Return False; Arrow asks this."""
        return False

    def flush(self) -> None:
        """Do nothing; Arrow calls this."""

    def write_rows(self, table: pa.Table) -> None:
        """Append rows as a row group; raises ValueError if a vector is null."""
        column = table.column(self._name)
        self._others.write_table(table.drop_columns(self._name), table.num_rows)
        values = [piece.flatten().to_numpy(zero_copy_only=True) for piece in column.chunks]
        values = [own.astype(own.dtype.newbyteorder("<"), copy=False) for own in values]
        width, kind = column.type.list_size, _PHYSICAL[values[0].dtype.str][0]
        parts = [full_levels(len(column), width), *(own.data.cast("B") for own in values)]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        size, count, offset = sum(map(len, parts)), sum(map(len, values)), self.bytes
        if count != len(column) * width:
            raise ValueError(f"{self._name} has null values")
        signed = checksum - (checksum >> 31 << 32)
        page = _integers({1: count, 2: _PLAIN, 3: _RLE, 4: _RLE})
        header = _integers({1: _DATA_PAGE, 2: size, 3: size, 4: signed}) | {5: (_STRUCT, page)}
        for part in (_encode(header), *parts):
            self.write(part)
        size = self.bytes - offset
        chunk = _integers({1: kind, 4: 0}) | {
            2: (_LIST, (_I32, [_PLAIN, _RLE])),
            3: (_LIST, (_BINARY, [self._name.encode(), b"list", b"element"])),
            **{
                field: (_I64, own) for field, own in ((5, count), (6, size), (7, size), (9, offset))
            },
        }
        self._chunks.append((size, {2: (_I64, 0), 3: (_STRUCT, chunk)}))

    def discard(self) -> None:
        """Close the file as it is, unless it is closed."""
        if not self._file.closed:
            self._tail = []
            with suppress(pa.ArrowException, OSError):
                self._others.close()
            self._file.close()

    def close(self) -> None:
        """Complete the file with a footer of all columns."""
        self._tail = []
        self._others.close()
        content, self._tail, shift = b"".join(self._tail), None, 0
        footer = _footer(content) | {field: self._columns[field] for field in (2, 5, 7)}
        for group, (size, own) in zip(footer[4][1][1], self._chunks, strict=True):
            chunks = group[1][1][1]
            for chunk in chunks:
                _add(chunk[3][1], {9: shift, 10: shift, 11: shift})
            chunks.insert(self._place, own)
            _add(group, {2: size, 5: shift, 6: size})
            shift += size
        encoded = _encode(footer)
        self.write(encoded + len(encoded).to_bytes(4, "little") + b"PAR1")
        self._file.close()


def _footer(content: bytes) -> dict[int, Any]:
    size = int.from_bytes(content[-8:-4], "little")
    found: dict[int, Any] = _decode(content[-8 - size : -8])[0]
    return found


def _integers(values: dict[int, int]) -> dict[int, Any]:
    return {field: (_I32, value) for field, value in values.items()}


def _add(fields: dict[int, Any], amounts: dict[int, int]) -> None:
    for field in fields.keys() & amounts.keys():
        fields[field] = (fields[field][0], fields[field][1] + amounts[field])


def _decode(data: bytes, at: int = 0, kind: int = _STRUCT) -> tuple[Any, int]:
    """Read a value of Thrift's compact protocol; return it and where it ends.

    A struct is ``{field: (kind, value)}``, a list ``(kind, [value, ...])``.
    """
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind == _BYTE:
        return data[at], at + 1
    if kind in (_I16, _I32, _I64, _BINARY):
        number, at = _number(data, at)
        if kind != _BINARY:
            return number >> 1 ^ -(number & 1), at
        if at + number > len(data):
            raise IndexError(number)
        return data[at : at + number], at + number
    if kind == _LIST:
        (size, own), at = divmod(data[at], 16), at + 1
        size, at = _number(data, at) if size == 15 else (size, at)
        values = []
        for _ in range(size if own > _FALSE else 0):
            value, at = _decode(data, at, own)
            values.append(value)
        return (own, values), at
    if kind != _STRUCT:
        raise ValueError(kind)
    found, field = {}, 0
    while head := data[at]:
        if not head >> 4:
            raise ValueError("a field far from the one before it")
        field += head >> 4
        value, at = _decode(data, at + 1, head & 15)
        found[field] = (head & 15, value)
    return found, at + 1


def _number(data: bytes, at: int) -> tuple[int, int]:
    found = shift = 0
    while shift < 64:
        found |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return found, at
    raise ValueError("a number of more than 64 bits")


def _encode(value: Any, kind: int = _STRUCT) -> bytes:
    """Write what `_decode` reads."""
    if kind in (_TRUE, _FALSE):
        return b""
    if kind == _BYTE:
        return bytes([value])
    if kind in (_I16, _I32, _I64):
        return _varint(value << 1 ^ value >> 63)
    if kind == _BINARY:
        return b"".join((_varint(len(value)), value))
    if kind == _LIST:
        own, values = value
        size = len(values)
        head = bytes([size << 4 | own]) if size < 15 else bytes([240 | own]) + _varint(size)
        return head + b"".join(_encode(item, own) for item in values)
    found, last = [], 0
    for field, (own, item) in sorted(value.items()):
        found += [bytes([(field - last) << 4 | own]), _encode(item, own)]
        last = field
    return b"".join(found) + b"\0"


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
