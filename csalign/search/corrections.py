"""Corrections for hubs that are built into an index, as eval makes them of rows in memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.core.errors import SchemaError
from csalign.metrics.retrieval import SCALES, centred, penalty
from csalign.search.manifest import Correction

MEANS = "query.npy"

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Corrected:
    """Maps unit rows to vectors whose inner products are corrected scores.

    Attributes:
        name: of the correction.
        means: (2, d), of the items' side and of the other, for "centre".
        references: (r, d), rows of the other side that tell how near to all an item is, for the
            others; empty once the items are in the index.
    """

    name: Correction
    means: Doubles
    references: Floats

    @property
    def extra(self) -> int:
        """Dimensions that it adds."""
        return 0 if self.name == "centre" else 1

    def items(self, rows: Floats) -> Floats:
        """Vectors of the items, (n, d) or (n, d + 1)."""
        if self.name == "centre":
            return centred(rows, self.means[0])
        own = penalty(rows, self.references, self.name)
        return np.hstack([self._scaled(rows), -own[:, None]])

    def queries(self, rows: Floats, *, of_items: bool) -> Floats:
        """Vectors of queries, which are of the items' side or of the other.

        The term of the query alone is left out, since it changes no rank.
        """
        if self.name == "centre":
            return centred(rows, self.means[0 if of_items else 1])
        return np.hstack([self._scaled(rows), np.ones((len(rows), 1), np.float32)])

    def save(self, folder: Path) -> None:
        """Write what queries need."""
        if self.name == "centre":
            np.save(folder / MEANS, self.means, allow_pickle=False)

    def _scaled(self, rows: Floats) -> Floats:
        scaled: Floats = np.float32(np.sqrt(SCALES[self.name])) * rows
        return scaled


def load_correction(folder: Path, name: Correction | None) -> Corrected | None:
    """What an index was built with, for its queries.

    Raises:
        SchemaError: the means are damaged.
    """
    if name is None:
        return None
    none: Any = np.empty((0, 0))
    if name != "centre":
        return Corrected(name, none, none.astype(np.float32))
    path = folder / MEANS
    try:
        means = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SchemaError(f"{path}: cannot be read ({error}); build the index again") from None
    return Corrected(name, means, none.astype(np.float32))


def mean_of(parts: Iterable[Floats]) -> Doubles:
    """Mean row of what comes in parts, (d,)."""
    total, count = np.float64(0), 0
    for rows in parts:
        total = total + rows.sum(axis=0, dtype=np.float64)
        count += len(rows)
    mean: Doubles = np.asarray(total) / count
    return mean
