"""Read rows to train on into memory or, if they do not fit, into a temporary mapped file."""

import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from csalign.core import distributed
from csalign.core.enums import Modality
from csalign.core.errors import OutputError
from csalign.features import schema
from csalign.features.checks import check_directions
from csalign.features.join import Joined, PairedRows, Pairs, compact, text_keys
from csalign.features.reader import FeatureSet, FeatureTable, batch_vectors, places_within

Array = npt.NDArray[Any]
Ints = npt.NDArray[Any]

MIB = 1 << 20
SPARE_BYTES = 256 * MIB  # of the disk, for everything else that the run writes
_RESIDENT_BYTES = 128 * MIB  # of a map that may be resident before its pages are released
_FAULT_BYTES = 64 << 10  # that the kernel maps around a byte that is touched
_BLOCK_BYTES = MIB  # prefetched together
_ADVICE_BYTES = 128 << 10  # a kernel may ignore advice beyond this


class MappedRows(np.memmap[Any, np.dtype[Any]]):
    """Rows (n, d) in a temporary file; what is taken of them is copied.

    Pages are released as rows are used, so few are resident at a time; the kernel keeps as many of
    them cached as there is memory for.
    """

    _used = 0

    def __getitem__(self, key: Any, /) -> Any:
        """Copy rows, by a slice or by their numbers."""
        found = self.view(np.ndarray)[key]
        if isinstance(key, slice):
            found = found.copy()  # a view would keep pages resident
        self._release(found)
        return found

    def __setitem__(self, key: Any, values: Any, /) -> None:
        """Write rows, by a slice or by their numbers."""
        self.view(np.ndarray)[key] = values
        self._release(np.asarray(values))

    def _release(self, values: Array) -> None:
        self._used += max(values.nbytes, len(np.atleast_2d(values)) * _FAULT_BYTES)
        if self._used > _RESIDENT_BYTES:
            self._used = 0
            self._advise("MADV_DONTNEED")

    def prefetch(self, rows: Ints) -> None:
        """Let the kernel read the blocks that hold these rows, without waiting for it."""
        for block in np.unique(rows * self.strides[0] // _BLOCK_BYTES).tolist():
            end = min((block + 1) * _BLOCK_BYTES, self.nbytes)
            for start in range(block * _BLOCK_BYTES, end, _ADVICE_BYTES):
                self._advise("MADV_WILLNEED", start, min(_ADVICE_BYTES, end - start))

    def _advise(self, advice: str, *span: int) -> None:
        mapped: mmap.mmap = self._mmap  # type: ignore[attr-defined]
        if hasattr(mmap, advice):
            mapped.madvise(getattr(mmap, advice), *span)


class MemoryBudget:
    """Memory for rows, and the folder for those that do not fit.

    The processes of a job on one machine share one copy of the rows, in a mapped file even if they
    fit; one of them fills it, see `fills`.

    Args:
        memory: bytes.
        folder: for temporary files, on a local disk.
        spare: bytes of the disk to leave free.

    Attributes:
        left: bytes not used yet.
        folder: as given.
    """

    def __init__(self, memory: int, folder: Path, spare: int = SPARE_BYTES) -> None:
        self.left = memory
        self.folder = folder
        self._spare = spare

    @property
    def fills(self) -> bool:
        """True if this process has to fill the rows, while the others wait."""
        return distributed.world().local_rank == 0

    def rows(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
        """Allocate rows (n, d), to be filled.

        Raises:
            OutputError: they fit neither into memory nor on the disk.
        """
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        fits = size <= self.left
        if distributed.world().local_size > 1:
            rows, fits = self._share(shape, dtype, fits=fits)
            found = np.asarray(rows).view(np.ndarray) if fits else rows
        elif fits:
            found = np.empty(shape, dtype)
        else:
            with self._reserve(size) as file:
                found = _map(file, shape, dtype)
        self.left -= size if fits else 0
        return found

    def _share(
        self, shape: tuple[int, int], dtype: np.dtype[Any], *, fits: bool
    ) -> tuple[Array, bool]:
        """Map one file in all processes of this machine; the first one's `fits` counts."""
        world = distributed.world()
        file = None
        if self.fills:
            file = self._reserve(shape[0] * shape[1] * np.dtype(dtype).itemsize)
        leader = distributed.all_gather((file and file.name, fits))[world.rank - world.local_rank]
        try:
            with file or Path(str(leader[0])).open("r+b") as opened:
                rows = _map(opened, shape, dtype)
                distributed.barrier()  # until all have opened it, since closing it removes it
        except OSError as error:
            raise OutputError(
                f"{leader[0]}: cannot be mapped ({error.strerror or error}); set TMPDIR to a disk "
                "that all processes of this machine can write to, or train in one process"
            ) from error
        return rows, leader[1]

    def _reserve(self, size: int) -> IO[bytes]:
        """Create a temporary file, which disappears when it is closed."""
        try:
            free = shutil.disk_usage(self.folder).free
            if size + self._spare > free:
                raise OutputError(self._too_small(size, f"{free // MIB} MiB free"))
            file = tempfile.NamedTemporaryFile(dir=self.folder, prefix="csalign-")  # noqa: SIM115
            file.truncate(max(1, size))
            with suppress(AttributeError):  # where there is no such call
                # Now, since a full disk would kill the process at a write to the map.
                os.posix_fallocate(file.fileno(), 0, max(1, size))
        except OSError as error:
            raise OutputError(self._too_small(size, error.strerror or str(error))) from error
        return file

    def _too_small(self, size: int, reason: str) -> str:
        return (
            f"{self.folder}: no room for embeddings that do not fit into memory: {reason}, "
            f"{-(-size // MIB)} MiB needed; free some space, set TMPDIR to a larger disk, or "
            "raise --memory"
        )


def _map(file: IO[bytes], shape: tuple[int, int], dtype: np.dtype[Any]) -> MappedRows:
    return MappedRows(file, dtype, "r+", shape=shape)


class Prefetcher:
    """Reads the windows of an epoch ahead, the next one while one is used.

    Args:
        window: rows per window.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._wanted: Sequence[tuple[MappedRows, Ints]] = ()
        self._next = 0

    def begin(self, wanted: Sequence[tuple[MappedRows, Ints]]) -> None:
        """Begin an epoch.

        Args:
            wanted: the rows (k,) to be taken of each array, in this order.
        """
        self._wanted, self._next = wanted, 0

    def reach(self, position: int) -> None:
        """Request the windows up to the one after a position."""
        while self._next <= position // self.window + 1:
            part = slice(self._next * self.window, (self._next + 1) * self.window)
            for values, rows in self._wanted:
                values.prefetch(rows[part])
            self._next += 1


@dataclass(frozen=True)
class _Target:
    """Rows of a table (ascending; None for all), and where they go.

    Attributes:
        name: for messages.
        rows: (k,).
        out: (k, d), to be filled.
        places: (k,) where each goes in `out`; None keeps the order.
        keys: (k,) caption keys, to be filled likewise; None if not needed.
    """

    name: str
    rows: Ints | None
    out: Array
    places: Ints | None = None
    keys: Ints | None = None


def _fill(table: FeatureTable, targets: Sequence[_Target]) -> None:
    """Read embeddings once, a row group at a time, into all their places."""
    columns = [schema.ID, schema.EMBEDDING]
    if any(target.keys is not None for target in targets):
        columns.append(schema.CAPTION)
    chosen = [target.rows for target in targets if target.rows is not None]
    wanted = np.unique(np.concatenate(chosen)) if len(chosen) == len(targets) else None
    for first, batch in table.read(*columns, rows=wanted):
        vectors = batch_vectors(batch, schema.EMBEDDING)
        for target in targets:
            positions, local = places_within(target.rows, first, first + len(batch))
            if not len(local):
                continue
            own = vectors[local]
            check_directions(own, batch.column(schema.ID).take(local), target.name)
            at = positions if target.places is None else target.places[positions]
            target.out[at] = own
            if target.keys is not None:
                target.keys[at] = text_keys(batch.column(schema.CAPTION).take(local), own)


def load_training(
    features: FeatureSet,
    joined: Joined,
    held_out: Joined | None,
    budget: MemoryBudget,
    *,
    with_keys: bool,
) -> tuple[Pairs, PairedRows | None]:
    """Read the embeddings of training rows, and of the rows held out from them.

    The texts come in the order of their images, unpaired ones last, so that rows that are used
    together are stored together. One process per machine reads; all get the training rows.

    Args:
        features: the feature set.
        joined: the training rows.
        held_out: the few rows to validate on; None in a process that does not validate.
        budget: for the training rows.
        with_keys: compute the caption keys; otherwise all captions count as different.

    Raises:
        DataError: a row has no direction.
        SchemaError: a shard is damaged.
        OutputError: the rows fit neither into memory nor on the disk.
    """
    order = _by_image(joined)
    keys = np.empty(joined.n_texts, np.int64) if with_keys else None
    filled: dict[Modality, Array] = {}
    validated: dict[Modality, Array] = {}
    for side in Modality:
        table = features.table(side)
        rows, count = joined.side(side)
        out = filled[side] = budget.rows((count, table.width), schema.DTYPES[table.dtype])
        target = _Target(f"{joined.name}: {side.plural}", rows, out)
        if side is Modality.TEXT:
            places = None if order is None else compact(np.argsort(order))
            target = _Target(target.name, rows, out, places, keys)
        targets = [target]
        if held_out is not None:
            own, size = held_out.side(side)
            validated[side] = np.empty((size, table.width), out.dtype)
            targets.append(_Target(f"{held_out.name}: {side.plural}", own, validated[side]))
        if budget.fills:
            if not (isinstance(out, MappedRows) or table.has_tokens):
                table.verify()  # cheap unless it is a second reading; pages have checksums too
            _fill(table, targets)
    distributed.barrier()
    if keys is not None:
        distributed.broadcast_array(keys)
        keys = np.unique(keys, return_inverse=True)[1]
    text_image, text_rows = joined.text_image, joined.text_rows
    if order is not None:
        text_image = text_image[order]
        text_rows = order if text_rows is None else text_rows[order]
    training = Pairs(
        name=joined.name,
        images=filled[Modality.IMAGE],
        texts=filled[Modality.TEXT],
        text_image=text_image,
        image_rows=joined.image_rows,
        text_rows=text_rows,
        keys=None if keys is None else compact(keys),
    )
    if held_out is None:
        return training, None
    return training, held_out.with_embeddings(features, *validated.values())


def load_vectors(table: FeatureTable, rows: Ints | None, budget: MemoryBudget, name: str) -> Array:
    """Read the embeddings of some rows of a table (ascending; None for all), in order.

    Raises:
        DataError: a row has no direction.
        SchemaError: a shard is damaged.
        OutputError: the rows fit neither into memory nor on the disk.
    """
    count = len(table) if rows is None else len(rows)
    out = budget.rows((count, table.width), schema.DTYPES[table.dtype])
    if budget.fills:
        _fill(table, [_Target(name, rows, out)])
    distributed.barrier()
    return out


def _by_image(joined: Joined) -> Ints | None:
    """Order the texts by image, unpaired ones last; None if they are in that order."""
    owners = np.where(joined.text_image < 0, joined.n_images, joined.text_image)
    if (owners[1:] >= owners[:-1]).all():
        return None
    return compact(np.argsort(owners, kind="stable"))
