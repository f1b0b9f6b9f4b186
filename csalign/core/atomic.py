"""Files and folders that appear under their final name only when they are complete."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from csalign.core.errors import OutputError
from csalign.core.paths import is_remote, is_store_error
from csalign.core.records import parse_json

ARTIFACT_MARKS = (
    "manifest.json",
    "adapter.json",
    "aligned.json",
    "generation.json",
    "index.json",
)
"""Whole artifacts hold one of these, with a "format" that begins with "csalign-"."""

LOCK = ".csalign-lock"
"""In a folder that is being built; its lock dies with the process that holds it."""

JOB = ".csalign-job.json"
"""In a folder that is built bit by bit: what it is to become, so that only that continues it."""

RESUME = "resume"
"""In the folder of a run that is being trained: what a rerun goes on from."""

ARTIFACT_ENTRIES = {
    *ARTIFACT_MARKS,
    "README.md",
    "adapter",
    "adapter.safetensors",
    "checkpoints",
    "config.toml",
    "environment.json",
    "failures.jsonl",
    "generated.jsonl",
    "image.onnx",
    "image.pt2",
    "images",
    "images.csv",
    "images.npy",
    "img_emb",
    "items.arrow",
    "metadata",
    "metrics.csv",
    "metrics.jsonl",
    "probes.npy",
    "query.npy",
    "sheet.jpg",
    "tensorboard",
    "text.onnx",
    "text.pt2",
    "text_emb",
    "texts",
    "texts.csv",
    "texts.npy",
    "vectors.faiss",
    "vectors.npy",
    "wandb",
    JOB,
    LOCK,
    RESUME,
}
"""All that csalign puts into the folder of an artifact; anything else there is the user's."""

_TEMPORARY = ".tmp"
_JOBS = {
    "csalign-job": "extraction",
    "csalign-training": "training run",
    "csalign-generation": "generation",
}
_FULL = "free some space, or choose another --out"
_BROKEN = "see whether the disk or its mount is in order, then run the same command again"
_REMEDIES = {
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV), _BROKEN),
    **dict.fromkeys((errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENXIO), _BROKEN),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    errno.EACCES: "check the permissions, or choose another --out",
    errno.EPERM: "check the permissions, or choose another --out",
    errno.EROFS: "choose another --out",
}


def os_error(error: Exception, path: Path | str | None = None) -> str:
    """What to say of an error of a file system or object store: file, reason and remedy.

    Args:
        error: what was raised.
        path: what was read or written, if the error does not say it.
    """
    name = getattr(error, "filename", None) or path
    number = getattr(error, "errno", None)
    if name is not None and ("://" in str(name) or is_store_error(error)):
        is_silent = isinstance(error, TimeoutError) and not str(error)
        words = "no answer in time" if is_silent else str(error) or type(error).__name__
        reason = words.splitlines()[0]
        return f"{name}: {reason}; check the address, the keys and the network"
    # Libraries put words of their own where the system's would say more.
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    number = int(quoted[1]) if quoted else number
    reason = os.strerror(number) if number else str(error) or type(error).__name__
    remedy = _REMEDIES.get(number or 0)
    return f"{name}: " * (name is not None) + reason + (f"; {remedy}" if remedy else "")


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turn what a file system or object store raises into an error that names a file.

    Raises:
        OutputError: `path`, or the file that the error names, cannot be written.
    """
    try:
        yield
    except OSError as error:
        known = error.filename or error.errno in _REMEDIES or is_remote(path)
        if not known or isinstance(error, BrokenPipeError):
            raise
        raise OutputError(os_error(error, path)) from error
    except Exception as error:
        if not is_store_error(error):
            raise
        raise OutputError(os_error(error, path)) from error


def write_text(path: Path, text: str) -> None:
    r"""Write a text file whole or not at all: temporary name, fsync, rename.

    Args:
        path: final path; its folder must exist. In an object store every write is whole.
        text: content, written as UTF-8 with ``\n`` line ends.
    """
    if is_remote(path):
        path.write_bytes(text.encode())
        return
    with translate_os_errors(path), _beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document whole or not at all; NaN is refused rather than written."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A local path to write a file to, which then appears under its own name, whole or not at all.

    Args:
        path: final path, local or in an object store.

    Yields:
        Where to write it. If the block raises, what was written is removed.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            _upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as temporary:
        yield temporary


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file beside `path`, to be written and then given its name; removed if the block raises."""
    temporary, lock = _locked_file(path)
    try:
        yield temporary
        os.fsync(lock)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # what happened says more than that it cannot be cleaned up
            temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


def _locked_file(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, empty, and its handle, with a lock that dies with the process."""
    while True:
        # Another process, maybe of another machine, may be writing the same file.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY}")
        lock = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return temporary, lock
        os.close(lock)  # swept away by another process before it was locked


def remove_stale_temporaries(path: Path) -> None:
    """Remove what processes left that died while they wrote `path`, a local file."""
    for left in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 12}{_TEMPORARY}"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by whoever still writes it
            left.unlink()


def fsync_path(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(
    out: Path, *, overwrite: bool, inputs: tuple[Path, ...] = (), searched: Path | None = None
) -> None:
    """Refuse an output folder that must not be written, before any work is done.

    Args:
        out: the folder to be made.
        overwrite: whether an artifact that is there may be replaced.
        inputs: folders and files that are read and so must not be replaced.
        searched: that one of them which, if it is a folder, is read with all that is in it; an
            output in there would be read by the next run.

    Raises:
        OutputError: `out` exists and `overwrite` is false; `out` is a file, a mount point, the
            working directory, a folder that csalign did not make, one of `inputs`, or holds one of
            them; or its ``OUT.partial`` is in use or not ours.
    """
    with translate_os_errors(out):
        if is_remote(out):
            _check_remote_output(out, overwrite=overwrite, inputs=inputs)
        else:
            _check_local_output(out, overwrite=overwrite, inputs=inputs, searched=searched)


def _check_local_output(
    out: Path, *, overwrite: bool, inputs: tuple[Path, ...], searched: Path | None
) -> None:
    resolved = out.resolve()
    for source in inputs:
        if is_remote(source):
            continue
        if source.exists() and source.resolve().is_relative_to(resolved):
            raise OutputError(f"{out}: this is where {source} is read from; choose another --out")
        if _is_artifact(source) and resolved.is_relative_to(source.resolve()):
            raise OutputError(f"{out}: lies inside {source}, which it would change; choose another")
    is_searched = searched is not None and not is_remote(searched) and searched.is_dir()
    if is_searched and searched and resolved.is_relative_to(searched.resolve()):
        raise OutputError(
            f"{out}: lies inside {searched}, where the next run would read it; choose another --out"
        )
    if os.path.ismount(resolved) or resolved == Path.cwd():
        raise OutputError(
            f"{out}: is a mount point or the working directory, which cannot be replaced; choose a "
            "folder in it"
        )
    _restore_interrupted_swap(resolved)
    partial = partial_path(resolved)
    marked = (partial / LOCK).exists() or (partial / JOB).exists()
    if partial.exists() and any(partial.iterdir()) and not marked:
        raise OutputError(f"{partial}: is in the way and csalign did not make it; move it")
    if not resolved.exists():
        return
    if not resolved.is_dir():
        raise OutputError(f"{out}: is a file; choose another --out")
    if not any(resolved.iterdir()):
        return
    foreign = {path.name for path in resolved.iterdir()} - ARTIFACT_ENTRIES
    if foreign or not _is_artifact(resolved):
        example = min(foreign or {path.name for path in resolved.iterdir()})
        raise OutputError(
            f"{out}: holds files that csalign did not make ({example}); choose another --out"
        )
    if not overwrite:
        raise OutputError(f"{out}: exists; choose another --out, or replace it with --overwrite")


def _check_remote_output(out: Path, *, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    if not out.name:
        raise OutputError(f"{out}: is a whole bucket; choose a folder in it")
    address = f"{out}/"
    for source in inputs:
        if f"{source}/".startswith(address) or address.startswith(f"{source}/"):
            raise OutputError(f"{out}: overlaps with {source}, which is read; choose another --out")
    partial = partial_path(out)
    foreign = _names(partial) - {"config.toml"}  # which is written first
    if foreign and JOB not in foreign:
        raise OutputError(f"{partial}: is in the way and csalign did not make it; move it")
    names = _names(out)
    if not names:
        return
    is_half = JOB in names  # a process died on the way
    if names - ARTIFACT_ENTRIES or not (is_half or _is_artifact(out)):
        example = min(names - ARTIFACT_ENTRIES or names)
        raise OutputError(
            f"{out}: holds files that csalign did not make ({example}); choose another --out"
        )
    if not overwrite and not is_half:
        raise OutputError(f"{out}: exists; choose another --out, or replace it with --overwrite")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Build a folder under ``OUT.partial`` and move it to `out` when the block succeeds.

    What stood at `out` stays untouched until then. What a dead process left at ``OUT.partial`` is
    replaced. Callers run `check_output` first. For an object store the folder is built locally.

    Args:
        out: final folder.

    Yields:
        The folder to write into: fresh, and local.

    Raises:
        OutputError: another process is building the same output, or ``OUT.partial`` holds what can
            be gone on with.
    """
    if is_remote(out):
        with translate_os_errors(out), tempfile.TemporaryDirectory(prefix="csalign-") as local:
            yield Path(local)
            commit(Path(local), out)
        return
    out = out.resolve()
    partial = partial_path(out)
    with translate_os_errors(out), _locked(partial):
        try:
            yield partial
            commit(partial, out)
            # Only now: without it a later process would take what is left for a stranger's.
            with suppress(OSError):  # it harms nobody
                (out / LOCK).unlink()
        except BaseException:
            cleanup(partial)
            raise


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make an empty folder that no other process builds in."""
    refuse_other_work(partial)
    with lock_folder(partial):
        empty_folder(partial)
        yield


def refuse_other_work(folder: Path, own: str | None = None) -> None:
    """Refuse a folder that holds unfinished work which the caller cannot go on with.

    Args:
        folder: ``OUT.partial``.
        own: format of the jobs that the caller can go on with.

    Raises:
        OutputError: the job there is another.
    """
    path = folder / JOB
    if not path.is_file():
        return
    try:
        found = parse_json(path.read_bytes())["format"]
    except (ValueError, KeyError, TypeError):
        found = own  # who goes on with it says what is damaged
    if own is None or found != own:
        raise OutputError(
            f"{folder}: holds an unfinished {_JOBS.get(found, 'job')}; finish it, remove it, or "
            "choose another --out"
        )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make a folder if it is not there, and keep other processes from writing in it.

    Raises:
        OutputError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(in_use(folder)) from None
        yield


def in_use(partial: Path) -> str:
    """What to say of a folder whose lock is held."""
    return f"{partial}: another process is writing there; wait for it, or choose another --out"


def empty_folder(folder: Path) -> None:
    """Remove everything in it but its lock."""
    for entry in folder.iterdir():
        if entry.is_dir():
            remove_folder(entry)
        elif entry.name != LOCK:
            entry.unlink()


def cleanup(folder: Path) -> None:
    """Remove a local folder that was built in, after an error, as far as the disk lets it.

    What marks it as ours goes last, so that a later process can do what is left.
    """
    with suppress(OSError):  # what happened says more than that it cannot be cleaned up
        empty_folder(folder)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def commit(folder: Path, out: Path) -> None:
    """Move a finished folder to its final name, in place of what stands there.

    Locally that is a rename. An object store has none: the file that makes a folder an artifact
    is removed first and arrives last, so that what is half there is no artifact; and a job file
    tells a later process that it may go on.

    Raises:
        OutputError: the folder is not there any more, or not whole.
    """
    # What a killed process was writing: by `atomic_path`, or by safetensors.
    for pattern in (f"*{_TEMPORARY}", f"{_TEMPORARY}*"):
        for entry in folder.rglob(pattern):
            if entry.is_file():
                entry.unlink()
    if not is_remote(out):
        fsync_path(folder)
        _replace(folder, out)
        return
    entries = [path for path in folder.rglob("*") if path.is_file() and path.name != JOB]
    if not any(path.name in ARTIFACT_MARKS for path in entries):
        raise OutputError(f"{folder}: is gone; another process moved it to {out}")
    (out / JOB).write_bytes(b"")
    old = {path for path in out.rglob("*") if path.is_file() and path.name != JOB}
    for path in sorted(old, key=lambda path: path.name not in ARTIFACT_MARKS):
        path.unlink()
    for path in sorted(entries, key=lambda path: path.name in ARTIFACT_MARKS):
        target = out.joinpath(*path.relative_to(folder).parts)
        if is_remote(folder):
            out.fs.copy(path.path, target.path)  # type: ignore[attr-defined]  # of UPath
        else:
            _upload(path, target)
    (out / JOB).unlink()
    if is_remote(folder):
        remove_folder(folder)


def _upload(local: Path, remote: Path) -> None:
    remote.parent.mkdir(parents=True, exist_ok=True)  # object stores need none, others do
    remote.fs.put_file(str(local), remote.path)  # type: ignore[attr-defined]  # of UPath


def _replace(partial: Path, out: Path) -> None:
    previous = _previous(out)
    if out.exists():
        out.rename(previous)
    partial.rename(out)
    (out / LOCK).unlink(missing_ok=True)
    fsync_path(out.parent)
    remove_folder(previous)


def _restore_interrupted_swap(out: Path) -> None:
    """Undo the first half of `_replace` if a run was killed between its two renames."""
    previous = _previous(out)
    if previous.is_dir() and not out.exists():
        previous.rename(out)
    remove_folder(previous)


def partial_path(out: Path) -> Path:
    """Where a folder is built before it gets its name."""
    return out.with_name(out.name + ".partial")


def _previous(out: Path) -> Path:
    # Hidden and ours by name: a plain OUT.previous may be somebody's backup.
    return out.with_name(f".{out.name}.csalign-previous")


def _is_artifact(folder: Path) -> bool:
    for mark in ARTIFACT_MARKS:
        try:
            document = parse_json((folder / mark).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and str(document.get("format")).startswith("csalign-"):
            return True
    return False


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if is_remote(folder):
        if folder.exists():
            folder.fs.rm(folder.path, recursive=True)  # type: ignore[attr-defined]  # of UPath
    elif folder.is_dir():
        try:
            shutil.rmtree(folder)
        except OSError as error:  # which names what it is in by its last name alone
            raise OSError(error.errno, error.strerror, str(folder)) from error
