"""Batches of epoch after epoch, which resume from any place."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from csalign.core.arrays import Array
from csalign.training.network.device_rows import DeviceRows, Pieces, Planned, upload_numbers

Rows = TypeVar("Rows")  # of a batch, as numbers
Batch = TypeVar("Batch")  # of tensors


class EpochLoader(Generic[Rows, Planned, Batch]):
    """Endless iterator over the batches of epoch after epoch.

    All random numbers follow from the seed, the epoch and the number of the batch in it, so that
    iterating resumes from any place exactly. A subclass has the three methods that raise
    NotImplementedError here, and calls `open` once.
    """

    seed: int

    def epoch(self, rng: np.random.Generator) -> Iterator[Rows]:
        """Iterate once over what is trained on."""
        raise NotImplementedError

    def plan(self, rows: Rows, place: dict[str, int], rng: np.random.Generator) -> Planned:
        """Plan a batch, after which comes the one at a place."""
        raise NotImplementedError

    def tensors(self, planned: Planned, pieces: Pieces | None) -> Batch:
        """Make the tensors of a batch, of rows that were read already or of those on the device."""
        raise NotImplementedError

    def open(self, arrays: Mapping[Any, Sequence[Array]], device: torch.device) -> None:
        """Begin at the first batch of embeddings (n, d) by side."""
        self._device_rows = DeviceRows(arrays, device)
        self.load_state_dict({"epoch": 0, "batch": 0})

    def __iter__(self) -> "EpochLoader[Rows, Planned, Batch]":
        return self

    def __next__(self) -> Batch:
        planned, pieces = next(self._planned)
        self._place = dict(planned.place)
        return self.tensors(planned, pieces)

    def state_dict(self) -> dict[str, int]:
        """Return the place of the next batch."""
        return dict(self._place)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from the place that `state_dict` returned."""
        self._place = dict(state)
        self._planned: Generator[tuple[Planned, Pieces | None]] = (
            (planned, None) for planned in self._plan_all(self._place)
        )

    def rows_of(
        self, planned: Planned, pieces: Pieces | None, numbers: Sequence[Array]
    ) -> tuple[dict[Any, Tensor], Sequence[Tensor]]:
        """Return the picked rows by side, (n, d) float32 on the device, and vectors as int64."""
        source = self._device_rows
        takes = pieces is None and bool(source.kept)
        chosen = [own.rows for side in planned.picked.values() for own in side] if takes else []
        vectors = upload_numbers([*numbers, *chosen], source.device)
        if pieces is None:
            rows = vectors[len(numbers) :]
            pieces = source.take(planned, rows) if takes else source.read(planned)
        found = {side: [own.float() for own in pieces[side]] for side in planned.picked}
        joined = {side: own[0] if len(own) == 1 else torch.cat(own) for side, own in found.items()}
        return joined, vectors[: len(numbers)]

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Keep the rows on the device in this block if they fit, else read them ahead."""
        self._device_rows.keep()
        if not self._device_rows.kept:
            self._planned = self._device_rows.read_ahead(self._plan_all(self._place))
        try:
            yield
        finally:
            self._planned.close()
            self._device_rows.release()
            self.load_state_dict(self._place)

    def _plan_all(self, place: Mapping[str, int]) -> Iterator[Planned]:
        """Yield batches from a place on."""
        epoch, batch = place["epoch"], place["batch"]
        while True:
            rng = np.random.default_rng([self.seed, 0, epoch])
            for rows in islice(self.epoch(rng), batch, None):
                batch += 1
                own = np.random.default_rng([self.seed, 1, epoch, batch])
                yield self.plan(rows, {"epoch": epoch, "batch": batch}, own)
            epoch, batch = epoch + 1, 0
