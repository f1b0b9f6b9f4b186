"""Read rows to train on into memory or, if they do not fit, into a temporary mapped file."""

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from csalign.core import distributed
from csalign.core.arrays import Array, Indices
from csalign.core.enums import Modality
from csalign.core.errors import OutputError
from csalign.core.progress import tick
from csalign.features import schema
from csalign.features.checks import check_directions
from csalign.features.join import Joined, PairedRows, Pairs, compact, first_alike, text_keys
from csalign.features.reader import FeatureSet, FeatureTable, batch_vectors, places_within

MIB = 1 << 20
SPARE_BYTES = 256 * MIB  # of the disk, for everything else that the run writes
RESIDENT_BYTES = 512 * MIB  # of a map, before its pages are released
FAULT_BYTES = 64 << 10  # that the kernel maps around a byte that is touched, or more


class MappedRows(np.memmap[Any, np.dtype[Any]]):
    """Rows (n, d) in a temporary file; taking rows, by a slice or by their numbers, copies them.

    Few pages are resident at a time; the kernel caches as many as there is memory for.
    """

    _used = 0

    def __getitem__(self, key: Any, /) -> Any:
        found = np.asarray(self)[key]
        if isinstance(key, slice):
            found = found.copy()  # a view would outlive the release
        self._release(found)
        return found

    def __setitem__(self, key: Any, values: Any, /) -> None:
        np.asarray(self)[key] = values
        self._release(np.asarray(values))

    def _release(self, values: Array) -> None:
        self._used += max(values.nbytes, len(np.atleast_2d(values)) * FAULT_BYTES)
        if self._used > RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._used = 0
            self._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


class MemoryBudget:
    """Memory for rows, and a local folder for the temporary files of those that do not fit.

    The processes of a job on one machine share one copy of the rows, in a mapped file even if they
    fit; one of them fills it, see `fills`.

    Attributes:
        left: bytes of the memory that are not used yet.
        is_shared: whether all processes of the job allocate together; false for one of them.
    """

    def __init__(self, memory: int, folder: Path, *, is_shared: bool = True) -> None:
        self.left = memory
        self.folder = folder
        self.is_shared = is_shared

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
        world = distributed.world()
        # Machines may differ in memory, but all must take part in the same collectives.
        if not self.is_shared or max(distributed.all_gather(world.local_size)) == 1:
            if fits:
                self.left -= size
                return np.empty(shape, dtype)
            with self._reserve(size) as opened:
                return MappedRows(opened, dtype, "r+", shape=shape)
        file = self._reserve(size) if self.fills else None
        leader = distributed.all_gather((file and file.name, fits))[world.rank - world.local_rank]
        path, fits = str(leader[0]), leader[1]
        try:
            with file or Path(path).open("r+b") as opened:
                rows = MappedRows(opened, dtype, "r+", shape=shape)
                distributed.barrier()  # closing removes the file, once all have mapped it
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be mapped ({error.strerror or error}); set TMPDIR to a folder "
                "that all processes of this machine can write to, or train in one process"
            ) from error
        if not fits:
            return rows
        self.left -= size
        return np.asarray(rows)  # pages that fit stay resident

    def _reserve(self, size: int) -> IO[bytes]:
        """Create a temporary file, which disappears when it is closed."""
        try:
            free = shutil.disk_usage(self.folder).free
            if size + SPARE_BYTES > free:
                raise OSError(errno.ENOSPC, f"{free // MIB} MiB free")
            file = tempfile.NamedTemporaryFile(dir=self.folder, prefix="csalign-")  # noqa: SIM115
            file.truncate(max(1, size))
            # Blocks now, since a full disk would kill the process at a write to the map.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, size))
        except OSError as error:
            raise OutputError(
                f"{self.folder}: no room for embeddings that do not fit into memory: "
                f"{error.strerror or error}, {-(-size // MIB)} MiB needed; free some space, set "
                "TMPDIR to a larger disk, or raise --memory"
            ) from error
        return file


class _Target(NamedTuple):
    """Rows (k,) of a table, ascending (None for all), and the arrays that they go into.

    `places` (k,) are their rows there; None keeps the order. `keys` (k,) are their caption keys.
    """

    name: str
    rows: Indices | None
    out: Array
    places: Indices | None = None
    keys: Indices | None = None


def _fill(table: FeatureTable, targets: Sequence[_Target]) -> None:
    """Read embeddings once, a row group at a time, into all their places."""
    columns = [schema.ID, schema.EMBEDDING]
    if any(target.keys is not None for target in targets):
        columns.append(schema.CAPTION)
    chosen = [target.rows for target in targets if target.rows is not None]
    wanted = np.unique(np.concatenate(chosen)) if len(chosen) == len(targets) else None
    for first, batch in table.read(*columns, rows=wanted):
        tick("reading: rows", first, len(table))
        vectors = batch_vectors(batch, schema.EMBEDDING)
        for name, rows, out, places, keys in targets:
            positions, local = places_within(rows, first, first + len(batch))
            if len(local):
                own = vectors[local]
                check_directions(own, batch.column(schema.ID).take(local), name)
                at = positions if places is None else places[positions]
                out[at] = own
                if keys is not None:
                    keys[at] = text_keys(batch.column(schema.CAPTION).take(local), own)


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
    Without `with_keys` all captions count as different.

    Raises:
        DataError: a row has no direction.
        SchemaError: a shard is damaged.
        OutputError: the rows fit neither into memory nor on the disk.
    """
    owners = np.where(joined.text_image < 0, joined.n_images, joined.text_image)
    is_ordered = (owners[1:] >= owners[:-1]).all()
    order = None if is_ordered else compact(np.argsort(owners, kind="stable"))
    del owners
    keys = np.empty(joined.n_texts, np.int64) if with_keys else None
    filled: dict[Modality, Array] = {}
    validated: dict[Modality, Array] = {}
    for side in Modality:
        table = features.table(side)
        rows, count = joined.side(side)
        out = filled[side] = budget.rows((count, table.width), schema.DTYPES[table.dtype])
        targets = [_Target(f"{joined.name}: {side.plural}", rows, out)]
        if side is Modality.TEXT:
            places = None if order is None else compact(np.argsort(order))
            targets = [targets[0]._replace(places=places, keys=keys)]
        if held_out is not None:
            own, size = held_out.side(side)
            validated[side] = np.empty((size, table.width), out.dtype)
            targets.append(_Target(f"{held_out.name}: {side.plural}", own, validated[side]))
        if budget.fills:
            if not (isinstance(out, MappedRows) or table.has_tokens):
                table.verify(again=False)  # cheap unless read a second time; pages have checksums
            _fill(table, targets)
    distributed.barrier()
    if keys is not None:
        distributed.broadcast_array(keys)
        keys = first_alike(keys)
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


def load_vectors(
    table: FeatureTable, rows: Indices | None, budget: MemoryBudget, name: str
) -> Array:
    """Read some rows of a table (ascending; None for all), in order; raises as `load_training`."""
    count = len(table) if rows is None else len(rows)
    out = budget.rows((count, table.width), schema.DTYPES[table.dtype])
    if budget.fills:
        _fill(table, [_Target(name, rows, out)])
    distributed.barrier()
    return out
