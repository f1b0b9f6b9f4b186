"""Recognise how a delimited text is written, and parse it: separator, header, quotes, encoding."""

import csv
import io
import logging
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from csalign.core.enums import SPLITS
from csalign.core.errors import DataError
from csalign.sources.records import files
from csalign.sources.records.cells import plain_name

logger = logging.getLogger(__name__)

HEAD_LINES = 64  # by which a file is recognised
_HEAD_BYTES = 1 << 16
_MOST = 0.9  # of the lines, as a list may have a few bad ones
_SIGNS = "\t,;|"
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars", " ": "spaces"}
_SEP_LINE = re.compile(r'"?sep=(.)"?\s*')  # as Excel has it above the header
_SUFFIX = "|".join(re.escape(suffix) for suffix in (*sorted(files.IMAGE_SUFFIXES), ".heic", ".jxl"))
_IMAGE = re.compile(rf"(?:{_SUFFIX})(?:#\d+)?$|^[^\s#]+#\d+$", re.IGNORECASE)
_KINDS = {
    "id": r"[\w./-]*\d{6,}\w*",
    "url": r"https?://\S+",
    "split": "|".join((*SPLITS, "restval")),
}
_QUOTES = "quote cells with double quotes and double a quote inside them"
_NUMBERED = re.compile(r"(\.\w{2,5})#\d+$")


class Dialect(NamedTuple):
    """How a delimited text is written.

    Attributes:
        delimiter: between cells; a space ends only the first cell of a line.
        names: of the columns.
        start: number of lines before the first row.
        guess: how a list without a header is read, for people; "" where the header decides.
        free: index of the column whose cells may contain unquoted delimiters, if any.
    """

    delimiter: str
    names: list[str]
    start: int
    guess: str = ""
    free: int | None = None


class Values(NamedTuple):
    """A row: its first line, counted from 1, the byte there, its values by column, its error."""

    number: int
    offset: int
    values: dict[str, Any]
    error: str | None = None


def open_text(path: Path) -> BinaryIO:
    """Open a text as UTF-8 with newlines, whatever it has on the disk; or raise `DataError`."""
    file = files.open_file(path)
    with files.translate_errors(path):
        start = file.read(_HEAD_BYTES)
        file.seek(0)
        if to_utf8(start) is start:
            return file
        with file:
            return io.BytesIO(to_utf8(file.read(), "strict"))


def to_utf8(data: bytes, errors: str = "replace") -> bytes:
    """Recode UTF-16 as UTF-8, and carriage returns as newlines if a text has no others."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        data = data.decode("utf-16", errors).encode()
    is_macintosh = b"\r" in data[:_HEAD_BYTES] and b"\n" not in data[:_HEAD_BYTES]
    return data.replace(b"\r", b"\n") if is_macintosh else data


def read_dialect(table: Path, head: Sequence[str], form: str, known: Collection[str]) -> Dialect:
    """Recognise how a delimited text is written by its first lines.

    The first line that is neither blank nor a comment is the header, unless the lines have the
    content of a list of images: names of files or URLs in a column of all of them.

    Raises:
        DataError: the header is malformed or has a name twice.
    """
    start, signs = 0, dict.fromkeys(_SIGNS if form == ".tsv" else ",\t;|")
    if head and (separator := _SEP_LINE.fullmatch(head[0])):
        start, signs = 1, {separator[1]: None}
    start += _comments(head[start:], known)
    lines = [line.lstrip("# ") for line in head[start : start + 1]] + list(head[start + 1 :])
    if not lines:
        return Dialect(next(iter(signs)), [], start)
    counts = {sign: _known(lines[0], sign, known) for sign in signs}
    delimiter = max(signs, key=lambda sign: counts[sign])
    if not counts[delimiter]:
        if (found := read_list(lines, signs)) is not None:
            return found._replace(start=start)
        delimiter = next((sign for sign in signs if sign in lines[0]), delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = [cell.strip() for cell in next(reader)]
    except csv.Error as error:
        raise DataError(f"{table}, row {start + 1}: is malformed ({error}); {_QUOTES}") from None
    return Dialect(delimiter, names, start + reader.line_num)


def text_form(head: Sequence[str], known: Collection[str]) -> str:
    """Return ".csv" or ".tsv" for the first lines of a delimited text, ".txt" for captions."""
    lines = [line for line in head[_comments(head, known) :] if line.strip()]
    if not lines:
        return ".txt"
    tabs = {line.count("\t") for line in lines}
    is_table = (
        lines[0].strip().lower() in ("caption", "captions")
        or (len(tabs) == 1 and tabs != {0})
        or _SEP_LINE.fullmatch(lines[0])
        or any(_known(lines[0], sign, known) > 1 for sign in _SIGNS)
        or any(read_list(rows, _SIGNS) for rows in (lines, lines[1:]) if rows)
    )
    return ".txt" if not is_table else ".tsv" if "\t" in lines[0] else ".csv"


def _comments(head: Sequence[str], known: Collection[str]) -> int:
    """Count the blank lines and comments at the start; a header or row behind # is neither."""
    for count, text in enumerate(line.strip() for line in head):
        if text and (text[0] != "#" or any(_is_row(text, sign, known) for sign in _SIGNS)):
            return count
    return len(head)


def _is_row(text: str, sign: str, known: Collection[str]) -> bool:
    first, found, _ = text.partition(sign)
    return bool(found) and (_known(text.lstrip("# "), sign, known) > 1 or is_image_name(first))


def _known(line: str, sign: str, known: Collection[str]) -> int:
    """Count the usual names of columns in a header; 0 if it has the name of a file."""
    cells = [cell.strip().strip('"') for cell in line.split(sign)]
    if any(map(is_image_name, cells)):
        return 0
    plain = [plain_name(cell) for cell in cells]
    return sum(bool({name, name.rstrip("s_0123456789")} & {*known} - {""}) for name in plain)


def read_list(lines: Sequence[str], signs: Collection[str]) -> Dialect | None:
    """Recognise a list of images without a header by its content; None if it is another text."""
    rows = [line.strip("\r\n") for line in lines if line.strip()]
    for sign in (*signs, " "):
        cells = [_cells(row, sign) for row in rows]
        if max(map(len, cells)) == 1 and re.search(r"[\t,;|]", "".join(rows)):
            continue  # it is hardly a list of names alone
        are_even = len({len(row) for row in cells}) == 1 and any('"' in row for row in rows)
        names = columns_of(cells, can_cut=sign in "\t|" or are_even)
        if names and (sign != " " or names[0] in ("image", "url")):
            listed = ", ".join(names)
            how = f", separated by {_SEPARATORS.get(sign, repr(sign))}" if len(names) > 1 else ""
            return Dialect(sign, names, 0, f"list without header of {listed}{how}")
    return None


def _cells(row: str, sign: str) -> list[str]:
    if sign == " ":
        return row.split(None, 1)
    try:
        cells = next(csv.reader([row], delimiter=sign, strict=True))
    except csv.Error:
        cells = row.split(sign)
    return [cell.strip() for cell in cells]


def columns_of(rows: Sequence[Sequence[str]], *, can_cut: bool = True) -> list[str] | None:
    """Name the columns of a list of images by their content.

    With `can_cut` several columns of prose are several captions, not one with separators in it.

    Returns:
        One of ``image`` and ``url``, and ``caption`` or ``caption_1`` and so on; None if there is
        neither an image nor a URL in the same column of nearly all rows and in the first, or the
        other columns are ambiguous.
    """
    counts = sorted(len(row) for row in rows)
    width = counts[int(len(rows) * (1 - _MOST))] if rows else 0
    has_more = counts and 1 < width < counts[-1] and not can_cut
    if has_more and _kind_of([row[-1] for row in rows]) in ("image", "url"):  # behind its caption
        width, rows = 2, [(" ".join(row[:-1]), row[-1]) for row in rows]
    rows = [row for row in rows if len(row) >= width]
    kinds = [_kind_of([row[column] for row in rows]) for column in range(width)]
    if not {"image", "url"} & {*kinds} and "id" in kinds:
        kinds[kinds.index("id")] = "image"
    prose = [column for column, kind in enumerate(kinds) if kind == "prose"]
    words = [column for column, kind in enumerate(kinds) if kind == "word"]
    if not prose and len(words) == 1:
        prose = words
    if len(prose) > 1 and not can_cut and counts[0] < counts[-1]:
        width, prose = prose[0] + 1, prose[:1]
    named = {"image", "url", "split", "id"}
    names = [kind if kind in named else f"column {k}" for k, kind in enumerate(kinds[:width], 1)]
    for number, column in enumerate(prose, 1):
        names[column] = "caption" if len(prose) == 1 else f"caption_{number}"
    is_clear = len(prose) < 2 or can_cut
    if not {"image", "url"} & {*names} or not is_clear or len({*names}) < width:
        return None
    return names if prose or "split" in names or width == 1 else None


def _kind_of(cells: Sequence[str]) -> str:
    """Return what a column has: image, url, split, number, prose, word, or nothing."""
    some = [cell for cell in cells if cell]

    def most(pattern: str) -> bool:
        return sum(bool(re.fullmatch(pattern, cell)) for cell in some) >= _MOST * len(some)

    if not some:
        return "nothing"
    if most(r"[+-]?\d{1,5}(\.\d*)?"):
        return "number"
    if sum(map(is_image_name, some)) >= _MOST * len(some) and is_image_name(cells[0]):
        return "image"
    for kind, pattern in _KINDS.items():
        if most(pattern) and re.fullmatch(pattern, cells[0]):
            return kind
    return "prose" if sum(" " in cell for cell in some) > len(some) / 2 else "word"


def is_image_name(cell: str) -> bool:
    """Check whether a cell is a name of an image, perhaps with the number of a caption behind #."""
    cell = cell.strip()
    return len(cell) < 4096 and not cell.startswith("http") and _IMAGE.search(cell) is not None


def without_number(image: str) -> str:
    """Remove the number of the caption behind the name of an image: ``a.jpg#0`` is a.jpg."""
    return _NUMBERED.sub(r"\1", image) if "#" in image else image


def parse_rows(table: Path, lines: Iterator[files.Line], dialect: Dialect) -> Iterator[Values]:
    """Yield the rows of a delimited text behind its header; blank lines are skipped."""
    # The limit holds for the process, as a reader has none of its own. Captions and images in
    # base64 exceed its default of 128 KiB; an unclosed quote must still not fill the memory.
    csv.field_size_limit(files.MAX_LINE_BYTES)
    names, width = dialect.names, len(dialect.names)
    taken: list[files.Line] = []
    again: deque[files.Line] = deque()

    def texts() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line.text

    reader, joined = reader_of(texts(), dialect), 0
    while True:
        taken.clear()
        error, cells = None, []
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as caught:
            error = f"is malformed ({caught}); {_QUOTES}"
        number, offset = taken[0][:2]
        if 0 < len(cells) < width and not "".join(cells).strip():
            continue
        if error is None and len(taken) > 1 and contains_row(cells, dialect):
            error = f"has a quote that is not closed in its line; {_QUOTES}"
        if error is None and cells and len(cells) != width:
            error = (
                f"has {len(cells)} cells, the header has {width}; put double quotes around a cell "
                "that contains the separator"
            )
        undecoded = next((line.error for line in taken if line.error), None)
        if error is not None:  # bad is the first line alone: its quote may be unclosed
            again.extendleft(reversed(taken[1:]))
            reader, undecoded = reader_of(texts(), dialect), taken[0].error
            if (other := _read_otherwise(taken[0].text.rstrip("\r\n"), dialect)) is not None:
                error, (cells, is_joined) = None, other
                joined += is_joined
        error = error or undecoded
        if error is not None or cells:
            cells = [cell.strip() for cell in cells]
            yield Values(number, offset, dict(zip(names, cells, strict=False)), error)
    if joined:
        logger.info(
            f"{table}: {joined} rows have more separators than columns, read as part of captions"
        )


def reader_of(lines: Iterable[str], dialect: Dialect) -> Any:
    """Return a reader of the cells of each row; its `line_num` is the number of lines read."""
    if dialect.delimiter == " ":
        return (line.split(None, 1) for line in lines)
    sign = dialect.delimiter
    return csv.reader(lines, delimiter=sign, strict=True, skipinitialspace=sign in ",;")


def contains_row(cells: Sequence[str], dialect: Dialect) -> bool:
    """Check whether a cell of several lines contains further rows, by an unclosed quote."""
    for line in chain.from_iterable(cell.split("\n")[1:] for cell in cells if "\n" in cell):
        parts = line.split(dialect.delimiter)
        is_wide = len(parts) >= len(dialect.names) > 1
        if is_wide and (dialect.delimiter == "\t" or any(map(is_image_name, parts))):
            return True
    return False


def _read_otherwise(line: str, dialect: Dialect) -> tuple[list[str], bool] | None:
    """Read a line that is not a row of CSV: cells, and whether the free column has delimiters."""
    sign, width = dialect.delimiter, len(dialect.names)
    if sign == " ":
        return None
    readings: list[dict[str, Any]] = [{}]  # one by one: more cells, all empty
    if "\\" in line:
        readings.append({"escapechar": "\\", "doublequote": False})
    is_balanced = all(cell.count('"') % 2 == 0 for cell in line.split(sign))
    if sign in "\t|" or is_balanced:
        readings.append({"quoting": csv.QUOTE_NONE})
    cells: list[str] = []
    for reading in readings:
        try:
            cells = next(csv.reader([line], delimiter=sign, strict=True, **reading), [])
        except csv.Error:
            continue
        if len(cells) >= width and not any(cell.strip() for cell in cells[width:]):
            return cells[:width], False
    if dialect.free is None or '"' in line or len(cells) < width:
        return None
    first, after = dialect.free, len(cells) - width + dialect.free + 1
    return [*cells[:first], sign.join(cells[first:after]), *cells[after:]], True
