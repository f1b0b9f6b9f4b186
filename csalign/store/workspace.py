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

import fcntl
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csalign import __version__, files
from csalign.enums import Modality
from csalign.errors import DataError, OutputError
from csalign.locations import is_remote
from csalign.store import schema
from csalign.store.documents import (
    Failure,
    Finished,
    Job,
    Receipt,
    Turn,
    is_same_but_source,
    other_job,
    read_document,
    write_document,
)
from csalign.store.manifest import (
    FAILURES,
    MANIFEST,
    Counts,
    Manifest,
    Shard,
    Shards,
    write_manifest,
)
from csalign.store.shard import Rows, ShardWriter

RECEIPTS = "receipts"
FINISHED = "finished"
_CLAIM = "receipts.claim"
_PATIENCE = 60.0  # seconds to wait for a process that only sets up or completes the folder


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
    """The folder of one job, as one process sees it; made by `open_workspace`."""

    def __init__(self, folder: Path, out: Path, job: Job, turn: Turn) -> None:
        self.folder = folder
        self._out = out
        self._job = job
        self._turn = turn
        self._token = uuid.uuid4().hex.encode()

    @property
    def is_gone(self) -> bool:
        """Whether another process has completed it."""
        return not (self.folder / files.JOB).exists()

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
            SchemaError: the receipt is damaged.
        """
        path = self.folder / RECEIPTS / f"{name}.json"
        receipt = read_document(path, Receipt) if path.is_file() else None
        if receipt is None:
            return None
        if receipt.job != self._job.fingerprint():
            raise DataError(
                f"{path}: the part was made with other options or of another source than "
                f"{self.folder / files.JOB} says; copy parts of one job only"
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
        write_document(self.folder / RECEIPTS / f"{receipt.name}.json", receipt)
        return receipt

    def finish(self, parts: list[str]) -> None:
        """Say that this process has done its parts, all of which have receipts."""
        turn = self._turn
        mark = Finished(index=turn.index, count=turn.count, source=self._job.source, parts=parts)
        write_document(self._mark, mark)

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
        deadline = time.monotonic() + _PATIENCE
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
            own = f"{files.LOCK}-{self._turn.index}-of-{self._turn.count}"
            locks = [path.name for path in self.folder.glob(f"{files.LOCK}-*")]
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
        found = [read_document(path, Finished) for path in marks]
        return [mark for mark in found if mark.source == self._job.source]

    def list_failures(self, failures: list[Failure]) -> Path:
        """Write a list of what was left out, for a job that failed because of it."""
        path = self.folder / FAILURES
        files.write_text(path, _lines(failures))
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
        """Turn the parts into a whole feature set and give it its name; see `alone`.

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
        files.write_text(self.folder / FAILURES, _lines(failures))
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
            files.remove_folder(self.folder / name)
        (self.folder / _CLAIM).unlink(missing_ok=True)
        for entry in self.folder.rglob("*.tmp"):  # what a killed process was writing
            entry.unlink()
        for lock in self.folder.glob(f"{files.LOCK}*"):
            lock.unlink()
        files.publish(self.folder, self._out)
        (self._out / files.JOB).unlink(missing_ok=True)


@contextmanager
def open_workspace(
    out: Path,
    job: Job,
    turn: Turn,
    *,
    config: str,
    restart: bool = False,
    retry: bool = False,
) -> Iterator[Workspace]:
    """Begin a job, or continue it, holding the locks of this process's turn.

    In an object store there are no locks: processes that do the same turn write the same bytes.

    Args:
        out: the feature set that it is to become.
        job: what it is.
        turn: which process this is.
        config: content of the feature set's ``config.toml``, that of the process that begins.
        restart: whether another job's unfinished parts may be removed.
        retry: whether to go on although the source holds something else by now; whoever says so
            makes those parts anew whose stamp is another.

    Raises:
        OutputError: another job was begun there, or another process has this turn.
    """
    if is_remote(out):
        folder = files.partial_of(out)
        _begin(folder, job, config, restart=restart, retry=retry)
        yield Workspace(folder, out, job, turn)
        return
    out = out.resolve()
    folder = files.partial_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / files.LOCK).open("a+") as lock:
        _join(lock, folder, job, config, restart=restart, retry=retry)
        with (folder / f"{files.LOCK}-{turn.index}-of-{turn.count}").open("a+") as own:
            if not _try_lock(own, fcntl.LOCK_EX):
                raise OutputError(
                    f"{folder}: another process does shard {turn}; wait for it, or choose another "
                    "--out"
                )
            workspace = Workspace(folder, out, job, turn)
            try:
                yield workspace
            except BaseException:
                if turn.count == 1 and not workspace.is_begun:
                    files.remove_folder(folder)  # there is nothing to go on from
                raise


@contextmanager
def alone(workspace: Workspace) -> Iterator[bool]:
    """Wait until no other process works in the folder; False if one of them completes it."""
    if is_remote(workspace.folder):
        yield workspace.claim()
        return
    path = workspace.folder / files.LOCK
    if not path.exists():
        yield False
        return
    with path.open("a+") as lock:
        # All parts are there, so that who holds it is about to end or completes the folder.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path.exists()


def merge_parts(out: Path) -> None:
    """Make a feature set out of the parts in ``OUT.partial``, whoever wrote them.

    For parts that were made on machines without a common disk and then copied into one folder,
    and where the last process died before it could do so.

    Raises:
        DataError: there are no parts, or some processes are not done.
        OutputError: `out` exists, or somebody still works on the parts.
    """
    folder = files.partial_of(out if is_remote(out) else out.resolve())
    _check_free(out, folder)
    job = _read_job(folder)
    if job is None:
        raise DataError(f"{folder}: holds no parts of a feature set")
    workspace = Workspace(folder, out, job, Turn(0, 1))
    if not is_remote(folder):
        (folder / files.LOCK).touch()  # which copies may lack
    if not workspace.is_whole and (missing := workspace.missing()):
        listed = ", ".join(map(str, missing[:5])) + (", ..." if missing[5:] else "")
        raise DataError(
            f"{folder}: shards {listed} are not done; run csalign extract with --shard for each"
        )
    if is_remote(folder):
        workspace.complete_and_publish()
        return
    with alone(workspace) as is_there:
        if is_there:
            workspace.complete_and_publish()


def _check_free(out: Path, folder: Path) -> None:
    try:
        files.check_output(out, overwrite=False)
    except OutputError as error:
        if not out.exists():
            raise
        if not folder.exists() and (out / MANIFEST).is_file():
            raise DataError(f"{out}: is whole already; leave out --merge") from None
        raise OutputError(
            f"{out}: is in the way of the feature set that the parts in {folder} are to become; "
            "move it"
        ) from error


def _join(lock: Any, folder: Path, job: Job, config: str, *, restart: bool, retry: bool) -> None:
    """Take a share in the folder's lock once the folder holds this job."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        if _try_lock(lock, fcntl.LOCK_SH):
            if not (folder / files.LOCK).exists():
                raise OutputError(f"{folder}: was completed by another process just now")
            found = _read_job(folder)
            if found == job:
                return
            _check_job(folder, found, job, restart=restart, retry=retry)
            # A lock cannot be raised while others share it, so it is given back in between.
            fcntl.flock(lock, fcntl.LOCK_UN)
            if _try_lock(lock, fcntl.LOCK_EX):
                _begin(folder, job, config, restart=restart, retry=retry)
                fcntl.flock(lock, fcntl.LOCK_SH)
                return
        if time.monotonic() > deadline:
            raise OutputError(files.in_use(folder))
        time.sleep(0.05)


def _check_job(folder: Path, found: Job | None, job: Job, *, restart: bool, retry: bool) -> None:
    """Refuse a folder that was begun as something else, unless that is what the user wants."""
    if found is None or restart or (retry and is_same_but_source(found, job)):
        return
    raise OutputError(other_job(folder, found, job))


def _begin(folder: Path, job: Job, config: str, *, restart: bool, retry: bool) -> None:
    found = _read_job(folder)
    if found == job:
        return
    _check_job(folder, found, job, restart=restart, retry=retry)
    if found is not None and not restart:
        (folder / MANIFEST).unlink(missing_ok=True)  # of a set that was never published
        write_document(folder / files.JOB, job)
        return
    if is_remote(folder):
        files.remove_folder(folder)
    else:
        files.empty_folder(folder)
    files.write_text(folder / "config.toml", config)
    write_document(folder / files.JOB, job)


def _try_lock(lock: Any, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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


def _read_job(folder: Path) -> Job | None:
    files.refuse_other_work(folder, Job.FORMAT)
    path = folder / files.JOB
    return read_document(path, Job) if path.is_file() else None


def _lines(failures: list[Failure]) -> str:
    return "".join(
        json.dumps(failure.model_dump(), ensure_ascii=False) + "\n" for failure in failures
    )
