"""A feature set that is built part by part, by several processes, and survives their deaths.

It is in ``OUT.partial``: a part is one file per side, with a record that is written when both are
complete. The content of a part follows from its records alone, so it does not matter which process
writes it, nor when. Once every process has finished, the part records become the manifest::

    .csalign-job.json    what the set is to become; another job is refused
    images/ texts/       finished parts, under their final names
    parts/               one JSON record per part
    finished/            one JSON file per finished process, naming its parts
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
from csalign.core.locks import LOCK
from csalign.core.paths import is_remote
from csalign.core.records import write_record
from csalign.core.version import __version__
from csalign.features import schema
from csalign.features.manifest import (
    FAILURES,
    MANIFEST,
    Counts,
    Manifest,
    Shard,
    Shards,
    write_manifest,
)
from csalign.features.shard import Rows, ShardWriter
from csalign.ingest.job import Failure, Finished, Job, PartRecord, WorkShard, read_or_rebuild

PARTS = "parts"
FINISHED = "finished"
TIMEOUT_S = 60.0  # to wait for a process that only sets up or completes the folder
_CLAIM = "parts.claim"


@dataclass
class PartWriter:
    """Writer of the two files of a part."""

    sides: dict[Modality, ShardWriter]
    failures: list[Failure] = field(default_factory=list)
    pairs: int = 0

    def write(self, modality: Modality, rows: Rows) -> None:
        """Append rows to one side; see `ShardWriter.write`."""
        self.sides[modality].write(rows)
        if modality is Modality.TEXT:
            self.pairs += sum(owner is not None for owner in rows.columns[schema.IMAGE_ID])


class PartialSet:
    """The folder of one job, as one process sees it; opened by `locks.open_partial_set`."""

    def __init__(self, folder: Path, out: Path, job: Job, shard: WorkShard) -> None:
        self.folder = folder
        self._out = out
        self._job = job
        self._shard = shard
        self._token = uuid.uuid4().hex.encode()

    @property
    def is_gone(self) -> bool:
        """Whether another process has committed the set."""
        return not (self.folder / atomic.JOB).exists()

    @property
    def has_parts(self) -> bool:
        """Whether some part is finished."""
        return (self.folder / PARTS).exists()

    @property
    def is_complete(self) -> bool:
        """Whether the set is complete except for its final name."""
        return (self.folder / MANIFEST).is_file()

    def part_record(self, name: str) -> PartRecord | None:
        """Return the record of a finished part, None if it is not finished.

        Raises:
            DataError: the part is of another job, and was copied here.
        """
        path = self.folder / PARTS / f"{name}.json"
        record = read_or_rebuild(path, PartRecord) if path.is_file() else None
        if record is None:
            return None
        if record.job != self._job.fingerprint():
            raise DataError(
                f"{path}: the part has other options or another source than "
                f"{self.folder / atomic.JOB}; copy parts of one job only"
            )
        for side in Modality:
            shard = record.side(side)
            file = shard and self.folder.joinpath(*shard.path.split("/"))
            if shard and file and not (file.is_file() and file.stat().st_size == shard.bytes):
                return None  # removed or truncated by somebody else
        return record

    @contextmanager
    def part(self, name: str) -> Iterator[PartWriter]:
        """Write a part, to be completed by `finish_part`; nothing stays if the block raises."""
        sides = {}
        for side in Modality:
            info = self._job.encoders.side(side)
            if info is not None:
                sides[side] = ShardWriter(self.folder, name, side, info, self._job.dtype)
        try:
            yield PartWriter(sides)
        except BaseException as error:
            with ExitStack() as aborts:  # each of them, independently of the others
                for writer in sides.values():
                    aborts.callback(writer.abort, error)
            raise

    def finish_part(self, part: PartWriter, record: PartRecord) -> PartRecord:
        """Commit a part's files, and then its record."""
        shards = {side.plural: writer.close() for side, writer in part.sides.items()}
        for side, shard in shards.items():
            if shard is None:  # an earlier attempt may have had rows
                (self.folder / side / f"{record.name}.parquet").unlink(missing_ok=True)
        known = {"job": self._job.fingerprint(), "pairs": part.pairs, "failures": part.failures}
        record = record.model_copy(update={**shards, **known})
        write_record(self.folder / PARTS / f"{record.name}.json", record)
        return record

    def mark_begun(self) -> None:
        """Withdraw the mark that this process finished, since it may redo some parts."""
        self._mark.unlink(missing_ok=True)

    def mark_finished(self, parts: list[str]) -> None:
        """Record that this process finished its parts, all of which have records."""
        own = {"index": self._shard.index, "count": self._shard.count}
        write_record(self._mark, Finished(**own, source=self._job.source, parts=parts))

    @property
    def _mark(self) -> Path:
        return self.folder / FINISHED / f"{self._shard.index}-of-{self._shard.count}.json"

    def claim(self) -> bool:
        """Return whether this process is the first to claim an object store's folder."""
        path = self.folder / _CLAIM
        try:
            # The one write that object stores refuse if the name is taken.
            path.fs.pipe_file(path.path, self._token, mode="create")  # type: ignore[attr-defined]
        except FileExistsError:
            return False
        return True

    def wait_until_committed(self) -> None:
        """Wait for the process that completes the folder.

        Raises:
            OutputError: it does not finish in time.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while not (self.is_gone and (self._out / MANIFEST).exists()):
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{self.folder}: waited {TIMEOUT_S:.0f} s for another process to complete it; "
                    f"if none does, run csalign inspect --merge {self._out}"
                )
            time.sleep(0.2)
            _refresh(self.folder)

    def shard_counts(self) -> set[int]:
        """Return the numbers of shards that other processes of the job were started with."""
        folder = self.folder / FINISHED
        marks = [path.stem for path in folder.glob("*.json")] if folder.exists() else []
        if not is_remote(self.folder):
            own = f"{LOCK}-{self._shard.index}-of-{self._shard.count}"
            names = [path.name for path in self.folder.glob(f"{LOCK}-*")]
            marks += [name for name in names if name != own]
        return {int(name.rpartition("-")[2]) for name in marks}

    def missing(self) -> list[WorkShard]:
        """Return the unfinished shards; empty once all shards of some count have finished."""
        return _missing(self._finished())

    def _finished(self) -> list[Finished]:
        """Return the marks of processes that finished with the source as it is now."""
        _refresh(self.folder)
        folder = self.folder / FINISHED
        marks = sorted(folder.glob("*.json")) if folder.exists() else []
        found = [read_or_rebuild(path, Finished) for path in marks]
        return [mark for mark in found if mark is not None and mark.source == self._job.source]

    def list_failures(self, failures: list[Failure]) -> Path:
        """Write the list of skipped inputs of a job that failed because of them."""
        path = self.folder / FAILURES
        atomic.write_text(path, _json_lines(failures))
        return path

    def part_records(self) -> list[PartRecord]:
        """Return the records of all parts in the source's order, once nothing is missing.

        Raises:
            DataError: a part is missing although its process finished.
        """
        found = {name: self.part_record(name) for name in self._part_names()}
        missing = [name for name, record in found.items() if record is None]
        if missing:
            raise DataError(
                f"{self.folder}: {missing[0]} is incomplete ({len(missing)} such parts); copy it "
                "again, or run csalign extract again to rebuild it"
            )
        return [record for record in found.values() if record is not None]

    def _part_names(self) -> list[str]:
        finished = self._finished()
        for count in {mark.count for mark in finished}:
            marks = [mark for mark in finished if mark.count == count]
            if not _missing(marks):
                names = [name for mark in marks for name in mark.parts]
                return sorted(names, key=lambda name: [int(part) for part in name.split("-")[1:]])
        raise OutputError(f"{self.folder}: is incomplete, or another process committed it")

    def complete_and_commit(self) -> None:
        """Turn the parts into a feature set under its final name; see `locks.sole_owner`.

        Raises:
            DataError: an id appears twice.
        """
        if not self.is_complete:
            self._complete()
        # A later process may have to repeat this, so the job goes last.
        for name in (PARTS, FINISHED):
            atomic.remove_folder(self.folder / name)
        (self.folder / _CLAIM).unlink(missing_ok=True)
        for lock in self.folder.glob(f"{LOCK}-*"):
            lock.unlink()
        atomic.commit(self.folder, self._out)
        (self._out / atomic.JOB).unlink(missing_ok=True)

    def _complete(self) -> None:
        records = self.part_records()
        shards = {
            side: [shard for record in records if (shard := record.side(side)) is not None]
            for side in Modality
        }
        for side in Modality:
            _check_ids(self.folder, side, shards[side])
            _remove_stale_files(self.folder / side.plural, shards[side])
        failures = [failure for record in records for failure in record.failures]
        atomic.write_text(self.folder / FAILURES, _json_lines(failures))
        manifest = Manifest(
            csalign_version=__version__,
            dtype=self._job.dtype,
            encoders=self._job.encoders,
            counts=Counts(
                images=sum(shard.rows for shard in shards[Modality.IMAGE]),
                texts=sum(shard.rows for shard in shards[Modality.TEXT]),
                pairs=sum(record.pairs for record in records),
                failures=len(failures),
            ),
            shards=Shards(images=shards[Modality.IMAGE], texts=shards[Modality.TEXT]),
        )
        write_manifest(self.folder, manifest)


def _refresh(folder: Path) -> None:
    if is_remote(folder):
        folder.fs.invalidate_cache()  # type: ignore[attr-defined]  # others write there too


def _missing(finished: list[Finished]) -> list[WorkShard]:
    missing: list[WorkShard] = []
    for count in sorted({mark.count for mark in finished}):
        there = {mark.index for mark in finished if mark.count == count}
        missing = [WorkShard(index, count) for index in range(count) if index not in there]
        if not missing:
            return []
    return missing or [WorkShard(0, 1)]


def _remove_stale_files(folder: Path, shards: list[Shard]) -> None:
    """Remove files of killed processes, which other readers would take for parts."""
    kept = {shard.path.rpartition("/")[2] for shard in shards}
    for path in list(folder.iterdir()) if folder.exists() else []:
        if path.name not in kept:
            path.unlink()
    if not shards and not is_remote(folder) and folder.exists():
        folder.rmdir()  # a missing side has no folder


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


def _json_lines(failures: list[Failure]) -> str:
    return "".join(
        json.dumps(failure.model_dump(), ensure_ascii=False) + "\n" for failure in failures
    )
