"""Files of arrays: NumPy, safetensors, torch, HDF5, and tables with vector columns."""

import shutil
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from csalign.core.devices import available_bytes
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, reason_of
from csalign.core.paths import is_remote
from csalign.core.records import read_object
from csalign.sources import arrow
from csalign.sources.arrays.base import UNNAMED, Array, Container, Header, Labels, first_of
from csalign.sources.records.tables import CAPTION_NAMES, IMAGE_NAMES

_MAX_CHUNK_BYTES = 1 << 30  # of a dataset in HDF5
_NUMPY_DAMAGE = (
    *(ValueError, EOFError, OSError, NotImplementedError, RuntimeError, zipfile.BadZipFile),
    # NumPy parses headers as Python literals.
    *(zlib.error, tokenize.TokenError, SyntaxError, RecursionError, MemoryError),
)
_SAFE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_OWNERS = "txt2img"  # of the retrieval sets of FuseMix and LAVIS: {text number: image number}
_LABEL_ROWS = 65_536
_SAVE_AGAIN = "save the dataset again"

# Usual names of the columns beside the embeddings, the likeliest first.
LABELS: dict[Modality, dict[str, tuple[str, ...]]] = {
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


@contextmanager
def open_npy(path: Path) -> Iterator[Container]:
    """Open an .npy, mapped into memory.

    Raises:
        DataError: it is damaged, cut short, or contains Python objects.
    """
    with _numpy_errors(path), local_copy(path) as local:
        with local.open("rb") as file:
            header = _read_header(file, local.stat().st_size)
        if header.dtype == "object":
            raise ValueError("Python objects")
        yield _sliced(
            {UNNAMED: header}, lambda _: np.load(local, mmap_mode="r", allow_pickle=False)
        )


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
                    headers[name] = _read_header(file, member.file_size)
        yield _sliced(headers, get)


def _read_header(file: IO[bytes], size: int) -> Header:
    """Read the header of an .npy of `size` bytes."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format is for tables, not arrays")
    if dtype.hasobject:
        return Header(shape, "object")
    if min(shape, default=0) < 0:
        raise ValueError(f"its header states shape {shape}")
    expected = file.tell() + prod(shape) * dtype.itemsize
    if size < expected:
        raise ValueError(f"it was cut short: {size} bytes of {expected}")
    return Header(shape, dtype.newbyteorder("=").name)


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
            with safetensors.safe_open(local, framework="pt") as file:
                headers = {}
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_slice(name)
                    kind = tensor.get_dtype()
                    shape = tuple(tensor.get_shape())
                    headers[name] = Header(shape, _SAFE_DTYPES.get(kind, kind))
                yield _sliced(headers, file.get_slice)
        except (safetensors.SafetensorError, OSError) as error:
            raise DataError(f"{path}: is not a readable safetensors file ({error})") from None


@contextmanager
def open_torch(path: Path) -> Iterator[Container]:
    """Open a tensor or dict of tensors written by torch.save, mapped into memory.

    Raises:
        DataError: it is damaged, or contains anything but tensors and plain containers.
    """
    with local_copy(path) as local:
        content = _load(path, local)
        if isinstance(content, Tensor):
            content = {UNNAMED: content}
        if not isinstance(content, dict):
            raise DataError(
                f"{path}: contains a {type(content).__name__}; save a tensor or a dict of tensors"
            )
        tensors = {str(name): item for name, item in content.items() if isinstance(item, Tensor)}
        headers = {name: _tensor_header(path, tensor) for name, tensor in tensors.items()}
        owners = content.get(_OWNERS)
        owners = owners if isinstance(owners, dict) else {}
        yield _sliced(
            headers,
            lambda name: tensors[name].detach(),
            {str(text): str(image) for text, image in owners.items()},
        )


def _load(path: Path, local: Path) -> Any:
    if not zipfile.is_zipfile(local):
        raise DataError(
            f"{path}: is not a readable torch file: it is damaged, a plain pickle, or from before "
            "torch 1.6; save the tensor again with torch.save(tensor, path)"
        )
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


def _tensor_header(path: Path, tensor: Tensor) -> Header:
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
    headers: dict[str, Header] = {}

    def visit(name: str | bytes, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape:
            if isinstance(name, bytes):
                raise DataError(f"{path}: the name {name!r} is not UTF-8; rename it")
            _check_dataset(f"{path}:{name}", item)
            headers[name] = Header(item.shape, item.dtype.newbyteorder("=").name)

    try:
        with path.open("rb") as raw, h5py.File(raw, "r") as file:
            file.visititems(visit)
            yield _sliced(headers, lambda name: file[name])
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
    headers: Mapping[str, Header],
    get: Callable[[str], Any],
    owners: Mapping[str, str] | None = None,
) -> Container:
    """Build a container of arrays, tensors or anything else that can be sliced."""

    def read(name: str, step: int) -> Iterator[Array]:
        array, (shape, dtype) = get(name), headers[name]
        for start in range(0, shape[0], step):
            rows = array[start : start + step]
            # NumPy has no bfloat16.
            yield rows.float().numpy() if dtype == "bfloat16" else np.asarray(rows)

    return Container(headers, read, owners or {})


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Copy a remote file to a temporary one; a local file is used as it is."""
    if not is_remote(path):
        yield path
        return
    with path.open("rb") as source, tempfile.NamedTemporaryFile(suffix=path.suffix) as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        yield Path(copy.name)


@contextmanager
def open_table(path: Path) -> Iterator[Container]:
    """Open a .parquet, .arrow or .feather; its arrays are the columns of lists of numbers.

    Raises:
        DataError: it is damaged.
    """
    with arrow.open_arrow(path) as file:
        headers = {}
        for column in file.schema:
            if arrow.kind_of(column.type) == "list":
                held = column.type.value_type
                if arrow.kind_of(held) != "text":
                    shape = (file.rows, arrow.list_width(file, column.name))
                    headers[column.name] = Header(shape, np.dtype(held.to_pandas_dtype()).name)

        def read(name: str, step: int) -> Iterator[Array]:
            start = 0
            for batch in file.batches([name], step):
                yield arrow.to_matrix(batch[name], headers[name].shape[1], f"{path}:{name}", start)
                start += len(batch)

        yield Container(headers, read, is_table=True)


def read_labels(
    path: Path, names: Mapping[str, tuple[str, ...]] | None = None, split: str | None = None
) -> Labels:
    """Read columns of strings or integers whole, as strings.

    Args:
        path: a .parquet, .arrow or .feather.
        names: usual names of the columns by their meaning: ``id``, ``caption``, ...; None to read
            all columns under their own names.
        split: of all rows, unless a column states it.

    Raises:
        DataError: the table is damaged, or a value is not UTF-8, whose row is named.
    """
    with arrow.open_arrow(path) as file:
        plain = [own.name for own in file.schema if arrow.kind_of(own.type) in ("text", "integer")]
        if names is None:
            names = {name: (name.lower(),) for name in plain}
        found = {known: first_of(usual, plain) for known, usual in names.items()}
        chosen = {known: name for known, name in found.items() if name is not None}
        columns: dict[str, list[str | None]] = {known: [] for known in chosen}
        for batch in file.batches(list(dict.fromkeys(chosen.values())), _LABEL_ROWS):
            for known, name in chosen.items():
                for value in arrow.column_values(batch[name]):
                    if isinstance(value, arrow.InvalidText):
                        raise DataError(
                            f"{path}, row {len(columns[known])}: {name} is not UTF-8; correct it"
                        )
                    columns[known].append(None if value is None else str(value) or None)
        if split is not None:
            columns.setdefault("split", [split] * file.rows)
        return Labels(str(path), file.rows, columns, lambda row: f"{path}, row {row}")


def dataset_files(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the files of a folder written by ``datasets.save_to_disk``, each with its split.

    Raises:
        DataError: the folder is damaged, or its rows are a selection that was never written out.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json", _SAVE_AGAIN).get("splits")
        names = [str(split) for split in splits] if isinstance(splits, list) else []
        found: list[tuple[Path, str | None]] = [
            (file, name) for name in names for file, _ in dataset_files(folder / name)
        ]
    else:
        state = read_object(folder / "state.json", _SAVE_AGAIN)
        if state.get("_indices_data_files"):
            raise DataError(
                f"{folder}: is a selection of a dataset; write it out with "
                "dataset.flatten_indices().save_to_disk(...)"
            )
        entries = state.get("_data_files")
        entries = entries if isinstance(entries, list) else []
        named = [Path(str(entry["filename"])).name for entry in entries if "filename" in entry]
        found = [(folder / name, None) for name in named]
    if not found:
        raise DataError(f"{folder}: names no data files; {_SAVE_AGAIN}")
    return found
