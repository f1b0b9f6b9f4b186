"""Nested values with tensors in them, as a safetensors file with JSON in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from csalign.core import atomic
from csalign.core.errors import OutputError, SchemaError
from csalign.core.records import parse_json

_JSON = "values"  # key of the header
_TENSOR = "tensor:"  # what stands for one in the JSON, before its name


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write values, and force them to the disk.

    Args:
        path: a new file.
        values: of mappings, lists, tensors, strings, numbers, booleans and None. Keys are strings,
            or become such; tuples become lists.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    document = json.dumps(_pack(values, "", tensors))
    try:
        save_file(tensors, path, {_JSON: document})
    except SafetensorError as error:  # also where the disk is full
        raise OutputError(atomic.os_error(error, path)) from None
    atomic.fsync_path(path)


def read_values(path: Path) -> dict[str, Any]:
    """Read what `write_values` wrote; all tensors on the CPU, in memory of their own.

    Raises:
        SchemaError: the file is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            document = parse_json((file.metadata() or {})[_JSON])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        unpacked = _unpack(document, tensors)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise SchemaError(f"{path}: cannot be read ({error})") from None
    if not isinstance(unpacked, dict):
        raise SchemaError(f"{path}: holds no state")
    return unpacked


def to_bytes(values: Mapping[str, Any]) -> bytes:
    """The same values as one string of bytes, for another process."""
    tensors: dict[str, Tensor] = {}
    document = json.dumps(_pack(values, "", tensors)).encode()
    found: bytes = save(
        {**tensors, _JSON: torch.frombuffer(bytearray(document), dtype=torch.uint8)}
    )
    return found


def from_bytes(data: bytes) -> dict[str, Any]:
    """What `to_bytes` was given; all tensors on the CPU."""
    tensors = load(data)
    document = parse_json(tensors.pop(_JSON).numpy().tobytes())
    found: dict[str, Any] = _unpack(document, tensors)
    return found


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return _TENSOR + name
    if isinstance(value, Mapping):
        return {str(key): _pack(part, f"{name}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(part, f"{name}/{number}", tensors) for number, part in enumerate(value)]
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: _unpack(part, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_unpack(part, tensors) for part in value]
    return value
