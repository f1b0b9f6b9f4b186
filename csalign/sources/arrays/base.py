"""Embeddings that somebody already has, whatever file they lie in: read in order, by parts."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.core.errors import ShapeError
from csalign.core.paths import is_remote

Array = npt.NDArray[Any]
Strings = Sequence[str | None]

CHUNK_ROWS = 8_192
CHUNK_BYTES = 32 << 20

DTYPES = ("float16", "bfloat16", "float32", "float64")

# What an array, dataset or column may be called where a file holds both sides, and where it
# holds one.
IMAGE_NAMES = (
    "images",
    "image",
    "image_embeddings",
    "image_embedding",
    "image_embeds",
    "image_emb",
    "img_emb",
    "image_features",
    "image_feats",
    "img_feats",
    "vision_features",
)
TEXT_NAMES = (
    "texts",
    "text",
    "text_embeddings",
    "text_embedding",
    "text_embeds",
    "text_emb",
    "text_features",
    "text_feats",
    "txt_feats",
    "language_features",
)
EITHER_NAMES = (
    "embeddings",
    "embedding",
    "embeds",
    "emb",
    "vectors",
    "vector",
    "features",
    "feats",
    "data",
)


@dataclass(frozen=True)
class Part:
    """The embeddings in one file, or in one array of it.

    Attributes:
        name: the file, with the array behind a colon where it holds several, for messages.
        shape: (n, d), or (n, k, d) for k captions an image.
        dtype: of what `read` gives: float16, float32 or float64, in either byte order.
        read: given a number of items, a stream of arrays of at most so many of the n, in order.
        keys: names of the rows in the file where it has any, for messages.
        numbers: of the rows in the file where it has others too, for messages.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int], Iterator[Array]]
    keys: Sequence[str] = ()
    numbers: Sequence[int] = ()

    def __len__(self) -> int:
        return prod(self.shape[:-1])

    def where(self, row: int) -> str:
        """File and row, counted from 0, for messages."""
        if self.numbers:
            return f"{self.name}, row {self.numbers[row]}"
        if len(self.shape) == 2:
            return f"{self.name}, row {row}" + (f" ({self.keys[row]})" if self.keys else "")
        return f"{self.name}, row {row // self.shape[1]}, caption {row % self.shape[1]}"


@dataclass(frozen=True)
class Labels:
    """What a file says of its rows beside their embeddings.

    Attributes:
        name: the file, for messages.
        rows: how many rows it describes.
        columns: ``id``, ``image_id``, ``text_id``, ``caption``, ``split`` and ``source`` where
            they are known; `rows` values each, None where there is none.
        where: file and row of a row counted from 0, for messages.
    """

    name: str
    rows: int
    columns: Mapping[str, Strings]
    where: Callable[[int], str]


@dataclass(frozen=True)
class Vectors:
    """Embeddings in one or more parts, as one array of rows; reads nothing until asked.

    Attributes:
        name: as the user named them.
        parts: at least one, all of one width.
        labels: what the files say of the rows, None where they hold embeddings alone.
    """

    name: str
    parts: tuple[Part, ...]
    labels: Labels | None = None

    def __post_init__(self) -> None:
        """Refuse parts that are not one array."""
        first = self.parts[0]
        for part in self.parts:
            if part.shape[1:] != first.shape[1:]:
                raise ShapeError(
                    f"{part.name}: has shape {part.shape} and {first.name} has {first.shape}; all "
                    "parts of an array have one width, import them one by one"
                )
        if not len(self) or not self.width:
            raise ShapeError(f"{first.name}: has shape {first.shape}: is empty")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.parts[0].shape[-1]

    @property
    def captions_each(self) -> int | None:
        """How many rows each image has in a 3-D array, None in a 2-D one."""
        shape = self.parts[0].shape
        return shape[1] if len(shape) == 3 else None

    @property
    def is_half(self) -> bool:
        """Whether all of it is float16."""
        return all(part.dtype.itemsize == 2 for part in self.parts)

    def chunks(self) -> Iterator[tuple[Array, Callable[[int], str]]]:
        """Stream all rows in order.

        Yields:
            (r, d) arrays of bounded size, with a function that tells file and row of one of them.

        Raises:
            DataError: a part is damaged, or a row is none; file and row are named.
        """
        for part in self.parts:
            each = prod(part.shape[1:-1])
            row_bytes = self.width * part.dtype.itemsize
            step = max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes) // each)
            start = 0
            for chunk in part.read(step):
                rows = chunk.reshape(-1, self.width)
                yield rows, _named_from(part, start)
                start += len(rows)


def _named_from(part: Part, start: int) -> Callable[[int], str]:
    return lambda row: part.where(start + row)


def check_array(name: str, shape: Sequence[int], dtype: str) -> None:
    """Refuse an array that cannot be embeddings.

    Args:
        name: the file, for the message.
        shape: of the array.
        dtype: name of its numbers' type.

    Raises:
        ShapeError: it is not 2-D or 3-D, or not of a float type.
    """
    if len(shape) not in (2, 3):
        raise ShapeError(
            f"{name}: has shape {tuple(shape)}: embeddings are (rows, width), or (images, "
            "captions, width) for texts"
        )
    check_dtype(name, dtype)


def check_dtype(name: str, dtype: str) -> None:
    """Refuse numbers that are not plain floats; arguments and errors as in `check_array`."""
    if dtype not in DTYPES:
        raise ShapeError(
            f"{name}: has dtype {dtype}; embeddings are {', '.join(DTYPES[:-1])} or {DTYPES[-1]}: "
            "save them as float32, quantised ones after multiplying by their scale"
        )


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file of a local file system with the content of `path`: itself, or a temporary copy."""
    if not is_remote(path):
        yield path
        return
    with path.open("rb") as source, tempfile.NamedTemporaryFile(suffix=path.suffix) as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        yield Path(copy.name)
