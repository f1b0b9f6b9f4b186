"""Nested values in a safetensors file, for checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from csalign.core import atomic
from csalign.core.errors import OutputError, SchemaError
from csalign.core.records import parse_json

_HEADER = "values"  # key of the JSON in the header
_TENSOR = "tensor:"  # prefix of a tensor's name in the JSON


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    """Write nested values as a safetensors file with JSON in its header, and sync it to disk.

    Args:
        path: a new file.
        values: of mappings, lists, tensors and plain values. Keys become strings, tuples lists.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"{_TENSOR}{len(tensors)}"
            # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return name
        if isinstance(value, Mapping):
            return {str(key): pack(part) for key, part in value.items()}
        return [pack(part) for part in value] if isinstance(value, list | tuple) else value

    document = json.dumps(pack(values))
    try:
        save_file(tensors, path, {_HEADER: document})
    except SafetensorError as error:  # also if the disk is full
        raise OutputError(atomic.os_error(error, path)) from None
    atomic.fsync_path(path)


def read_state(path: Path) -> dict[str, Any]:
    """Read a file of `write_state`, tensors on the CPU; SchemaError if it is not one."""

    def unpack(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_TENSOR):
            return tensors[value]
        if isinstance(value, dict):
            return {key: unpack(part) for key, part in value.items()}
        return [unpack(part) for part in value] if isinstance(value, list) else value

    try:
        with safe_open(path, "pt") as file:
            document = parse_json((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state: dict[str, Any] = unpack(document)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise SchemaError(f"{path}: cannot be read ({error})") from None
    return state
