"""Tables with columns of vectors, and tables and lists of labels."""

import csv
import io
import logging
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from csalign.core.arrays import Array
from csalign.core.errors import DataError, reason_of
from csalign.core.paths import likely_meant, stand_in
from csalign.core.records import parse_json, read_object
from csalign.sources import arrow
from csalign.sources.arrays.base import UNNAMED, Container, Header, labels_of
from csalign.sources.arrays.files import in_rows, label_list, open_npy, to_keys
from csalign.sources.arrays.naming import are_vectors, is_id, is_usual_key, plain_name
from csalign.sources.labels import Labels
from csalign.sources.records import delimited
from csalign.sources.records.cells import MISSING, captions_of, text_of
from csalign.sources.records.files import MAX_LINE_BYTES, Line, translate_errors
from csalign.sources.records.tables import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    SUFFIXES,
    SourceOptions,
    TableReader,
    dialect_of,
)

logger = logging.getLogger(__name__)

LISTS = (".npy", ".txt", ".json")
_MAX_KEY_BYTES = 64
_SAVE_AGAIN = "save the dataset again"
_CHUNK_ROWS = 65_536
_PROBED = 1_000

Columns = dict[str, list[str | None]]


@contextmanager
def open_table(path: Path) -> Iterator[Container]:
    """Open a .parquet, .arrow or .feather.

    Its arrays are the columns of lists of numbers, its labels those of texts, numbers, times, short
    bytes, and lists of one key.

    Raises:
        DataError: it is damaged.
    """
    with arrow.open_arrow(path) as opened:
        file, headers, single = arrow.gather_columns(opened), {}, set()
        for column in file.schema:
            if arrow.kind_of(column.type) == "list":
                held = column.type.value_type
                if is_usual_key(column.name) and arrow.list_width(file, column.name) == 1:
                    single.add(column.name)
                elif arrow.kind_of(held) in ("number", "integer"):
                    shape = (file.rows, arrow.list_width(file, column.name))
                    headers[column.name] = Header(shape, np.dtype(held.to_pandas_dtype()).name)
        labels = {
            own.name: file.rows
            for own in file.schema
            if own.name in single or _is_plain(file, own.name, own.type)
        }
        others = arrow.describe(file, headers, are_vectors)

        def read(name: str, step: int) -> Iterator[Array]:
            start = 0
            for batch in file.batches([name], step):
                yield arrow.to_matrix(batch[name], headers[name].shape[1], f"{path}:{name}", start)
                start += len(batch)

        def read_labels(name: str) -> pa.Array:
            parts: list[pa.Array] = []
            start = 0
            for batch in file.batches([name], _CHUNK_ROWS):
                parts.append(arrow.to_strings(batch[name], name, path, start))
                start += len(batch)
            return pa.chunked_array(parts, pa.large_string()).combine_chunks()

        yield Container(headers, read, labels, read_labels, others, is_table=True)


def read_label_table(path: Path) -> Labels:
    """Read a .csv, .tsv, .jsonl, .parquet, .arrow or .feather of labels, or a list of keys.

    A list is an .npy, a .txt of lines, or a .json of values, of objects, of a list per column, of
    the row of each key, or of the key of each row; its column has the name of the file. A .txt of
    names, numbers of captions and captions, as of Flickr, is a table.

    Raises:
        DataError: it is missing, of another kind, or damaged.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file{likely_meant(path)}")
    if path.suffix.lower() in (*arrow.PARQUET, *arrow.ARROW):
        with arrow.open_arrow(path) as held, open_table(path) as file:
            return labels_of(path, open_table, file, held.rows)
    if path.suffix.lower() in LISTS and not _is_token_list(path):
        columns = _read_list(path)
        count = len(next(iter(columns.values())))
        return Labels(str(path), count, lambda row: f"{path}, row {row}").with_columns(columns)
    return _read_text(path)


def _read_text(path: Path) -> Labels:
    """Read a .csv, .tsv or .jsonl."""
    suffix = path.suffix.lower()
    suffix = ".tsv" if suffix == ".txt" else suffix
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: not a table; use one of {', '.join(SUFFIXES)}")
    if path.stat().st_size and (problem := stand_in(path)) is not None:
        raise DataError(f"{path}: {problem}")
    plain = None if suffix == ".jsonl" else _read_plain(path, suffix)
    numbers, columns = _read_rows(path, suffix) if plain is None else plain
    labels = Labels(str(path), len(numbers), lambda row: f"{path}, row {numbers[row]}")
    for name, cells in columns.items():
        _clean(labels, name, cells)
    return labels.with_columns({k: pa.array(v, pa.large_string()) for k, v in columns.items()})


def _read_rows(path: Path, suffix: str) -> tuple[Sequence[int], Columns]:
    """Return the line number of each row, and its values by column."""
    numbers, columns = array("q"), Columns()
    with delimited.open_text(path) as file:
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
                columns.setdefault(name, [None] * len(numbers))
            for name, column in columns.items():
                column.append(cells.get(name))
            numbers.append(number)
    return numbers, columns


def _read_plain(path: Path, form: str) -> tuple[Sequence[int], Columns] | None:
    """Read a .csv or .tsv at once; None if it has an error, which a reader by lines names."""
    csv.field_size_limit(MAX_LINE_BYTES)
    numbers = array("q")
    try:
        # As in the reader by lines, a carriage return alone does not end a row.
        with io.TextIOWrapper(delimited.open_text(path), "utf-8-sig", newline="\n") as file:
            head = [Line(0, 0, line, None) for line in islice(file, delimited.HEAD_LINES)]
            dialect = dialect_of(path, head, form, SourceOptions())
            if dialect.guess:
                logger.info(f"{path}: read as a {dialect.guess}")
            if dialect.delimiter == " ":
                return None
            file.seek(0)
            before = sum(1 for _ in islice(file, dialect.start))
            reader = delimited.reader_of(file, dialect)
            columns: list[list[str | None]] = [[] for _ in dialect.names]

            def rows() -> Iterator[list[str]]:
                number = reader.line_num + 1
                for row in reader:
                    if row:
                        if reader.line_num > number and delimited.contains_row(row, dialect):
                            raise ValueError("unclosed quote")
                        numbers.append(before + number)
                        yield row
                    number = reader.line_num + 1

            rest = rows()
            while chunk := list(islice(rest, _CHUNK_ROWS)):
                for column, cells in zip(columns, zip(*chunk, strict=True), strict=True):
                    column += [cell.strip() or None for cell in cells]
    except (csv.Error, ValueError, OSError):
        return None
    return numbers, dict(zip(dialect.names, columns, strict=True))


def _clean(labels: Labels, name: str, cells: list[str | None]) -> None:
    """Remove the number of a caption from names of images, and words for missing captions."""
    plain = plain_name(name)
    if plain in IMAGE_NAMES and any("#" in cell for cell in cells[:_PROBED] if cell):
        cells[:] = [cell and delimited.without_number(cell) for cell in cells]
    elif plain in CAPTION_NAMES:
        if not MISSING.isdisjoint(cells):
            cells[:] = [None if cell in MISSING else cell for cell in cells]
        for row in [row for row, cell in enumerate(cells) if cell and cell[-1] in "])"]:
            if captions_of(cells[row], name) != (cells[row],):
                raise DataError(
                    f"{labels.where(row)}: has a list of captions in column {name!r}; write a row "
                    "for each"
                )


def _is_token_list(path: Path) -> bool:
    """Return whether a .txt has the lines of Flickr: a name, the caption's number, a caption."""
    with translate_errors(path), path.open("rb") as file:
        start = file.readline(MAX_LINE_BYTES)
    return path.suffix.lower() == ".txt" and re.match(rb"[^\t\n]+#\d+\t", start) is not None


def _read_list(path: Path) -> dict[str, pa.Array]:
    """Read the columns of a list of keys, by name."""
    name = path.stem
    if path.suffix.lower() == ".npy":
        with open_npy(path) as file:
            shape, _ = file.headers[UNNAMED]
            if len(shape) != 1:
                raise DataError(f"{path}: has shape {shape}; a list of keys has one dimension")
            return {name: file.read_labels(UNNAMED)}
    with translate_errors(path):
        content = path.read_bytes()
    try:
        if path.suffix.lower() == ".txt":
            lines = content.decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n").split("\n")
            keys = to_keys([line.strip() for line in lines], name, path)
            cells = [[line] for line in lines[:_PROBED]]
            is_file = plain_name(name) in CAPTION_NAMES and delimited.columns_of(cells)
            return {"file" if is_file else name: keys}
        found = in_rows(parse_json(content))
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({reason_of(error)}); write it again") from None
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        found = {key: [row.get(key) for row in found] for key in dict.fromkeys(chain(*found))}
    columns = found if isinstance(found, dict) else {name: found}
    lists = {key: own for key, own in columns.items() if label_list(own) is not None}
    if len({*map(len, lists.values())}) != 1:
        raise DataError(f"{path}: is not a list of keys, one per row; write it as a .csv")
    return {key: to_keys(own, key, path) for key, own in lists.items()}


def _is_plain(file: arrow.ArrowFile, name: str, held: pa.DataType) -> bool:
    """Return whether a column contains texts, numbers, times or short bytes, rather than files."""
    kind = arrow.kind_of(held)
    if kind == "struct" and held.num_fields == 1:
        return is_id(name) and _is_plain(file, name, held.field(0).type)
    if kind == "struct":  # an image of datasets
        return any(own.name == "path" and arrow.kind_of(own.type) == "text" for own in held)
    if kind == "bytes" and not is_id(name):
        first = next(file.batches([name], 1), None)
        return first is not None and len(str(first[0][0])) <= _MAX_KEY_BYTES
    return kind in ("text", "integer", "number", "bytes") or pa.types.is_temporal(held)


def dataset_files(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the files of a folder written by ``datasets.save_to_disk``, each with its split.

    Raises:
        DataError: the folder is damaged, or its rows are a selection that was never written out.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json", _SAVE_AGAIN).get("splits")
        names = [str(split) for split in splits] if isinstance(splits, list) else []
        found: list[tuple[Path, str | None]] = [
            (file, name) for name in names for file, _ in dataset_files(folder / name)
        ]
    else:
        state = read_object(folder / "state.json", _SAVE_AGAIN)
        if state.get("_indices_data_files"):
            raise DataError(
                f"{folder}: is a selection of a dataset; write it out with "
                "dataset.flatten_indices().save_to_disk(...)"
            )
        entries = state.get("_data_files")
        entries = entries if isinstance(entries, list) else []
        named = [Path(str(entry["filename"])).name for entry in entries if "filename" in entry]
        found = [(folder / name, None) for name in named]
    if not found:
        raise DataError(f"{folder}: names no data files; {_SAVE_AGAIN}")
    return found
