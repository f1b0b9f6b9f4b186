"""Parquet and Arrow files as a source of records, as on the Hugging Face hub."""

import json
import logging
import posixpath
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.figures import counted
from csalign.sources import arrow
from csalign.sources.arrow import ArrowFile, DamagedError, InvalidText, column_values, open_arrow
from csalign.sources.records import (
    FileSource,
    ImageInput,
    Record,
    SourceFile,
    TextInput,
    cells,
    files,
    warn_of_unreadable,
)
from csalign.sources.records.catalog import Catalog
from csalign.sources.records.tables import (
    SHARED_NAMES,
    Row,
    SourceOptions,
    TableColumns,
    labels_of,
    row_of,
)

_IMAGE_ROWS = 32  # per batch, whose bytes are in memory at once
_TEXT_ROWS = 8_192

logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Meaning of the columns.

    `kind` is that of the image column: bytes, struct, base64 or path; `splits` are the names that
    `datasets` stores for a split column of numbers.
    """

    found: TableColumns
    kind: str | None
    names: tuple[str, ...]
    splits: tuple[str, ...] = ()

    def rows(self, file: ArrowFile, start: int = 0) -> Iterator[dict[str, Any]]:
        """Stream the rows of a file from `start` on, as values by column."""
        wanted = self.found.used
        if self.found.image and self.kind != "path":
            wanted += [own for own in SHARED_NAMES if own in {*self.names} - {*wanted}]
        size = _TEXT_ROWS if self.kind in (None, "path") else _IMAGE_ROWS
        for batch in file.batches(wanted, size, start):
            for values in zip(*(column_values(batch[name]) for name in wanted), strict=True):
                yield dict(zip(wanted, values, strict=True))

    def row(self, number: int, values: dict[str, Any], split: str | None) -> Row:
        """Read image path, captions, split and id of a row; `split` is that of its file."""
        found = self.found if self.kind == "path" else self.found._replace(image=None)
        label = values.get(found.split or "")
        if isinstance(label, int) and 0 <= label < len(self.splits):
            values = {**values, str(found.split): self.splits[label]}
        row = row_of(number, values, found)
        return row if found.split else row._replace(split=split)


def open_parquet(
    root: Path,
    sizes: Mapping[str, int | None],
    options: SourceOptions,
    *,
    images: Path | None = None,
    found: Collection[str] = (),
    parents: Collection[str] = (),
) -> "ParquetSource | Catalog":
    """Open Parquet or Arrow files as a source.

    Files whose image column contains paths are read into memory and grouped by image; others are
    streamed, one record per row.

    Args:
        root: folder of all files.
        sizes: bytes of each file where known, by path relative to `root`.
        options: which columns to read.
        images: folder that image paths are relative to (default: `root`).
        found: images below `images` to be added where no row names them.
        parents: folders whose files have image paths that start from the folder itself.

    Raises:
        DataError: no file can be read, or one lacks a column or differs from the others.
    """
    paths = list(sizes)
    layout, total, lost = _inspect(root, paths, options)
    if layout.kind == "path":
        catalog = Catalog(images or root)
        for position, path in enumerate(paths):
            name = (root / path).as_posix()
            if position in lost:
                catalog.add_unreadable_file(files.printable(name), lost[position])
                continue
            prefix = f"{posixpath.splitext(path)[0]}/" if len(paths) > 1 else ""
            folder = posixpath.dirname(path)
            catalog.begin_file(name, prefix, None, folder if folder in parents else "")
            with open_arrow(root / path) as file:
                for number, values in enumerate(layout.rows(file), 1):
                    catalog.add(layout.row(number, values, files.split_of(path)))
        catalog.add_found(found)
        return catalog.finish(f"{_form(paths)} with image paths")
    splits = sorted({split for path in paths if (split := files.split_of(path))})
    if layout.found.split is None and splits:
        logger.info("%s: splits are taken from file names (%s)", root, ", ".join(splits))
    count = None if layout.found.id else total + len(lost)
    columns = {Modality.IMAGE: layout.found.image, Modality.TEXT: layout.found.caption}
    sides = tuple(side for side, column in columns.items() if column is not None)
    form = f"{_form(paths)} of {' and '.join(side.plural for side in sides)}"
    known = [files.size_of(root / path, size) for path, size in sizes.items()]
    place = images or root
    return ParquetSource(form, root, paths, known, lost, (layout,), sides, count, layout, place)


def _inspect(
    root: Path, paths: Sequence[str], options: SourceOptions
) -> tuple[Layout, int, dict[int, str]]:
    """Return the layout of all files, their number of rows, and why some cannot be read."""
    layouts: dict[Path, Layout] = {}
    empty: dict[Path, Layout] = {}  # whose images may be of any kind
    total = 0
    lost: dict[int, str] = {}
    for position, path in enumerate(root / path for path in paths):
        try:
            if (reason := files.name_error(str(path))) is not None:
                raise DamagedError(reason)
            with open_arrow(path) as file:
                (layouts if file.rows else empty)[path] = _layout_of(file, options)
                total += file.rows
        except DamagedError as error:
            lost[position] = str(error)
    warn_of_unreadable(root, lost, len(paths))
    if empty and layouts:
        logger.warning("%s: %d of %d files have no rows", root, len(empty), len(paths))
    layouts = layouts or empty
    first, layout = next(iter(layouts.items()))
    layout.found.warn_of_one_side(layout.names, first, options._skipped)
    for path, own in layouts.items():
        if own[:2] != layout[:2]:
            raise DataError(
                f"{path}: has other columns than {first.name} ({', '.join(own.names)}, not "
                f"{', '.join(layout.names)}); all files must have the same columns"
            )
    return layout, total, lost


def _layout_of(file: ArrowFile, options: SourceOptions) -> Layout:
    found = options.find(file.names, file.path)
    kind = None if found.image is None else _image_kind(file, found.image)
    if found.caption is not None:
        held = file.schema.field(found.caption).type
        while arrow.kind_of(held) == "list":
            held = held.value_type
        if arrow.kind_of(held) not in ("text", "null"):
            raise DataError(
                f"{file.path}: column {found.caption!r} contains {held}, not text or lists of "
                "text; name another with --caption-column"
            )
    return Layout(found, kind, file.names, _label_names(file, found.split))


def _label_names(file: ArrowFile, column: str | None) -> tuple[str, ...]:
    """Return the names of a column of class labels, which `datasets` stores as numbers."""
    try:
        stored = json.loads((file.schema.metadata or {})[b"huggingface"])
        return tuple(map(str, stored["info"]["features"][column]["names"]))
    except (LookupError, TypeError, ValueError):
        return ()


def _image_kind(file: ArrowFile, name: str) -> str:
    held = file.schema.field(name).type
    kind = arrow.kind_of(held)
    if kind == "bytes" or (kind == "struct" and {"bytes", "path"} & {own.name for own in held}):
        return kind
    if kind != "text":
        raise DataError(
            f"{file.path}: column {name!r:.200} contains {held}, not images or paths; name another "
            "with --image-column"
        )
    for batch in islice(file.batches([name], 1), 0 if cells.is_base64_name(name) else 10):
        value = column_values(batch[name])[0]
        if isinstance(value, str) and value:
            return "base64" if cells.is_base64(value) else "path"
    return "base64" if cells.is_base64_name(name) else "path"


def _form(paths: Sequence[str]) -> str:
    form = "Arrow" if paths[0].lower().endswith(arrow.ARROW) else "Parquet"
    return counted(len(paths), f"{form} file")


@dataclass(frozen=True)
class ParquetSource(FileSource):
    """Parquet or Arrow files as a `Source`: each row a record.

    With an id column, adjacent rows of one id are one record, with the image of the first; further
    rows of the id are named by their number.
    """

    layout: Layout
    images: Path  # folder that image paths start from

    @contextmanager
    def open_readable(self, path: Path, position: int) -> Iterator[SourceFile]:
        """See `FileSource`."""
        with open_arrow(path) as file:
            yield ParquetFile(self, position, file)


class ParquetFile:
    """An open file of a `ParquetSource` as a `SourceFile`."""

    def __init__(self, source: ParquetSource, position: int, file: ArrowFile) -> None:
        path = source.paths[position]
        self.name = file.path.as_posix()
        self._file = file
        self._layout = source.layout
        self._images = source.images
        self._stem = f"{posixpath.splitext(path)[0]}/"
        self._prefix = self._stem if len(source.paths) > 1 else ""
        self._split = files.split_of(path)
        self._next: tuple[int, Iterator[dict[str, Any]]] = (-1, iter(()))
        self._damaged = (range(0), "")  # rows that cannot be read, and the reason

    def __len__(self) -> int:
        return len(self._groups[0]) - 1

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """See `SourceFile`."""
        starts, repeated = self._groups
        for record in range(start, min(stop, len(self))):
            first = int(starts[record])
            try:
                rows = self._read(first, int(starts[record + 1]))
                yield self._record(first + 1, rows, is_repeated=record in repeated)
            except (ValueError, DataError) as error:
                reason = str(error).removeprefix(f"{self.name}: ")
                yield Record(None, row=first + 1, error=reason)

    @cached_property
    def _groups(self) -> tuple[Sequence[int], set[int]]:
        """First row of each record, and the end; records whose id is repeated."""
        name = self._layout.found.id
        if name is None:
            return range(self._file.rows + 1), set()
        starts = array("q")
        repeated: set[int] = set()
        seen: set[Any] = set()
        previous: Any = None
        row = 0
        for batch in self._file.batches([name], _TEXT_ROWS):
            for value in column_values(batch[name]):
                key = None if isinstance(value, InvalidText) else value
                if key is None or key != previous:
                    if key is not None and key in seen:
                        repeated.add(len(starts))
                    seen.add(key)
                    starts.append(row)
                previous = key
                row += 1
        starts.append(self._file.rows)
        if repeated:
            logger.info(
                "%s: %s have the id of an earlier row that is not adjacent, such as row %d; their "
                "images are joined",
                *(self.name, counted(len(repeated), "row"), starts[min(repeated)] + 1),
            )
        return starts, repeated

    def _read(self, first: int, stop: int) -> list[dict[str, Any]]:
        """Read rows, from the position of the last call if it ended at `first`."""
        damaged, reason = self._damaged
        if first in damaged:
            raise DataError(reason)
        position, rows = self._next
        if position != first:
            rows = self._layout.rows(self._file, first)
        try:
            read = list(islice(rows, stop - first))
            if len(read) < stop - first:
                raise DamagedError("has fewer rows than it states; write or download it again")
        except DamagedError as error:
            self._damaged = (range(first, self._file.end_of_group(first)), str(error))
            raise
        self._next = (stop, rows)
        return read

    def _record(
        self, number: int, values: Sequence[dict[str, Any]], *, is_repeated: bool
    ) -> Record:
        rows = [self._layout.row(number, own, self._split) for own in values]
        if any((error := row.error) is not None for row in rows):
            raise ValueError(error)
        own, split = None if is_repeated else rows[0].id, rows[0].split
        if any(row.split != split for row in rows):
            raise ValueError(f"its rows are in several splits, one of them {split or 'none'}")
        image = None
        column = self._layout.found.image
        if column is not None:
            image_id = f"{self._stem}{number}" if own is None else f"{self._prefix}{own}"
            images = (row[column] for row in values if row[column] is not None)
            read = self._image_reader(next(images, None))
            source, labels = f"{self.name}/{number}", labels_of(values[0])
            image = read and ImageInput(image_id, source, read, rows[0].id, labels)
        captions = dict.fromkeys(caption for row in rows for caption in row.captions)
        if image is None and not captions:
            raise ValueError("has neither an image nor a caption")
        label = image.id if image else f"{self._prefix}{own or f'caption:{number}'}"
        texts = tuple(
            TextInput(f"{label}#{k}" if k or image else label, text, number)
            for k, text in enumerate(captions)
        )
        return Record(image, texts, split, number)

    def _image_reader(self, value: Any) -> Callable[[], bytes] | None:
        """Return a function that reads an image's bytes, None if there is no image."""
        if isinstance(value, InvalidText):
            raise ValueError(f"image must be bytes or base64, not {value!r}")
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
            if value is None and isinstance(path, str) and path:
                return partial(
                    files.read_bounded, self._images / files.path_below(self._images, path)
                )
        return None if value is None or value == "" else partial(_image_bytes, value)


def _image_bytes(value: bytes | str) -> bytes:
    if isinstance(value, str):
        return cells.decode_base64(value)
    files.check_size(len(value))
    return value
