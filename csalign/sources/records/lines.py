"""The lines of a text file as records, so that a bad one spoils no other."""

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from csalign.core.errors import DataError

LONGEST_CELL = 64 << 20  # characters; a quote that is never closed would else fill the memory


@dataclass
class Lines:
    """The lines of a UTF-8 file with their ends, which knows those of the record at hand.

    A record is what was read since `begin`.

    Attributes:
        number: the record's first line, counted from 1.
        flaw: why the record is not UTF-8.
    """

    table: Path
    file: BinaryIO
    digest: Any = None
    number: int = 1
    flaw: str | None = None
    _offset: int = 0
    _taken: list[bytes] = field(default_factory=list)
    _again: deque[bytes] = field(default_factory=deque)

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._read()
        if not line:
            raise StopIteration
        self._taken.append(line)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            offset = self.span[1] - len(line) + error.start
            byte = error.object[error.start]
            self.flaw = (
                f"is not UTF-8 (byte 0x{byte:02x} at offset {offset}); save the table as UTF-8"
            )
            return line.decode(errors="surrogateescape")
        return text.removeprefix("\ufeff") if self._offset == 0 and len(self._taken) == 1 else text

    @property
    def span(self) -> tuple[int, int]:
        """Where the record's bytes start and end."""
        return self._offset, self._offset + sum(map(len, self._taken))

    def begin(self) -> None:
        """Forget the record and start the next."""
        self.number += len(self._taken)
        self._offset += sum(map(len, self._taken))
        self._taken.clear()
        self.flaw = None

    def keep_first(self) -> None:
        """Let the record be its first line alone; the others are given again."""
        self._again.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]
        self.flaw = None

    def peek(self) -> str:
        """The first line, which is given again."""
        line = next(self, "")
        self._again.extendleft(reversed(self._taken))
        self._taken.clear()
        self.flaw = None
        return line

    def _read(self) -> bytes:
        try:
            line = self.file.readline(LONGEST_CELL + 1)
        except OSError as error:
            raise DataError(f"{self.table}: cannot be read ({error.strerror})") from None
        if len(line) > LONGEST_CELL:
            row = self.number + len(self._taken)
            raise DataError(
                f"{self.table}, row {row}: is longer than {LONGEST_CELL >> 20} MiB; end each row "
                "with a line break"
            )
        if self.digest is not None:
            self.digest.update(line)
        return line


class CsvRecord(NamedTuple):
    """A record of a CSV file: its first line, counted from 1, and its cells or its flaw."""

    number: int
    cells: list[str]
    flaw: str | None


def csv_records(lines: Lines, delimiter: str) -> Iterator[CsvRecord]:
    """The records of a CSV file, without blank lines; one that is malformed has a flaw."""
    csv.field_size_limit(LONGEST_CELL)  # the module's own is 128 KiB, which captions exceed
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.keep_first()  # a quote that is not closed must not take later rows with it
            yield CsvRecord(
                lines.number,
                [],
                f"is malformed ({error}); quote cells with double quotes and double a quote "
                "inside them",
            )
            continue
        if lines.flaw is not None:
            yield CsvRecord(lines.number, [], lines.flaw)
        elif cells:
            yield CsvRecord(lines.number, cells, None)
