"""Rows that belong to no pair: images without captions, captions without images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.enums import Modality
from csalign.errors import DataError, ShapeError
from csalign.store.join import PairedRows, check_directions, split_names
from csalign.store.reader import FeatureSet

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Unpaired:
    """A pool of rows of each side.

    Attributes:
        images: arrays (k_i, d) of the encoder's image embeddings.
        texts: likewise of texts.
    """

    images: Sequence[Array]
    texts: Sequence[Array]

    def count(self, side: Modality) -> int:
        """Rows of one side."""
        return sum(map(len, self._arrays(side)))

    def draw(self, side: Modality, count: int, rng: np.random.Generator) -> Array | None:
        """Rows of one side at random, with replacement; (count, d) float32, None if it has none."""
        total = self.count(side)
        if not total or not count:
            return None
        return self._take(side, rng.integers(0, total, count))

    def sample(self, side: Modality, most: int, rng: np.random.Generator) -> Array:
        """Different rows of one side, at most so many, at random; (k, d) float32."""
        total = self.count(side)
        chosen = np.arange(total)
        if total > most:
            chosen = np.sort(rng.choice(total, most, replace=False))
        return self._take(side, chosen)

    def _take(self, side: Modality, chosen: npt.NDArray[np.int64]) -> Array:
        parts, start = [], 0
        for array in self._arrays(side):
            own = chosen[(chosen >= start) & (chosen < start + len(array))] - start
            parts.append(array[own].astype(np.float32))
            start += len(array)
        return np.concatenate(parts)

    def _arrays(self, side: Modality) -> Sequence[Array]:
        return self.images if side is Modality.IMAGE else self.texts


def gather_unpaired(rows: PairedRows, others: Sequence[Path], train_split: str) -> Unpaired:
    """The training rows without a partner, and the rows of further feature sets.

    Of a further set all rows count, paired or not, but for those in splits of its own that are not
    trained on, such as val and test.

    Args:
        rows: training rows.
        others: further feature sets, of one side or both.
        train_split: the split(s) to train on.

    Raises:
        DataError: there is no such feature set, or one of its rows has no direction.
        ShapeError: one was made by encoders of other widths.
    """
    lone_texts = np.flatnonzero(rows.text_image < 0)
    images: list[Array] = [rows.images[np.flatnonzero(rows.caption_counts == 0)]]
    texts: list[Array] = [rows.texts[lone_texts]]
    for path in others:
        features = FeatureSet.open(path)
        there = features.splits()
        names = (split_names(train_split, there) | {None}) & set(there)
        for side, pool, width in (
            (Modality.IMAGE, images, rows.images.shape[1]),
            (Modality.TEXT, texts, rows.texts.shape[1]),
        ):
            pool.append(_side_rows(features, side, names, width))
        if not sum(map(len, (images[-1], texts[-1]))):
            raise DataError(f"{path}: has no rows in split {train_split}, nor any without a split")
    return Unpaired(images, texts)


def _side_rows(features: FeatureSet, side: Modality, names: set[str | None], width: int) -> Array:
    table = features.table(side)
    if table.made_by is None or not len(table):
        return np.empty((0, width), np.float32)
    if table.width != width:
        raise ShapeError(
            f"{features.path}: {side} embeddings are {table.width} wide, those to train on "
            f"{width}; extract both with the same encoder"
        )
    splits = np.array(table.column("split").to_pylist(), dtype=object)
    chosen = np.flatnonzero([split in names for split in splits])
    values: Array = table.embeddings()[chosen]
    ids = table.column("id").combine_chunks().take(chosen)
    check_directions(values, ids, f"{features.path}: {side.plural}")
    return values
