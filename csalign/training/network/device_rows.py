"""Embeddings to train on, where a step takes them: kept on the device, or sent to it ahead.

Rows in memory are used as they are on the CPU, and copied to a CUDA device once if they fit. Else a
thread reads those of the next batches while the device computes, and sends a block of them at once.
"""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from queue import Queue
from threading import Event, Semaphore, Thread
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from warnings import catch_warnings

import numpy as np
import torch
from torch import Tensor

from csalign.core import distributed
from csalign.core.arrays import Array, Indices
from csalign.core.devices import free_bytes
from csalign.core.enums import Modality
from csalign.features.streaming import MIB
from csalign.features.tokens import PaddedTokens

log = logging.getLogger(__name__)


SHARE = 0.5  # of a device's free memory, for embeddings that are kept there
BLOCK_BYTES = 32 * MIB  # of embeddings that are sent together
BLOCKS = 2  # at most: one that batches are taken of, one that is read
CHUNK_ROWS = 65_536  # copied at once
_ALIGNED = 64  # bytes, of which the rows in a block begin at a multiple


class Picked(NamedTuple):
    """Rows (k,) of one of the arrays of a side."""

    array: int
    rows: Array


@dataclass(frozen=True)
class PlannedBatch:
    """A batch as row numbers."""

    place: dict[str, int]  # of the batch after it, see `BatchLoader.state_dict`
    picked: dict[Modality, list[Picked]]  # rows of the set's array (0) and of the pool's (1 ...)
    counts: dict[Modality, list[int]]  # see `SideBatch`
    shares: dict[Modality, slice]  # of this process, among the rows of a side
    owner: Indices | None
    others: Indices
    token_pairs: tuple[Indices, Indices]
    tokens: dict[Modality, PaddedTokens]
    partner: Indices  # (b,) the pair that each is mixed with, (0,) without mixing
    coefficient: float  # of that


class Plan(Protocol):
    """Which rows a batch takes, and the place of the batch after it."""

    @property
    def place(self) -> Mapping[str, int]:
        """See `EpochLoader.state_dict`."""

    @property
    def picked(self) -> Mapping[Any, Sequence[Picked]]:
        """By side, rows of its arrays."""


Planned = TypeVar("Planned", bound=Plan)
Pieces = Mapping[Any, Sequence[Tensor]]
"""Rows (k, d) on the device in the stored dtype, for each `Picked`."""


def upload(values: Array, device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for it; a tensor on the CPU shares its memory."""
    # torch warns of read-only memory; nothing writes to these tensors.
    with nullcontext() if values.flags.writeable else catch_warnings(action="ignore"):
        own = torch.from_numpy(values)
    if device.type == "cuda":
        return own.pin_memory().to(device, non_blocking=True)
    return own.to(device)


def upload_numbers(numbers: Sequence[Array], device: torch.device) -> Sequence[Tensor]:
    """Copy vectors of integers to a device as int64, all in one copy and without waiting."""
    packed = np.concatenate(numbers, dtype=np.int64)
    return torch.split(upload(packed, device), [len(own) for own in numbers])


class DeviceRows:
    """Arrays of embeddings (n, d), in memory or mapped, rows of which become tensors on a device.

    Attributes:
        device: as given.
        kept: the arrays on the device, by their identity; empty where rows are read on the host.
    """

    def __init__(self, arrays: Mapping[Any, Sequence[Array]], device: torch.device) -> None:
        self._arrays, self.device = arrays, device
        self._distinct = {id(own): own for side in arrays.values() for own in side}
        self.kept: dict[int, Tensor] = {}
        mapped = any(isinstance(own, np.memmap) for own in self._distinct.values())
        if device.type == "cpu" and not mapped:
            self.kept = {key: upload(own, device) for key, own in self._distinct.items()}

    def keep(self) -> None:
        """Copy all arrays to a CUDA device, if they fit into half of its free memory."""
        if self.device.type != "cuda" or self.kept:
            return
        size = sum(own.nbytes for own in self._distinct.values())
        free = free_bytes(self.device)
        fits = size <= SHARE * free
        if distributed.is_main_process():
            where = "kept there" if fits else f"more than {SHARE:.0%}, so sent in blocks"
            figures = self.device, -(-size // MIB), free // MIB, where
            log.info("embeddings on %s: %d MiB of %d MiB free, %s", *figures)
        for key, own in self._distinct.items() if fits else ():
            copied = self.kept[key] = torch.empty(own.shape, dtype=_dtype(own), device=self.device)
            for start in range(0, len(own), CHUNK_ROWS):
                chunk = slice(start, start + CHUNK_ROWS)
                copied[chunk] = upload(np.ascontiguousarray(own[chunk]), self.device)

    def release(self) -> None:
        """Free what `keep` copied."""
        if self.device.type == "cuda":
            self.kept = {}

    def take(self, plan: Plan, rows: Sequence[Tensor]) -> Pieces:
        """Take rows of arrays that are kept: of all that is picked, in order, each (k,) int64."""
        left = iter(rows)
        return {
            side: [
                torch.index_select(self.kept[id(self._arrays[side][own.array])], 0, next(left))
                for own in picked
            ]
            for side, picked in plan.picked.items()
        }

    def read(self, plan: Plan) -> Pieces:
        """Read the rows of a batch on the host, and copy them to the device."""
        return {
            side: [upload(own, self.device) for own in found]
            for side, found in self._gather(plan).items()
        }

    def read_ahead(self, plans: Iterator[Planned]) -> Generator[tuple[Planned, Pieces]]:
        """Yield batches with their rows, which a thread reads and sends in blocks.

        What fails in the thread is raised here. Closing the iterator ends the thread.
        """
        stream: Any = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        blocks: Queue[_Block[Planned] | BaseException] = Queue()
        room, ended = Semaphore(BLOCKS), Event()

        def read() -> None:
            try:
                while room.acquire() and not ended.is_set():
                    blocks.put(self._read_block(plans, stream))
            except BaseException as error:
                blocks.put(error)

        thread = Thread(target=read, name="csalign-rows", daemon=True)
        thread.start()
        try:
            while True:
                block = blocks.get()
                if isinstance(block, BaseException):
                    raise block
                if stream is not None:
                    computing = torch.cuda.current_stream(self.device)
                    computing.wait_event(block.arrived)
                    block.memory.record_stream(computing)
                yield from block.batches
                del block
                room.release()
        finally:
            ended.set()
            room.release()
            thread.join()

    def _gather(self, plan: Plan) -> dict[Any, list[Array]]:
        return {
            side: [self._arrays[side][array][rows] for array, rows in picked]
            for side, picked in plan.picked.items()
        }

    def _read_block(self, plans: Iterator[Planned], stream: Any) -> "_Block[Planned]":
        """Read the rows of the next batches, and begin to send them."""
        read: list[tuple[Planned, dict[Any, list[Array]]]] = []
        size = 0
        while size < BLOCK_BYTES:
            plan = next(plans)
            read.append((plan, self._gather(plan)))
            size += sum(_padded(own) for found in read[-1][1].values() for own in found)
        flat = [own for _, sides in read for found in sides.values() for own in found]
        with torch.cuda.stream(stream):  # nothing without one
            packed = torch.empty(size, dtype=torch.uint8, pin_memory=stream is not None)
            for rows, own in zip(_divide(packed, flat), flat, strict=True):
                rows.numpy()[...] = own
            sent = packed.to(self.device, non_blocking=stream is not None)
            arrived = None if stream is None else stream.record_event()
        pieces = iter(_divide(sent, flat))
        batches: list[tuple[Planned, Pieces]] = [
            (plan, {side: [next(pieces) for _ in found] for side, found in sides.items()})
            for plan, sides in read
        ]
        return _Block(batches, sent, arrived)


class _Block(NamedTuple, Generic[Planned]):
    """Batches with their rows, which share one memory on the device."""

    batches: list[tuple[Planned, Pieces]]
    memory: Tensor
    arrived: Any  # event of CUDA, after which the memory is filled


def _padded(own: Array) -> int:
    return -(-own.nbytes // _ALIGNED) * _ALIGNED


def _divide(memory: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Return a part of some bytes for each array, as a tensor of its shape and dtype."""
    parts = torch.split(memory, [_padded(own) for own in arrays])
    return [
        part[: own.nbytes].view(_dtype(own)).view(own.shape)
        for part, own in zip(parts, arrays, strict=True)
    ]


def _dtype(own: Array) -> torch.dtype:
    return torch.from_numpy(np.empty(0, own.dtype)).dtype
