"""Read tables row by row, or whole: .csv, .tsv and .jsonl."""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csalign.core.errors import DataError
from csalign.core.records import parse_json
from csalign.sources.records.columns import (
    Columns,
    Found,
    Row,
    from_base64,
    is_base64,
    is_base64_name,
)
from csalign.sources.records.lines import CsvRecord, Lines, csv_records
from csalign.sources.records.tree import opened, told_of

SUFFIXES = (".csv", ".tsv", ".jsonl")
_DELIMITERS = ",\t;|"


class RowReader:
    """The rows of a captions table, streamed; blank lines are passed over.

    A row that cannot be used comes with its flaw, and the rows behind it are read.

    Args:
        table: a .csv or .tsv with a header, or a .jsonl with an object a line; UTF-8, with or
            without a byte order mark.
        columns: which columns hold what.
        form: suffix to read it as (default: its own).

    Attributes:
        found: the columns, once rows were read.
        fingerprint: hex SHA-256 of what was read so far.
    """

    def __init__(self, table: Path, columns: Columns, form: str | None = None) -> None:
        self._table = table
        self._columns = columns
        self._form = form or table.suffix.lower()
        self._delimiter = ","
        self._names: list[str] = []
        self._digest = hashlib.sha256()
        self.found = Found(None, None, None, None)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what was read so far and of what its columns are taken for."""
        digest = self._digest.copy()
        digest.update(repr(self.found).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        """Stream the rows.

        Raises:
            DataError: the file, its header or a column makes the whole table unusable; the
                message names the table and the row.
        """
        with opened(self._table) as file:
            lines = Lines(self._table, file, self._digest)
            yield from self._jsonl_rows(lines) if self._form == ".jsonl" else self._csv_rows(lines)

    def image_bytes(self, span: tuple[int, int]) -> bytes:
        """Decode the base64 image of a row again; may run in any thread.

        Raises:
            DataError: it is not valid base64; the message is the reason alone.
        """
        try:
            with told_of(self._table, named=False), self._table.open("rb") as file:
                file.seek(span[0])
                line = file.read(span[1] - span[0]).decode("utf-8-sig")
            return from_base64(self._image_cell(line))
        except (ValueError, LookupError, csv.Error) as error:
            raise DataError(f"cannot be read ({error})") from None

    def _image_cell(self, line: str) -> str:
        if self._form == ".jsonl":
            record = parse_json(line)
            return str(record[self._columns.pick(record).image])
        cells: list[str] = next(
            csv.reader(line.splitlines(keepends=True), delimiter=self._delimiter)
        )
        return cells[self._names.index(str(self.found.image))]

    def _csv_rows(self, lines: "Lines") -> Iterator[Row]:
        self._delimiter = _delimiter(lines, self._form)
        records = csv_records(lines, self._delimiter)
        names = _header(self._table, records)
        if names is None:
            return
        self._names = names
        self.found = found = self._columns.find(names, self._table)
        found.warn_of_one_side(names, self._table)
        places = [None if name is None else names.index(name) for name in found]
        all_base64 = is_base64_name(found.image)
        for number, cells, flaw in records:
            if flaw is None:
                flaw = _cell_count_flaw(cells, names)
            if flaw is not None:
                lines.keep_first()
                yield Row(number, flaw=flaw)
                continue
            image, caption, split, own_id = (
                "" if place is None else cells[place].strip() for place in places
            )
            span = lines.span if image and (all_base64 or is_base64(image)) else None
            captions = (caption,) if caption else ()
            yield Row(number, image, captions, split or None, own_id or None, span=span)

    def _jsonl_rows(self, lines: "Lines") -> Iterator[Row]:
        by_names: dict[tuple[str, ...], Found] = {}
        seen: dict[str, None] = {}
        while True:
            lines.begin()
            line = next(lines, None)
            if line is None:
                break
            number = lines.number
            if not line.strip():
                continue
            try:
                record = _json_object(line, lines.flaw)
                names = tuple(record)
                if names not in by_names:
                    by_names[names] = self._columns.pick(names)
                    seen |= dict.fromkeys(names)
                yield _json_row(number, record, by_names[names], lines.span)
            except ValueError as error:
                yield Row(number, flaw=str(error))
        if by_names:  # keys may be left out of a row, so what is there is known at the end alone
            self.found = self._columns.find(seen, self._table)
            self.found.warn_of_one_side(seen, self._table)


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
    with opened(path) as file:
        lines = Lines(path, file)
        records = _json_records if suffix == ".jsonl" else _csv_dicts
        for number, record in records(path, lines):
            for name in record.keys() - columns.keys():
                columns[name] = [None] * len(numbers)
            for name, values in columns.items():
                values.append(record.get(name))
            numbers.append(number)
    return Table(path, numbers, columns)


def _json_row(number: int, record: dict[str, Any], found: Found, span: tuple[int, int]) -> Row:
    image = _json_text(record, found.image)
    in_base64 = image and (is_base64_name(found.image) or is_base64(image))
    return Row(
        number,
        image,
        _json_captions(record, found.caption),
        _json_text(record, found.split) or None,
        _json_id(record, found.id),
        span=span if in_base64 else None,
    )


def row_of(number: int, record: dict[str, Any], columns: Columns) -> Row:
    """The row that a JSON object is, with its flaw if it has one."""
    try:
        return _json_row(number, record, columns.pick(record), (0, 0))
    except ValueError as error:
        return Row(number, flaw=str(error))


def caption_of(value: Any, name: str) -> tuple[str, ...]:
    """The captions in a JSON value: text or a list of texts, stripped and not empty.

    Raises:
        ValueError: it is neither; the message is the reason alone.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(text for text in (_checked(item, name) for item in values) if text)


def _csv_dicts(path: Path, lines: "Lines") -> Iterator[tuple[int, dict[str, str | None]]]:
    records = csv_records(lines, "\t" if path.suffix.lower() == ".tsv" else ",")
    names = _header(path, records) or []
    for number, cells, flaw in records:
        if flaw := flaw or _cell_count_flaw(cells, names):
            raise DataError(f"{path}, row {number}: {flaw}")
        yield number, {n: cell.strip() or None for n, cell in zip(names, cells, strict=True)}


def _json_records(path: Path, lines: "Lines") -> Iterator[tuple[int, dict[str, str | None]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = _json_object(line, lines.flaw)
                yield number, {name: _scalar(value) for name, value in record.items()}
            except ValueError as error:
                raise DataError(f"{path}, row {number}: {error}") from None
        lines.begin()


def _scalar(value: Any) -> str | None:
    """An id may be a number in JSON; as a string it is the same id."""
    return None if value is None else _checked(str(value), "a cell") or None


def _header(table: Path, records: Iterator["CsvRecord"]) -> list[str] | None:
    first = next(records, None)
    if first is None:
        return None
    if first.flaw is not None:
        raise DataError(f"{table}, row {first.number}: {first.flaw}")
    names = [cell.strip() for cell in first.cells]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{table}: has the column {name!r:.200} twice; rename one of them")
    return names


def _delimiter(lines: "Lines", form: str) -> str:
    """What parts the cells: the usual one of the form, unless the header has another alone."""
    usual = "\t" if form == ".tsv" else ","
    header = lines.peek()
    for delimiter in f"{usual}{_DELIMITERS}":
        if delimiter in header:
            return delimiter
    return usual


def _cell_count_flaw(cells: Sequence[str], names: Sequence[str]) -> str | None:
    if len(cells) == len(names):
        return None
    return (
        f"has {len(cells)} cells, the header has {len(names)}; put double quotes around a cell "
        "that holds the separator"
    )


def _json_object(line: str, flaw: str | None) -> dict[str, Any]:
    if flaw is not None:
        raise ValueError(flaw)
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error}); each line must be one object") from None
    if not isinstance(record, dict):
        raise ValueError("is no JSON object; each line must be one object")
    return record


def _json_text(record: dict[str, Any], name: str | None) -> str:
    value = None if name is None else record.get(name)
    return "" if value is None else _checked(value, str(name))


def _json_id(record: dict[str, Any], name: str | None) -> str | None:
    value = None if name is None else record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None else _checked(value, str(name)) or None


def _json_captions(record: dict[str, Any], name: str | None) -> tuple[str, ...]:
    return () if name is None else caption_of(record.get(name), name)


def _checked(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} holds half of a surrogate pair; write the character whole"
        ) from None
    return value.strip()
