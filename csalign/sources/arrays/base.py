"""Arrays of embeddings from any file format: selected by name, streamed in parts."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError

Array = npt.NDArray[Any]
Strings = Sequence[str | None]

CHUNK_ROWS = 8_192
CHUNK_BYTES = 32 << 20
UNNAMED = ""  # key of the array in a file of one array
DTYPES = ("float16", "bfloat16", "float32", "float64")
_LISTED = 8  # names in a message

# Usual names of an array, dataset or column: of a side, and in a file of one side only.
NAMES: dict[Modality, tuple[str, ...]] = {
    Modality.IMAGE: (
        *("images", "image", "image_embeddings", "image_embedding", "image_embeds", "image_emb"),
        *("img_emb", "image_features", "image_feats", "img_feats", "vision_features"),
    ),
    Modality.TEXT: (
        *("texts", "text", "text_embeddings", "text_embedding", "text_embeds", "text_emb"),
        *("text_features", "text_feats", "txt_feats", "language_features"),
    ),
}
EITHER_NAMES = (
    *("embeddings", "embedding", "embeds", "emb", "vectors", "vector", "features", "feats"),
    "data",
)


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
class Labels:
    """Strings that describe the rows of an array.

    Attributes:
        name: the file, for messages.
        rows: number of rows.
        columns: ``id``, ``image_id``, ``text_id``, ``caption``, ``split`` and ``source`` where
            known; `rows` values each, None where missing.
        where: returns file and row of a 0-based row.
    """

    name: str
    rows: int
    columns: Mapping[str, Strings]
    where: Callable[[int], str]


@dataclass(frozen=True)
class Vectors:
    """Embeddings in one or more parts, as one array of rows; nothing is read until `chunks`."""

    name: str  # as given by the user
    parts: tuple[Part, ...]  # at least one, all of one width
    labels: Labels | None = None  # of the rows, None where the files contain embeddings alone
    kept: npt.NDArray[np.bool_] | None = None  # mask of the rows to use, None for all

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
    def is_half(self) -> bool:
        """True if all parts are float16."""
        return all(part.dtype.itemsize == 2 for part in self.parts)

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


def _where(part: Part, numbers: npt.NDArray[np.int64], row: int) -> str:
    return part.where(int(numbers[row]))


class Header(NamedTuple):
    """Shape of an array, and the name of its number format."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Container:
    """An open file of arrays.

    Attributes:
        headers: of each array by name; of `UNNAMED` alone where the file is one array.
        read: streams the array of a name, at most the given number of rows at a time.
        owners: the image of each text, by key, where the file states it.
        is_table: whether all arrays describe the same rows.
    """

    headers: Mapping[str, Header]
    read: Callable[[str, int], Iterator[Array]]
    owners: Mapping[str, str] = field(default_factory=dict)
    is_table: bool = False


Opener = Callable[[Path], AbstractContextManager[Container]]


def read_named(
    path: Path, opener: Opener, modality: Modality, wanted: str | None, *, guess: bool = True
) -> Vectors:
    """Select one side's embeddings in a file of arrays.

    Args:
        path: the file.
        opener: opens it.
        modality: which side.
        wanted: name of the array, None to recognise it.
        guess: whether an array without a usual name of the side may be recognised.

    Returns:
        The first that applies: the array that is wanted, has no name, or has a usual name; all
        arrays as rows, with their names as ids, if all are 1-D; the only 2-D or 3-D array,
        unless it is a column with a usual name of the other side; all arrays as parts, if they are
        numbered (``tensor_0``, ``tensor_1``, ...).

    Raises:
        DataError: the name is missing, or the choice is ambiguous.
        ShapeError: it cannot be embeddings.
    """
    with opener(path) as file:
        headers = file.headers
    listed = ", ".join(sorted(headers, key=natural_key)[:_LISTED]) or "none"
    if len(headers) > _LISTED:
        listed += f", and {len(headers) - _LISTED} more"
    if UNNAMED in headers and (wanted is not None or not guess):
        raise DataError(f"{path}: contains one array, which has no name; pass the path alone")
    if wanted is not None and wanted not in headers:
        raise DataError(f"{path}: has no array {wanted!r} (arrays: {listed})")
    known = (*NAMES[modality], *((UNNAMED, *EITHER_NAMES) if guess else ()))
    name = wanted if wanted is not None else first_of(known, headers)
    names = [] if name is None else [name]
    if name is None and guess:
        if headers and all(len(header.shape) == 1 for header in headers.values()):
            return _keyed(path, opener, file)
        names = _recognised(file, modality)
    if not names:
        raise DataError(
            f"{path}: no array looks like the {modality} embeddings (arrays: {listed}); name it "
            f"with --{modality}-column"
        )
    return Vectors(str(path), tuple(_part(path, opener, name, headers[name]) for name in names))


def join(name: str, arrays: Sequence[Vectors]) -> Vectors:
    """Concatenate arrays, with the labels that all of them have.

    Raises:
        ShapeError: their widths differ, or all are empty.
    """
    parts = tuple(part for array in arrays for part in array.parts if len(part))
    first = (parts or arrays[0].parts)[0]
    if not prod(first.shape):
        raise ShapeError(f"{first.name}: has shape {first.shape}: is empty")
    labels = [array.labels for array in arrays if array.labels is not None]
    joined = join_labels(name, labels) if len(labels) == len(arrays) else None
    return Vectors(name, parts, joined)


def join_labels(name: str, labels: Sequence[Labels]) -> Labels:
    """Concatenate labels; columns that some of them lack are omitted."""
    common = [known for known in labels[0].columns if all(known in own.columns for own in labels)]
    columns = {known: [value for own in labels for value in own.columns[known]] for known in common}
    ends = np.cumsum([own.rows for own in labels])

    def where(row: int) -> str:
        index = int(np.searchsorted(ends, row, side="right"))
        return labels[index].where(row - int(ends[index]) + labels[index].rows)

    return Labels(name, int(ends[-1]), columns, where)


def first_of(names: Iterable[str], there: Iterable[str]) -> str | None:
    """Return the first of some lower-case names that is there, in any case; None if none is."""
    by_name = {name.lower(): name for name in reversed(list(there))}
    return next((by_name[name] for name in names if name in by_name), None)


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

    columns: dict[str, list[str | None]] = {"id": [*keys]}
    if file.owners:
        columns["image_id"] = [file.owners.get(key) for key in keys]
    part = Part(str(path), shape, check_array(f"{path}:{keys[0]}", shape, first.dtype), read, keys)
    return Vectors(str(path), (part,), Labels(str(path), len(keys), columns, part.where))


def _recognised(file: Container, modality: Modality) -> list[str]:
    """Return the only array, or all if their names differ in a last number only, from 0 on."""
    arrays = [name for name, header in file.headers.items() if len(header.shape) in (2, 3)]
    if len(arrays) == 1:
        other = next(side for side in Modality if side is not modality)
        return [] if file.is_table and first_of(NAMES[other], arrays) else arrays
    stem = re.sub(r"\d+$", "", min(file.headers, default=""))
    names = [f"{stem}{number}" for number in range(len(file.headers))]
    return names if set(names) == set(arrays) and not file.is_table else []
