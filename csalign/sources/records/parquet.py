"""Parquet and Arrow files as a source."""

import logging
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.paths import is_remote
from csalign.sources.arrow import DamagedError, opened
from csalign.sources.records import SourceFile
from csalign.sources.records.catalog import Catalog
from csalign.sources.records.files import fingerprint, name_error, printable, size_of, split_of
from csalign.sources.records.parquet_file import ColumnarVolume
from csalign.sources.records.parquet_layout import (
    PLAIN_ROWS,
    Layout,
    captions_of,
    id_of,
    layout_of,
    rows_of,
    text_of,
)
from csalign.sources.records.tables import Row, SourceOptions, TableColumns
from csalign.sources.unreadable import LostVolume, tell_of_lost

logger = logging.getLogger(__name__)


def open_parquet(
    root: Path,
    paths: Sequence[str],
    columns: SourceOptions,
    *,
    images: Path | None = None,
    found: Sequence[str] = (),
    sizes: Sequence[int | None] | None = None,
) -> "ColumnarSource | Catalog":
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
            f"{_form(paths)} with image paths"
        )
    _tell_of_splits(root, paths, layout)
    count = None if layout.found.id else total + len(lost)
    return ColumnarSource(root, paths, known, layout, images, count, mark, lost)


def _look(
    root: Path, paths: Sequence[str], columns: SourceOptions
) -> tuple["Layout", int, dict[int, str]]:
    """What the columns of all files hold, their rows in all, and why some cannot be read."""
    layout: Layout | None = None
    first, total = "", 0
    lost: dict[int, str] = {}
    for place, path in enumerate(paths):
        with ExitStack() as stack:
            try:
                if (flaw := name_error(str(root / path))) is not None:
                    raise DamagedError(flaw)
                shelf = stack.enter_context(opened(root / path))
            except DataError as error:
                # What an object store refuses now, it may give to the next attempt.
                if is_remote(root) and not isinstance(error, DamagedError):
                    raise
                lost[place] = str(error)
                continue
            own = layout_of(root / path, shelf, columns)
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


def _tell_of_splits(root: Path, paths: Sequence[str], layout: Layout) -> None:
    splits = {split_of(path) for path in paths} - {None}
    if layout.found.split is None and splits:
        listed = ", ".join(sorted(str(split) for split in splits))
        logger.info("%s: splits are told by file names (%s)", root, listed)


def _gather(
    root: Path,
    paths: Sequence[str],
    layout: Layout,
    images: Path | None,
    found: Sequence[str],
    lost: Mapping[int, str],
) -> Catalog:
    catalog = Catalog(images or root)
    for place, path in enumerate(paths):
        if place in lost:
            catalog.add_unreadable_file(printable((root / path).as_posix()), lost[place])
            continue
        stem = posixpath.splitext(path)[0]
        catalog.begin_file((root / path).as_posix(), f"{stem}/" if len(paths) > 1 else "")
        default = None if layout.found.split else split_of(path)
        with opened(root / path) as shelf:
            for number, values in rows_of(root / path, shelf, layout, 0, PLAIN_ROWS):
                catalog.add(_row(number + 1, values, layout.found, default))
    catalog.add_found(found)
    return catalog


def _row(number: int, values: Mapping[str, Any], found: TableColumns, default: str | None) -> Row:
    try:
        image = text_of(values, found.image) or ""
        captions = captions_of(values, found)
        split = text_of(values, found.split) or default
        return Row(number, image, captions, split, id_of(values, found))
    except ValueError as error:
        return Row(number, error=str(error))


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
    layout: Layout
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
    def files(self) -> Sequence[str]:
        """See `Source`."""
        return [printable((self.root / path).as_posix()) for path in self.paths]

    @property
    def sides(self) -> Collection[Modality]:
        """See `Source`."""
        there = {Modality.IMAGE: self.layout.found.image, Modality.TEXT: self.layout.found.caption}
        return tuple(side for side, column in there.items() if column is not None)

    @property
    def total_images(self) -> int | None:
        """See `Source`; a row may lack its image."""
        return 0 if self.layout.found.image is None else self.total

    def fingerprint_of(self, position: int, start: int, stop: int) -> str:
        """See `Source`: name, size and columns of the file."""
        own = (self.paths[position], self.sizes[position], self.lost.get(position))
        return fingerprint([self.layout, *own])

    @contextmanager
    def open(self, position: int) -> Iterator[SourceFile]:
        """See `Source`."""
        path = self.paths[position]
        if position in self.lost:
            yield LostVolume(self.files[position], self.lost[position])
            return
        with opened(self.root / path) as shelf:
            yield ColumnarVolume(
                self.root,
                path,
                shelf,
                self.layout,
                self.images or self.root,
                is_one_of_several=len(self.paths) > 1,
            )
