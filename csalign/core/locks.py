"""Locks on files and folders, which end with the process that holds them."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from csalign.core.errors import OutputError

log = logging.getLogger(__name__)

LOCK = ".csalign-lock"  # in a folder that is being built; a commit removes it
# Errors of flock on a file system without locks, such as Lustre mounted without "flock".
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_warned: set[Path] = set()


def try_lock(
    file: IO[str] | IO[bytes],
    *,
    shared: bool = False,
    wait: bool = False,
    without_locks: bool = True,
) -> bool:
    """Lock an open file; return False if another process holds its lock.

    On a file system without locks this warns once per folder and returns `without_locks`.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        folder = Path(file.name).parent
        if folder not in _warned:
            _warned.add(folder)
            log.warning(
                "%s: this file system has no file locks (%s); run only one csalign at a time on "
                "this output",
                folder,
                error.strerror,
            )
        return without_locks
    return True


def unlock(file: IO[str] | IO[bytes]) -> None:
    """Release the lock of an open file."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_UN)


def is_current(file: IO[str] | IO[bytes], path: Path) -> bool:
    """Return whether an open file is still the one at `path`, neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create a folder if needed and keep other processes from writing in it.

    The lock is held until the block ends, also after the folder was renamed by a commit.

    Raises:
        OutputError: another process holds the lock.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        try:
            file = path.open("w")
        except FileNotFoundError:
            continue  # another process committed the folder in between
        with file:
            if not try_lock(file):
                raise OutputError(in_use(folder))
            if is_current(file, path):
                yield
                return


def in_use(folder: Path) -> str:
    """Word the error of a folder whose lock is held."""
    return f"{folder}: another process is writing there; wait for it, or choose another --out"
