"""Files that appear under their final name only when they are complete."""

import errno
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, Any

from csalign.core.errors import OutputError, reason_of
from csalign.core.locks import try_lock
from csalign.core.paths import is_remote, is_store_error

TEMPORARY = ".tmp"
_FULL = "free some space, or choose another --out"
_BROKEN = "check the disk and its mount, then run the same command again"
_REMEDIES = {
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV), _BROKEN),
    **dict.fromkeys((errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENXIO), _BROKEN),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    errno.EACCES: "check the permissions, or choose another --out",
    errno.EPERM: "check the permissions, or choose another --out",
    errno.EROFS: "choose another --out",
}


def os_error(error: Exception, path: Path | str | None = None) -> str:
    """Word an error of a file system or object store: file, reason and remedy."""
    name = getattr(error, "filename", None) or path
    number = getattr(error, "errno", None)
    if name is not None and ("://" in str(name) or is_store_error(error)):
        is_silent = isinstance(error, TimeoutError) and not str(error)
        reason = "no answer in time" if is_silent else reason_of(error)
        return f"{name}: {reason}; check the address, the keys and the network"
    # Some libraries replace the system's message by a vaguer one but keep its number.
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    number = int(quoted[1]) if quoted else number
    if name is None and isinstance(error, FileNotFoundError) and number:
        return "the working directory was removed; change to another one"
    reason = os.strerror(number) if number else str(error) or type(error).__name__
    remedy = _REMEDIES.get(number or 0)
    return f"{name}: " * (name is not None) + reason + (f"; {remedy}" if remedy else "")


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Raise errors of a file system or object store as an `OutputError` that names the file.

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
    r"""Write a text file atomically, as UTF-8 with ``\n`` line ends, into a folder that exists."""
    if is_remote(path):
        path.write_bytes(text.encode())
        return
    with translate_os_errors(path), _beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically; NaN is refused."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a local path to write a file to, which is then renamed (or uploaded) to `path`.

    It is removed if the block raises.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as temporary:
        yield temporary


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path` that is then renamed to it; removed if the block raises."""
    file = _locked_file(path)
    temporary = Path(file.name)
    try:
        yield temporary
        os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error says more than one of the cleanup
            temporary.unlink(missing_ok=True)
        raise
    finally:
        file.close()


def _locked_file(path: Path) -> IO[bytes]:
    """Open a new locked file beside `path`; the lock marks it as in use by a live process."""
    while True:
        # Another process, maybe on another machine, may be writing the same file.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
        file = temporary.open("xb")
        try_lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed as stale before it was locked


def remove_stale_temporaries(path: Path) -> None:
    """Remove temporary files of killed processes that were writing `path`, a local file."""
    for left in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 12}{TEMPORARY}"):
        with suppress(OSError), left.open("rb") as file:
            if try_lock(file, without_locks=False):
                left.unlink()


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload(local: Path, remote: Path) -> None:
    """Copy a local file to an object store."""
    remote.parent.mkdir(parents=True, exist_ok=True)  # object stores need none, others do
    remote.fs.put_file(str(local), remote.path)  # type: ignore[attr-defined]  # of UPath
