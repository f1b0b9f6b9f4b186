""".safetensors, and what torch.save writes (.pt, .pth, .dpt): tensors only, never a pickle."""

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from csalign.core.errors import DataError
from csalign.sources.arrays.base import Array, Part, Vectors, check_array, local_copy
from csalign.sources.arrays.named import Container, Header, as_numpy, read_named

_SAFE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_OWNERS = "txt2img"  # of FuseMix' and LAVIS' retrieval sets: {text number: image number}


@dataclass
class _Safetensors:
    file: Any

    def headers(self) -> Mapping[str, Header]:
        found = {}
        for name in self.file.keys():  # noqa: SIM118 - it is no dict
            tensor = self.file.get_slice(name)
            kind = tensor.get_dtype()
            found[name] = Header(tuple(tensor.get_shape()), _SAFE_DTYPES.get(kind, kind))
        return found

    def rows(self, name: str, step: int) -> Iterator[Array]:
        tensor = self.file.get_slice(name)
        for start in range(0, tensor.get_shape()[0], step):
            yield _as_array(tensor[start : start + step])

    def owners(self) -> Mapping[str, str]:
        return {}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Container]:
    """Open a .safetensors; slices are read from it, never the whole.

    Raises:
        DataError: it is damaged.
    """
    with local_copy(path) as local:
        try:
            with safetensors.safe_open(local, framework="pt") as file:
                yield _Safetensors(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise DataError(f"{path}: is no readable safetensors file ({error})") from None


def read_torch(
    path: Path, wanted: str | None, known: tuple[str, ...], *, guess: bool = True
) -> Vectors:
    """The embeddings in a file of torch.save, which is mapped and not read.

    Args:
        path: the file: a tensor, or a dict of tensors.
        wanted: name of the tensor in a dict, None to recognise it.
        known: what it may be called.
        guess: whether what has no such name may be taken by its shape.

    Raises:
        DataError: it is damaged, holds anything but tensors, or not the one that is meant.
        ShapeError: the tensor cannot be embeddings.
    """
    with _loaded(path) as content:
        header = _header(path, content) if isinstance(content, Tensor) else None
    if header is None:
        return read_named(path, lambda: _open_dict(path), wanted, known, guess=guess)
    if wanted is not None or not guess:
        raise DataError(f"{path}: holds one tensor, without a name; give it as it is")
    check_array(str(path), header.shape, header.dtype)

    def read(step: int) -> Iterator[Array]:
        with _loaded(path) as tensor:
            for start in range(0, len(tensor), step):
                yield _as_array(tensor[start : start + step])

    part = Part(str(path), header.shape, as_numpy(header.dtype), read)
    return Vectors(str(path), (part,))


@dataclass
class _Tensors:
    path: Path
    content: dict[Any, Any]

    def headers(self) -> Mapping[str, Header]:
        return {
            str(name): _header(self.path, value)
            for name, value in self.content.items()
            if isinstance(value, Tensor)
        }

    def rows(self, name: str, step: int) -> Iterator[Array]:
        tensor = self.content[name] if name in self.content else self.content[int(name)]
        for start in range(0, len(tensor), step):
            yield _as_array(tensor[start : start + step])

    def owners(self) -> Mapping[str, str]:
        owners = self.content.get(_OWNERS)
        if not isinstance(owners, dict):
            return {}
        return {str(text): str(image) for text, image in owners.items()}


@contextmanager
def _open_dict(path: Path) -> Iterator[Container]:
    with _loaded(path) as content:
        if not isinstance(content, dict):
            raise DataError(
                f"{path}: holds a {type(content).__name__}; save a tensor or a dict of tensors"
            )
        yield _Tensors(path, content)


@contextmanager
def _loaded(path: Path) -> Iterator[Any]:
    """What torch.save was given, mapped; only tensors and plain containers come out of it."""
    with local_copy(path) as local:
        yield _load(path, local)


def _load(path: Path, local: Path) -> Any:
    if not zipfile.is_zipfile(local):
        raise DataError(
            f"{path}: is no readable torch file: it is damaged, a plain pickle, or of torch before "
            "1.6; save the tensor again with torch.save(tensor, path)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused anyway
            return torch.load(local, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if "weights only" in str(error).lower():
            raise DataError(
                f"{path}: holds Python objects that are no tensors, which csalign never unpickles; "
                "save the tensor alone with torch.save(tensor, path)"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{path}: is no readable torch file ({reason})") from None


def _header(path: Path, tensor: Tensor) -> Header:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise DataError(f"{path}: holds no plain tensor; save tensor.to_dense().float()")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise DataError(f"{path}: holds an expanded tensor; save tensor.contiguous()")
    return Header(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _as_array(tensor: Tensor) -> Array:
    tensor = tensor.detach()
    array: Array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array
