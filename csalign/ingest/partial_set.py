"""A feature set that is built part by part, by several processes, and survives their deaths.

It lives in ``OUT.partial``: a part is a file a side, with a receipt that is written when both are
there. A part's content follows from its records alone, so it does not matter which process writes
it, nor when; but for the rounding of a product that another process or machine computes another
way. Once every process has said that it is done, the receipts become the manifest::

    .csalign-job.json    what the set is to become; another job is refused
    images/ texts/       finished parts, under their final names
    receipts/            a JSON file a part
    finished/            a JSON file a process that is done, naming its parts
"""

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import DataError, OutputError
from csalign.core.paths import is_remote
from csalign.core.records import write_record
from csalign.core.version import __version__
from csalign.features import schema
from csalign.features.schema import (
    FAILURES,
    MANIFEST,
    Counts,
    Manifest,
    Shard,
    Shards,
    write_manifest,
)
from csalign.features.writer import Rows, ShardWriter
from csalign.ingest.job import Failure, Finished, Job, Receipt, Turn, read_finished

RECEIPTS = "receipts"
FINISHED = "finished"
_CLAIM = "receipts.claim"
PATIENCE = 60.0  # seconds to wait for a process that only sets up or completes the folder


@dataclass
class PartWriter:
    """Writes the two files of a part."""

    sides: dict[Modality, ShardWriter]
    failures: list[Failure] = field(default_factory=list)
    pairs: int = 0

    def write(self, modality: Modality, rows: Rows) -> None:
        """Append rows to one side; see `ShardWriter.write`."""
        self.sides[modality].write(rows)
        if modality is Modality.TEXT:
            self.pairs += sum(owner is not None for owner in rows.columns[schema.IMAGE_ID])


class Workspace:
    """The folder of one job, as one process sees it; made by `sharing.open_workspace`."""

    def __init__(self, folder: Path, out: Path, job: Job, turn: Turn) -> None:
        self.folder = folder
        self._out = out
        self._job = job
        self._turn = turn
        self._token = uuid.uuid4().hex.encode()

    @property
    def is_gone(self) -> bool:
        """Whether another process has completed it."""
        return not (self.folder / atomic.JOB).exists()

    @property
    def is_begun(self) -> bool:
        """Whether some part is finished."""
        return (self.folder / RECEIPTS).exists()

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there and it lacks nothing but its name."""
        return (self.folder / MANIFEST).is_file()

    def receipt(self, name: str) -> Receipt | None:
        """The receipt of a finished part, None if it is not finished.

        Raises:
            DataError: the part was made with other options, and copied here.
        """
        path = self.folder / RECEIPTS / f"{name}.json"
        receipt = read_finished(path, Receipt) if path.is_file() else None
        if receipt is None:
            return None
        if receipt.job != self._job.fingerprint():
            raise DataError(
                f"{path}: the part was made with other options or of another source than "
                f"{self.folder / atomic.JOB} says; copy parts of one job only"
            )
        for side in Modality:
            shard = receipt.side(side)
            file = shard and self.folder.joinpath(*shard.path.split("/"))
            if shard and file and not (file.is_file() and file.stat().st_size == shard.bytes):
                return None  # removed or cut short by other hands: made again
        return receipt

    @contextmanager
    def part(self, name: str) -> Iterator[PartWriter]:
        """Writes one part; nothing of it stays if the block raises. `seal` completes it."""
        sides = {}
        for side in Modality:
            info = self._job.encoders.side(side)
            if info is not None:
                sides[side] = ShardWriter(self.folder, name, side, info, self._job.dtype)
        try:
            yield PartWriter(sides)
        except BaseException as error:
            with ExitStack() as aborts:  # each of them, whatever becomes of the others
                for writer in sides.values():
                    aborts.callback(writer.abort, error)
            raise

    def seal(self, part: PartWriter, receipt: Receipt) -> Receipt:
        """Let a part's files appear under their names, and its receipt after them."""
        shards = {side.plural: writer.close() for side, writer in part.sides.items()}
        for side, shard in shards.items():
            if shard is None:  # one that had rows once, made anew
                (self.folder / side / f"{receipt.name}.parquet").unlink(missing_ok=True)
        known = {"job": self._job.fingerprint(), "pairs": part.pairs, "failures": part.failures}
        receipt = receipt.model_copy(update={**shards, **known})
        write_record(self.folder / RECEIPTS / f"{receipt.name}.json", receipt)
        return receipt

    def finish(self, parts: list[str]) -> None:
        """Say that this process has done its parts, all of which have receipts."""
        turn = self._turn
        mark = Finished(index=turn.index, count=turn.count, source=self._job.source, parts=parts)
        write_record(self._mark, mark)

    def begin(self) -> None:
        """Take back that this process has done its parts, since it may do some of them anew."""
        self._mark.unlink(missing_ok=True)

    @property
    def _mark(self) -> Path:
        return self.folder / FINISHED / f"{self._turn.index}-of-{self._turn.count}.json"

    def claim(self) -> bool:
        """Whether this process may complete a folder in an object store: the first one may."""
        path = self.folder / _CLAIM
        try:
            # The one write that object stores refuse if the name is taken.
            path.fs.pipe_file(path.path, self._token, mode="create")  # type: ignore[attr-defined]
        except FileExistsError:
            return False
        return True

    def wait_until_complete(self) -> None:
        """Wait for the process that completes the folder.

        Raises:
            OutputError: it does not come to an end.
        """
        deadline = time.monotonic() + PATIENCE
        while not (self.is_gone and (self._out / MANIFEST).exists()):
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{self.folder}: another process was to complete it; if none does, complete it "
                    f"with csalign inspect --merge {self._out}"
                )
            time.sleep(0.2)
            _refresh(self.folder)

    def counts(self) -> set[int]:
        """Numbers of processes by which the work was shared out so far, this one left out."""
        folder = self.folder / FINISHED
        marks = [path.stem for path in folder.glob("*.json")] if folder.exists() else []
        if not is_remote(self.folder):
            own = f"{atomic.LOCK}-{self._turn.index}-of-{self._turn.count}"
            locks = [path.name for path in self.folder.glob(f"{atomic.LOCK}-*")]
            marks += [name for name in locks if name != own]
        return {int(name.rpartition("-")[2]) for name in marks}

    def missing(self) -> list[Turn]:
        """The processes that are not done; empty once all of some number of them are."""
        return _missing(self._finished())

    def _finished(self) -> list[Finished]:
        """What the processes say that are done with the source as it is now."""
        _refresh(self.folder)
        folder = self.folder / FINISHED
        marks = sorted(folder.glob("*.json")) if folder.exists() else []
        found = [read_finished(path, Finished) for path in marks]
        return [mark for mark in found if mark is not None and mark.source == self._job.source]

    def list_failures(self, failures: list[Failure]) -> Path:
        """Write a list of what was left out, for a job that failed because of it."""
        path = self.folder / FAILURES
        atomic.write_text(path, _lines(failures))
        return path

    def receipts(self) -> list[Receipt]:
        """The receipts of all parts, in the source's order, once nothing is missing.

        Raises:
            DataError: a part is not there, though a process said that it made it.
        """
        found = {name: self.receipt(name) for name in self._parts()}
        lost = [name for name, receipt in found.items() if receipt is None]
        if lost:
            raise DataError(
                f"{self.folder}: {lost[0]} is not whole ({len(lost)} such parts in all); copy it "
                "again, or run csalign extract again to have it made"
            )
        return [receipt for receipt in found.values() if receipt is not None]

    def _parts(self) -> list[str]:
        """All parts in the source's order, once nothing is missing."""
        finished = self._finished()
        for count in {mark.count for mark in finished}:
            marks = [mark for mark in finished if mark.count == count]
            if not _missing(marks):
                names = [name for mark in marks for name in mark.parts]
                return sorted(names, key=lambda name: [int(part) for part in name.split("-")[1:]])
        raise OutputError(f"{self.folder}: is gone or not whole; another process works on it")

    def complete_and_publish(self) -> None:
        """Turn the parts into a whole feature set and give it its name; see `sharing.alone`.

        Raises:
            DataError: an id appears twice.
        """
        if not self.is_whole:
            self._complete()
        self._publish()

    def _complete(self) -> None:
        receipts = self.receipts()
        shards = {
            side: [shard for receipt in receipts if (shard := receipt.side(side)) is not None]
            for side in Modality
        }
        for side in Modality:
            _check_ids(self.folder, side, shards[side])
            _remove_others(self.folder / side.plural, shards[side])
        failures = [failure for receipt in receipts for failure in receipt.failures]
        atomic.write_text(self.folder / FAILURES, _lines(failures))
        manifest = Manifest(
            csalign_version=__version__,
            dtype=self._job.dtype,
            encoders=self._job.encoders,
            counts=Counts(
                images=sum(shard.rows for shard in shards[Modality.IMAGE]),
                texts=sum(shard.rows for shard in shards[Modality.TEXT]),
                pairs=sum(receipt.pairs for receipt in receipts),
                failures=len(failures),
            ),
            shards=Shards(images=shards[Modality.IMAGE], texts=shards[Modality.TEXT]),
        )
        write_manifest(self.folder, manifest)

    def _publish(self) -> None:
        # A later process may have to repeat this, so the job goes last.
        for name in (RECEIPTS, FINISHED):
            atomic.remove_folder(self.folder / name)
        (self.folder / _CLAIM).unlink(missing_ok=True)
        for lock in self.folder.glob(f"{atomic.LOCK}*"):
            lock.unlink()
        atomic.commit(self.folder, self._out)
        (self._out / atomic.JOB).unlink(missing_ok=True)


def _refresh(folder: Path) -> None:
    if is_remote(folder):
        folder.fs.invalidate_cache()  # type: ignore[attr-defined]  # others write there too


def _missing(finished: list[Finished]) -> list[Turn]:
    counts = {mark.count for mark in finished}
    left = []
    for count in sorted(counts):
        there = {mark.index for mark in finished if mark.count == count}
        absent = [Turn(index, count) for index in range(count) if index not in there]
        if not absent:
            return []
        left = absent
    return left or [Turn(0, 1)]


def _remove_others(folder: Path, shards: list[Shard]) -> None:
    """Remove the files of killed processes, which other readers would take for parts."""
    kept = {shard.path.rpartition("/")[2] for shard in shards}
    for path in list(folder.iterdir()) if folder.exists() else []:
        if path.name not in kept:
            path.unlink()
    if not shards and not is_remote(folder) and folder.exists():
        folder.rmdir()  # a side that is not there has no folder


def _check_ids(folder: Path, side: Modality, shards: list[Shard]) -> None:
    chunks: list[pa.Array] = []
    for shard in shards:
        with folder.joinpath(*shard.path.split("/")).open("rb") as file:
            chunks += pq.read_table(file, columns=[schema.ID]).column(0).chunks
    ids = pa.chunked_array(chunks, pa.string())
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counted = ids.value_counts()
    worst = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
    raise DataError(
        f"{folder}: {side} id {worst[0].as_py()!r} appears twice ({len(worst)} such ids in all); "
        "ids must be unique across the files of the source"
    )


def _lines(failures: list[Failure]) -> str:
    return "".join(
        json.dumps(failure.model_dump(), ensure_ascii=False) + "\n" for failure in failures
    )
