"""Rows in a temporary file that is mapped, for sets that are larger than memory."""

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from csalign.core import distributed
from csalign.core.errors import OutputError

Array = npt.NDArray[Any]
Ints = npt.NDArray[Any]

MIB = 1 << 20
_SPARE_BYTES = 256 * MIB  # of the disk, for what else the run writes
_HELD_BYTES = 128 * MIB  # of a map that may be resident, before its pages are let go
_FAULT_BYTES = 64 << 10  # what the kernel maps around a byte that is touched, or more: up to 2 MiB
_DENSE = 4  # rows that span at most so many times their number are read in one go
_BLOCK_BYTES = MIB  # read ahead at a time


class Vectors(Protocol):
    """Rows (n, d) that are in memory or elsewhere; what is taken of them is a NumPy array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    @property
    def dtype(self) -> Any:
        """Of the values."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def __setitem__(self, key: Any, values: Any, /) -> None: ...


class MappedRows:
    """Rows (n, d) in a file without a name, which ends with the process, however that ends.

    Few of its pages are resident at a time; the kernel keeps as many cached as there is room for.

    Args:
        shape: (n, d).
        dtype: of the values.
        folder: where the file is, on a local disk.

    Attributes:
        shape: as given.
        dtype: as given.

    Raises:
        OutputError: the disk has not that much room, or the folder cannot be written to.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any], folder: Path) -> None:
        size = _file_bytes(shape, dtype)
        free = shutil.disk_usage(folder).free
        if size + _SPARE_BYTES > free:
            raise OutputError(_too_small(folder, size, free))
        try:
            with tempfile.TemporaryFile(dir=folder, prefix="csalign-") as file:
                # Now, rather than as a fault at some write to a page of the map.
                os.posix_fallocate(file.fileno(), 0, size)
                self._begin(shape, dtype, os.dup(file.fileno()))
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{_too_small(folder, size, free)} ({reason})") from error

    @classmethod
    def of_other(cls, shape: tuple[int, int], dtype: np.dtype[Any], address: str) -> "MappedRows":
        """Those that another process of this machine holds.

        Args:
            shape: theirs.
            dtype: theirs.
            address: theirs; of no use once that process has let go of them.

        Raises:
            OutputError: they cannot be reached.
        """
        rows = cls.__new__(cls)
        try:
            rows._begin(shape, dtype, os.open(address, os.O_RDWR))
        except OSError as error:
            raise OutputError(
                f"{address}: the rows of another process cannot be mapped "
                f"({error.strerror or error}); train in one process"
            ) from error
        return rows

    @property
    def address(self) -> str:
        """Where other processes of this machine find the file."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def array(self) -> Array:
        """The rows as an array, whose pages stay resident, as those of memory do."""
        self._map.madvise(mmap.MADV_NORMAL)
        return self._values

    def _begin(self, shape: tuple[int, int], dtype: np.dtype[Any], file: int) -> None:
        """Map an open file, which is now these rows' own."""
        self.shape, self.dtype, self._file = shape, np.dtype(dtype), file
        self._row_bytes = shape[1] * self.dtype.itemsize
        size = _file_bytes(shape, dtype)
        weakref.finalize(self, os.close, self._file)
        self._map = mmap.mmap(self._file, size)
        self._map.madvise(mmap.MADV_RANDOM)  # what is read in order is not read by the map
        values = np.frombuffer(self._map, self.dtype, count=shape[0] * shape[1])
        self._values = values.reshape(shape)
        self._held = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any, /) -> Array:
        """Rows by a slice, or by their numbers (k,); a copy."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._read(start, max(start, stop))[::step]
        rows = np.asarray(key)
        if not len(rows):
            return np.empty((0, self.shape[1]), self.dtype)
        first, last = int(rows.min()), int(rows.max())
        if first >= 0 and last - first < _DENSE * len(rows):
            dense: Array = self._read(first, last + 1)[rows - first]
            return dense
        found: Array = self._values[rows]
        self._hold(len(rows))
        return found

    def __setitem__(self, key: Any, values: Array, /) -> None:
        """Write rows, by a slice or by their numbers."""
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            data = np.ascontiguousarray(np.broadcast_to(values, (stop - start, self.shape[1])))
            self._write(data.astype(self.dtype, copy=False), start)
            return
        self._values[key] = values
        self._hold(len(values))

    def touch(self, rows: Ints) -> None:
        """Read what holds these rows, so that the kernel has it when they are taken."""
        block = max(1, _BLOCK_BYTES // self._row_bytes)
        for number in np.unique(rows // block).tolist():
            self._read(number * block, min((number + 1) * block, len(self)))

    def _hold(self, rows: int) -> None:
        """Let the pages go once many may be resident; they are not lost by that."""
        self._held += rows * max(_FAULT_BYTES, self._row_bytes)
        if self._held > _HELD_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._held = 0

    def _read(self, start: int, stop: int) -> Array:
        found = np.empty((stop - start, self.shape[1]), self.dtype)
        view, done = _bytes_of(found), 0
        while done < len(view):
            got = os.preadv(self._file, [view[done:]], start * self._row_bytes + done)
            if not got:
                raise OSError("a temporary file ended early")
            done += got
        return found

    def _write(self, rows: Array, start: int) -> None:
        view, done = _bytes_of(rows), 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], start * self._row_bytes + done)


def _file_bytes(shape: tuple[int, int], dtype: np.dtype[Any]) -> int:
    return max(1, shape[0] * shape[1] * np.dtype(dtype).itemsize)


def _bytes_of(rows: Array) -> memoryview:
    return memoryview(rows.reshape(-1).view(np.uint8).data)


def _too_small(folder: Path, size: int, free: int) -> str:
    return (
        f"{folder}: has {free // MIB} MiB free, and embeddings that do not fit into memory take "
        f"{-(-size // MIB)}; free some space, set TMPDIR to a larger disk, or raise --memory"
    )


class Room:
    """Memory for rows, and where those go that do not fit.

    The processes of a job on one machine have the same rows in common, in a mapped file even where
    they fit: one of them fills them, see `fills`.

    Args:
        memory: bytes.
        folder: for temporary files.

    Attributes:
        left: bytes that are still free.
        folder: as given.
    """

    def __init__(self, memory: int, folder: Path) -> None:
        self.left = memory
        self.folder = folder

    @property
    def fills(self) -> bool:
        """Whether it is for this process to fill the rows; the others wait until it has."""
        return distributed.world().local_rank == 0

    def rows(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Vectors:
        """Room for rows (n, d), to be filled.

        Raises:
            OutputError: they do not fit into memory, nor on the disk.
        """
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        if distributed.world().local_size > 1:
            return self._shared(shape, dtype, size)
        if size > self.left:
            return MappedRows(shape, dtype, self.folder)
        self.left -= size
        found: Array = np.empty(shape, dtype)
        return found

    def _shared(self, shape: tuple[int, int], dtype: np.dtype[Any], size: int) -> Vectors:
        """Rows that this process and the others of this machine have in common."""
        world = distributed.world()
        made = MappedRows(shape, dtype, self.folder) if self.fills else None
        own: dict[str, Any] = {} if made is None else {"address": made.address}
        own["fits"] = size <= self.left
        found = distributed.all_gather(own)[world.rank - world.local_rank]
        rows = made or MappedRows.of_other(shape, dtype, found["address"])
        distributed.barrier()  # for all to have opened it
        if not found["fits"]:
            return rows
        self.left -= size
        return rows.array


class ReadAhead:
    """Reads the windows of an epoch, the next one in a thread while one is used.

    Args:
        window: rows of the shorter list that `begin` gets.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="csalign-read-ahead")
        self._wanted: Sequence[tuple[MappedRows, Ints]] = ()
        self._pending: dict[int, Future[None]] = {}

    def begin(self, wanted: Sequence[tuple[MappedRows, Ints]]) -> None:
        """Begin an epoch.

        Args:
            wanted: the rows (k,) that it takes of each array, in the order in which it does.
        """
        self._wanted, self._pending = wanted, {}

    def reach(self, position: int) -> None:
        """Wait until what is taken at a position is there, and begin to read the next window."""
        window = position // self.window
        for number in (window, window + 1):
            if number not in self._pending:
                self._pending[number] = self._thread.submit(self._touch, number)
        self._pending.pop(window - 1, None)
        self._pending[window].result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _touch(self, number: int) -> None:
        part = slice(number * self.window, (number + 1) * self.window)
        for values, rows in self._wanted:
            values.touch(rows[part])
