"""Read tables row by row, or whole: .csv, .tsv and .jsonl."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from csalign.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl")
IMAGE_NAMES = (
    "image",
    "image_path",
    "image path",
    "filepath",
    "file_name",
    "filename",
    "path",
    "file",
)
CAPTION_NAMES = ("caption", "title", "text", "sentence", "captions", "caption_text")
SPLIT_NAME = "split"
LONGEST_CELL = 64 << 20  # characters; a quote that is never closed would else fill the memory


class Row(NamedTuple):
    """One row of a captions table.

    Attributes:
        number: its first line in the file, counted from 1, the header included.
        image: path as the table gives it, "" if there is none.
        captions: stripped and not empty; several only where a .jsonl row lists them.
        split: None if there is none.
    """

    number: int
    image: str
    captions: tuple[str, ...]
    split: str | None


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None means to recognise the column by its name.

    Attributes:
        image: of image paths.
        caption: of captions.
        split: of splits. A table need not have it while it is the usual one.
    """

    image: str | None = None
    caption: str | None = None
    split: str = SPLIT_NAME

    def find(self, names: Sequence[str], table: Path) -> "_Found":
        """Tell which of a table's columns are meant.

        Raises:
            DataError: a column is not there; the message lists those that are.
        """
        return _Found(
            _find(names, self.image, IMAGE_NAMES, "image", table),
            _find(names, self.caption, CAPTION_NAMES, "caption", table),
            self._find_split(names, table),
        )

    def _find_split(self, names: Sequence[str], table: Path) -> str | None:
        if self.split != SPLIT_NAME:
            return _find(names, self.split, (), "split", table)
        return next((name for name in names if name.lower() == SPLIT_NAME), None)


class _Found(NamedTuple):
    image: str
    caption: str
    split: str | None


def read_rows(table: Path, columns: Columns) -> Iterator[Row]:
    """Stream the rows of a captions table; blank lines are passed over.

    Args:
        table: a .csv or .tsv with a header, or a .jsonl with an object a line; UTF-8, with or
            without a byte order mark.
        columns: which columns hold what.

    Raises:
        DataError: a column is missing, or a line is not UTF-8 or malformed; the message names
            the table and the row.
    """
    if table.suffix.lower() == ".jsonl":
        return _jsonl_rows(table, columns)
    return _csv_rows(table, columns)


@dataclass(frozen=True)
class Table:
    """A whole table of strings in memory.

    Attributes:
        path: where it came from.
        numbers: line of each row in the file, counted from 1, for messages.
        columns: values by column name; None where a cell is empty.
    """

    path: Path
    numbers: list[int]
    columns: dict[str, list[str | None]]

    def __len__(self) -> int:
        return len(self.numbers)

    def get(self, names: Sequence[str]) -> list[str | None] | None:
        """The first of these columns that the table has, None if it has none of them."""
        return next((self.columns[name] for name in names if name in self.columns), None)

    def require(self, names: Sequence[str]) -> list[str | None]:
        """Like `get`.

        Raises:
            DataError: the table has none of these columns; the message lists those that it has.
        """
        column = self.get(names)
        if column is None:
            listed = ", ".join(self.columns) or "none"
            raise DataError(f"{self.path}: has no column {names[0]!r} (columns: {listed}); add it")
        return column

    def where(self, row: int) -> str:
        """File and line of a row counted from 0, for messages."""
        return f"{self.path}, row {self.numbers[row]}"


def read_table(path: Path) -> Table:
    """Read a whole .csv, .tsv or .jsonl of strings.

    Raises:
        DataError: there is no such file, it is of another kind, or a line is not UTF-8 or
            malformed; the message names the row.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: a table is one of {', '.join(SUFFIXES)}")
    numbers: list[int] = []
    columns: dict[str, list[str | None]] = {}
    for number, record in _json_records(path) if suffix == ".jsonl" else _csv_dicts(path):
        for name in record.keys() - columns.keys():
            columns[name] = [None] * len(numbers)
        for name, values in columns.items():
            values.append(record.get(name))
        numbers.append(number)
    return Table(path, numbers, columns)


def _csv_dicts(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    records = _csv_records(path, _delimiter(path))
    _, names = next(records, (0, []))
    names = _header(path, names)
    for number, cells in records:
        _check_cells(path, number, cells, names)
        yield number, {n: cell.strip() or None for n, cell in zip(names, cells, strict=True)}


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            record = _json_object(path, number, line)
            try:
                yield number, {name: _scalar(value) for name, value in record.items()}
            except ValueError as error:
                raise DataError(f"{path}, row {number}: {error}") from None


def _scalar(value: Any) -> str | None:
    """An id may be a number in JSON; as a string it is the same id."""
    return None if value is None else _checked(str(value), "a cell") or None


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: has the column {name!r} twice; rename one of them")
    return names


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _check_cells(path: Path, number: int, cells: Sequence[str], names: Sequence[str]) -> None:
    if len(cells) != len(names):
        raise DataError(
            f"{path}, row {number}: has {len(cells)} cells, the header has {len(names)}; "
            "put double quotes around a cell that holds the separator"
        )


def _find(
    names: Sequence[str], given: str | None, known: Iterable[str], what: str, table: Path
) -> str:
    if given is not None:
        if given in names:
            return given
        problem = f"has no column {given!r}"
    else:
        by_name = {name.lower(): name for name in reversed(names)}
        for name in known:
            if name in by_name:
                return by_name[name]
        problem = f"no column looks like the {what} column"
    listed = ", ".join(names) or "none"
    raise DataError(f"{table}: {problem} (columns: {listed}); name it with --{what}-column")


def _csv_rows(table: Path, columns: Columns) -> Iterator[Row]:
    records = _csv_records(table, _delimiter(table))
    header = next(records, None)
    if header is None:
        return
    names = _header(table, header[1])
    found = columns.find(names, table)
    image, caption = names.index(found.image), names.index(found.caption)
    split = None if found.split is None else names.index(found.split)
    for number, cells in records:
        _check_cells(table, number, cells, names)
        text = cells[caption].strip()
        yield Row(
            number,
            cells[image].strip(),
            (text,) if text else (),
            None if split is None else cells[split].strip() or None,
        )


def _csv_records(table: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(LONGEST_CELL)  # the module's own is 128 KiB, which captions exceed
    reader = csv.reader(_lines(table), delimiter=delimiter, strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{table}, row {number}: is malformed ({error}); quote cells with double quotes and "
            "double a quote inside them"
        ) from None


def _jsonl_rows(table: Path, columns: Columns) -> Iterator[Row]:
    found: _Found | None = None
    for number, line in enumerate(_lines(table), 1):
        if not line.strip():
            continue
        record = _json_object(table, number, line)
        if found is None:
            found = columns.find(list(record), table)
        try:
            yield Row(
                number,
                _json_text(record, found.image),
                _json_captions(record, found.caption),
                (_json_text(record, found.split) or None) if found.split else None,
            )
        except ValueError as error:
            raise DataError(f"{table}, row {number}: {error}") from None


def _json_object(table: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{table}, row {number}: is not valid JSON ({error}); each line must be one object"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{table}, row {number}: is no JSON object; each line must be one object")
    return record


def _json_text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return "" if value is None else _checked(value, name)


def _json_captions(record: dict[str, Any], name: str) -> tuple[str, ...]:
    value = record.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(text for text in (_checked(item, name) for item in values) if text)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} holds half of a surrogate pair; write the character whole"
        ) from None
    return value.strip()


def _lines(table: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends; decoded one by one, so that errors have a row."""
    offset = 0
    try:
        with table.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode()
                yield text.removeprefix("\ufeff") if number == 1 else text
                offset += len(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table}, row {number}: is not UTF-8 (byte 0x{error.object[error.start]:02x} at "
            f"offset {offset + error.start}); save the table as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{table}: cannot be read ({error.strerror})") from None
