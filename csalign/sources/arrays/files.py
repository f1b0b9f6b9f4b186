"""Files of arrays: NumPy, safetensors, torch, HDF5, and tables with vector columns."""

import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import NoneType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import safetensors

from csalign.core.arrays import Array
from csalign.core.devices import available_bytes
from csalign.core.errors import ConfigError, DataError, reason_of
from csalign.core.records import parse_json
from csalign.sources import arrow
from csalign.sources.arrays.base import UNNAMED, Container, Header
from csalign.sources.arrays.naming import is_usual_key
from csalign.sources.records.files import local_copy

if TYPE_CHECKING:
    from torch import Tensor  # loaded for torch's own files alone

_MAX_CHUNK_BYTES = 1 << 30  # of a dataset in HDF5
_NUMPY_DAMAGE = (
    *(ValueError, EOFError, OSError, NotImplementedError, RuntimeError, zipfile.BadZipFile),
    # NumPy parses headers as Python literals.
    *(zlib.error, tokenize.TokenError, SyntaxError, RecursionError, MemoryError),
)
_SAFE_DTYPES = {
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"I32": "int32", "I64": "int64"},
}
_OWNERS = "txt2img"  # of the retrieval sets of FuseMix and LAVIS: {text number: image number}
_INTEGERS = ("int16", "int32", "int64", "uint16", "uint32", "uint64")
_OTHER_NUMBERS = ("int8", "uint8", "float16", "float32", "float64")  # of keys alone


@contextmanager
def open_npy(path: Path) -> Iterator[Container]:
    """Open an .npy, which is read piece by piece; one in Fortran order is mapped into memory.

    Raises:
        DataError: it is damaged, cut short, or contains Python objects.
    """
    with _numpy_errors(path), local_copy(path) as local:
        with local.open("rb") as file:
            header, kind, is_fortran = _read_header(file, local.stat().st_size)
            start = file.tell()
        if header.dtype == "object":
            raise ValueError("Python objects")

        def get(_: str) -> Any:
            if is_fortran:
                return np.load(local, mmap_mode="r", allow_pickle=False)
            return _RowsOfFile(local, start, header.shape, kind)

        yield _sliced(path, {UNNAMED: header}, get)


@contextmanager
def open_npz(path: Path) -> Iterator[Container]:
    """Open an .npz, whose arrays are read whole.

    Raises:
        DataError: it is damaged.
    """

    def get(name: str) -> Array:
        with archive.open(f"{name}.npy") as file:
            size = archive.getinfo(f"{name}.npy").file_size
            if size > available_bytes():
                raise ValueError(
                    f"{name} would take {size >> 20} MiB of memory, more than is available; save "
                    "it as .npy"
                )
            return np.lib.format.read_array(file, allow_pickle=False)

    with _numpy_errors(path), path.open("rb") as content, zipfile.ZipFile(content) as archive:
        headers = {}
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    name = member.filename.removesuffix(".npy")
                    headers[name], _, _ = _read_header(file, member.file_size)
        yield _sliced(path, headers, get)


def _read_header(file: IO[bytes], size: int) -> tuple[Header, np.dtype[Any], bool]:
    """Read the header of an .npy of `size` bytes; return its dtype, and if in Fortran order too."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format is for tables, not arrays")
    if dtype.hasobject:
        return Header(shape, "object"), dtype, is_fortran
    if min(shape, default=0) < 0:
        raise ValueError(f"its header states shape {shape}")
    expected = file.tell() + prod(shape) * dtype.itemsize
    if size < expected:
        raise ValueError(f"it was cut short: {size} bytes of {expected}")
    return Header(shape, dtype.newbyteorder("=").name), dtype, is_fortran


class _RowsOfFile:
    """Rows of an array in C order that is stored from a byte of a file on.

    They are read rather than mapped, so that those that were used do not stay in memory.
    """

    def __init__(self, path: Path, start: int, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self._path, self._start, self._shape, self._dtype = path, start, tuple(shape), dtype

    def __getitem__(self, rows: slice) -> Array:
        first, stop, _ = rows.indices(self._shape[0])
        each = prod(self._shape[1:])
        # From Arrow's pool, which keeps what is freed for the next rows.
        content = pa.allocate_buffer((stop - first) * each * self._dtype.itemsize)
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start + first * each * self._dtype.itemsize)
            if file.readinto(memoryview(content)) < content.size:
                raise OSError(f"{self._path} was cut short while it was read")
        return np.frombuffer(content, self._dtype).reshape(stop - first, *self._shape[1:])


@contextmanager
def _numpy_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _NUMPY_DAMAGE as error:
        if "object" in str(error).lower():
            raise DataError(
                f"{path}: contains Python objects, which are never unpickled; save a plain "
                "array with numpy.save(path, array.astype('float32'))"
            ) from None
        raise DataError(f"{path}: is not a readable NumPy file ({error})") from None


@contextmanager
def open_safetensors(path: Path) -> Iterator[Container]:
    """Open a .safetensors, from which slices are read.

    Raises:
        DataError: it is damaged.
    """
    with local_copy(path) as local:
        try:
            with safetensors.safe_open(local, framework="numpy"), local.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")  # checked by safe_open
                tensors = parse_json(file.read(size))
        except (safetensors.SafetensorError, OSError) as error:
            raise DataError(f"{path}: is not a readable safetensors file ({error})") from None
        tensors.pop("__metadata__", None)
        headers = {
            name: Header(tuple(held["shape"]), _SAFE_DTYPES.get(held["dtype"], held["dtype"]))
            for name, held in tensors.items()
        }

        def get(name: str) -> _RowsOfFile:
            shape, dtype = headers[name]
            start = 8 + size + tensors[name]["data_offsets"][0]
            stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
            return _RowsOfFile(local, start, shape, stored.newbyteorder("<"))

        yield _sliced(path, headers, get)


@contextmanager
def open_torch(path: Path) -> Iterator[Container]:
    """Open a tensor or dict of tensors written by torch.save, mapped into memory.

    Raises:
        DataError: it is damaged, or contains anything but tensors and plain containers.
    """
    from torch import Tensor

    with local_copy(path) as local:
        content = _load(path, local)
        if isinstance(content, Tensor):
            content = {UNNAMED: content}
        if not isinstance(content, dict):
            raise DataError(
                f"{path}: contains a {type(content).__name__}; save a tensor or a dict of tensors"
            )
        items = dict(_flat(content))
        tensors = {name: item for name, item in items.items() if isinstance(item, Tensor)}
        headers = {name: _tensor_header(path, tensor) for name, tensor in tensors.items()}
        lists = {n: own for n, item in items.items() if (own := label_list(item)) is not None}
        headers |= {name: Header((len(item),), "str") for name, item in lists.items()}
        owners = content.get(_OWNERS)
        owners = owners if isinstance(owners, dict) else {}
        yield _sliced(
            path,
            headers,
            lambda name: (
                np.asarray(lists[name], object) if name in lists else _TensorRows(tensors[name])
            ),
            {str(text): str(image) for text, image in owners.items()},
        )


def _flat(content: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the items of a dict and of the dicts in it that contain lists or arrays."""
    for key, item in content.items():
        is_group = isinstance(item, dict) and any(
            isinstance(own, list | tuple) or getattr(own, "ndim", 0) > 1 for own in item.values()
        )
        if is_group:
            yield from _flat(item, f"{above}{key}/")
        else:
            yield f"{above}{key}", item


def label_list(item: object) -> list[Any] | None:
    """Return a list of texts, numbers and None, also in tensors of one; None if it is not one."""
    item = in_rows(item)
    if not isinstance(item, list | tuple):
        return None
    values = [own.item() if getattr(own, "ndim", 1) == 0 else own for own in item]
    kinds = {*map(type, values)}
    is_list = kinds <= {str, bytes, int, float, bool, NoneType}
    return values if is_list and kinds - {bool, NoneType} else None


def in_rows(item: Any) -> Any:
    """Return the list that a dict by row number, or of the row of each key, stands for."""
    if not isinstance(item, dict):
        return item
    by_row = {str(key): own for key, own in item.items()}
    if by_row.keys() == {*map(str, range(len(item)))}:
        return [by_row[str(row)] for row in range(len(item))]
    is_index = {*map(type, item.values())} == {int} and {*item.values()} == {*range(len(item))}
    return sorted(item, key=item.__getitem__) if is_index else item


def to_keys(values: list[Any], name: str, path: Path) -> pa.Array:
    """Write texts, bytes and numbers as large_string, null where they are missing.

    Raises:
        DataError: a text is not UTF-8.
    """
    try:
        found = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # of several types
        found = pa.array([None if own is None or own != own else str(own) for own in values])
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: {name} is not UTF-8 ({error}); correct it") from None
    return arrow.to_strings(found, name, path)


class _TensorRows:
    """Rows of a tensor as arrays; bfloat16, which NumPy lacks, as its bits."""

    def __init__(self, tensor: "Tensor") -> None:
        self._tensor = tensor.detach()

    def __getitem__(self, rows: slice) -> Array:
        import torch

        found = self._tensor[rows]
        is_brain = found.dtype is torch.bfloat16
        array: Array = (found.contiguous().view(torch.uint16) if is_brain else found).numpy()
        return array


def _load(path: Path, local: Path) -> Any:
    if not zipfile.is_zipfile(local):
        raise DataError(
            f"{path}: is not a readable torch file: it is damaged, a plain pickle, or from before "
            "torch 1.6; save the tensor again with torch.save(tensor, path)"
        )
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused anyway
            return torch.load(local, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if "weights only" in str(error).lower():
            raise DataError(
                f"{path}: contains Python objects other than tensors, which are never "
                "unpickled; save the tensor alone with torch.save(tensor, path)"
            ) from None
        raise DataError(f"{path}: is not a readable torch file ({reason_of(error):.200})") from None


def _tensor_header(path: Path, tensor: "Tensor") -> Header:
    import torch

    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise DataError(f"{path}: does not contain a plain tensor; save tensor.to_dense().float()")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise DataError(f"{path}: contains an expanded tensor; save tensor.contiguous()")
    return Header(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@contextmanager
def open_hdf5(path: Path) -> Iterator[Container]:
    """Open an .h5, from whose datasets slices are read.

    Raises:
        ConfigError: h5py is not installed.
        DataError: it is damaged, or a dataset is not in the file itself.
    """
    try:
        import h5py
    except ImportError:
        raise ConfigError(f"{path}: needs h5py to be read; pip install 'csalign[hdf5]'") from None
    found: dict[str, Any] = {}
    headers: dict[str, Header] = {}

    def add(name: str, item: Any, is_text: bool) -> None:
        kind = "str" if is_text else item.dtype.newbyteorder("=").name
        found[name], headers[name] = item, Header(item.shape, kind)

    def visit(name: str | bytes, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape:
            if isinstance(name, bytes):
                raise DataError(f"{path}: the name {name!r} is not UTF-8; rename it")
            _check_dataset(f"{path}:{name}", item)
            add(name, item, h5py.check_string_dtype(item.dtype) is not None)
        for key, value in item.attrs.items():
            own, full = np.asarray(value), f"{name!s}/{key}".lstrip("/")
            if own.ndim == 1 and len(own) > 1 and full not in found:
                add(full, own, own.dtype.kind in "OSU")

    try:
        with path.open("rb") as raw, h5py.File(raw, "r") as file:
            file.visititems(visit)
            visit("", file)
            yield _sliced(path, headers, found.__getitem__)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: is not a readable HDF5 file ({error})") from None


def _check_dataset(name: str, data: Any) -> None:
    if data.is_virtual or data.external:
        raise DataError(
            f"{name}: is stored in other files, which csalign does not follow; write it into one "
            "file, as h5repack does"
        )
    size = data.dtype.itemsize * prod(data.chunks or (0,))
    if size > _MAX_CHUNK_BYTES:
        raise DataError(
            f"{name}: has chunks of {size >> 20} MiB, each of which would be read whole; write it "
            f"with chunks of at most {_MAX_CHUNK_BYTES >> 20} MiB"
        )
    if not data.id.get_storage_size():
        raise DataError(f"{name}: contains no data; write it again")


def _sliced(
    path: Path,
    headers: Mapping[str, Header],
    get: Callable[[str], Any],
    owners: Mapping[str, str] | None = None,
) -> Container:
    """Build a container of anything that can be sliced into arrays; 1-D lists may be labels."""

    def read(name: str, step: int) -> Iterator[Array]:
        array, (shape, dtype) = get(name), headers[name]
        for start in range(0, shape[0], step):
            rows = np.asarray(array[start : start + step])
            # NumPy has no bfloat16: its bits are the upper half of a float32.
            yield (rows.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else rows

    def read_labels(name: str) -> pa.Array:
        array = np.asarray(get(name)[: headers[name].shape[0]]).reshape(-1)
        values = (array.astype(str) if array.dtype.kind == "M" else array).tolist()
        return to_keys(values, name, path)

    has_rows = any(len(shape) > 1 and shape[-1] > 1 for shape, _ in headers.values())
    labels = {
        name: shape[0]
        for name, (shape, dtype) in headers.items()
        if name != UNNAMED
        and (len(shape) == 1 or (shape[1:] == (1,) and has_rows and is_usual_key(name)))
        and (
            dtype in _INTEGERS
            or dtype.startswith(("str", "bytes", "void", "datetime"))
            or (dtype in _OTHER_NUMBERS and has_rows and is_usual_key(name))
        )
    }
    rest = {name: header for name, header in headers.items() if name not in labels}
    return Container(rest, read, labels, read_labels, owners=owners or {})
