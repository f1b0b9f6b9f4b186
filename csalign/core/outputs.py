"""Output folders: checked, built under ``OUT.partial``, and committed when they are complete."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from csalign.core.atomic import TEMPORARY, fsync_path, translate_os_errors, upload
from csalign.core.errors import OutputError
from csalign.core.locks import LOCK, lock_folder
from csalign.core.paths import is_remote
from csalign.core.records import parse_json

JOB = ".csalign-job.json"  # describes unfinished work, so that only the same work resumes it
RESUME = "resume"  # folder of the checkpoints that a rerun resumes from

_OWN = {JOB, LOCK, RESUME}
_JOBS = {
    "csalign-job": "extraction of csalign 0.1.0",
    "csalign-extraction": "extraction",
    "csalign-training": "training run",
    "csalign-generation": "generation",
}


def check_output(
    out: Path,
    entries: Collection[str] | None,
    *,
    overwrite: bool,
    inputs: tuple[Path, ...] = (),
    searched: Path | None = None,
) -> None:
    """Refuse an output folder that must not be written, before any work is done.

    An artifact that a killed process had moved aside is moved back first.

    Args:
        out: the output folder.
        entries: names that the command writes into it; anything else there is the user's. None
            for any.
        overwrite: whether an artifact there may be replaced.
        inputs: files and folders that are read, and so must not be replaced.
        searched: the input folder that is read recursively; an output in it would be read by
            the next run.

    Raises:
        OutputError: `out` exists and `overwrite` is false; `out` is a file, a mount point, the
            working directory, a folder that csalign did not make, one of `inputs`, or contains
            one; or its ``OUT.partial`` is in use or not csalign's.
    """
    with translate_os_errors(out):
        if is_remote(out):
            _check_remote_place(out, inputs)
        else:
            _check_local_place(out, inputs, searched)
        _refuse_existing(out, entries, overwrite=overwrite)


def _check_local_place(out: Path, inputs: tuple[Path, ...], searched: Path | None) -> None:
    resolved = out.resolve()
    for source in inputs:
        if is_remote(source):
            continue
        if source.exists() and source.resolve().is_relative_to(resolved):
            raise OutputError(f"{out}: this is where {source} is read from; choose another --out")
        if resolved.is_relative_to(source.resolve()) and _is_artifact(source):
            raise OutputError(f"{out}: is inside {source}, which it would change; choose another")
    is_searched = searched is not None and not is_remote(searched) and searched.is_dir()
    if is_searched and searched and resolved.is_relative_to(searched.resolve()):
        raise OutputError(
            f"{out}: is inside {searched}, where the next run would read it; choose another --out"
        )
    if os.path.ismount(resolved) or resolved == Path.cwd():
        raise OutputError(
            f"{out}: is a mount point or the working directory, which cannot be replaced; choose a "
            "folder in it"
        )
    partial = partial_path(resolved)
    if _previous(resolved).is_dir():
        _repair_swap(resolved, partial)
    refuse_foreign(partial)
    if resolved.exists() and not resolved.is_dir():
        raise OutputError(f"{out}: is a file; choose another --out")


def check_page(path: Path) -> None:
    """Raise OutputError if a page cannot be written there, before the work that fills it."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file such as {path / 'page.html'}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first")


def refuse_foreign(partial: Path) -> None:
    """Raise OutputError if there is a folder for unfinished work that csalign did not make."""
    names = _names(partial)
    if names and not names & {LOCK, JOB}:
        raise OutputError(f"{partial}: is in the way and csalign did not make it; move it")


def _check_remote_place(out: Path, inputs: tuple[Path, ...]) -> None:
    if not out.name:
        raise OutputError(f"{out}: is a bucket; choose a folder in it")
    address = f"{out}/"
    for source in inputs:
        if f"{source}/".startswith(address) or address.startswith(f"{source}/"):
            raise OutputError(f"{out}: overlaps with {source}, which is read; choose another --out")
    partial = partial_path(out)
    foreign = _names(partial) - {"config.toml"}  # which is written first
    if foreign and JOB not in foreign:
        raise OutputError(f"{partial}: is in the way and csalign did not make it; move it")


def _refuse_existing(out: Path, entries: Collection[str] | None, *, overwrite: bool) -> None:
    """Refuse a folder with files of others, or with an artifact that is not to be replaced."""
    names = _names(out)
    if not names:
        return
    is_half = is_remote(out) and JOB in names  # a process died on the way
    foreign = names - {*(names if entries is None else entries), *_OWN}
    if foreign or not (is_half or _is_artifact(out)):
        example = min(foreign or names)
        raise OutputError(
            f"{out}: contains files that this command did not make ({example}); choose "
            "another --out"
        )
    if not overwrite and not is_half:
        raise OutputError(f"{out}: exists; choose another --out, or replace it with --overwrite")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Build a folder under ``OUT.partial`` and move it to `out` when the block succeeds.

    What is at `out` stays untouched until then. What a killed process left at ``OUT.partial`` is
    replaced. Callers run `check_output` first. For an object store the folder is built locally.

    Yields:
        The folder to write into: new, empty and local.

    Raises:
        OutputError: another process is building the same output, or ``OUT.partial`` contains
            unfinished work that can be resumed.
    """
    if is_remote(out):
        with translate_os_errors(out), tempfile.TemporaryDirectory(prefix="csalign-") as local:
            yield Path(local)
            commit(Path(local), out)
        return
    out = out.resolve()
    partial = partial_path(out)
    refuse_other_work(partial)
    with translate_os_errors(out), lock_folder(partial):
        empty_folder(partial)
        try:
            yield partial
            commit(partial, out)
        except BaseException:
            cleanup(partial)
            raise


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Keep other processes from replacing an artifact while files are written in it.

    Raises:
        OutputError: a file cannot be written, or another process is building the same output.
    """
    if is_remote(folder):
        with translate_os_errors(folder):
            yield
        return
    partial = partial_path(folder.resolve())
    refuse_foreign(partial)
    refuse_other_work(partial)
    with translate_os_errors(folder), lock_folder(partial):
        try:
            yield
        finally:
            cleanup(partial)


def refuse_other_work(folder: Path, own: str | None = None) -> None:
    """Refuse a folder of unfinished work other than that of the format `own`.

    Raises:
        OutputError: the work there is of another kind.
    """
    path = folder / JOB
    if not path.is_file():
        return
    try:
        found = parse_json(path.read_bytes())["format"]
    except (ValueError, KeyError, TypeError):
        found = own  # whoever resumes it reports the damage
    if own is None or found != own:
        raise OutputError(
            f"{folder}: contains an unfinished {_JOBS.get(found, 'job')}; finish it, remove it, or "
            "choose another --out"
        )


def empty_folder(folder: Path) -> None:
    """Remove everything in a folder except its lock file."""
    for entry in folder.iterdir():
        if entry.is_dir():
            remove_folder(entry)
        elif entry.name != LOCK:
            entry.unlink()


def cleanup(folder: Path) -> None:
    """Remove a local folder after an error, best effort.

    The lock file goes last, so that a later process recognises what is left as csalign's.
    """
    with suppress(OSError):  # the first error says more than one of the cleanup
        empty_folder(folder)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def commit(folder: Path, out: Path) -> None:
    """Move a finished folder to its final name, replacing what is there.

    Locally this is a rename; the caller holds the lock of `folder`, whose lock file is removed
    after it. An object store has no rename: the file that makes a folder an artifact is removed
    first and uploaded last, so that a half-written artifact is not one, and a job file lets a
    later process finish.

    Raises:
        OutputError: the folder is gone or incomplete.
    """
    # Stale temporary files of killed processes, of `atomic_path` and of safetensors.
    for pattern in (f"*{TEMPORARY}", f"{TEMPORARY}*"):
        for entry in folder.rglob(pattern):
            if entry.is_file():
                entry.unlink()
    if not is_remote(out):
        fsync_path(folder)
        _replace(folder, out)
        with suppress(OSError):  # it does no harm
            (out / LOCK).unlink()
        return
    entries = [
        path for path in folder.rglob("*") if path.is_file() and path.name not in (JOB, LOCK)
    ]
    if not any(_is_mark(path) for path in entries):
        raise OutputError(f"{folder}: is incomplete, or another process moved it to {out}")
    (out / JOB).write_bytes(b"")
    old = {path for path in out.rglob("*") if path.is_file() and path.name != JOB}
    for path in sorted(old, key=lambda path: not _is_mark(path)):
        path.unlink()
    for path in sorted(entries, key=lambda path: _is_mark(path)):
        target = out.joinpath(*path.relative_to(folder).parts)
        if is_remote(folder):
            out.fs.copy(path.path, target.path)  # type: ignore[attr-defined]  # of UPath
        else:
            upload(path, target)
    (out / JOB).unlink()
    if is_remote(folder):
        remove_folder(folder)


def _repair_swap(out: Path, partial: Path) -> None:
    """Undo a `_replace` that was killed; raises OutputError if its process is still alive."""
    was_there = partial.exists()
    with lock_folder(partial):
        _restore(out)
        if not was_there:
            cleanup(partial)


def _restore(out: Path) -> None:
    """Move back what a killed `_replace` had moved aside; callers hold the lock."""
    previous = _previous(out)
    if previous.is_dir() and not out.exists():
        previous.rename(out)
    remove_folder(previous)


def _replace(partial: Path, out: Path) -> None:
    previous = _previous(out)
    _restore(out)
    if out.exists():
        out.rename(previous)
    partial.rename(out)
    fsync_path(out.parent)
    remove_folder(previous)


def partial_path(out: Path) -> Path:
    """Return where a folder is built before it gets its name."""
    return out.with_name(out.name + ".partial")


def _previous(out: Path) -> Path:
    # Hidden and ours by name: a plain OUT.previous may be somebody's backup.
    return out.with_name(f".{out.name}.csalign-previous")


def _is_artifact(folder: Path) -> bool:
    return any(_is_mark(path) for path in folder.glob("*.json"))


def _is_mark(path: Path) -> bool:
    """Return whether a file is the document that makes its folder an artifact."""
    if path.suffix != ".json" or path.name == JOB:
        return False
    try:
        document = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and str(document.get("format")).startswith("csalign-")


def remove_folder(folder: Path) -> None:
    """Remove a folder and its content, if it exists."""
    if is_remote(folder):
        if folder.exists():
            folder.fs.rm(folder.path, recursive=True)  # type: ignore[attr-defined]  # of UPath
    elif folder.is_dir():
        try:
            shutil.rmtree(folder)
        except OSError as error:  # which gives only the last name of what cannot be removed
            raise OSError(error.errno, error.strerror, str(folder)) from error
