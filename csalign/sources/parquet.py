"""Image-text Parquet and Arrow files, as data sets on the Hugging Face hub are kept."""

import logging
import mmap
import posixpath
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csalign.enums import Modality
from csalign.errors import DataError
from csalign.locations import is_remote
from csalign.sources.base import ImageInput, Record, TextInput, Volume
from csalign.sources.catalog import Catalog, CatalogSource
from csalign.sources.columns import Columns, Found, Row, from_base64, is_base64, is_base64_name
from csalign.sources.lost import LostVolume, tell_of_lost
from csalign.sources.tables import caption_of
from csalign.sources.tree import (
    check_size,
    fingerprint,
    local_file,
    name_flaw,
    path_below,
    read_bounded,
    shown,
    size_of,
    split_of,
    told_of,
)

logger = logging.getLogger(__name__)

_IMAGE_ROWS = 32  # of which the bytes are held at once
_PLAIN_ROWS = 8192


def open_parquet(
    root: Path,
    paths: Sequence[str],
    columns: Columns,
    *,
    images: Path | None = None,
    found: Sequence[str] = (),
    sizes: Sequence[int | None] | None = None,
) -> "ColumnarSource | CatalogSource":
    """The source that Parquet or Arrow files make.

    Files whose image column holds paths are gathered in memory by image; others are streamed, a
    record a row.

    Args:
        root: folder that all files are below.
        paths: the files, by their path below it.
        columns: which columns hold what.
        images: folder that image paths start from (default: `root`).
        found: images below `images` to be added where no row speaks of them.
        sizes: bytes of each file where known already.

    Raises:
        DataError: no file can be read, or one lacks a column or differs from the others.
    """
    known = [
        size_of(root / path) if size is None else size
        for path, size in zip(paths, sizes or [None] * len(paths), strict=True)
    ]
    layout, total, lost = _look(root, paths, columns)
    mark = fingerprint([layout, *paths, *known, *found, *lost.items()])
    if layout.kind == "path":
        return _gather(root, paths, layout, images, found, lost).finish(
            f"{_form(paths)} with image paths", mark
        )
    _tell_of_splits(root, paths, layout)
    count = None if layout.found.id else total + len(lost)
    return ColumnarSource(root, paths, known, layout, images, count, mark, lost)


def _look(
    root: Path, paths: Sequence[str], columns: Columns
) -> tuple["_Layout", int, dict[int, str]]:
    """What the columns of all files hold, their rows in all, and why some cannot be read."""
    layout: _Layout | None = None
    first, total = "", 0
    lost: dict[int, str] = {}
    for place, path in enumerate(paths):
        with ExitStack() as stack:
            try:
                if (flaw := name_flaw(str(root / path))) is not None:
                    raise _DamagedError(flaw)
                shelf = stack.enter_context(_opened(root / path))
            except DataError as error:
                # What an object store refuses now, it may give to the next attempt.
                if is_remote(root) and not isinstance(error, _DamagedError):
                    raise
                lost[place] = str(error)
                continue
            own = _layout(root / path, shelf, columns)
            total += shelf.rows
        if layout is None:
            layout, first = own, path
            layout.found.warn_of_one_side(layout.names, root / path)
        if own[:2] != layout[:2]:
            raise DataError(
                f"{root / path}: has other columns than {first} ({own}, not {layout}); give files "
                "that are alike"
            )
    tell_of_lost(root, lost, len(paths))
    assert layout is not None
    return layout, total, lost


class _DamagedError(DataError):
    """A file that was read and is none."""


class _Layout(NamedTuple):
    """What the columns of a file hold; `kind` of its images: bytes, struct, base64 or path."""

    found: Found
    kind: str | None
    names: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.names)

    @property
    def wanted(self) -> list[str]:
        return list(dict.fromkeys(name for name in self.found if name is not None))


class _Shelf(NamedTuple):
    """An open file: its schema, its rows, and its batches from one row on.

    `stop` tells where the piece that a row is in ends, behind which damage does not reach.
    """

    schema: pa.Schema
    rows: int
    stop: Callable[[int], int]
    batches: Callable[[int, list[str], int], Iterator[tuple[int, pa.RecordBatch]]]


@contextmanager
def _opened(path: Path) -> Iterator[_Shelf]:
    with ExitStack() as stack:
        with told_of(path):
            try:
                if path.suffix.lower() == ".arrow":
                    shelf = _arrow_shelf(stack.enter_context(local_file(path)))
                else:
                    file = stack.enter_context(path.open("rb")) if is_remote(path) else path
                    shelf = _parquet_shelf(stack, file)
            except pa.ArrowException as error:
                reason = f"{path}: cannot be read ({_line(error)}); write or download it again"
                raise _DamagedError(reason) from None
        yield shelf


def _parquet_shelf(stack: ExitStack, file: Any) -> _Shelf:
    # Buffered, so that a large row group is read piece by piece rather than whole.
    parquet = stack.enter_context(pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False))
    groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])

    def batches(start: int, names: list[str], size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        group = int(np.searchsorted(starts, start, side="right")) - 1
        row = int(starts[group])
        rest = list(range(group, len(groups)))
        for batch in parquet.iter_batches(size, row_groups=rest, columns=names, use_threads=False):
            if row + len(batch) > start:
                yield row, batch
            row += len(batch)

    def stop(row: int) -> int:
        return int(starts[np.searchsorted(starts, row, side="right")])

    return _Shelf(parquet.schema_arrow, parquet.metadata.num_rows, stop, batches)


def _arrow_shelf(file: Any) -> _Shelf:
    # Mapped, so that nothing is in memory before it is needed.
    content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        table = pa.ipc.open_stream(content).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_file(content).read_all()

    def batches(start: int, names: list[str], size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        row = start
        for batch in table.select(names).slice(start).to_batches(max_chunksize=size):
            yield row, batch
            row += len(batch)

    return _Shelf(table.schema, len(table), lambda _: len(table), batches)


def _layout(path: Path, shelf: _Shelf, columns: Columns) -> _Layout:
    names = tuple(shelf.schema.names)
    found = columns.find(names, path)
    kind = None
    if found.image is not None:
        kind = _image_kind(path, shelf, found.image)
    if found.caption is not None and not _is_caption(shelf.schema.field(found.caption).type):
        held = shelf.schema.field(found.caption).type
        raise DataError(
            f"{path}: column {found.caption!r} holds {held}, not text or lists of text; name "
            "another with --caption-column"
        )
    return _Layout(found, kind, names)


def _image_kind(path: Path, shelf: _Shelf, name: str) -> str:
    held = shelf.schema.field(name).type
    if pa.types.is_dictionary(held):
        held = held.value_type
    if _is_any(held, "binary", "large_binary", "fixed_size_binary", "binary_view"):
        return "bytes"
    if pa.types.is_struct(held) and {"bytes", "path"} & {field.name for field in held}:
        return "struct"
    if _is_any(held, "string", "large_string", "string_view"):
        if is_base64_name(name) or _starts_with_base64(path, shelf, name):
            return "base64"
        return "path"
    raise DataError(
        f"{path}: column {name!r:.200} holds {held}, not images or paths; name another with "
        "--image-column"
    )


def _starts_with_base64(path: Path, shelf: _Shelf, name: str) -> bool:
    for _, batch in islice(_guarded(path, shelf.batches(0, [name], 1)), 10):
        for value in _values(batch.column(0)):
            if isinstance(value, str) and value:
                return is_base64(value)
    return False


def _is_caption(held: pa.DataType) -> bool:
    if _is_any(held, "list", "large_list", "fixed_size_list", "list_view", "large_list_view"):
        return _is_caption(held.value_type)
    if pa.types.is_dictionary(held):
        return _is_caption(held.value_type)
    return _is_any(held, "string", "large_string", "string_view", "null")


def _is_any(held: pa.DataType, *kinds: str) -> bool:
    return any(getattr(pa.types, f"is_{kind}")(held) for kind in kinds)


def _tell_of_splits(root: Path, paths: Sequence[str], layout: _Layout) -> None:
    splits = {split_of(path) for path in paths} - {None}
    if layout.found.split is None and splits:
        listed = ", ".join(sorted(str(split) for split in splits))
        logger.info("%s: splits are told by file names (%s)", root, listed)


def _gather(
    root: Path,
    paths: Sequence[str],
    layout: _Layout,
    images: Path | None,
    found: Sequence[str],
    lost: Mapping[int, str],
) -> Catalog:
    catalog = Catalog(images or root)
    for place, path in enumerate(paths):
        if place in lost:
            catalog.lose(shown((root / path).as_posix()), lost[place])
            continue
        stem = posixpath.splitext(path)[0]
        catalog.begin((root / path).as_posix(), f"{stem}/" if len(paths) > 1 else "")
        default = None if layout.found.split else split_of(path)
        with _opened(root / path) as shelf:
            for number, values in _rows(root / path, shelf, layout, 0, _PLAIN_ROWS):
                catalog.add(_row(number + 1, values, layout.found, default))
    catalog.add_found(found)
    return catalog


def _row(number: int, values: Mapping[str, Any], found: Found, default: str | None) -> Row:
    try:
        image = _text(values, found.image) or ""
        captions = _captions(values, found)
        split = _text(values, found.split) or default
        return Row(number, image, captions, split, _id(values, found))
    except ValueError as error:
        return Row(number, flaw=str(error))


def _form(paths: Sequence[str]) -> str:
    form = "Arrow" if paths[0].lower().endswith(".arrow") else "Parquet"
    return f"{len(paths)} {form} file{'s' if len(paths) > 1 else ''}"


@dataclass(frozen=True)
class ColumnarSource:
    """Parquet or Arrow files as a `Source`, each of them a volume and each row a record.

    With an id column, adjacent rows of one id are one record, with the image of the first.

    Attributes:
        root: folder that all files are below.
        paths: the files, by their path below it.
        sizes: bytes of each.
        layout: what their columns hold.
        images: folder that image paths start from, None for `root`.
        total: see `Source`.
        fingerprint: see `Source`: names, sizes and columns.
        lost: why a file cannot be read at all, by position.
    """

    root: Path
    paths: Sequence[str]
    sizes: Sequence[int]
    layout: _Layout
    images: Path | None
    total: int | None
    fingerprint: str
    lost: Mapping[int, str]

    @property
    def description(self) -> str:
        """See `Source`."""
        what = " and ".join(side.plural for side in self.sides)
        return f"{_form(self.paths)} of {what}"

    @property
    def volumes(self) -> Sequence[str]:
        """See `Source`."""
        return [shown((self.root / path).as_posix()) for path in self.paths]

    @property
    def sides(self) -> Collection[Modality]:
        """See `Source`."""
        there = {Modality.IMAGE: self.layout.found.image, Modality.TEXT: self.layout.found.caption}
        return tuple(side for side, column in there.items() if column is not None)

    @property
    def total_images(self) -> int | None:
        """See `Source`; a row may lack its image."""
        return 0 if self.layout.found.image is None else self.total

    def stamp(self, position: int, start: int, stop: int) -> str:
        """See `Source`: name, size and columns of the file."""
        own = (self.paths[position], self.sizes[position], self.lost.get(position))
        return fingerprint([self.layout, *own])

    @contextmanager
    def open(self, position: int) -> Iterator[Volume]:
        """See `Source`."""
        path = self.paths[position]
        if position in self.lost:
            yield LostVolume(self.volumes[position], self.lost[position])
            return
        with _opened(self.root / path) as shelf:
            yield _ColumnarVolume(self, path, shelf)


class _ColumnarVolume:
    def __init__(self, source: ColumnarSource, path: str, shelf: _Shelf) -> None:
        self._path = source.root / path
        self.name = self._path.as_posix()
        self._shelf = shelf
        self._layout = source.layout
        self._images = source.images or source.root
        self._prefix = f"{posixpath.splitext(path)[0]}/"
        self._several = len(source.paths) > 1
        self._split = None if source.layout.found.split else split_of(path)
        self._size = _IMAGE_ROWS if source.layout.kind else _PLAIN_ROWS
        self._groups: _Groups | None = None
        self._cursor: tuple[int, Iterator[tuple[int, Mapping[str, Any]]]] = (-1, iter(()))
        self._damaged = (0, 0, "")  # rows that cannot be read, and why

    def __len__(self) -> int:
        groups = self._grouped()
        return self._shelf.rows if groups is None else len(groups.starts) - 1

    def records(self, start: int, stop: int) -> Iterator[Record]:
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
                yield Record(None, row=first + 1, flaw=str(error))
            except DataError as error:
                reason = str(error).removeprefix(f"{self.name}: ")
                yield Record(None, row=first + 1, flaw=reason)

    def _read(self, first: int, last: int) -> list[Mapping[str, Any]]:
        """Rows, from where the last call ended if it can be: a row group starts at its start."""
        start, stop, reason = self._damaged
        if start <= first < stop:
            raise DataError(reason)
        position, rows = self._cursor
        if position != first:
            rows = _rows(self._path, self._shelf, self._layout, first, self._size)
        try:
            read = [values for _, values in islice(rows, last - first)]
        except _DamagedError as error:
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
        own = _id(rows[0], found)
        captions = [text for values in rows for text in _captions(values, found)]
        split = _text(rows[0], found.split) or self._split
        if any((_text(values, found.split) or self._split) != split for values in rows):
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
        if isinstance(value, _Broken):
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
        return from_base64(value)
    check_size(len(value))
    return value


class _Groups(NamedTuple):
    """Rows by id: where each group starts, and the end; groups whose id was there before."""

    starts: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    repeated: set[int]


def _groups(path: Path, shelf: _Shelf, name: str) -> _Groups:
    starts: list[int] = []
    repeated: set[int] = set()
    seen: set[Any] = set()
    previous: Any = None
    for row, batch in _guarded(path, shelf.batches(0, [name], _PLAIN_ROWS)):
        for position, value in enumerate(_values(batch.column(0))):
            key = None if isinstance(value, _Broken) else value
            if key is None or key != previous:
                if key is not None and key in seen:
                    repeated.add(len(starts))
                seen.add(key)
                starts.append(row + position)
            previous = key
    return _Groups(np.array([*starts, shelf.rows], np.int64), repeated)


def _rows(
    path: Path, shelf: _Shelf, layout: _Layout, start: int, size: int
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows from one on, with their 0-based numbers."""
    for first, batch in _guarded(path, shelf.batches(start, layout.wanted, size)):
        skipped = max(0, start - first)
        columns = {name: _values(batch.column(name)[skipped:]) for name in layout.wanted}
        for position in range(len(batch) - skipped):
            values = {name: column[position] for name, column in columns.items()}
            yield first + skipped + position, values


def _guarded(
    path: Path, batches: Iterator[tuple[int, pa.RecordBatch]]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    with told_of(path):
        try:
            yield from batches
        except (pa.ArrowException, OSError) as error:
            reason = f"{path}: is damaged ({_line(error)}); write it again"
            raise _DamagedError(reason) from None


class _Broken(str):
    """Why a value cannot be had; stands where it would."""

    __slots__ = ()


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _Broken("holds text that is not UTF-8")


def _text(values: Mapping[str, Any], name: str | None) -> str | None:
    value = None if name is None else values[name]
    if value is None:
        return None
    if isinstance(value, _Broken):
        raise ValueError(str(value))
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {value!r:.40}")
    return value.strip() or None


def _captions(values: Mapping[str, Any], found: Found) -> tuple[str, ...]:
    value = None if found.caption is None else values[found.caption]
    if isinstance(value, _Broken):
        raise ValueError(str(value))
    return caption_of(value, str(found.caption))


def _id(values: Mapping[str, Any], found: Found) -> str | None:
    value = None if found.id is None else values[found.id]
    return str(value) if isinstance(value, int) else _text(values, found.id)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
