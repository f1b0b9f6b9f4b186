"""Arrays of embeddings from any file format: selected by name, streamed in parts."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from csalign.core.arrays import Array, Floats, Ints, Mask
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.sources.arrays.naming import (
    EITHER_NAMES,
    are_vectors,
    first_of,
    is_key,
    is_label,
    is_usual_key,
    label_side,
    of_side,
    words_of,
)
from csalign.sources.arrow import lists_from
from csalign.sources.labels import Labels

CHUNK_ROWS = 8_192
CHUNK_BYTES = 32 << 20
UNNAMED = ""  # key of the array in a file of one array
DTYPES = ("float16", "bfloat16", "float32", "float64")
_LISTED = 8  # names in a message
_AXES = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """The embeddings in one file, or in one array of a file."""

    name: str  # the file, followed by a colon and the array's name where it contains several
    shape: tuple[int, ...]  # (n, d), or (n, k, d) for k captions per image
    dtype: np.dtype[Any]  # float16, float32 or float64, in either byte order
    read: Callable[[int], Iterator[Array]]  # streams at most so many of the n items at a time
    keys: Sequence[str] = ()  # names of the rows for messages, if any

    def __len__(self) -> int:
        return prod(self.shape[:-1])

    def where(self, row: int) -> str:
        """Return file and 0-based row, for messages."""
        if len(self.shape) == 3:
            return f"{self.name}, row {row // self.shape[1]}, caption {row % self.shape[1]}"
        return f"{self.name}, row {row}" + (f" ({self.keys[row]})" if self.keys else "")


@dataclass(frozen=True)
class Vectors:
    """Embeddings in one or more parts, as one array of rows; nothing is read until `chunks`."""

    name: str  # as given by the user
    parts: tuple[Part, ...]  # at least one, all of one width
    labels: Labels  # of the rows, without columns where the files contain embeddings alone
    kept: Mask | None = None  # mask of the rows to use, None for all
    unused: frozenset[str] = frozenset()  # other arrays of vectors in the files, named as parts
    in_table: bool = False  # whether other arrays of the file describe the same rows
    gap: str = ""  # which numbered parts have another between them that is missing

    def __post_init__(self) -> None:
        """Check that the parts have one width."""
        first = self.parts[0]
        for part in self.parts:
            if part.shape[1:] != first.shape[1:]:
                raise ShapeError(
                    f"{part.name}: has shape {part.shape} and {first.name} has {first.shape}; all "
                    "parts of an array must have one width, import them separately"
                )

    def __len__(self) -> int:
        return sum(map(len, self.parts)) if self.kept is None else int(self.kept.sum())

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.parts[0].shape[-1]

    @property
    def captions_each(self) -> int | None:
        """Number of rows per image in a 3-D array, None in a 2-D one."""
        shape = self.parts[0].shape
        return shape[1] if len(shape) == 3 else None

    @property
    def is_in_one_file(self) -> bool:
        """True if several arrays of one file are read as one."""
        return len({part.name.partition(":")[0] for part in self.parts}) < len(self.parts)

    @property
    def is_half(self) -> bool:
        """True if all parts are float16."""
        return all(part.dtype.itemsize == 2 for part in self.parts)

    @cached_property
    def sketch(self) -> Floats:
        """Directions of all rows on a few random axes, (n, 8); they differ as the rows do."""
        axes = np.random.default_rng(0).normal(size=(self.width, _AXES)).astype(np.float32)
        found = []
        for rows, _ in self.chunks():
            wide = rows.astype(np.float32)
            with np.errstate(all="ignore"):  # rows of norm 0 are refused elsewhere
                found.append(wide @ axes / np.linalg.norm(wide, axis=1, keepdims=True))
        return np.concatenate(found)

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Numbers (n,) that are equal where rows are, to the bit."""
        odd = np.random.default_rng(0).integers(0, 1 << 63, self.width, np.uint64) * 2 + 1
        bits = (np.ascontiguousarray(rows).view(f"u{rows.itemsize}") for rows, _ in self.chunks())
        return np.concatenate([np.einsum("ij,j->i", own, odd) for own in bits])

    def chunks(self) -> Iterator[tuple[Array, Callable[[int], str]]]:
        """Stream all rows in order.

        Yields:
            (r, d) arrays of bounded size, each with a function that returns the file and row of
            one of its rows.

        Raises:
            DataError: a part is damaged, or a row is missing; file and row are named.
        """
        start = 0  # of the part
        for part in self.parts:
            row = 0  # of the part's rows
            most = min(CHUNK_ROWS, CHUNK_BYTES // (self.width * part.dtype.itemsize))
            for chunk in part.read(max(1, most // prod(part.shape[1:-1]))):
                rows = chunk.reshape(-1, self.width)
                numbers = np.arange(row, row + len(rows))
                row += len(rows)
                if self.kept is not None:
                    kept = self.kept[start + numbers]
                    rows, numbers = rows[kept], numbers[kept]
                if len(rows):
                    yield rows, partial(_where, part, numbers)
            start += len(part)


def _where(part: Part, numbers: Ints, row: int) -> str:
    return part.where(int(numbers[row]))


class Header(NamedTuple):
    """Shape of an array, and the name of its number format."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Container:
    """An open file of arrays."""

    headers: Mapping[str, Header]  # by name; of `UNNAMED` alone where the file is one array
    read: Callable[[str, int], Iterator[Array]]  # streams an array, at most so many rows at a time
    labels: Mapping[str, int]  # number of values of each list of texts or integers
    read_labels: Callable[[str], pa.Array]  # returns one of those, large_string
    others: Mapping[str, str] = field(default_factory=dict)  # types of everything else
    owners: Mapping[str, str] = field(default_factory=dict)  # image of each text, where stated
    is_table: bool = False  # whether all arrays describe the same rows

    @property
    def vectors(self) -> list[str]:
        """Names of the arrays that may be embeddings."""
        return [
            n
            for n, (shape, kind) in self.headers.items()
            if len(shape) in (2, 3) and kind in DTYPES
        ]

    def remedy(self, sides: Iterable[str] = Modality) -> str:
        """Say how to store vectors of some sides that are there in a form that is not read."""
        for name, kind in self.others.items():
            if are_vectors(name) and any(
                of_side([name], side) or first_of(EITHER_NAMES, [name]) for side in sides
            ):
                return f"; {name} contains {kind}: {lists_from(name, kind)}"
        return ""

    def __str__(self) -> str:
        """List what is in the file, with the types of what are not arrays of floats."""
        named = {name: name for name in self.headers}
        named |= {name: f"{name} ({kind})" for name, kind in self.others.items()}
        listed = [named[name] for name in sorted(named, key=natural_key)]
        more = f", and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        return (", ".join(listed[:_LISTED]) or "none") + more


Opener = Callable[[Path], AbstractContextManager[Container]]


def read_named(path: Path, opener: Opener, modality: str, wanted: str | None = None) -> Vectors:
    """Select one side's embeddings in a file of arrays.

    They are the first that applies: the array that is `wanted`, has no name, or has a name of the
    side or of either side; all arrays as rows, with their names as ids, if all are 1-D; the only
    2-D or 3-D array, unless it is a column with a name of the other side; all arrays as parts, if
    they are numbered (``tensor_0``, ``tensor_1``, ...).

    Raises:
        DataError: the name is missing, or the choice is ambiguous.
        ShapeError: it cannot be embeddings.
    """
    with opener(path) as file:
        headers = file.headers
    if UNNAMED in headers and wanted is not None:
        raise DataError(f"{path}: contains one array, which has no name; pass the path alone")
    if wanted is not None and wanted not in headers:
        raise DataError(f"{path}: has no array {wanted!r} (arrays: {file})")
    names = [] if wanted is None else [wanted]
    if UNNAMED in headers:
        names = [UNNAMED]
    elif wanted is None:
        own = of_side(list(headers), modality)
        either = first_of(EITHER_NAMES, headers)
        names = own if len(own) == 1 else [] if either is None else [either]
    if not names and headers and all(len(header.shape) == 1 for header in headers.values()):
        return _keyed(path, opener, file)
    names = names or _recognised(file, modality)
    if not names:
        option = f"--{modality}-column" if isinstance(modality, Modality) else f"{path}:NAME"
        raise DataError(
            f"{path}: no array looks like the {modality} embeddings (arrays: {file}); name it "
            f"with {option}{file.remedy([modality])}"
        )
    parts = tuple(_part(path, opener, name, headers[name]) for name in names)
    unused = frozenset(f"{path}:{name}" for name in file.vectors if name not in names)
    labels = labels_of(path, opener, file, sum(part.shape[0] for part in parts))
    labels = labels.repeated(prod(parts[0].shape[1:-1]))
    return Vectors(str(path), parts, labels, unused=unused, in_table=file.is_table)


def join(name: str, arrays: Sequence[Vectors]) -> Vectors:
    """Concatenate arrays and their labels.

    Raises:
        DataError: some of them lack a column of ids, captions or splits that others have.
        ShapeError: their widths differ, or all are empty.
    """
    parts = tuple(part for array in arrays for part in array.parts if len(part))
    first = (parts or arrays[0].parts)[0]
    if not prod(first.shape):
        raise ShapeError(f"{first.name}: has shape {first.shape}: is empty")
    labels = [array.labels for array in arrays if len(array)]
    unused = frozenset[str]().union(*(array.unused for array in arrays))
    in_table = arrays[0].in_table
    return Vectors(name, parts, join_labels(name, labels), unused=unused, in_table=in_table)


def join_labels(name: str, labels: Sequence[Labels]) -> Labels:
    """Concatenate labels, with the columns that all have.

    Raises:
        DataError: some of them lack a column of keys, captions or splits that others have.
    """
    counts = Counter(column for own in labels for column in own.names)
    names = [column for column, count in counts.items() if count == len(labels)]
    unread = {column: reason for own in labels for column, reason in own.unread.items()}
    for column in sorted(counts.keys() - names):
        lacking = next(own.name for own in labels if column not in own.names)
        other = next(own.name for own in labels if column in own.names)
        problem = f"{lacking}: has no column {column!r}, unlike {other}"
        if is_label(column):
            raise DataError(f"{problem}; add it there, or remove it from the other parts")
        log.warning("%s, so it is not used", problem)
    ends = np.cumsum([own.rows for own in labels])

    def read(column: str) -> pa.Array:
        return pa.chunked_array([own.column(column) for own in labels]).combine_chunks()

    def where(row: int) -> str:
        index = int(np.searchsorted(ends, row, side="right"))
        return labels[index].where(row - int(ends[index]) + labels[index].rows)

    return Labels(name, int(ends[-1]), where, names, read, unread)


def check_array(name: str, shape: Sequence[int], dtype: str) -> np.dtype[Any]:
    """Refuse an array that cannot be embeddings; return its type once read.

    Raises:
        ShapeError: it is not 2-D or 3-D, or `dtype` is not one of `DTYPES`.
    """
    if len(shape) not in (2, 3):
        raise ShapeError(
            f"{name}: has shape {tuple(shape)}: embeddings are (rows, width), or (images, "
            "captions, width) for texts"
        )
    if dtype not in DTYPES:
        raise ShapeError(
            f"{name}: has dtype {dtype}, not {', '.join(DTYPES[:-1])} or {DTYPES[-1]}; save "
            "them as float32, quantised ones after multiplying by their scale"
        )
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Return a sort key that puts ``emb_2`` before ``emb_10``."""
    # The pieces alternate between text and numbers, so like is compared with like.
    pieces = re.split(r"(\d+)", name)
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces)), name


def _part(path: Path, opener: Opener, key: str, header: Header) -> Part:
    name = f"{path}:{key}" if key else str(path)

    def read(step: int) -> Iterator[Array]:
        with opener(path) as file:
            yield from file.read(key, step)

    return Part(name, header.shape, check_array(name, *header), read)


def _keyed(path: Path, opener: Opener, file: Container) -> Vectors:
    """Stack vectors, in the natural order of their names."""
    keys = sorted(file.headers, key=natural_key)
    first = file.headers[keys[0]]
    shape = (len(keys), *first.shape)
    for row, key in enumerate(keys):
        header = file.headers[key]
        if header != first:
            raise DataError(
                f"{path}, row {row} ({key}): is {header.shape[0]} wide and {keys[0]} is "
                f"{shape[1]} ({header.dtype}, {first.dtype}); omit it or encode it again"
            )

    def read(step: int) -> Iterator[Array]:
        with opener(path) as file:
            for start in range(0, len(keys), step):
                rows = (file.read(key, shape[1]) for key in keys[start : start + step])
                yield np.stack([*chain.from_iterable(rows)])

    columns = {"id": pa.array(keys, pa.large_string())}
    if file.owners:
        owners = [file.owners.get(key) for key in keys]
        columns["image_id"] = pa.array(owners, pa.large_string())
    part = Part(str(path), shape, check_array(f"{path}:{keys[0]}", shape, first.dtype), read, keys)
    labels = Labels(str(path), len(keys), part.where).with_columns(columns)
    return Vectors(str(path), (part,), labels)


def labels_of(path: Path, opener: Opener, file: Container, rows: int) -> Labels:
    """Return the labels of `rows` rows in an open file, which is opened again to read them."""

    def read(name: str) -> pa.Array:
        with opener(path) as again:
            return again.read_labels(name)

    counts = Counter(name.rpartition("/")[2] for name in file.labels)
    names = {}  # without the groups around them, where names are unique without
    for name in (name for name, count in file.labels.items() if count == rows):
        short = name.rpartition("/")[2]
        names[short if counts[short] == 1 and label_side(name) is None else name] = name
    unread = _unread(file, rows)
    where = partial("{}, row {}".format, path)
    return Labels(str(path), rows, where, [*names], lambda name: read(names[name]), unread)


def _unread(file: Container, rows: int) -> dict[str, str]:
    """Return the lists that look like keys but are of another type or length, with the reason."""
    counts = {rows, *(file.headers[name].shape[0] for name in file.vectors)}
    kinds = {name: header.dtype for name, header in file.headers.items()} | dict(file.others)
    known = {*file.vectors, *file.labels}
    found = {
        name: f"contains {'Python objects' if kind == 'object' else kind}, which cannot be read as "
        "keys; store one text or integer per row, as array.astype(str) does"
        for name, kind in kinds.items()
        if name not in known
    }
    for name, count in file.labels.items():
        if count not in counts:
            found[name] = f"has {count} values and there are {rows} rows; give every row one"
    objects = [name for name in found if kinds.get(name) == "object"]
    names = {name for name in objects if is_key(name) or words_of(name) & {"name", "names"}}
    for name in {*objects} - names:
        log.warning("%s", f"{name} contains Python objects and is not read; store texts")
    return {name: why for name, why in found.items() if name in names or is_usual_key(name)}


def _recognised(file: Container, modality: str) -> list[str]:
    """Return the only array, or all if their names differ in a last number only, from 0 on."""
    arrays = [name for name, header in file.headers.items() if len(header.shape) in (2, 3)]
    if len(arrays) == 1:
        is_other = any(of_side(arrays, side) for side in Modality if side != modality)
        return [] if file.is_table and is_other else arrays
    stem = re.sub(r"\d+$", "", min(file.headers, default=""))
    names = [f"{stem}{number}" for number in range(len(file.headers))]
    return names if set(names) == set(arrays) and not file.is_table else []
