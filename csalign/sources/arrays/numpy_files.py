""".npy and .npz: read through a plain file, so that a URL does as well as a path."""

import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from shutil import copyfileobj, disk_usage
from typing import IO, Any

import numpy as np

from csalign.core.errors import DataError
from csalign.sources.arrays.base import Array, Part, Vectors, check_array
from csalign.sources.arrays.named import Header

_DAMAGES = (
    ValueError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    # NumPy reads headers as Python's literals.
    tokenize.TokenError,
    SyntaxError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True)
class _Layout:
    """What an .npy says of itself: shape, Fortran order, type, and where the numbers begin."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int


def read_npy(path: Path) -> Vectors:
    """The embeddings in an .npy.

    Raises:
        DataError: it is damaged or cut short, or holds Python objects.
        ShapeError: it cannot be embeddings.
    """
    with _reading(path), path.open("rb") as file:
        layout = _layout(file)
        if layout.dtype.hasobject:
            raise ValueError("Python objects")
        _check_size(layout, path.stat().st_size)
    check_array(str(path), layout.shape, layout.dtype.newbyteorder("=").name)

    def read(step: int) -> Iterator[Array]:
        with _reading(path), path.open("rb") as file:
            yield from _rows(file, layout, step)

    return Vectors(str(path), (Part(str(path), layout.shape, layout.dtype, read),))


def read_integers(path: Path) -> list[int]:
    """A whole .npy of integers, which is small.

    Raises:
        DataError: it is not there, is damaged, or holds anything else.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with _reading(path), path.open("rb") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path}: has shape {array.shape} of {array.dtype}; give a list of integers"
        )
    return [int(value) for value in array]


@dataclass
class NpzFile:
    """An open .npz as a `named.Container`."""

    archive: zipfile.ZipFile

    def headers(self) -> Mapping[str, Header]:
        """Shape and type of each array."""
        found = {}
        for member in self.archive.infolist():
            if member.filename.endswith(".npy"):
                with self.archive.open(member) as file:
                    layout = _layout(file)
                _check_size(layout, member.file_size)
                name = "object" if layout.dtype.hasobject else layout.dtype.newbyteorder("=").name
                found[member.filename.removesuffix(".npy")] = Header(layout.shape, name)
        return found

    def rows(self, name: str, step: int) -> Iterator[Array]:
        """Stream an array; one in Fortran order goes through a temporary file."""
        with self.archive.open(f"{name}.npy") as file, tempfile.TemporaryFile() as copy:
            layout = _layout(file)
            if not layout.fortran:
                yield from _rows(file, layout, step)
                return
            size = prod(layout.shape) * layout.dtype.itemsize
            folder = tempfile.gettempdir()
            if size > disk_usage(folder).free:
                raise ValueError(
                    f"{name} is in Fortran order, and read by way of {folder}, where {size >> 20} "
                    "MiB are not free; save it in C order"
                )
            copy.seek(layout.offset)  # seeking in a compressed member reads it again and again
            copyfileobj(file, copy, 1 << 20)
            yield from _rows(copy, layout, step)

    def owners(self) -> Mapping[str, str]:
        """None are known."""
        return {}


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """Open an .npz.

    Raises:
        DataError: it is damaged.
    """
    with _reading(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        yield NpzFile(archive)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGES as error:
        if "object" in str(error).lower():
            raise DataError(
                f"{path}: holds Python objects, which csalign never unpickles; save a plain array "
                "with numpy.save(path, array.astype('float32'))"
            ) from None
        raise DataError(f"{path}: is no readable NumPy file ({error})") from None


def _layout(file: IO[bytes]) -> _Layout:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"version {version} of the format is for tables, not arrays")
    shape, fortran, dtype = read_header(file)
    if any(count < 0 for count in shape):
        raise ValueError(f"its header says shape {shape}")
    return _Layout(shape, fortran and len(shape) > 1, dtype, file.tell())


def _check_size(layout: _Layout, there: int) -> None:
    size = layout.offset + prod(layout.shape) * layout.dtype.itemsize
    if there < size and not layout.dtype.hasobject:
        raise ValueError(f"it was cut short: {there} bytes of {size}")


def _rows(file: IO[bytes], layout: _Layout, step: int) -> Iterator[Array]:
    """Read an array in order; the file stands, or can be set, at its first number."""
    rows, trailing = layout.shape[0], layout.shape[1:]
    get = partial(_columnwise, file, layout) if layout.fortran else partial(_next, file, layout)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        if not layout.fortran and start == 0 and file.tell() != layout.offset:
            file.seek(layout.offset)
        yield get(start, count).reshape(count, *trailing)


def _next(file: IO[bytes], layout: _Layout, _: int, count: int) -> Array:
    return _numbers(file, layout, count * prod(layout.shape[1:]))


def _columnwise(file: IO[bytes], layout: _Layout, start: int, count: int) -> Array:
    """Rows of an array in Fortran order, which lie column by column."""
    rows, trailing = layout.shape[0], layout.shape[1:]
    columns = np.empty((prod(trailing), count), layout.dtype)
    for column in range(len(columns)):
        file.seek(layout.offset + (column * rows + start) * layout.dtype.itemsize)
        columns[column] = _numbers(file, layout, count)
    return columns.reshape(*trailing[::-1], count).T


def _numbers(file: IO[bytes], layout: _Layout, count: int) -> Array:
    size = count * layout.dtype.itemsize
    data = file.read(size)
    if len(data) != size:
        raise ValueError("it was cut short")
    return np.frombuffer(data, layout.dtype)
