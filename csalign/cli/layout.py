"""Lay out tables as lines of text in which no label is cut and no number is broken."""

import re
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

INDENT, GAP = "  ", "   "
JOINT = "\ue000"  # a blank at which `wrap` breaks no line
LEAST_TEXT = 24  # cells beside a name; with fewer, text is put on a line of its own

Columns = Mapping[str, Sequence[str]]
"""Cells by heading. In a cell what follows " ± " or " [" may be put below the value."""

_Column = Sequence[tuple[str, str]]
"""The heading and the cells, of two lines each; all lines are of one width."""

_AROUND = re.compile(r" (?=± |\+/- |\[)")
_NUMBER = re.compile(r"[-+]?[\d.]")


def table_lines(labels: Sequence[str], columns: Columns, width: int) -> list[str]:
    """Lay out a table of figures, a row per label.

    The first of these that fits is taken: one line per row; errors and intervals below their
    values; long labels on a line above their row; and several tables with the same labels.
    Single words that are longer than `width` cells stay complete all the same.
    """
    beside = _padded([("", ""), *((label, "") for label in labels)])
    ways: list[tuple[_Column, Sequence[str]]] = [(beside, [""] * len(labels))]
    if cell_len(beside[0][0]) > width // 3:
        ways.append(([("", "")] * (len(labels) + 1), labels))
    for left, titles in ways:
        found = []
        for stacked in (False, True):
            aligned = [_column(*column, stacked=stacked) for column in columns.items()]
            found.append(_blocks(aligned, width - cell_len(INDENT + left[0][0])))
            if len(found[-1]) == 1:
                return _lines(titles, [left, *aligned], width)
    blocks = [block for block in min(found, key=len) if block]
    return [line for own in blocks for line in ("", *_lines(titles, [left, *own], width))][1:]


def term_lines(
    rows: Sequence[tuple[str, str]], width: int | None, most: int = 100
) -> Iterator[str]:
    """Yield lines of names and texts, which are wrapped at words; no width means no wrapping.

    The text of a name of more than `most` cells begins on the next line.
    """
    if width is not None:
        most = min(most, width - len(INDENT + GAP) - LEAST_TEXT)
    column = max((size for name, _ in rows if (size := cell_len(name)) <= most), default=0)
    left = len(INDENT + GAP) + column
    for name, text in rows:
        lines = wrap(text, None if width is None else width - left, " " * left)
        if cell_len(name) <= column:
            lines[0] = (INDENT + _pad(name, column) + GAP + lines[0][left:]).rstrip()
        else:
            yield from wrap(name, width, INDENT)
        yield from filter(None, lines)


def wrap(text: str, width: int | None, indent: str = "") -> list[str]:
    """Wrap text at words, and words that are longer than a line anywhere; then indent it."""
    lines = [Text(text)]
    if width is not None and text:
        room = max(1, width)
        lines = [*Text(text).wrap(Console(width=room, emoji=False), room)]
    return [indent + line.plain.rstrip().replace(JOINT, " ") for line in lines]


def _column(heading: str, cells: Sequence[str], *, stacked: bool) -> _Column:
    """Align cells, with what is around their values beside or below them."""
    values = [_AROUND.split(cell, maxsplit=1)[0] for cell in cells]
    parts = [(own, cell[len(own) + 1 :]) for own, cell in zip(values, cells, strict=True)]
    if not stacked and (most := max((cell_len(around) for _, around in parts), default=0)):
        parts = [(f"{value} {_pad(around, most)}", "") for value, around in parts]
    return _padded([(heading, ""), *parts], right=any(map(_NUMBER.match, values)))


def _padded(parts: Sequence[tuple[str, str]], *, right: bool = False) -> _Column:
    width = max(cell_len(line) for part in parts for line in part)
    return [(_pad(one, width, right=right), _pad(two, width, right=right)) for one, two in parts]


def _blocks(columns: Sequence[_Column], room: int) -> list[list[_Column]]:
    """Divide columns into blocks that fit; one that does not fit alone follows an empty block."""
    blocks: list[list[_Column]] = [[]]
    left = room
    for column in columns:
        need = cell_len(GAP + column[0][0])
        if need > left:
            blocks.append([])
            left = room
        blocks[-1].append(column)
        left -= need
    return blocks


def _lines(titles: Sequence[str], columns: Sequence[_Column], width: int) -> list[str]:
    """Return the lines of a table: headings and a rule if there are any, then the rows."""
    lines: list[str] = []
    for title, row in zip(["", *titles], zip(*columns, strict=True), strict=True):
        lines += wrap(title, width - len(INDENT), INDENT) if title else []
        texts = [INDENT + GAP.join(parts) for parts in zip(*row, strict=True)]
        lines += [text.rstrip() for text in texts if not text.isspace()]
    if any(column[0][0].strip() for column in columns):
        lines.insert(1, INDENT + "─" * (cell_len(texts[0]) - len(INDENT)))
    return lines


def _pad(text: str, width: int, *, right: bool = False) -> str:
    blanks = " " * max(0, width - cell_len(text))
    return blanks + text if right else text + blanks
