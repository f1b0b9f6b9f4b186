"""What lies below a folder, on a disk or in an object store, and how its files are read."""

import hashlib
import io
import os
import posixpath
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from csalign.core.errors import CsalignError, DataError
from csalign.core.paths import is_remote

MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 16 << 20
_BUGS = (TypeError, AttributeError, LookupError, AssertionError, ImportError)
_SPLITS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}


def files_below(folder: Path) -> dict[str, int | None]:
    """The files below a folder, by their path below it with ``/``, sorted; hidden ones are skipped.

    Returns:
        The size in bytes of each, None where it was not told without asking for each file.

    Raises:
        DataError: a folder cannot be read.
    """
    found = _remote_files(folder) if is_remote(folder) else _local_files(folder)
    return {name: found[name] for name in sorted(found)}


def size_of(path: Path) -> int:
    """Bytes of a file.

    Raises:
        DataError: there is no such file.
    """
    if not is_file(path):
        raise DataError(f"{path}: no such file")
    with told_of(path):
        return path.stat().st_size


def read_bounded(path: Path, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        DataError: it is larger, not there or no file; the message is the reason alone.
    """
    with told_of(path, named=False):
        status = path.stat()
        check_size(status.st_size, limit)
        # A named pipe would let the reader wait for ever.
        if not is_remote(path) and not stat.S_ISREG(status.st_mode):
            raise DataError("is no regular file")
        return path.read_bytes()


@contextmanager
def told_of(path: Path, *, named: bool = True) -> Iterator[None]:
    """Turn what reading a path raises into a `DataError`, whose message starts with it if named."""
    try:
        yield
    except CsalignError:
        raise
    except Exception as error:
        # The libraries that speak to object stores have errors of their own.
        is_expected = isinstance(error, OSError | ValueError)
        if not is_expected and (isinstance(error, _BUGS) or not is_remote(path)):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        told = f"cannot be read ({reason.splitlines()[0]})"
        if named:
            remedy = "; check the address, the keys and the network" if is_remote(path) else ""
            told = f"{path}: {told}{remedy}"
        raise DataError(told) from None


def is_file(path: Path) -> bool:
    """Whether there is such a file, which there is not under a name that no file may have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def opened(path: Path) -> BinaryIO:
    """Open a file to be read by lines, as far as one likes.

    Raises:
        DataError: it cannot be read.
    """
    with told_of(path):
        file: Any = path.open("rb")
    # What object stores give reads no line of bounded length.
    return cast(BinaryIO, io.BufferedReader(file, 1 << 20) if is_remote(path) else file)


@contextmanager
def local_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that has a descriptor: a remote one is copied to a temporary file first.

    Raises:
        DataError: it cannot be read.
    """
    with ExitStack() as stack:
        with told_of(path):
            file: BinaryIO = stack.enter_context(path.open("rb"))
            if is_remote(path):
                copy = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, copy, 8 << 20)
                copy.flush()
                file = cast(BinaryIO, copy)
        yield file


def check_size(size: int, limit: int = MAX_IMAGE_BYTES) -> None:
    """Refuse what is larger than anything that is meant.

    Raises:
        DataError: the message is the reason alone.
    """
    if size > limit:
        raise DataError(f"has {size} bytes, more than {limit >> 20} MiB")


def decoded(data: bytes) -> str:
    """UTF-8 text, without a byte order mark.

    Raises:
        DataError: it is not UTF-8; the message is the reason alone.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"is not UTF-8 (byte 0x{byte:02x} at offset {error.start})") from None


def is_text(name: str) -> bool:
    """Whether a name is UTF-8 on the disk."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """A name as it can be written, with what is not UTF-8 in it escaped."""
    return name.encode(errors="backslashreplace").decode()


def name_flaw(name: str) -> str | None:
    """What is wrong with a file's name, None if nothing is."""
    return None if is_text(name) else f"{shown(name)}: file name is not UTF-8; rename the file"


def path_below(root: Path, path: str) -> str:
    """An image path as a table gives it, made relative to `root` and normal, with ``/``.

    Raises:
        DataError: it is a URL or lies elsewhere; the message is the reason alone.
    """
    given = path
    if "://" in path:
        start = f"{root}/"
        if not (is_remote(root) and path.startswith(start)):
            raise DataError(
                f"image {path!r:.200} is a URL, which is not fetched; download it first"
            )
        path = path.removeprefix(start)
    elif os.path.isabs(path) and not is_remote(root):  # noqa: PTH117
        path = os.path.relpath(path, root)
    normal = posixpath.normpath(path)
    if normal in ("..", ".") or normal.startswith(("../", "/")) or "\0" in normal:
        remedy = "move it inside"
        if given.startswith("/"):
            remedy += ", or name a folder that holds all images with --images"
        raise DataError(f"image {given!r:.200} lies outside of {root}; {remedy}")
    return normal


def split_of(name: str) -> str | None:
    """The split that a file's name, or else its folder's, speaks of, spelled the usual way.

    ``train-00000-of-00002.parquet``, ``validation/0.tar`` and ``captions_val2017.json`` do.
    """
    *folders, file = name.split("/")
    for part in (file, *folders[-1:]):
        for word in re.findall(r"[a-z]+", part.lower().split(".")[0]):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def fingerprint(parts: Iterable[object]) -> str:
    """Hex SHA-256 of a list of values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part!r}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _local_files(folder: Path) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    prefix = len(os.path.join(folder, ""))  # noqa: PTH118
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        # Hidden entries are what editors and file managers leave behind, such as ._photo.jpg.
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            if name[0] != ".":
                found[os.path.join(parent, name)[prefix:].replace(os.sep, "/")] = None  # noqa: PTH118
    return found


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _remote_files(folder: Any) -> dict[str, int | None]:
    base = folder.path.rstrip("/")  # one listing, where a walk would ask for each folder
    found: dict[str, int | None] = {}
    for path, entry in folder.fs.find(base, detail=True).items():
        name = path[len(base) :].strip("/")
        if name and not path.endswith("/") and not any(p[0] == "." for p in name.split("/") if p):
            found[name] = entry.get("size")
    return found
