"""Files that hold arrays by name: which of them are meant."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from csalign.core.errors import DataError
from csalign.sources.arrays.base import Array, Labels, Part, Vectors, check_array, check_dtype

_LISTED = 8  # names in a message


class Header(NamedTuple):
    """Shape of an array, and the name of its numbers' type."""

    shape: tuple[int, ...]
    dtype: str


class Container(Protocol):
    """An open file that holds arrays by name."""

    def headers(self) -> Mapping[str, Header]:
        """What it holds; nothing but the headers is read."""

    def rows(self, name: str, step: int) -> Iterator[Array]:
        """An array of 1, 2 or 3 dimensions, at most `step` of its first at a time."""

    def owners(self) -> Mapping[str, str]:
        """The image of each text, by key, where the file says so; {} where it does not."""


Opened = Callable[[], AbstractContextManager[Container]]


def read_named(
    path: Path, opened: Opened, wanted: str | None, known: Sequence[str], *, guess: bool = True
) -> Vectors:
    """The embeddings in a file that holds arrays by name.

    Args:
        path: the file.
        opened: opens it.
        wanted: name of the array, None to recognise it.
        known: what it may be called, the likeliest first.
        guess: whether what has no such name may be taken by its shape.

    Returns:
        One of: the array that is wanted or has a known name; all arrays where they are numbered
        parts (``tensor_0``, ``tensor_1``, ...); a row each where all are vectors, with their names
        as ids; the only array that can be embeddings.

    Raises:
        DataError: it is not there, or the file does not say which is meant.
        ShapeError: it cannot be embeddings.
    """
    with opened() as file:
        headers = file.headers()
        owners = file.owners()
    if wanted is not None and wanted not in headers:
        raise DataError(f"{path}: has no array {wanted!r} (arrays: {_listed(headers)})")
    name = wanted or next((name for name in known if name in headers), None)
    parts = [name] if name else None
    if parts is None and guess:
        if _are_vectors(headers):
            return _keyed(path, opened, headers, owners)
        parts = _numbered(headers) or _only_array(headers)
    if parts is None:
        name_it = f"name it: {path.name}:NAME"
        if not guess:
            name_it = "name the arrays with --image-column and --text-column"
        raise DataError(
            f"{path}: has no array {known[0]!r} (arrays: {_listed(headers)}); {name_it}"
        )
    return Vectors(str(path), tuple(_part(path, opened, key, headers[key]) for key in parts))


def _part(path: Path, opened: Opened, key: str, header: Header) -> Part:
    name = f"{path}:{key}"
    check_array(name, header.shape, header.dtype)

    def read(step: int) -> Iterator[Array]:
        with opened() as file:
            yield from file.rows(key, step)

    return Part(name, header.shape, as_numpy(header.dtype), read)


def _keyed(path: Path, opened: Opened, headers: Mapping[str, Header], owners: Any) -> Vectors:
    """Vectors by key, a row each."""
    keys = sorted(headers, key=natural_key)
    width = headers[keys[0]].shape[0]
    for row, key in enumerate(keys):
        shape, dtype = headers[key]
        check_dtype(f"{path}:{key}", dtype)
        if shape != (width,):
            raise DataError(
                f"{path}, row {row} ({key}): is {shape[0]} wide and {keys[0]} is {width}; leave it "
                "out or encode it again"
            )
        if dtype != headers[keys[0]].dtype:
            raise DataError(f"{path}, row {row} ({key}): is {dtype} and others are not")

    def read(step: int) -> Iterator[Array]:
        with opened() as file:
            for start in range(0, len(keys), step):
                rows = [next(file.rows(key, width)) for key in keys[start : start + step]]
                yield np.stack(rows)

    columns: dict[str, list[str | None]] = {"id": [*keys]}
    if owners:
        columns["image_id"] = [owners.get(key) for key in keys]
    part = Part(str(path), (len(keys), width), as_numpy(headers[keys[0]].dtype), read, keys)
    return Vectors(str(path), (part,), Labels(str(path), len(keys), columns, part.where))


def as_numpy(dtype: str) -> np.dtype[Any]:
    """The NumPy type in which numbers of a type are read; it has no bfloat16."""
    return np.dtype(np.float32 if dtype == "bfloat16" else dtype)


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts ``emb_2`` before ``emb_10``."""
    # The pieces alternate between text and numbers, so like is compared with like.
    pieces = re.split(r"(\d+)", name)
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces)), name


def _numbered(headers: Mapping[str, Header]) -> list[str] | None:
    """All names in order, where they differ in a last number only and none is left out."""
    names = sorted(headers, key=natural_key)
    stems = {re.sub(r"\d+$", "", name) for name in names}
    numbers = [int(name[len(min(stems)) :]) for name in names if name[-1:].isdigit()]
    if len(stems) != 1 or any(len(header.shape) not in (2, 3) for header in headers.values()):
        return None
    return names if numbers == list(range(len(names))) else None


def _only_array(headers: Mapping[str, Header]) -> list[str] | None:
    """The one array that can be embeddings, if it is the only one."""
    arrays = [name for name, header in headers.items() if len(header.shape) in (2, 3)]
    return arrays if len(arrays) == 1 else None


def _are_vectors(headers: Mapping[str, Header]) -> bool:
    return bool(headers) and all(len(header.shape) == 1 for header in headers.values())


def _listed(names: Mapping[str, Header]) -> str:
    shown = sorted(names, key=natural_key)[:_LISTED]
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(shown) or "none") + more
