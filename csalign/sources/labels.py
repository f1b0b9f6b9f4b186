"""Tables of labels: strings of each row of an array, of pairs, or of counts."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from csalign.core.errors import DataError
from csalign.sources.arrays.base import Labels
from csalign.sources.arrays.files import read_table_labels
from csalign.sources.arrays.naming import first_of
from csalign.sources.arrow import ARROW, PARQUET
from csalign.sources.records.tables import read_table


def read_label_table(path: Path) -> Labels:
    """Read a .csv, .tsv, .jsonl, .parquet, .arrow or .feather of labels.

    Raises:
        DataError: it is missing, of another kind, or damaged.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix.lower() in (*PARQUET, *ARROW):
        return read_table_labels(path)
    table = read_table(path)
    columns = {name: pa.array(own, pa.large_string()) for name, own in table.columns.items()}
    return Labels(str(path), len(table), tuple(columns), columns.__getitem__, table.where)


def find_column(labels: Labels, names: Sequence[str]) -> pa.Array | None:
    """Return the first column of some names, in any spelling; None if there is none."""
    name = first_of(names, labels.names)
    return None if name is None else labels.column(name)


def require_column(labels: Labels, names: Sequence[str]) -> pa.Array:
    """Return the first column of some names.

    Raises:
        DataError: there is none.
    """
    column = find_column(labels, names)
    if column is None:
        listed = ", ".join(labels.names) or "none"
        raise DataError(f"{labels.name}: has no column {names[0]!r} (columns: {listed}); add it")
    return column


def check_rows(labels: Labels, count: int, what: str) -> None:
    """Raise DataError unless a table has one row for each of `count` rows of an array."""
    if labels.rows != count:
        header = "only a header" if not labels.rows else f"{labels.rows} rows"
        raise DataError(
            f"{labels.name}: has {header} and there are {count} {what}; the table needs "
            "one row per row of the array"
        )
