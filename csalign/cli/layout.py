"""Lay out tables as lines of text in which no label is cut and no number is broken."""

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

INDENT = "  "
GAP = "   "
LEAST_TEXT = 24  # cells beside a name; with fewer, text is put on a line of its own

Row = tuple[str, Sequence[str]]
"""A label and its cells. In a cell what follows " ± " or " [" may be put below the value."""

_AROUND = re.compile(r" (?=± |\+/- |\[)")
_NUMBER = re.compile(r"[-+]?[\d.]")


def table_lines(
    headings: Sequence[str], rows: Sequence[Row], width: int, notes: Sequence[str] = ()
) -> list[str]:
    """Lay out a table of figures.

    The first of these that fits is taken: one line per row; errors and intervals below their
    values; long labels on a line above their row; and several tables with the same labels.

    Args:
        headings: of the columns, without that of the labels.
        rows: as many cells each.
        width: cells of a line. Single words that are longer stay complete all the same.
        notes: a text per row, wrapped beside the figures or below them.
    """
    if notes:
        return list(_noted_lines(headings, rows, width, notes))
    columns = [_Column(heading, [row[1][i] for row in rows]) for i, heading in enumerate(headings)]
    labels = [label for label, _ in rows]
    label_width = max(map(cell_len, labels), default=0)
    choices = [(False, False), (False, True)]
    if label_width > width // 3:
        choices += [(True, False), (True, True)]
    for above, stacked in choices:
        left = len(INDENT) if above else label_width
        total = len(INDENT) + left + sum(len(GAP) + c.width(stacked=stacked) for c in columns)
        if total <= width:
            return _lines(labels, columns, left, above=above, stacked=stacked, width=width)
    above = label_width > width // 3
    left = len(INDENT) if above else label_width
    divided = {flag: _blocks(columns, width - len(INDENT) - left, flag) for flag in (False, True)}
    stacked = len(divided[True]) < len(divided[False])
    lines: list[str] = []
    for block in divided[stacked]:
        lines += [""] if lines else []
        lines += _lines(labels, block, left, above=above, stacked=stacked, width=width)
    return lines


def _noted_lines(
    headings: Sequence[str], rows: Sequence[Row], width: int, notes: Sequence[str]
) -> Iterator[str]:
    lines = table_lines(headings, rows, width)
    left = max(map(cell_len, lines)) + len(GAP)
    if len(lines) != len(rows) + 2 * any(headings) or width - left < LEAST_TEXT:
        yield from lines
        yield from term_lines(
            [(row[0], note) for row, note in zip(rows, notes, strict=True)], width
        )
        return
    yield from lines[: len(lines) - len(rows)]
    for line, note in zip(lines[-len(rows) :], notes, strict=True):
        for number, part in enumerate(wrap(note, width - left)):
            yield (_pad("" if number else line, left) + part).rstrip()


def term_lines(rows: Sequence[tuple[str, str]], width: int | None) -> Iterator[str]:
    """Yield lines of names and texts, which are wrapped at words; no width means no wrapping."""
    name_width = max((cell_len(name) for name, _ in rows), default=0)
    left = len(INDENT) + name_width + len(GAP)
    above = width is not None and width - left < LEAST_TEXT
    for name, text in rows:
        if above:
            yield from wrap(name, width, INDENT)
            yield from wrap(text, width, 2 * INDENT)
            continue
        first, *others = wrap(text, None if width is None else width - left) or [""]
        yield (INDENT + _pad(name, name_width) + GAP + first).rstrip()
        for line in others:
            yield " " * left + line


def wrap(text: str, width: int | None, indent: str = "") -> list[str]:
    """Wrap text at words, and words that are longer than a line anywhere."""
    if width is None:
        return [indent + text]
    room = max(1, width - len(indent))
    console = Console(width=room, emoji=False)
    return [indent + line.plain.rstrip() for line in Text(text).wrap(console, room)]


class _Column:
    """A column of cells, each divided into a value and what is around it."""

    def __init__(self, heading: str, cells: Sequence[str]) -> None:
        self.heading = heading
        parts = [_AROUND.split(cell, maxsplit=1) for cell in cells]
        self.values = [part[0] for part in parts]
        self.around = [part[1] if len(part) > 1 else "" for part in parts]
        self.is_text = not any(_NUMBER.match(value) for value in self.values)
        self._value = max(map(cell_len, self.values), default=0)
        around = max(map(cell_len, self.around), default=0)
        self._around = around and around + 1

    def width(self, *, stacked: bool) -> int:
        """Return its width, with what is around the values below or beside them."""
        most = max(self._value, self._around - 1) if stacked else self._value + self._around
        return max(cell_len(self.heading), most)

    def align(self, text: str, *, stacked: bool) -> str:
        """Pad a heading or a stacked cell."""
        return _pad(text, self.width(stacked=stacked), right=not self.is_text)

    def beside(self, row: int) -> str:
        """Return a cell on one line; values and what is around them are below one another."""
        around = f" {self.around[row]}" if self.around[row] else ""
        if self._around:
            cell = _pad(self.values[row], self._value, right=True) + _pad(around, self._around)
        else:
            cell = self.values[row]
        return self.align(cell, stacked=False)


def _blocks(columns: Sequence[_Column], room: int, stacked: bool) -> list[list[_Column]]:
    """Divide columns into as few blocks as fit, of one column at least and of similar width."""

    def divide(most: int) -> list[list[_Column]]:
        blocks: list[list[_Column]] = [[]]
        used = 0
        for column in columns:
            need = len(GAP) + column.width(stacked=stacked)
            if blocks[-1] and used + need > most:
                blocks.append([])
                used = 0
            blocks[-1].append(column)
            used += need
        return blocks

    fewest = len(divide(room))
    return next(found for most in range(room + 1) if len(found := divide(most)) == fewest)


def _lines(
    labels: Sequence[str],
    columns: Sequence[_Column],
    left: int,
    *,
    above: bool,
    stacked: bool,
    width: int,
) -> list[str]:
    def line(label: str, cells: Iterator[str]) -> str:
        return (INDENT + _pad(label, left) + "".join(GAP + cell for cell in cells)).rstrip()

    lines = []
    if any(column.heading for column in columns):
        lines.append(line("", (c.align(c.heading, stacked=stacked) for c in columns)))
        total = left + sum(len(GAP) + column.width(stacked=stacked) for column in columns)
        lines.append(INDENT + "─" * total)
    for row, label in enumerate(labels):
        if above:
            lines += wrap(label, width, INDENT)
            label = ""
        if not stacked:
            lines.append(line(label, (column.beside(row) for column in columns)))
            continue
        lines.append(line(label, (c.align(c.values[row], stacked=True) for c in columns)))
        if any(column.around[row] for column in columns):
            lines.append(line("", (c.align(c.around[row], stacked=True) for c in columns)))
    return lines


def _pad(text: str, width: int, *, right: bool = False) -> str:
    blanks = " " * max(0, width - cell_len(text))
    return blanks + text if right else text + blanks
