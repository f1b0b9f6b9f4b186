"""Tables with columns of vectors, and tables and lists of labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from csalign.core.errors import DataError, reason_of
from csalign.core.records import parse_json, read_object
from csalign.sources import arrow
from csalign.sources.arrays.base import UNNAMED, Array, Container, Header, labels_of
from csalign.sources.arrays.files import key_text, label_list, open_npy
from csalign.sources.arrays.naming import are_vectors, is_id, is_usual_key
from csalign.sources.labels import Labels
from csalign.sources.records.files import translate_errors
from csalign.sources.records.tables import read_table

LISTS = (".npy", ".txt", ".json")
_LABEL_ROWS = 65_536
_MAX_KEY_BYTES = 64
_SAVE_AGAIN = "save the dataset again"


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
            for batch in file.batches([name], _LABEL_ROWS):
                parts.append(arrow.to_strings(batch[name], name, path, start))
                start += len(batch)
            return pa.chunked_array(parts, pa.large_string()).combine_chunks()

        yield Container(headers, read, labels, read_labels, others, is_table=True)


def read_label_table(path: Path) -> Labels:
    """Read a .csv, .tsv, .jsonl, .parquet, .arrow or .feather of labels, or a list of keys.

    A list is an .npy, a .txt of lines, or a .json of values, of objects, of a list per column, or
    of the row of each key; its column has the name of the file.

    Raises:
        DataError: it is missing, of another kind, or damaged.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix.lower() in (*arrow.PARQUET, *arrow.ARROW):
        with arrow.open_arrow(path) as held, open_table(path) as file:
            return labels_of(path, open_table, file, held.rows)
    if path.suffix.lower() in LISTS:
        listed = {
            name: pa.array([key_text(value) or None for value in own], pa.large_string())
            for name, own in _read_list(path).items()
        }
        count = max(map(len, listed.values()), default=0)
        return Labels(str(path), count, lambda row: f"{path}, row {row}").with_columns(listed)
    table = read_table(path)
    columns = {name: pa.array(own, pa.large_string()) for name, own in table.columns.items()}
    numbers = table.numbers  # all that is kept of it
    labels = Labels(str(path), len(numbers), lambda row: f"{path}, row {numbers[row]}")
    return labels.with_columns(columns)


def _read_list(path: Path) -> dict[str, list[Any]]:
    """Read the columns of a list of keys, by name."""
    name = path.stem
    if path.suffix.lower() == ".npy":
        with open_npy(path) as file:
            shape, _ = file.headers[UNNAMED]
            if len(shape) != 1:
                raise DataError(f"{path}: has shape {shape}; a list of keys has one dimension")
            values = [v for chunk in file.read(UNNAMED, _LABEL_ROWS) for v in chunk.tolist()]
        return {name: [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values]}
    with translate_errors(path):
        content = path.read_bytes()
    try:
        if path.suffix.lower() == ".txt":
            lines = content.decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n").split("\n")
            return {name: [line.strip() for line in lines]}
        found = parse_json(content)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({reason_of(error)}); write it again") from None
    is_index = isinstance(found, dict) and all(isinstance(own, int) for own in found.values())
    if is_index and {*found.values()} == {*range(len(found))}:
        return {name: sorted(found, key=lambda key: found[key])}
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        found = {key: [row.get(key) for row in found] for key in dict.fromkeys(chain(*found))}
    columns = found if isinstance(found, dict) else {name: found}
    columns = {str(key): own for key, own in columns.items() if label_list(own) is not None}
    if not columns or len({*map(len, columns.values())}) != 1:
        raise DataError(f"{path}: is not a list of keys, one per row; write it as a .csv")
    return columns


def _is_plain(file: arrow.ArrowFile, name: str, held: pa.DataType) -> bool:
    """Return whether a column contains texts, numbers, times or short bytes, rather than files."""
    kind = arrow.kind_of(held)
    if kind == "struct" and held.num_fields == 1:
        return is_id(name) and _is_plain(file, name, held.field(0).type)
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
