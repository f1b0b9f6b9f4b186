"""Rows that belong to no pair: images without captions, captions without images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.features.join import Pairs, select_rows, split_names
from csalign.features.reader import FeatureSet
from csalign.features.streaming import MemoryBudget, load_vectors

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """Some rows of an array, which may be more than memory holds.

    Attributes:
        values: (n, d) embeddings of one encoder.
        rows: (k,) which rows; None for all.
    """

    values: Array
    rows: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.values) if self.rows is None else len(self.rows)

    def take(self, chosen: npt.NDArray[np.int64]) -> Array:
        """Rows by their position in the part; float32."""
        rows = chosen if self.rows is None else self.rows[chosen]
        found: Array = self.values[rows].astype(np.float32)
        return found


@dataclass(frozen=True)
class Unpaired:
    """A pool of rows of each side.

    Attributes:
        images: parts with rows (k_i, d).
        texts: likewise.
    """

    images: Sequence[Part]
    texts: Sequence[Part]

    def count(self, side: Modality) -> int:
        """Rows of one side."""
        return sum(map(len, self._parts(side)))

    def draw(self, side: Modality, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Numbers of rows of one side at random, with replacement, for `take`; none if it has none.

        Rows of one part are together, in the order of the parts, and so are any some of them.
        """
        total = self.count(side)
        chosen = rng.integers(0, total, count if total else 0)
        ends = np.cumsum([len(part) for part in self._parts(side)])
        return chosen[np.argsort(np.searchsorted(ends, chosen, "right"), kind="stable")]

    def sample(self, side: Modality, most: int, rng: np.random.Generator) -> Array:
        """Different rows of one side, at most so many, at random; (k, d) float32."""
        total = self.count(side)
        chosen = np.arange(total)
        if total > most:
            chosen = np.sort(rng.choice(total, most, replace=False))
        return self.take(side, chosen)

    def take(self, side: Modality, chosen: npt.NDArray[np.int64]) -> Array:
        """Rows by their numbers, part by part; (k, d) float32."""
        found, start = [], 0
        for part in self._parts(side):
            own = chosen[(chosen >= start) & (chosen < start + len(part))] - start
            found.append(part.take(own))
            start += len(part)
        return np.concatenate(found)

    def _parts(self, side: Modality) -> Sequence[Part]:
        return self.images if side is Modality.IMAGE else self.texts


def gather_unpaired(
    rows: Pairs, others: Sequence[Path], train_split: str, room: MemoryBudget
) -> Unpaired:
    """The training rows without a partner, and the rows of further feature sets.

    Of a further set all rows count, paired or not, but for those in splits of its own that are not
    trained on, such as val and test.

    Args:
        rows: training rows.
        others: further feature sets, of one side or both.
        train_split: the split(s) to train on.
        room: for the rows of further sets.

    Raises:
        DataError: there is no such feature set, or one of its rows has no direction.
        ShapeError: one was made by encoders of other widths.
        OutputError: the rows fit neither into memory nor on the disk.
    """
    images = [Part(rows.images, np.flatnonzero(rows.caption_counts == 0))]
    texts = [Part(rows.texts, np.flatnonzero(rows.text_image < 0))]
    for path in others:
        features = FeatureSet.open(path)
        there = features.splits()
        names = (split_names(train_split, there) | {None}) & set(there)
        for side, pool, width in (
            (Modality.IMAGE, images, rows.images.shape[1]),
            (Modality.TEXT, texts, rows.texts.shape[1]),
        ):
            pool.append(_side_rows(features, side, names, width, room))
        if not sum(map(len, (images[-1], texts[-1]))):
            raise DataError(f"{path}: has no rows in split {train_split}, nor any without a split")
    return Unpaired(images, texts)


def _side_rows(
    features: FeatureSet, side: Modality, names: set[str | None], width: int, room: MemoryBudget
) -> Part:
    table = features.table(side)
    if table.info is None or not len(table):
        return Part(np.empty((0, width), np.float32))
    if table.width != width:
        raise ShapeError(
            f"{features.path}: {side} embeddings are {table.width} wide, those to train on "
            f"{width}; extract both with the same encoder"
        )
    chosen = select_rows(table, names)
    return Part(load_vectors(table, chosen, room, f"{features.path}: {side.plural}"))
