"""Plain text: captions alone, one a line, or a list of image paths."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from csalign.core.errors import DataError
from csalign.core.records import parse_json
from csalign.sources.records.catalog import Catalog, CatalogSource
from csalign.sources.records.columns import Columns, Row
from csalign.sources.records.lines import Lines
from csalign.sources.records.tables import row_of
from csalign.sources.records.tree import opened


def read_captions(file: Path) -> CatalogSource:
    """Read a text file with a caption a line.

    Raises:
        DataError: it cannot be read, or holds no caption.
    """
    catalog = Catalog(None)
    catalog.begin(file.as_posix())
    digest = hashlib.sha256()
    with opened(file) as lines:
        for number, text, flaw in text_lines(Lines(file, lines, digest)):
            catalog.add(Row(number, captions=(text,), flaw=flaw))
    return catalog.finish("text file with a caption a line", digest.hexdigest())


def read_list(name: Path, lines: BinaryIO, root: Path | None, columns: Columns) -> CatalogSource:
    """Read a list with an image path a line; a line that starts with ``{`` is a JSON object.

    Args:
        name: what to call it in messages.
        lines: the list.
        root: folder that paths start from and must stay below (default: the working directory,
            which they may leave).
        columns: which keys of an object hold what.

    Raises:
        DataError: it cannot be read, or names no image.
    """
    catalog = Catalog(root)
    catalog.begin("stdin" if str(name) == "-" else name.as_posix())
    digest = hashlib.sha256()
    for number, text, flaw in text_lines(Lines(name, lines, digest)):
        catalog.add(_entry(number, text, columns) if flaw is None else Row(number, flaw=flaw))
    return catalog.finish("list of images", digest.hexdigest())


def _entry(number: int, text: str, columns: Columns) -> Row:
    if not text.startswith("{"):
        return Row(number, text)
    try:
        record = parse_json(text)
    except ValueError as error:
        return Row(number, flaw=f"is not valid JSON ({error})")
    return row_of(number, record, columns)


def text_lines(lines: Lines) -> Iterator[tuple[int, str, str | None]]:
    """The lines that are not blank, with their numbers and flaws."""
    while True:
        lines.begin()
        line = next(lines, None)
        if line is None:
            return
        if "\0" in line:
            raise DataError(
                f"{lines.table}: holds NUL bytes, as find -print0 writes them; give a line each, "
                "as find -print does"
            )
        if line.strip():
            yield lines.number, line.strip(), lines.flaw
