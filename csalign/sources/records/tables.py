"""Read captions tables row by row, or tables of strings whole: .csv, .tsv, .jsonl, plain text."""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

from pydantic import Field, PrivateAttr

from csalign.core.config import Config, Location
from csalign.core.enums import usual_split
from csalign.core.errors import DataError
from csalign.core.records import parse_json
from csalign.sources.records import cells, delimited, files
from csalign.sources.records.delimited import Dialect, Values

logger = logging.getLogger(__name__)

Kind = Literal[
    "auto", "folder", "table", "coco", "karpathy", "webdataset", "parquet", "captions", "list"
]
SUFFIXES = (".csv", ".tsv", ".jsonl")
IMAGE_NAMES = (
    *("image", "image_path", "image path", "image_file", "image_name", "img", "img_path"),
    *("filepath", "file_path", "file_name", "filename", "path", "file", "jpg", "jpeg", "png"),
    *("webp", "image_bytes", "img_bytes", *cells.BASE64_NAMES),
)
CAPTION_NAMES = (
    *("caption", "title", "text", "txt", "sentence", "captions", "caption_text", "sentences_raw"),
    *("raw_caption", "sentences", "texts", "raw", "alt_text", "comment", "description"),
)
SPLIT_NAME = "split"
# Usual names of what images of several rows share, the likeliest first.
SHARED_NAMES = ("image_id", "img_id", "imgid", "cocoid", "url", "image_url", "sha256")
_ID_NAMES = ("image_id", "img_id", "imgid", "id")  # of images, if no column has their names
_FORMS = {"list": "list of images", ".txt": "text file with one caption per line"}
# Usual names of columns, by which a header is recognised.
KNOWN_NAMES = frozenset(
    [
        *(cells.plain_name(name) for name in (*IMAGE_NAMES, *CAPTION_NAMES, SPLIT_NAME)),
        *("id", "image_id", "img_id", "imgid", "cocoid", "caption_id", "text_id", "sentid"),
        *("sent", "comment_number", "url", "image_url"),
    ]
)


class Row(NamedTuple):
    """One row of a captions table."""

    number: int  # its first line in the file, counted from 1, the header included
    image: str = ""  # path or base64 as the table has it, "" if there is none
    captions: tuple[str, ...] = ()  # stripped and not empty
    split: str | None = None
    id: str | None = None
    error: str | None = None  # why the row cannot be used; everything but its number is then absent
    offset: int | None = None  # byte where the row starts, if `image` is base64 rather than a path
    lacks_caption: bool = False  # although there is a column of captions


class TableColumns(NamedTuple):
    """The columns of a table by their content; None where there is none."""

    image: str | None = None
    caption: str | None = None
    split: str | None = None
    id: str | None = None
    more: tuple[str, ...] = ()  # further columns of captions: caption_2 and so on

    def __str__(self) -> str:
        sides = (("images", self.image), ("captions", self.caption))
        parts = [f"{what} in column {name!r}" for what, name in sides if name is not None]
        return ", ".join(parts) + (f" and {len(self.more)} more" if self.more else "")

    @property
    def used(self) -> list[str]:
        """The names of all of them."""
        names = dict.fromkeys((self.image, self.caption, self.split, self.id, *self.more))
        return [name for name in names if name is not None]

    def captions_in(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the captions of a row, or raise `ValueError`."""
        if self.caption is None:
            return ()
        found = cells.captions_of(values.get(self.caption), self.caption)
        for name in self.more:
            found += cells.captions_of(values.get(name), name)
        return found

    def warn_of_one_side(
        self, names: Collection[str], table: Path, skipped: Collection[str]
    ) -> None:
        """Warn if one side, not skipped, is missing where another column may have been meant."""
        others = [name for name in names if name not in self.used]
        if not others or (self.image is not None and self.caption is not None):
            return
        missing, kept = ("captions", "images") if self.image else ("images", "captions")
        if missing in skipped:
            return
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

    _skipped: frozenset[str] = PrivateAttr(frozenset())  # "images", "captions": not missed

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
                "them with --image-column and --caption-column, write a header such as "
                "image,caption above the first row if there is none, or read a folder's images "
                "without the table with --kind folder"
            )
        return found

    def pick(self, names: Collection[str]) -> TableColumns:
        """Recognise those of the columns that are among `names`."""
        by_name: dict[str, str] = {}
        for spell in (str.lower, cells.plain_name, lambda name: cells.plain_name(name).rstrip("s")):
            for name in names:
                by_name.setdefault(spell(name), name)

        def choose(given: str | None, known: Collection[str]) -> str | None:
            if given is not None:
                return given if given in names else None
            return next((by_name[name] for name in known if name in by_name), None)

        image = None if self.kind == "captions" else choose(self.image_column, IMAGE_NAMES)
        # An image column named "text" is not the caption column too.
        known = [name for name in CAPTION_NAMES if name in by_name and by_name[name] != image]
        numbered = [] if self.caption_column else _numbered(names, known)
        caption = choose(self.caption_column, known) or next(iter(numbered), None)
        split = choose(
            None if self.split_column == SPLIT_NAME else self.split_column, (SPLIT_NAME,)
        )
        more = tuple(name for name in numbered if name != caption)
        return TableColumns(image, caption, split, choose(self.id_column, ()), more)


def _numbered(names: Collection[str], known: Sequence[str]) -> list[str]:
    """Return the columns such as caption_1 and caption_2 by number, of the usual name found."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := re.fullmatch(r"([a-z_]+?)_?(\d+)", cells.plain_name(name)):
            found.setdefault(match[1], []).append((int(match[2]), name))
    base = next((base for base in known or (*CAPTION_NAMES, "sent", "cap") if base in found), None)
    return [] if base is None else [name for _, name in sorted(found[base])]


class TableReader:
    """Stream the rows of a captions table; `found` has its columns after that.

    Args:
        table: the file.
        options: the columns to read.
        form: ".csv" or ".tsv" with a header, ".jsonl" with one object per line, ".txt" with one
            caption per line, or "list" with one image path or object per line.
        has_images: ids are names of images if no column has these.
    """

    def __init__(
        self, table: Path, options: SourceOptions, form: str, *, has_images: bool = False
    ) -> None:
        self._has_images = has_images
        self._table = table
        self._options = options
        self._form = form
        self._dialect: Dialect | None = None
        self.found = TableColumns()

    @property
    def description(self) -> str:
        """How the table is read, for people."""
        if self._form not in SUFFIXES:
            return _FORMS[self._form]
        if self._dialect is not None and self._dialect.guess:
            return self._dialect.guess
        return f"{self._form[1:].upper()} table with {str(self.found) or 'no rows'}"

    def rows(self, file: BinaryIO) -> Iterator[Row]:
        """Stream the rows of the open file; blank lines are skipped.

        Raises:
            DataError: the whole table is unusable; the message names the table and the row.
        """
        yield from self.rows_of(self.values(file))

    def rows_of(self, parsed: Iterable[Values]) -> Iterator[Row]:
        """Make rows of values by column."""
        picked: dict[tuple[str, ...], TableColumns] = {}
        seen: dict[str, None] = {}
        for number, offset, values, error in parsed:
            if error is not None:
                yield Row(number, error=error)
                continue
            names = tuple(values)
            if names not in picked:
                picked[names] = self._named(self._options.pick(names), names)
                seen |= dict.fromkeys(names)
                if self._dialect is not None:
                    self._options.find(names, self._table)
            yield row_of(number, values, picked[names], offset)
        if seen and self._form in SUFFIXES:  # an object may omit keys: all are known only now
            self.found = self._named(self._options.find(seen, self._table), seen)
            self.found.warn_of_one_side(seen, self._table, self._options._skipped)

    def _named(self, found: TableColumns, names: Collection[str]) -> TableColumns:
        ids = [name for own in _ID_NAMES for name in names if cells.plain_name(name) == own]
        if found.image or found.id or not found.caption or not ids or not self._has_images:
            return found
        return found._replace(image=ids[0])

    def read_image(self, offset: int) -> bytes:
        """Read the base64 image of the row that starts at a byte; any thread may call it."""
        with (
            files.translate_errors(self._table, named=False),
            delimited.open_text(self._table) as file,
        ):
            file.seek(offset)
            row = next(self.rows(file), None)
        if row is None or row.error is not None:
            raise DataError("cannot be read, as its table has changed")
        return cells.decode_base64(row.image)

    def values(self, file: BinaryIO) -> Iterator[Values]:
        """Yield number, offset, values by column, and error of each row of the open file."""
        is_text = self._form not in SUFFIXES
        lines = files.read_lines(self._table, file)
        if self._form in (".csv", ".tsv"):
            if self._dialect is None:
                head = list(islice(lines, delimited.HEAD_LINES))
                self._dialect = dialect_of(self._table, head, self._form, self._options)
                lines = chain(head[self._dialect.start :], lines)
            yield from delimited.parse_rows(self._table, lines, self._dialect)
            return
        name = "caption" if self._form == ".txt" else self._options.image_column or "image"
        for line in lines:
            text = line.text.strip()
            if is_text and text and (self._form == ".txt" or not text.startswith("{")):
                yield Values(line.number, line.offset, {name: text}, line.error)
            elif text:
                yield _parse_json(line)


def dialect_of(
    table: Path, head: Sequence[files.Line], form: str, options: SourceOptions
) -> Dialect:
    """Recognise how a table is written, with unique names of columns, or raise `DataError`."""
    given = (options.image_column, options.caption_column, options.split_column, options.id_column)
    known = KNOWN_NAMES | {cells.plain_name(name) for name in given if name}
    dialect = delimited.read_dialect(table, [line.text for line in head], form, known)
    for line in head[: dialect.start]:
        if line.error is not None:
            raise DataError(f"{table}, row {line.number}: {line.error}")
    names: list[str] = []
    for number, name in enumerate(dialect.names, 1):
        if name in names and cells.plain_name(name) in CAPTION_NAMES:
            name = f"{name}.{number}"  # as pandas does
        elif not name:
            name = f"column {number}"
        if name in names:
            raise DataError(f"{table}: has the column {name!r:.200} twice; rename one")
        names.append(name)
    caption = options.pick(names).caption
    free = None if caption is None else names.index(caption)
    if free != len(names) - 1 and not (free == 0 and dialect.guess):
        free = None
    return dialect._replace(names=names, free=free)


def row_of(number: int, values: dict[str, Any], found: TableColumns, offset: int = 0) -> Row:
    """Make a row of a JSON object or of a table's cells; it has an error if they are unusable."""
    try:
        image, split = (
            "" if name is None or values.get(name) is None else cells.text_of(values[name], name)
            for name in (found.image, found.split)
        )
        captions = found.captions_in(values)
        own = None if found.id is None else values.get(found.id)
        own = None if own is None else cells.text_of(cells.id_of(own) or own, str(found.id)) or None
    except ValueError as error:
        return Row(number, error=str(error))
    in_base64 = image and (cells.is_base64_name(found.image) or cells.is_base64(image))
    split = split and (usual_split(split) or ("" if cells.is_missing(split) else split))
    image = image if in_base64 or not image else delimited.without_number(image)
    lacks = found.caption is not None and not captions
    at = offset if in_base64 else None
    return Row(number, image, captions, split or None, own, offset=at, lacks_caption=lacks)


def labels_of(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of what may say which images are one."""
    found = ((name, cells.id_of(values.get(name))) for name in SHARED_NAMES)
    return [(name, own) for name, own in found if own]


def _parse_json(line: files.Line) -> Values:
    error = line.error
    if error is None:
        try:
            values = parse_json(line.text.strip().rstrip(","))
            if isinstance(values, dict):
                return Values(line.number, line.offset, values)
            error = "is not a JSON object; each line must be one object"
        except ValueError as caught:
            error = f"is not valid JSON ({caught}); each line must be one object"
    return Values(line.number, line.offset, {}, error)
