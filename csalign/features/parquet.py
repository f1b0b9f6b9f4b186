"""Write Parquet files whose vectors are copied in blocks.

pyarrow encodes a list column value by value, which takes most of the time of a large import. As all
vectors of a column have one width, their levels are known: this module writes the pages of that
column itself, and has pyarrow write all others. The format is Parquet's, as pyarrow would write it:
uncompressed plain pages (version 1) with checksums.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC = b"PAR1"
_PAGE_BYTES = 1 << 20
# Numbers of Parquet's own enumerations.
_FLOAT, _FIXED_BYTES, _PLAIN, _RLE, _UNCOMPRESSED, _DATA_PAGE = 4, 7, 0, 3, 0, 0
# Types of Thrift's compact protocol.
_I16, _I32, _I64, _BINARY, _LIST, _STRUCT = 4, 5, 6, 8, 9, 12

Struct = dict[int, tuple[int, Any]]
"""Type and value of each field of a Thrift structure, by its number."""


class VectorWriter:
    """Write row groups of a table of which one column holds vectors; use as a context manager.

    Args:
        path: the file, on a local disk.
        schema: of the table.
        vectors: the column of vectors: fixed-size lists of float16 or float32 without nulls.
        options: of `pyarrow.parquet.ParquetWriter`, for the other columns.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, vectors: str, options: Mapping[str, Any]
    ) -> None:
        self._place = schema.get_field_index(vectors)
        self._vectors = schema.field(vectors)
        self._others = schema.remove(self._place)
        self._options = options
        self._groups: list[Struct] = []
        self._rows = 0
        self._footer, _ = _read_footer(_written(schema, [], options))
        self._file: BinaryIO = path.open("wb")
        self._file.write(_MAGIC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write_group(self, table: pa.Table) -> None:
        """Append a row group, of one row at least."""
        content = _written(self._others, [table.drop_columns(self._vectors.name)], self._options)
        footer, end = _read_footer(content)
        ((group,),) = (footer[4][1][1],)
        start = self._file.tell()
        self._file.write(memoryview(content)[len(_MAGIC) : end])
        columns = group[1][1][1]
        for column in columns:
            held = column[3][1]
            for field in (9, 10, 11):  # offsets of the data, index and dictionary pages
                if field in held:
                    held[field] = (_I64, held[field][1] + start - len(_MAGIC))
        own = self._write_vectors(table.column(self._vectors.name))
        columns.insert(self._place, {2: (_I64, 0), 3: (_STRUCT, own)})
        sizes = [sum(column[3][1][field][1] for column in columns) for field in (6, 7)]
        group |= {
            2: (_I64, sizes[0]),
            5: (_I64, start),
            6: (_I64, sizes[1]),
            7: (_I16, len(self._groups)),
        }
        self._groups.append(group)
        self._rows += len(table)

    def close(self) -> None:
        """Write the footer."""
        self._footer |= {3: (_I64, self._rows), 4: (_LIST, (_STRUCT, self._groups))}
        footer = _encoded(self._footer)
        self._file.write(footer + len(footer).to_bytes(4, "little") + _MAGIC)
        self._file.close()

    def _write_vectors(self, column: pa.ChunkedArray) -> Struct:
        """Write the pages of the vectors; return the metadata of their column chunk."""
        width, number = self._vectors.type.list_size, self._vectors.type.value_type
        size = width * number.bit_width // 8
        start = self._file.tell()
        for chunk in column.chunks:
            flat: npt.NDArray[Any] = np.ascontiguousarray(chunk.flatten().to_numpy())
            values = flat.view(np.uint8).data
            step = max(1, _PAGE_BYTES // size)
            for row in range(0, len(chunk), step):
                rows = min(step, len(chunk) - row)
                levels = _levels(rows, width)
                page = values[row * size : (row + rows) * size]
                checksum = zlib.crc32(page, zlib.crc32(levels))
                header: Struct = {
                    1: (_I32, _DATA_PAGE),
                    2: (_I32, len(levels) + len(page)),
                    3: (_I32, len(levels) + len(page)),
                    4: (_I32, checksum - (checksum >> 31 << 32)),  # signed
                    5: (
                        _STRUCT,
                        {
                            1: (_I32, rows * width),
                            2: (_I32, _PLAIN),
                            3: (_I32, _RLE),
                            4: (_I32, _RLE),
                        },
                    ),
                }
                self._file.write(_encoded(header) + levels)
                self._file.write(page)
        total = self._file.tell() - start
        path = [self._vectors.name.encode(), b"list", b"element"]
        return {
            1: (_I32, _FLOAT if number == pa.float32() else _FIXED_BYTES),
            2: (_LIST, (_I32, [_PLAIN, _RLE])),
            3: (_LIST, (_BINARY, path)),
            4: (_I32, _UNCOMPRESSED),
            5: (_I64, len(column) * width),
            6: (_I64, total),
            7: (_I64, total),
            9: (_I64, start),
        }


def _levels(rows: int, width: int) -> bytes:
    """Return the repetition and definition levels of vectors, run-length encoded.

    A vector begins with a 0, which its other values follow with 1; all values are there.
    """
    run = b"\x02\x00" + (_varint((width - 1) << 1) + b"\x01" if width > 1 else b"")
    repetition, definition = run * rows, _varint(rows * width << 1) + b"\x01"
    return b"".join(len(part).to_bytes(4, "little") + part for part in (repetition, definition))


def _written(schema: pa.Schema, tables: list[pa.Table], options: Mapping[str, Any]) -> pa.Buffer:
    """Write tables with pyarrow into memory, each as a row group."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
    return sink.getvalue()


def _read_footer(content: pa.Buffer) -> tuple[Struct, int]:
    """Return the metadata of a Parquet file, and where it begins."""
    view = memoryview(content)
    start = len(view) - 8 - int.from_bytes(view[-8:-4], "little")
    return _decoded(bytes(view[start:-8]), 0)[0], start


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _encoded(struct: Struct) -> bytes:
    """Encode a structure in Thrift's compact protocol."""
    out, last = bytearray(), 0
    for number, (kind, value) in sorted(struct.items()):
        short = 0 < number - last < 16
        out += bytes([(number - last) << 4 | kind]) if short else bytes([kind]) + _zigzag(number)
        out += _encoded_value(kind, value)
        last = number
    return bytes(out) + b"\0"


def _encoded_value(kind: int, value: Any) -> bytes:
    if kind in (_I16, _I32, _I64):
        return _zigzag(value)
    if kind == _BINARY:
        return _varint(len(value)) + bytes(value)
    if kind == _STRUCT:
        return _encoded(value)
    if kind == _LIST:
        inner, items = value
        head = bytes([len(items) << 4 | inner]) if len(items) < 15 else bytes([0xF0 | inner])
        size = b"" if len(items) < 15 else _varint(len(items))
        return head + size + b"".join(_encoded_value(inner, item) for item in items)
    return bytes(value)  # booleans are in their type; doubles and bytes are kept as they are


def _zigzag(value: int) -> bytes:
    return _varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _decoded(data: bytes, at: int) -> tuple[Struct, int]:
    """Decode a structure, and return where it ends."""
    struct: Struct = {}
    last = 0
    while data[at]:
        kind, short = data[at] & 15, data[at] >> 4
        at += 1
        if not short:
            last, at = _read_zigzag(data, at)
        last += short
        value, at = _decoded_value(data, at, kind)
        struct[last] = (kind, value)
    return struct, at + 1


def _decoded_value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (_I16, _I32, _I64):
        return _read_zigzag(data, at)
    if kind == _BINARY:
        size, at = _read_varint(data, at)
        return data[at : at + size], at + size
    if kind == _STRUCT:
        return _decoded(data, at)
    if kind == _LIST:
        inner, size = data[at] & 15, data[at] >> 4
        at += 1
        if size == 15:
            size, at = _read_varint(data, at)
        items = []
        for _ in range(size):
            item, at = _decoded_value(data, at, inner)
            items.append(item)
        return (inner, items), at
    size = {1: 0, 2: 0, 3: 1, 7: 8}[kind]
    return data[at : at + size], at + size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _read_zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return value >> 1 ^ -(value & 1), at
