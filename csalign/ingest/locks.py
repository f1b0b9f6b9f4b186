"""Who works in ``OUT.partial``, and what that folder is to become: locks and the job's document."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csalign.core import atomic
from csalign.core.errors import DataError, OutputError
from csalign.core.paths import is_remote
from csalign.core.records import read_job, write_record
from csalign.features.schema import MANIFEST
from csalign.ingest.job import Job, Turn, is_same_but_source, other_job
from csalign.ingest.partial_set import PATIENCE, Workspace


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
        folder = atomic.partial_path(out)
        _begin(folder, job, config, restart=restart, retry=retry)
        yield Workspace(folder, out, job, turn)
        return
    out = out.resolve()
    folder = atomic.partial_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / atomic.LOCK).open("a+") as lock:
        _join(lock, folder, job, config, restart=restart, retry=retry)
        with (folder / f"{atomic.LOCK}-{turn.index}-of-{turn.count}").open("a+") as own:
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
                    atomic.cleanup(folder)  # there is nothing to go on from
                raise


@contextmanager
def alone(workspace: Workspace) -> Iterator[bool]:
    """Wait until no other process works in the folder; False if one of them completes it."""
    if is_remote(workspace.folder):
        yield workspace.claim()
        return
    path = workspace.folder / atomic.LOCK
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
    folder = atomic.partial_path(out if is_remote(out) else out.resolve())
    _check_free(out, folder)
    job = _read_job(folder)
    if job is None:
        raise DataError(f"{folder}: holds no parts of a feature set")
    workspace = Workspace(folder, out, job, Turn(0, 1))
    if not is_remote(folder):
        (folder / atomic.LOCK).touch()  # which copies may lack
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
        atomic.check_output(out, overwrite=False)
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
    deadline = time.monotonic() + PATIENCE
    while True:
        if _try_lock(lock, fcntl.LOCK_SH):
            if not (folder / atomic.LOCK).exists():
                raise OutputError(f"{folder}: was completed by another process just now")
            found = _read_job(folder, restart=restart)
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
            raise OutputError(atomic.in_use(folder))
        time.sleep(0.05)


def _check_job(folder: Path, found: Job | None, job: Job, *, restart: bool, retry: bool) -> None:
    """Refuse a folder that was begun as something else, unless that is what the user wants."""
    if found is None or restart or (retry and is_same_but_source(found, job)):
        return
    raise OutputError(other_job(folder, found, job))


def _begin(folder: Path, job: Job, config: str, *, restart: bool, retry: bool) -> None:
    found = _read_job(folder, restart=restart)
    if found == job:
        return
    _check_job(folder, found, job, restart=restart, retry=retry)
    if found is not None and not restart:
        (folder / MANIFEST).unlink(missing_ok=True)  # of a set that was never published
        write_record(folder / atomic.JOB, job)
        return
    if is_remote(folder):
        atomic.remove_folder(folder)
    else:
        atomic.empty_folder(folder)
    atomic.write_text(folder / "config.toml", config)
    write_record(folder / atomic.JOB, job)


def _try_lock(lock: Any, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_job(folder: Path, *, restart: bool = False) -> Job | None:
    """What was begun there; None if nothing was, or if it is damaged and may be begun anew."""
    atomic.refuse_other_work(folder, Job.FORMAT)
    return read_job(folder / atomic.JOB, Job, restart=restart)
