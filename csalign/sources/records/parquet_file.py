"""The records of one Parquet or Arrow file."""

import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csalign.core.errors import DataError
from csalign.sources.arrow import Broken, DamagedError, Shelf, column_values, guarded
from csalign.sources.records import ImageInput, Record, TextInput
from csalign.sources.records.files import check_size, path_below, read_bounded, split_of
from csalign.sources.records.parquet_layout import (
    PLAIN_ROWS,
    Layout,
    captions_of,
    id_of,
    rows_of,
    text_of,
)
from csalign.sources.records.tables import decode_base64

_IMAGE_ROWS = 32  # of which the bytes are held at once


class ColumnarVolume:
    """One file as a `SourceFile`.

    Args:
        root: folder that all files of the source are below.
        below: the file's path below it.
        shelf: the file, open.
        layout: what its columns hold.
        images: folder that image paths start from.
        is_one_of_several: whether ids need the file's name to be unique.
    """

    def __init__(
        self,
        root: Path,
        below: str,
        shelf: Shelf,
        layout: Layout,
        images: Path,
        *,
        is_one_of_several: bool,
    ) -> None:
        self._path = root / below
        self.name = self._path.as_posix()
        self._shelf = shelf
        self._layout = layout
        self._images = images
        self._prefix = f"{posixpath.splitext(below)[0]}/"
        self._several = is_one_of_several
        self._split = None if layout.found.split else split_of(below)
        self._size = _IMAGE_ROWS if layout.kind else PLAIN_ROWS
        self._groups: _Groups | None = None
        self._cursor: tuple[int, Iterator[tuple[int, Mapping[str, Any]]]] = (-1, iter(()))
        self._damaged = (0, 0, "")  # rows that cannot be read, and why

    def __len__(self) -> int:
        groups = self._grouped()
        return self._shelf.rows if groups is None else len(groups.starts) - 1

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """See `SourceFile`."""
        groups = self._grouped()
        for record in range(start, min(stop, len(self))):
            first = record if groups is None else int(groups.starts[record])
            last = record + 1 if groups is None else int(groups.starts[record + 1])
            try:
                rows = self._read(first, last)
                if groups is not None and record in groups.repeated:
                    raise ValueError("its id was there before; rows of one id must be adjacent")
                yield self._record(first + 1, rows)
            except ValueError as error:
                yield Record(None, row=first + 1, error=str(error))
            except DataError as error:
                reason = str(error).removeprefix(f"{self.name}: ")
                yield Record(None, row=first + 1, error=reason)

    def _read(self, first: int, last: int) -> list[Mapping[str, Any]]:
        """Rows, from where the last call ended if it can be: a row group starts at its start."""
        start, stop, reason = self._damaged
        if start <= first < stop:
            raise DataError(reason)
        position, rows = self._cursor
        if position != first:
            rows = rows_of(self._path, self._shelf, self._layout, first, self._size)
        try:
            read = [values for _, values in islice(rows, last - first)]
            if len(read) < last - first:
                raise DamagedError(
                    f"{self.name}: holds fewer rows than it says; write or download it again"
                )
        except DamagedError as error:
            self._damaged = (first, self._shelf.stop(first), str(error))
            raise
        self._cursor = (last, rows)
        return read

    def _grouped(self) -> "_Groups | None":
        name = self._layout.found.id
        if name is None:
            return None
        if self._groups is None:
            self._groups = _groups(self._path, self._shelf, name)
        return self._groups

    def _record(self, row: int, rows: Sequence[Mapping[str, Any]]) -> Record:
        found = self._layout.found
        own = id_of(rows[0], found)
        captions = [text for values in rows for text in captions_of(values, found)]
        split = text_of(rows[0], found.split) or self._split
        if any((text_of(values, found.split) or self._split) != split for values in rows):
            raise ValueError(f"its rows are in several splits, one of them {split or 'none'}")
        if found.image is not None:
            others = [values[found.image] for values in rows[1:]]
            if any(other is not None and other != rows[0][found.image] for other in others):
                raise ValueError(
                    f"its rows share the id {own!r:.200}, but not the image; ids are unique"
                )
        volume = self._prefix if self._several else ""
        image = None
        if found.image is not None and rows[0][found.image] is not None:
            image_id = f"{self._prefix}{row}" if own is None else f"{volume}{own}"
            read = self._reader(rows[0][found.image])
            image = None if read is None else ImageInput(image_id, f"{self.name}/{row}", read)
        if image is None and not captions:
            raise ValueError("has neither an image nor a caption")
        label = image.id if image else f"{volume}{own}" if own else f"{volume}caption:{row}"
        texts = tuple(
            TextInput(f"{label}#{k}" if k or image else label, text, row)
            for k, text in enumerate(dict.fromkeys(captions))
        )
        return Record(image, texts, split, row)

    def _reader(self, value: Any) -> Callable[[], bytes] | None:
        """What gives an image's bytes, None for no image."""
        if isinstance(value, Broken):
            raise ValueError(str(value))
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
            if value is None and isinstance(path, str) and path:
                return partial(read_bounded, self._images / path_below(self._images, path))
        if value is None or value == "":
            return None
        return partial(_image_bytes, value)


def _image_bytes(value: bytes | str) -> bytes:
    if isinstance(value, str):
        return decode_base64(value)
    check_size(len(value))
    return value


class _Groups(NamedTuple):
    """Rows by id: where each group starts, and the end; groups whose id was there before."""

    starts: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    repeated: set[int]


def _groups(path: Path, shelf: Shelf, name: str) -> _Groups:
    starts: list[int] = []
    repeated: set[int] = set()
    seen: set[Any] = set()
    previous: Any = None
    for row, batch in guarded(path, shelf.batches(0, [name], PLAIN_ROWS)):
        for position, value in enumerate(column_values(batch.column(0))):
            key = None if isinstance(value, Broken) else value
            if key is None or key != previous:
                if key is not None and key in seen:
                    repeated.add(len(starts))
                seen.add(key)
                starts.append(row + position)
            previous = key
    return _Groups(np.array([*starts, shelf.rows], np.int64), repeated)
