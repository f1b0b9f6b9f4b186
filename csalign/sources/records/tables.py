"""Read captions tables row by row, or tables of strings whole: .csv, .tsv, .jsonl, plain text."""

import base64
import binascii
import csv
import logging
import re
from array import array
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

from pydantic import Field

from csalign.core.config import Config, Location
from csalign.core.enums import usual_split
from csalign.core.errors import DataError
from csalign.core.paths import likely_meant, stand_in
from csalign.core.records import parse_json
from csalign.sources.records import files

logger = logging.getLogger(__name__)

Kind = Literal[
    "auto", "folder", "table", "coco", "karpathy", "webdataset", "parquet", "captions", "list"
]
SUFFIXES = (".csv", ".tsv", ".jsonl")
BASE64_NAMES = ("image_base64", "img_base64", "image_b64", "base64")
IMAGE_NAMES = (
    *("image", "image_path", "image path", "image_file", "image_name", "img", "img_path"),
    *("filepath", "file_path", "file_name", "filename", "path", "file", "jpg", "jpeg", "png"),
    *("webp", "image_bytes", "img_bytes", *BASE64_NAMES),
)
CAPTION_NAMES = (
    *("caption", "title", "text", "txt", "sentence", "captions", "caption_text", "sentences_raw"),
    *("raw_caption", "sentences", "texts", "raw", "alt_text", "comment", "description"),
)
SPLIT_NAME = "split"
_DELIMITERS = ",\t;|"
_CHUNK_ROWS = 65_536
# How JPEG, PNG, GIF and WebP begin in base64. "/9j/" alone may be a path, but not of this length.
_BASE64 = re.compile(r"data:image/[\w.+-]+;base64,|(?=.{100})(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)")
_URL_SAFE = str.maketrans("-_", "+/", " \n\r")


class Row(NamedTuple):
    """One row of a captions table."""

    number: int  # its first line in the file, counted from 1, the header included
    image: str = ""  # path or base64 as the table has it, "" if there is none
    captions: tuple[str, ...] = ()  # stripped and not empty
    split: str | None = None
    id: str | None = None
    error: str | None = None  # why the row cannot be used; everything but its number is then absent
    offset: int | None = None  # byte where the row starts, if `image` is base64 rather than a path


class TableColumns(NamedTuple):
    """The columns of a table by their content; None where there is none."""

    image: str | None = None
    caption: str | None = None
    split: str | None = None
    id: str | None = None

    def __str__(self) -> str:
        sides = (("images", self.image), ("captions", self.caption))
        return ", ".join(f"{what} in column {name!r}" for what, name in sides if name is not None)

    def warn_of_one_side(self, names: Collection[str], table: Path) -> None:
        """Warn if one side is missing where another column may have been meant."""
        others = [name for name in names if name not in self]
        if not others or (self.image is not None and self.caption is not None):
            return
        missing, kept = ("captions", "images") if self.image else ("images", "captions")
        logger.warning(
            f"{table}: no column looks like {missing}, only {kept} are read "
            f"(columns: {', '.join(names)}); name it with --{missing[:-1]}-column"
        )


class SourceOptions(Config):
    """Form and columns of a SOURCE; None is to be recognised."""

    panel: ClassVar[str] = "Source"

    kind: Kind = Field("auto", description="Form of SOURCE.")
    captions: Location | None = Field(None, description="Captions table outside of the source.")
    images: Location | None = Field(None, description="Folder that image paths are relative to.")
    image_column: str | None = Field(None, description="Column of image paths, bytes or base64.")
    caption_column: str | None = Field(None, description="Column of captions.")
    split_column: str = Field("split", description="Column of splits, if the source has it.")
    id_column: str | None = Field(
        None, description="Column of image ids (default: paths, keys or row numbers)."
    )
    caption_lines: bool | None = Field(
        None, description="Each line of a .txt is a caption (default: in folders, not in tars)."
    )

    def find(self, names: Collection[str], table: Path) -> TableColumns:
        """Recognise the columns of a table.

        Raises:
            DataError: a named column is missing, or there are neither images nor captions.
        """
        listed = ", ".join(names) or "none"
        for option in ("image", "caption", "split", "id"):
            name = getattr(self, f"{option}_column")
            if name not in (None, SPLIT_NAME, *names):
                raise DataError(
                    f"{table}: has no column {name!r:.200} (columns: {listed:.300}); correct "
                    f"--{option}-column"
                )
        found = self.pick(names)
        if found.image is None and found.caption is None:
            raise DataError(
                f"{table}: no column looks like images or captions (columns: {listed:.300}); name "
                "them with --image-column and --caption-column, or read a folder's images without "
                "the table with --kind folder"
            )
        return found

    def pick(self, names: Collection[str]) -> TableColumns:
        """Recognise those of the columns that are among `names`."""
        by_name = {name.lower(): name for name in reversed(list(names))}

        def choose(given: str | None, known: Collection[str]) -> str | None:
            if given is not None:
                return given if given in names else None
            return next((by_name[name] for name in known if name in by_name), None)

        image = None if self.kind == "captions" else choose(self.image_column, IMAGE_NAMES)
        # An image column named "text" is not the caption column too.
        captions = [name for name in CAPTION_NAMES if image is None or name != image.lower()]
        caption = choose(self.caption_column, captions)
        split = choose(
            None if self.split_column == SPLIT_NAME else self.split_column, (SPLIT_NAME,)
        )
        return TableColumns(image, caption, split, choose(self.id_column, ()))


class TableReader:
    """Stream the rows of a captions table; `found` has its columns after that.

    Args:
        table: the file.
        options: the columns to read.
        form: ".csv" or ".tsv" with a header, ".jsonl" with one object per line, ".txt" with one
            caption per line, or "list" with one image path or object per line.
    """

    def __init__(self, table: Path, options: SourceOptions, form: str) -> None:
        self._table = table
        self._options = options
        self._form = form
        self._header = _Header()
        self.found = TableColumns()

    def rows(self, file: BinaryIO) -> Iterator[Row]:
        """Stream the rows of the open file; blank lines are skipped.

        Raises:
            DataError: the whole table is unusable; the message names the table and the row.
        """
        picked: dict[tuple[str, ...], TableColumns] = {}
        seen: dict[str, None] = {}
        for number, offset, values, error in self.values(file):
            if error is not None:
                yield Row(number, error=error)
                continue
            names = tuple(values)
            if names not in picked:
                picked[names] = self._options.pick(names)
                seen |= dict.fromkeys(names)
                if self._header.names:
                    self._options.find(names, self._table)
            yield row_of(number, values, picked[names], offset)
        if seen and self._form in SUFFIXES:  # an object may omit keys: all are known only now
            self.found = self._options.find(seen, self._table)
            self.found.warn_of_one_side(seen, self._table)

    def read_image(self, offset: int) -> bytes:
        """Read the base64 image of the row that starts at a byte; any thread may call it."""
        with files.translate_errors(self._table, named=False), files.open_file(self._table) as file:
            file.seek(offset)
            row = next(self.rows(file), None)
        if row is None or row.error is not None:
            raise DataError("cannot be read, as its table has changed")
        return decode_base64(row.image)

    def values(self, file: BinaryIO) -> Iterator["_Values"]:
        """Yield number, offset, values by column, and error of each row of the open file."""
        is_text = self._form not in SUFFIXES
        lines = files.read_lines(self._table, file, refuse_nul=is_text)
        if self._form in (".csv", ".tsv"):
            yield from _parse_csv(self._table, lines, self._form, self._header)
            return
        name = "caption" if self._form == ".txt" else self._options.image_column or "image"
        for line in lines:
            text = line.text.strip()
            if is_text and text and (self._form == ".txt" or not text.startswith("{")):
                yield _Values(line.number, line.offset, {name: text}, line.error)
            elif text:
                yield _parse_json(line)


@dataclass(frozen=True)
class Table:
    """A whole table of strings: line number of each row, and values or None by column."""

    path: Path
    numbers: "array[int]"
    columns: dict[str, list[str | None]]

    def __len__(self) -> int:
        return len(self.numbers)

    def require(self, names: Sequence[str]) -> list[str | None]:
        """Return the first of these columns that the table has, or raise `DataError`."""
        for name in names:
            if name in self.columns:
                return self.columns[name]
        listed = ", ".join(self.columns) or "none"
        raise DataError(f"{self.path}: has no column {names[0]!r} (columns: {listed}); add it")

    def where(self, row: int) -> str:
        """Name the file and line of a row counted from 0, for messages."""
        return f"{self.path}, row {self.numbers[row]}"


def read_table(path: Path) -> Table:
    """Read a whole .csv, .tsv or .jsonl of strings.

    Raises:
        DataError: no such file, it has another suffix, or a line is not UTF-8 or
            malformed; the message names the row.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataError(f"{path}: no such file{likely_meant(path)}")
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: not a table; use one of {', '.join(SUFFIXES)}")
    if path.stat().st_size and (problem := stand_in(path)) is not None:
        raise DataError(f"{path}: {problem}")
    if suffix != ".jsonl" and (plain := _read_plain(path, suffix)) is not None:
        return plain
    table = Table(path, array("q"), {})
    with files.open_file(path) as file:
        for number, _, values, error in TableReader(path, SourceOptions(), suffix).values(file):
            try:
                if error is not None:
                    raise ValueError(error)
                # An id may be a number in JSON; as a string it is the same id.
                cells = {
                    name: None if value is None else text_of(str(value), "a cell") or None
                    for name, value in values.items()
                }
            except ValueError as reason:
                raise DataError(f"{path}, row {number}: {reason}") from None
            for name in cells:
                table.columns.setdefault(name, [None] * len(table))
            for name, column in table.columns.items():
                column.append(cells.get(name))
            table.numbers.append(number)
    return table


def _read_plain(path: Path, form: str) -> Table | None:
    """Read a .csv or .tsv at once; None if it has an error, which a reader by lines names."""
    csv.field_size_limit(files.MAX_LINE_BYTES)
    numbers = array("q")
    try:
        # As in the reader by lines, a carriage return alone does not end a row.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            delimiter = _delimiter(file.readline(), form)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = [cell.strip() for cell in next(reader, [])]
            if len(set(names)) != len(names):
                return None
            columns: list[list[str | None]] = [[] for _ in names]

            def rows() -> Iterator[list[str]]:
                number = reader.line_num + 1
                for row in reader:
                    if row:
                        numbers.append(number)
                        yield row
                    number = reader.line_num + 1

            rest = rows()
            while chunk := list(islice(rest, _CHUNK_ROWS)):
                for column, cells in zip(columns, zip(*chunk, strict=True), strict=True):
                    column += [cell.strip() or None for cell in cells]
    except (csv.Error, ValueError, OSError):
        return None
    return Table(path, numbers, dict(zip(names, columns, strict=True)))


def row_of(number: int, values: dict[str, Any], found: TableColumns, offset: int = 0) -> Row:
    """Make a row of a JSON object or of a table's cells; it has an error if they are unusable."""
    try:
        image, split = (
            "" if name is None or values.get(name) is None else text_of(values[name], name)
            for name in (found.image, found.split)
        )
        captions = (
            () if found.caption is None else json_captions(values.get(found.caption), found.caption)
        )
        own = None if found.id is None else values.get(found.id)
        if isinstance(own, int) and not isinstance(own, bool):
            own = str(own)
        own = None if own is None else text_of(own, str(found.id)) or None
    except ValueError as error:
        return Row(number, error=str(error))
    in_base64 = image and (is_base64_name(found.image) or is_base64(image))
    split = usual_split(split) or split
    return Row(number, image, captions, split or None, own, None, offset if in_base64 else None)


def json_captions(value: Any, name: str) -> tuple[str, ...]:
    """Return the captions in a JSON value, text or a list of texts, or raise `ValueError`."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(text for text in (text_of(item, name) for item in values) if text)


def text_of(value: object, name: str) -> str:
    """Strip a text; raises `ValueError` if it is not text or not valid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} contains half of a surrogate pair; write the whole character"
        ) from None
    return value.strip()


def is_base64_name(name: str | None) -> bool:
    """Check whether all cells of a column by that name are base64."""
    return name is not None and name.lower() in BASE64_NAMES


def is_base64(cell: str) -> bool:
    """Recognise an image in base64, rather than a path, by its first characters."""
    return len(cell) > 20 and _BASE64.match(cell) is not None


def decode_base64(text: str) -> bytes:
    """Decode base64, plain or URL-safe, perhaps with a ``data:`` header, or raise `DataError`."""
    body = text.partition(",")[2] if text.startswith("data:") else text
    files.check_size(len(body) * 3 // 4)
    try:
        return base64.b64decode(body.translate(_URL_SAFE), validate=True)
    except (binascii.Error, ValueError):
        raise DataError("is not valid base64") from None


def _delimiter(first: str, form: str) -> str:
    """Return the separator in the first line of a .csv or .tsv."""
    usual = "\t" if form == ".tsv" else ","
    return next((sign for sign in f"{usual}{_DELIMITERS}" if sign in first), usual)


@dataclass
class _Header:
    names: list[str] = field(default_factory=list)
    delimiter: str = ""


class _Values(NamedTuple):
    number: int
    offset: int
    values: dict[str, Any]
    error: str | None = None


def _parse_json(line: files.Line) -> _Values:
    error = line.error
    if error is None:
        try:
            values = parse_json(line.text.strip())
            if isinstance(values, dict):
                return _Values(line.number, line.offset, values)
            error = "is not a JSON object; each line must be one object"
        except ValueError as caught:
            error = f"is not valid JSON ({caught}); each line must be one object"
    return _Values(line.number, line.offset, {}, error)


def _parse_csv(
    table: Path, lines: Iterator[files.Line], form: str, header: _Header
) -> Iterator[_Values]:
    """Yield the records behind the header, which is read first unless it is known already."""
    # The limit holds for the process, as a reader has none of its own. Captions and images in
    # base64 exceed its default of 128 KiB; an unclosed quote must still not fill the memory.
    csv.field_size_limit(files.MAX_LINE_BYTES)
    taken: list[files.Line] = []
    again: deque[files.Line] = deque()

    def texts() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line.text

    if not header.names:
        again.extend(islice(lines, 1))
        header.delimiter = _delimiter(again[0].text if again else "", form)
    reader = csv.reader(texts(), delimiter=header.delimiter, strict=True)
    while True:
        taken.clear()
        error, cells = None, []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as caught:
            error = (
                f"is malformed ({caught}); quote cells with double quotes and double a quote "
                "inside them"
            )
        number, offset = taken[0][:2]
        undecoded = next((line.error for line in taken if line.error), None)
        if not (error or undecoded) and cells and header.names and len(cells) != len(header.names):
            error = (
                f"has {len(cells)} cells, the header has {len(header.names)}; put double quotes "
                "around a cell that contains the separator"
            )
        if error is not None:  # bad is the first line alone: its quote may be unclosed
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(texts(), delimiter=header.delimiter, strict=True)
            plain = taken[0].text.rstrip("\r\n").split("\t")
            if form == ".tsv" and header.delimiter == "\t" and len(plain) == len(header.names):
                error, cells = None, plain  # of a file without quoting
        error = error or undecoded
        cells = [cell.strip() for cell in cells]
        if error is None and not cells:
            continue
        if header.names:
            yield _Values(number, offset, dict(zip(header.names, cells, strict=False)), error)
        elif error is not None:
            raise DataError(f"{table}, row {number}: {error}")
        elif len(set(cells)) < len(cells):
            repeated = next(name for name in cells if cells.count(name) > 1)
            raise DataError(f"{table}: has the column {repeated!r:.200} twice; rename one")
        else:
            header.names = cells
