"""Columns of strings that describe rows: those of an array, of pairs, or of counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from csalign.core.arrays import Ints
from csalign.core.errors import DataError
from csalign.sources.arrays.naming import first_of


@dataclass(frozen=True)
class Labels:
    """Columns of strings of some rows, read when they are asked for; there may be none."""

    name: str  # the file, for messages
    rows: int
    where: Callable[[int], str]  # returns file and row of a 0-based row
    names: Sequence[str] = ()  # of the columns, in the file's own spelling
    read: Callable[[str], pa.Array] | None = None  # returns a column, large_string, (rows,)
    unread: Mapping[str, str] = field(default_factory=dict)  # what look like keys, and the problem
    _known: dict[str, pa.Array] = field(default_factory=dict, compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.names or self.unread)

    def column(self, name: str) -> pa.Array:
        """Return the values of a column."""
        if name not in self._known and self.read is not None:
            self._known[name] = self.read(name)
        return self._known[name]

    def find(self, names: Sequence[str], otherwise: pa.Array = None) -> pa.Array:
        """Return the first column of some names, in any spelling, or else `otherwise`."""
        name = first_of(names, self.names)
        return otherwise if name is None else self.column(name)

    def require(self, *names: str) -> pa.Array:
        """Return the first column of some names; raises DataError if there is none."""
        if (column := self.find(names)) is None:
            listed = ", ".join(self.names) or "none"
            raise DataError(f"{self.name}: has no column {names[0]!r} (columns: {listed}); add it")
        return column

    def check_rows(self, count: int, what: str) -> None:
        """Raise DataError unless there is one row for each of `count` rows of an array."""
        if self.rows != count:
            header = "only a header" if not self.rows else f"{self.rows} rows"
            raise DataError(
                f"{self.name}: has {header} and there are {count} {what}; the table needs "
                "one row per row of the array"
            )

    def repeated(self, each: int) -> "Labels":
        """Repeat each row."""
        if each == 1:
            return self
        return replace(
            self,
            rows=self.rows * each,
            where=lambda row: self.where(row // each),
            read=lambda name: self.column(name).take(pa.array(np.arange(self.rows * each) // each)),
        )

    def with_columns(self, columns: Mapping[str, pa.Array]) -> "Labels":
        """Add columns, or replace them."""
        names = dict.fromkeys([*self.names, *columns])
        return replace(self, names=tuple(names), _known={**self._known, **columns})


def first_rows(keys: pa.Array) -> Ints:
    """Return the first row with the key of each row, (n,)."""
    codes = keys.dictionary_encode().indices.to_numpy()
    found: Ints = np.unique(codes, return_index=True)[1][codes]
    return found


def first_repeated(keys: pa.Array) -> tuple[int, int] | None:
    """Return the first row whose key an earlier row has, and that row; None if all differ."""
    first = first_rows(keys)
    repeated = np.flatnonzero(first != np.arange(len(first)))
    return (int(repeated[0]), int(first[repeated[0]])) if len(repeated) else None


def check_no_null(labels: Labels, name: str, what: str) -> pa.Array:
    """Return a column; raises DataError where it has a null."""
    keys = labels.column(name)
    if keys.null_count:
        row = keys.is_null().index(True).as_py()
        raise DataError(f"{labels.where(row)}: has no {what}; give every row one, or none")
    return keys
