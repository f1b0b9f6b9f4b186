"""A feature set that is built part by part, by several processes, and survives their deaths.

A part is one file per side, with a record that is written when both are complete. Its content
follows from its records alone, so it does not matter which process writes it, nor when. Once every
process has finished, the part records become the manifest. README.md lists the files.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csalign.core import __version__, atomic, outputs
from csalign.core.enums import Modality
from csalign.core.errors import DataError, OutputError
from csalign.core.locks import LOCK
from csalign.core.paths import is_remote
from csalign.core.records import write_record
from csalign.features import schema
from csalign.features.join import repeated_ids
from csalign.features.splits import divide
from csalign.features.writer import Rows, ShardWriter
from csalign.ingest.job import Failure, Finished, Job, PartRecord, WorkShard, read_or_rebuild
from csalign.ingest.repeats import join_repeats, read_columns

log = logging.getLogger(__name__)

PARTS = "parts"
FINISHED = "finished"
TIMEOUT_S = 60.0  # to wait for a process that only sets up or completes the folder
SPLIT_TIMEOUT_S = 1_800.0  # or that also compares all images
_CLAIM = "parts.claim"


@dataclass
class PartWriter:
    """Writer of the two files of a part, with the counts of its `PartRecord`."""

    sides: dict[Modality, ShardWriter]
    counts: Counter[str] = field(default_factory=Counter)
    source_root: str | None = None
    failures: list[Failure] = field(default_factory=list)
    digests: bytes = b""
    is_named: bool = False

    def write(self, modality: Modality, rows: Rows) -> None:
        """Append rows to one side; see `ShardWriter.write`."""
        self.sides[modality].write(rows)
        if modality is Modality.IMAGE and self.source_root is None:
            self.source_root = schema.source_root(rows.column(schema.SOURCE))
        if modality is Modality.TEXT:
            self.counts["pairs"] += sum(
                owner is not None for owner in rows.columns[schema.IMAGE_ID]
            )


class PartialSet:
    """The folder of one job, as one process sees it; opened by `locks.open_partial_set`."""

    def __init__(self, folder: Path, out: Path, job: Job, shard: WorkShard) -> None:
        self.folder = folder
        self._out = out
        self._job = job
        self._shard = shard
        self._mark = folder / FINISHED / f"{shard.index}-of-{shard.count}.json"

    @property
    def is_gone(self) -> bool:
        """True if another process has committed the set."""
        return not (self.folder / outputs.JOB).exists()

    @property
    def has_parts(self) -> bool:
        """True if any part is finished."""
        return (self.folder / PARTS).exists()

    @property
    def is_complete(self) -> bool:
        """True if only the final name is missing."""
        return (self.folder / schema.MANIFEST).is_file()

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
                f"{self.folder / outputs.JOB}; copy parts of one job only"
            )
        for shard in (record.images, record.texts):
            if shard is not None:
                file = self.folder / shard.path
                if not file.is_file() or file.stat().st_size != shard.bytes:
                    return None  # removed or truncated by somebody else
        return record

    @contextmanager
    def part(self, name: str) -> Iterator[PartWriter]:
        """Write a part, to be completed by `finish_part`; nothing stays if the block raises."""
        encoders, dtype = self._job.encoders, self._job.dtype
        sides = {
            side: ShardWriter(self.folder, name, side, info, dtype)
            for side in Modality
            if (info := encoders.side(side)) is not None
        }
        try:
            yield PartWriter(sides)
        except BaseException as error:
            with ExitStack() as aborts:  # each of them, independently of the others
                for writer in sides.values():
                    aborts.callback(writer.abort, error)
            raise

    def finish_part(self, part: PartWriter, record: PartRecord) -> PartRecord:
        """Commit a part's files, and then its record with the counts of `part`."""
        shards = {side.plural: writer.close() for side, writer in part.sides.items()}
        for side, shard in shards.items():
            if shard is None:  # an earlier attempt may have had rows
                (self.folder / side / f"{record.name}.parquet").unlink(missing_ok=True)
        found = {k: value for k, value in vars(part).items() if k not in ("sides", "counts")}
        job = self._job.fingerprint()
        record = record.model_copy(update={"job": job, **found, **part.counts, **shards})
        write_record(self.folder / PARTS / f"{record.name}.json", record)
        return record

    def mark_begun(self) -> None:
        """Withdraw the mark that this process finished, since it may redo some parts."""
        self._mark.unlink(missing_ok=True)

    def mark_finished(self, parts: list[str]) -> None:
        """Record that this process finished its parts, all of which have records."""
        shard, source = self._shard, self._job.source
        mark = Finished(index=shard.index, count=shard.count, source=source, parts=parts)
        write_record(self._mark, mark)

    def shard_counts(self) -> set[int]:
        """Return the numbers of shards that other processes of the job were started with."""
        marks = [path.stem for path in self._mark_files()]
        if not is_remote(self.folder):
            own = f"{LOCK}-{self._mark.stem}"
            names = [path.name for path in self.folder.glob(f"{LOCK}-*")]
            marks += [name for name in names if name != own]
        return {int(name.rpartition("-")[2]) for name in marks}

    def missing(self) -> list[WorkShard]:
        """Return the unfinished shards; empty once all shards of some count have finished."""
        missing = [WorkShard(0, 1)]
        for count, marks in sorted(self._finished().items()):
            missing = [WorkShard(index, count) for index in range(count) if index not in marks]
            if not missing:
                break
        return missing

    def describe(self) -> dict[str, Any]:
        """Summarise how far the work is, as plain JSON values; see `csalign inspect`."""
        finished = self._finished()
        count = max([*self.shard_counts(), *finished], default=1)
        marks = finished.get(count, {})
        is_done = any(len(own) == of for of, own in finished.items())
        missing = () if is_done else (i for i in range(count) if i not in marks)
        folder = self.folder / PARTS
        names = sorted(path.stem for path in folder.glob("*.json")) if folder.exists() else []
        records = [record for name in names if (record := self.part_record(name)) is not None]
        sides = ([r.images for r in records], [r.texts for r in records])
        images, texts = (sum(shard.rows for shard in side if shard) for side in sides)
        return {
            "source": self._job.location,
            "shards": count,
            "missing_shards": [str(WorkShard(index, count)) for index in missing],
            "parts": len(records),
            "counts": {
                "images": images,
                "texts": texts,
                "pairs": sum(record.pairs for record in records),
                "failures": sum(len(record.failures) for record in records),
            },
        }

    def _finished(self) -> dict[int, dict[int, Finished]]:
        """Return who finished with the source as it is now, by number of shards and by index."""
        self._refresh()
        finished: dict[int, dict[int, Finished]] = {}
        for path in self._mark_files():
            mark = read_or_rebuild(path, Finished)
            if mark is not None and mark.source == self._job.source:
                finished.setdefault(mark.count, {})[mark.index] = mark
        return finished

    def _mark_files(self) -> list[Path]:
        folder = self.folder / FINISHED
        return sorted(folder.glob("*.json")) if folder.exists() else []

    def _refresh(self) -> None:
        if is_remote(self.folder):
            self.folder.fs.invalidate_cache()  # type: ignore[attr-defined]  # others write there

    def list_failures(self, records: list[PartRecord]) -> list[Failure]:
        """Write ``failures.jsonl``, the skipped inputs of some parts, and return them."""
        failures = [failure for record in records for failure in record.failures]
        lines = [failure.model_dump_json() + "\n" for failure in failures]
        atomic.write_text(self.folder / schema.FAILURES, "".join(lines))
        return failures

    def part_records(self) -> list[PartRecord]:
        """Return the records of all parts in the source's order, once nothing is missing.

        Raises:
            DataError: a part is missing although its process finished.
            OutputError: some process has not finished.
        """
        everybody = [marks for count, marks in self._finished().items() if len(marks) == count]
        if not everybody:
            raise OutputError(f"{self.folder}: is incomplete, or another process committed it")
        names = [name for mark in everybody[0].values() for name in mark.parts]
        names.sort(key=lambda name: [int(number) for number in name.split("-")[1:]])
        records = [record for name in names if (record := self.part_record(name)) is not None]
        if len(records) < len(names):
            missing = sorted({*names} - {record.name for record in records})
            raise DataError(
                f"{self.folder}: {missing[0]} is incomplete ({len(missing)} such parts); copy it "
                "again, or run csalign extract again to rebuild it"
            )
        return records

    def claim(self) -> bool:
        """Return whether this process is the first to claim an object store's folder."""
        path = self.folder / _CLAIM
        try:
            # The one write that object stores refuse if the name is taken.
            path.fs.pipe_file(path.path, b"claimed", mode="create")  # type: ignore[attr-defined]
        except FileExistsError:
            return False
        return True

    def wait_until_committed(self) -> None:
        """Wait for the process that completes the folder.

        Raises:
            OutputError: it does not finish in time.
        """
        timeout = TIMEOUT_S if self._job.splits is None else SPLIT_TIMEOUT_S
        deadline = time.monotonic() + timeout
        while not (self.is_gone and (self._out / schema.MANIFEST).exists()):
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{self.folder}: waited {timeout:.0f} s for another process to complete it; "
                    f"if none does, run csalign inspect --merge {self._out}"
                )
            time.sleep(0.2)
            self._refresh()

    def complete_and_commit(self) -> None:
        """Complete the feature set, if its ids are unique; see `locks.sole_owner`.

        Raises:
            DataError: ids repeat; or the set is complete, but cannot be divided into splits.
        """
        if not self.is_complete:
            self._write_manifest()
        shards = schema.read_manifest(self.folder).shards
        for side in Modality:
            _remove_stale_files(self.folder / side.plural, shards.side(side))
        problem = self._divide()
        # A later process may have to repeat this, so the job goes last.
        for name in (PARTS, FINISHED):
            outputs.remove_folder(self.folder / name)
        (self.folder / _CLAIM).unlink(missing_ok=True)
        for lock in self.folder.glob(f"{LOCK}-*"):
            lock.unlink()
        outputs.commit(self.folder, self._out)
        (self._out / outputs.JOB).unlink(missing_ok=True)
        if problem is not None:
            raise problem

    def _divide(self) -> DataError | None:
        """Make the splits of the job; return what prevents it, which must not cost the set."""
        if self._job.splits is None:
            return None
        try:
            made = divide(self.folder, self._job.splits)
        except DataError as error:
            reason = str(error).removeprefix(f"{self.folder}: ")
            return DataError(
                f"{self._out}: the feature set is complete, but has no splits: {reason}; make "
                "some with csalign split"
            )
        if made.groups:
            log.info("%s", made.kept_together)
        return None

    def _write_manifest(self) -> None:
        records, joined = join_repeats(self.folder, self._job, self.part_records())
        images = [record.images for record in records if record.images is not None]
        texts = [record.texts for record in records if record.texts is not None]
        for side, shards in ((Modality.IMAGE, images), (Modality.TEXT, texts)):
            _check_ids(self.folder, side, shards)
        manifest = schema.Manifest(
            csalign_version=__version__,
            source_root=next((r.source_root for r in records if r.source_root), None),
            job=self._job.digest(),
            joined=joined or None,
            dtype=self._job.dtype,
            encoders=self._job.encoders,
            counts=schema.Counts(
                images=sum(shard.rows for shard in images),
                texts=sum(shard.rows for shard in texts),
                pairs=sum(record.pairs for record in records),
                failures=len(self.list_failures(records)),
            ),
            shards=schema.Shards(images=images, texts=texts),
        )
        schema.write_manifest(self.folder, manifest)


def _remove_stale_files(folder: Path, shards: list[schema.Shard]) -> None:
    """Remove files of killed processes, which other readers would take for parts."""
    if not shards:
        outputs.remove_folder(folder)  # a missing side has no folder
        return
    kept = {shard.path.rpartition("/")[2] for shard in shards}
    for path in list(folder.iterdir()):
        if path.name not in kept:
            path.unlink()


def _check_ids(folder: Path, side: Modality, shards: list[schema.Shard]) -> None:
    repeated = repeated_ids(read_columns(folder, side, shards, schema.ID)[schema.ID])
    if len(repeated):
        raise DataError(
            f"{folder}: {side} id {repeated[0].as_py()!r} appears twice ({len(repeated)} such ids "
            "in all); ids must be unique across the files of the source"
        )
