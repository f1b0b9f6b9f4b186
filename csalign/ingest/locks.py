"""Open ``OUT.partial`` for one of several processes, complete it, and merge copied parts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from csalign.core import atomic, outputs
from csalign.core.errors import DataError, OutputError, Stopped
from csalign.core.locks import LOCK, in_use, is_current, try_lock, unlock
from csalign.core.paths import is_remote
from csalign.core.records import read_job, write_record
from csalign.features.schema import ENTRIES, MANIFEST
from csalign.ingest.job import Job, WorkShard, describe_conflict, is_same_but_source
from csalign.ingest.partial_set import TIMEOUT_S, PartialSet


@contextmanager
def open_partial_set(
    out: Path,
    job: Job,
    shard: WorkShard,
    *,
    config: str,
    restart: bool = False,
    retry: bool = False,
) -> Iterator[PartialSet]:
    """Begin or resume a job, holding the lock of this process's shard.

    In an object store there are no locks: processes of the same shard write the same bytes.
    `restart` removes the unfinished parts of another job; `retry` resumes although the source has
    changed, and the caller rebuilds the parts of the change.

    Raises:
        OutputError: the folder contains another job, or another process has this shard.
    """
    out = out if is_remote(out) else out.resolve()
    folder = outputs.partial_path(out)
    partial = PartialSet(folder, out, job, shard)
    if is_remote(out):
        _begin(folder, job, config, restart=restart, retry=retry)
        yield partial
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as lock:
        _join(lock, folder, job, config, restart=restart, retry=retry)
        with (folder / f"{LOCK}-{shard.index}-of-{shard.count}").open("a+") as own:
            if not try_lock(own):
                raise OutputError(
                    f"{folder}: another process has shard {shard}; wait for it, or choose another "
                    "--out"
                )
            try:
                yield partial
            except BaseException as error:
                if shard.count == 1 and not partial.has_parts:
                    outputs.cleanup(folder)  # there is nothing to resume
                elif isinstance(error, Stopped):
                    error.resumes = True
                raise


@contextmanager
def sole_owner(partial: PartialSet) -> Iterator[bool]:
    """Wait until no other process works in the folder; yield False if one of them completes it."""
    if is_remote(partial.folder):
        yield partial.claim()
        return
    path = partial.folder / LOCK
    if not path.exists():
        yield False
        return
    with path.open("a+") as lock:
        # All parts are there, so whoever holds the lock is about to end or completes the folder.
        try_lock(lock, wait=True)
        yield is_current(lock, path)


def merge_parts(out: Path) -> None:
    """Build a feature set from the parts in ``OUT.partial``, whoever wrote them.

    For parts that were copied into one folder, and if the last process died before it could
    complete the set.

    Raises:
        DataError: there are no parts, or some shards are missing.
        OutputError: `out` exists, or another process works on the parts.
    """
    folder = outputs.partial_path(out if is_remote(out) else out.resolve())
    try:
        outputs.check_output(out, ENTRIES, overwrite=False)
    except OutputError as error:
        if not out.exists():
            raise
        if not folder.exists() and (out / MANIFEST).is_file():
            raise DataError(f"{out}: is complete already; omit --merge") from None
        raise OutputError(
            f"{out}: is in the way of the feature set to be built from {folder}; move it"
        ) from error
    outputs.refuse_other_work(folder, Job.FORMAT)
    job = read_job(folder / outputs.JOB, Job)
    if job is None:
        raise DataError(f"{folder}: contains no parts of a feature set")
    partial = PartialSet(folder, out, job, WorkShard(0, 1))
    if not is_remote(folder):
        (folder / LOCK).touch()  # copies may lack it
    if not partial.is_complete and (missing := partial.missing()):
        listed = ", ".join(map(str, missing[:5])) + (", ..." if missing[5:] else "")
        raise DataError(
            f"{folder}: shards {listed} are missing; run csalign extract with --shard for each"
        )
    with sole_owner(partial) as is_owner:
        if is_owner or is_remote(folder):  # where the claim may be that of a dead process
            partial.complete_and_commit()


def _join(
    lock: IO[str], folder: Path, job: Job, config: str, *, restart: bool, retry: bool
) -> None:
    """Share the folder's lock once the folder contains this job."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        if try_lock(lock, shared=True):
            if not is_current(lock, folder / LOCK):
                raise OutputError(f"{folder}: another process has just completed it")
            if _read_job(folder, job, restart=restart, retry=retry) == job:
                return
            # A shared lock cannot be upgraded while others share it, so release it in between.
            unlock(lock)
            if try_lock(lock):
                _begin(folder, job, config, restart=restart, retry=retry)
                try_lock(lock, shared=True)
                return
        if time.monotonic() > deadline:
            raise OutputError(in_use(folder))
        time.sleep(0.05)


def _begin(folder: Path, job: Job, config: str, *, restart: bool, retry: bool) -> None:
    found = _read_job(folder, job, restart=restart, retry=retry)
    if found == job:
        return
    if found is not None and not restart:  # only the source has changed
        (folder / MANIFEST).unlink(missing_ok=True)  # of a set that was never committed
    else:
        if is_remote(folder):
            outputs.remove_folder(folder)
        else:
            outputs.empty_folder(folder)
        atomic.write_text(folder / "config.toml", config)
    write_record(folder / outputs.JOB, job)


def _read_job(folder: Path, job: Job, *, restart: bool, retry: bool) -> Job | None:
    """Return the job begun there, None if there is none; one in the way of `job` is refused."""
    outputs.refuse_other_work(folder, Job.FORMAT)
    found = read_job(folder / outputs.JOB, Job, restart=restart)
    if found is None or found == job or restart or (retry and is_same_but_source(found, job)):
        return found
    raise OutputError(describe_conflict(folder, found, job))
