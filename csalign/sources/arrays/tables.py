"""Embeddings and labels in the columns of Parquet, Arrow and Feather files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.records import read_object
from csalign.sources import arrow
from csalign.sources.arrays.base import Array, Container, Header, Labels, first_of
from csalign.sources.records.tables import CAPTION_NAMES, IMAGE_NAMES

_LABEL_ROWS = 65_536
_SAVE_AGAIN = "save the dataset again"

# Usual names of the columns beside the embeddings, the likeliest first.
LABELS: dict[Modality, dict[str, tuple[str, ...]]] = {
    Modality.IMAGE: {
        "id": ("image_id", "id", "key"),
        "source": ("source", *IMAGE_NAMES),
        "split": ("split",),
    },
    Modality.TEXT: {
        "id": ("text_id", "id", "key"),
        "image_id": ("image_id",),
        "caption": CAPTION_NAMES,
        "split": ("split",),
    },
}


@contextmanager
def open_table(path: Path) -> Iterator[Container]:
    """Open a .parquet, .arrow or .feather; its arrays are the columns of lists of numbers.

    Raises:
        DataError: it is damaged.
    """
    with arrow.open_arrow(path) as file:
        headers = {}
        for column in file.schema:
            if arrow.kind_of(column.type) == "list":
                held = column.type.value_type
                if arrow.kind_of(held) != "text":
                    shape = (file.rows, arrow.list_width(file, column.name))
                    headers[column.name] = Header(shape, np.dtype(held.to_pandas_dtype()).name)

        def read(name: str, step: int) -> Iterator[Array]:
            start = 0
            for batch in file.batches([name], step):
                yield arrow.to_matrix(batch[name], headers[name].shape[1], f"{path}:{name}", start)
                start += len(batch)

        yield Container(headers, read, is_table=True)


def read_labels(
    path: Path, names: Mapping[str, tuple[str, ...]] | None = None, split: str | None = None
) -> Labels:
    """Read columns of strings or integers whole, as strings.

    Args:
        path: a .parquet, .arrow or .feather.
        names: usual names of the columns by their meaning: ``id``, ``caption``, ...; None to read
            all columns under their own names.
        split: of all rows, unless a column states it.

    Raises:
        DataError: the table is damaged, or a value is not UTF-8, whose row is named.
    """
    with arrow.open_arrow(path) as file:
        plain = [own.name for own in file.schema if arrow.kind_of(own.type) in ("text", "integer")]
        if names is None:
            names = {name: (name.lower(),) for name in plain}
        found = {known: first_of(usual, plain) for known, usual in names.items()}
        chosen = {known: name for known, name in found.items() if name is not None}
        columns: dict[str, list[str | None]] = {known: [] for known in chosen}
        for batch in file.batches(list(dict.fromkeys(chosen.values())), _LABEL_ROWS):
            for known, name in chosen.items():
                for value in arrow.column_values(batch[name]):
                    if isinstance(value, arrow.InvalidValue):
                        raise DataError(f"{path}, row {len(columns[known])}: {value}; correct it")
                    columns[known].append(None if value is None else str(value) or None)
        if split is not None:
            columns.setdefault("split", [split] * file.rows)
        return Labels(str(path), file.rows, columns, lambda row: f"{path}, row {row}")


def dataset_files(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the files of a folder written by ``datasets.save_to_disk``, each with its split.

    Raises:
        DataError: the folder is damaged, or its rows are a selection that was never written out.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json", _SAVE_AGAIN).get("splits", [])
        return [(file, str(s)) for s in splits for file, _ in dataset_files(folder / str(s))]
    state = read_object(folder / "state.json", _SAVE_AGAIN)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: is a selection of a dataset; write it out with "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    named = [str(entry.get("filename")) for entry in state.get("_data_files") or []]
    if not named:
        raise DataError(f"{folder}: names no data files in state.json; {_SAVE_AGAIN}")
    return [(folder / Path(name).name, None) for name in named]
