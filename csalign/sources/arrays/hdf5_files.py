"""HDF5: datasets by name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from csalign.core.errors import ConfigError, DataError
from csalign.sources.arrays.base import Array
from csalign.sources.arrays.named import Container, Header

_MOST_CHUNK_BYTES = 1 << 30


@dataclass
class _Datasets:
    path: Path
    file: Any

    def headers(self) -> Mapping[str, Header]:
        import h5py

        found: dict[str, Header] = {}

        def visit(name: str | bytes, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.shape:
                if isinstance(name, bytes):
                    raise DataError(f"{self.path}: the name {name!r} is not UTF-8; rename it")
                if item.is_virtual or item.external:
                    raise DataError(
                        f"{self.path}:{name}: lies in other files, which are not followed; write "
                        "it into one file, as h5repack does"
                    )
                size = item.dtype.itemsize * prod(item.chunks or (0,))
                if size > _MOST_CHUNK_BYTES:
                    raise DataError(
                        f"{self.path}:{name}: has chunks of {size >> 20} MiB, each of which would "
                        f"be read whole; write it with chunks of at most {_MOST_CHUNK_BYTES >> 20}"
                    )
                if not item.id.get_storage_size():
                    raise DataError(f"{self.path}:{name}: holds no data; write it again")
                found[name] = Header(item.shape, item.dtype.newbyteorder("=").name)

        self.file.visititems(visit)
        return found

    def rows(self, name: str, step: int) -> Iterator[Array]:
        data = self.file[name]
        for start in range(0, len(data), step):
            yield data[start : start + step]

    def owners(self) -> Mapping[str, str]:
        return {}


@contextmanager
def open_hdf5(path: Path) -> Iterator[Container]:
    """Open an .h5; slices are read from it, never the whole.

    Raises:
        ConfigError: h5py is not installed.
        DataError: it is damaged.
    """
    try:
        import h5py
    except ImportError:
        raise ConfigError(f"{path}: needs h5py to be read; pip install 'csalign[hdf5]'") from None
    try:
        with path.open("rb") as raw, h5py.File(raw, "r") as file:
            yield _Datasets(path, file)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: is no readable HDF5 file ({error})") from None
