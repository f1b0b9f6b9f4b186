"""Batches of items, of each the sides that it has, and rows of items with one side."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csalign.core import distributed
from csalign.core.arrays import Ints
from csalign.core.enums import AnySide
from csalign.training.network.device_rows import Picked, Pieces
from csalign.training.network.loader import EpochLoader
from csalign.training.network.sampler import SideBatch
from csalign.training.sides.data import Drawn, Sampler, SidesData

Pair = tuple[AnySide, AnySide]


class PairRows(NamedTuple):
    """Positions of rows of two sides: those of items that have both, in order, and the others."""

    first: Tensor  # (p,) int64
    second: Tensor  # (p,)
    first_rest: Tensor  # (q,)
    second_rest: Tensor  # (r,)


class SidesBatch(NamedTuple):
    """One batch, as tensors on the device; of a side the rows of items, then unpaired ones."""

    sides: dict[AnySide, SideBatch]
    pairs: dict[Pair, PairRows]


@dataclass(frozen=True)
class PlannedSides:
    """A batch as row numbers."""

    place: dict[str, int]  # of the batch after it
    picked: dict[AnySide, list[Picked]]
    counts: dict[AnySide, list[int]]  # see `SideBatch`: of items, and unpaired
    pairs: dict[Pair, tuple[Ints, ...]]  # see `PairRows`


class SidesLoader(EpochLoader[Drawn, PlannedSides, SidesBatch]):
    """Loader of any sides.

    Args:
        data: all rows.
        sampler: of the items.
        batch_size: items per step, at most.
        seed: of the order and of what is drawn.
        device: of the tensors.
        unpaired_rows: rows of items with one side to draw per side and step.
        to: a side that each pair of sides is to have; None for all pairs.
    """

    def __init__(
        self,
        data: SidesData,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        device: torch.device,
        unpaired_rows: int,
        to: AnySide | None = None,
    ) -> None:
        self.seed, self._sampler, self._size = seed, sampler, batch_size
        self._unpaired = unpaired_rows
        self._pairs = [own for own in combinations(data.rows.sides, 2) if to is None or to in own]
        self.open({side: [own.embeddings] for side, own in data.rows.sides.items()}, device)

    def epoch(self, rng: np.random.Generator) -> Iterator[Drawn]:
        """See `EpochLoader.epoch`."""
        return self._sampler.epoch(self._size, rng)

    def plan(self, rows: Drawn, place: dict[str, int], rng: np.random.Generator) -> PlannedSides:
        """See `EpochLoader.plan`; a process picks its share of the rows of each side."""
        picked, counts, pairs = {}, {}, {}
        for side, (own, _) in rows.items():
            pool = self._sampler.pools[side]
            count = min(self._unpaired, len(pool))
            drawn = np.sort(rng.integers(0, max(1, len(pool)), count))
            every, counts[side] = np.concatenate([own, pool[drawn]]), [len(own), len(drawn)]
            share = distributed.share_of(len(every))
            part = share if share.stop > share.start else slice(0, 1)
            picked[side] = [Picked(0, every[part])]
        for one, other in self._pairs:
            first, second = rows[one][1], rows[other][1]
            both = np.intersect1d(first, second, assume_unique=True, return_indices=True)[1:]
            sizes = sum(counts[one]), sum(counts[other])
            rest = (np.delete(np.arange(n), own) for n, own in zip(sizes, both, strict=True))
            pairs[one, other] = (*both, *rest)
        return PlannedSides(place, picked, counts, pairs)

    def tensors(self, planned: PlannedSides, pieces: Pieces | None) -> SidesBatch:
        """See `EpochLoader.tensors`."""
        numbers = [own for pair in planned.pairs.values() for own in pair]
        rows, positions = self.rows_of(planned, pieces, numbers)
        sides = {side: SideBatch(own, planned.counts[side], None) for side, own in rows.items()}
        pairs = {
            pair: PairRows(*positions[4 * number : 4 * number + 4])
            for number, pair in enumerate(planned.pairs)
        }
        return SidesBatch(sides, pairs)
