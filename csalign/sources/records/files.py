"""List, name and read the files of a source, on a disk or in an object store."""

import hashlib
import io
import logging
import os
import posixpath
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote

from csalign.core.enums import usual_split
from csalign.core.errors import ConfigError, CsalignError, DataError, reason_of
from csalign.core.figures import counted
from csalign.core.paths import is_remote, likely_meant, parse_location, stand_in

MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 16 << 20
MAX_LINE_BYTES = 64 << 20
_MAX_FILES = 100_000
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".avif", ".tga"),
}
"""Suffixes of images in a folder, in lower case."""
_BUGS = (TypeError, AttributeError, LookupError, AssertionError, ImportError)
_NUL = "contains NUL bytes, as of find -print0 or UTF-16; write one entry per line, in UTF-8"
_BRACES = re.compile(r"\{([^{}]*)\}")
_BRACE_FORMS = "write {00000..00012}, or {a,b}"
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILDCARD = re.compile(r"[*?[]")
_NUMBERED = re.compile(r"(.*?)(\d+)(?:-of-(\d+)[^/]*|[^\d/]*)")
_DATE = 8  # digits, which are no series
_CLUTTER = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")  # of file managers

logger = logging.getLogger(__name__)


def files_below(folder: Path) -> dict[str, int | None]:
    """Return the size of each file (None if unknown) below a folder, sorted by relative path.

    Raises:
        DataError: a folder cannot be read.
    """
    found = _remote_files(folder) if is_remote(folder) else _local_files(folder)
    return {name: found[name] for name in sorted(found)}


def expand_pattern(source: str) -> list[Path] | None:
    """List the files that a pattern names, in its order; those of a wildcard are sorted.

    Args:
        source: ``{00000..00012}`` and ``{a,b}`` are replaced by each of their values, ``*``, ``?``
            and ``[..]`` match existing files, ``::`` joins several patterns.

    Returns:
        None for a plain path.

    Raises:
        ConfigError: its braces are not a pattern, or it names too many files.
        DataError: a wildcard matches nothing, or a file is repeated or missing.
    """
    if "::" not in source and re.search(r"[{}*?[]", source) is None:
        return None
    found: list[Path] = []
    for text in (text for part in source.split("::") for text in _expand_braces(part)):
        found += _glob(text) if _WILDCARD.search(text) else [parse_location(text)]
        if len(found) > _MAX_FILES:
            raise ConfigError(f"{source}: names more than {_MAX_FILES} files; narrow the pattern")
    if len({str(path) for path in found}) < len(found):
        raise DataError(f"{source}: names a file twice; name each once")
    missing = [path for path in found if not is_remote(path) and not path.exists()]
    if missing:
        raise DataError(
            f"{source}: {len(missing)} of its {len(found)} files do not exist, such as "
            f"{missing[0]}; correct the pattern or add the files"
        )
    return found


def common_folder(paths: Sequence[Path]) -> Path:
    """Find the deepest folder that contains all of the files."""
    folder = paths[0].parent
    while folder != folder.parent and not all(folder in path.parents for path in paths):
        folder = folder.parent
    return folder


def size_of(path: Path, known: int | None = None) -> int:
    """Return the size of a file in bytes, unless `known`; raises `DataError` if there is none."""
    with translate_errors(path):
        return path.stat().st_size if known is None else known


def is_file(path: Path) -> bool:
    """Check for a file; False also for a name that no file may have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_bounded(path: Path, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes, or raise `DataError` with the reason alone."""
    with translate_errors(path, named=False):
        status = path.stat()
        check_size(status.st_size, limit)
        # Reading a named pipe would wait for ever.
        if not is_remote(path) and not stat.S_ISREG(status.st_mode):
            raise DataError("is not a regular file")
        return path.read_bytes()


@contextmanager
def translate_errors(path: Path, *, named: bool = True) -> Iterator[None]:
    """Raise what reading a path raises as a `DataError`, which starts with the path if `named`."""
    try:
        yield
    except CsalignError:
        raise
    except Exception as error:
        # The libraries behind object stores raise errors of their own.
        is_expected = isinstance(error, OSError | ValueError)
        if not is_expected and (isinstance(error, _BUGS) or not is_remote(path)):
            raise
        reason = getattr(error, "strerror", None) or reason_of(error)
        message = f"cannot be read ({reason})"
        if named:
            remedy = "; check the address, the keys and the network" if is_remote(path) else ""
            message = f"{path}: {message}{remedy}"
        raise DataError(message) from None


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading in order, or raise `DataError`."""
    with translate_errors(path):
        file: Any = path.open("rb")
    # The file objects of object stores ignore the length given to readline.
    return cast(BinaryIO, io.BufferedReader(file, 1 << 20) if is_remote(path) else file)


class Line(NamedTuple):
    """A line of a text file: 1-based number, byte offset, text, and why it is not text in UTF-8."""

    number: int
    offset: int
    text: str
    error: str | None


def read_lines(name: Path, file: BinaryIO, *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Yield the lines of a UTF-8 file with their line ends.

    Raises:
        DataError: the file cannot be read, or a line is too long; the message names the row.
    """
    number, offset = 1, 0
    with translate_errors(name):
        while data := file.readline(max_bytes + 1):
            if len(data) > max_bytes:
                raise DataError(
                    f"{name}, row {number}: is longer than {max_bytes >> 20} MiB; end each row "
                    "with a line break"
                )
            error = _NUL if b"\0" in data else None
            try:
                text = decode_text(data, offset)
            except DataError as reason:
                error = (
                    f"{reason}; save the table as UTF-8, as by iconv -t utf-8 -f with its encoding "
                    "(cp1252 in Western Europe, gb18030 in China, shift_jis in Japan)"
                )
                text = data.decode(errors="surrogateescape")
            yield Line(number, offset, text, error)
            number += 1
            offset += len(data)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Copy a remote file to a temporary one; a local file is used as it is."""
    if not is_remote(path):
        yield path
        return
    with open_file(path) as file, tempfile.NamedTemporaryFile(suffix=path.suffix) as copy:
        with translate_errors(path):
            shutil.copyfileobj(file, copy, 8 << 20)
            copy.flush()
        yield Path(copy.name)


def check_size(size: int, limit: int = MAX_IMAGE_BYTES) -> None:
    """Raise `DataError` for implausibly large data."""
    if size > limit:
        raise DataError(f"has {size} bytes, more than {limit >> 20} MiB")


def decode_text(data: bytes, start: int = 0) -> str:
    """Decode the UTF-8 at byte `start` of a file, without byte order mark, or raise `DataError`."""
    if data.startswith(b"version https://git-lfs") and not start:
        raise DataError(stand_in(data))
    try:
        return data.decode().removeprefix("" if start else "\ufeff")
    except UnicodeDecodeError as error:
        byte, offset = data[error.start], start + error.start
        raise DataError(f"is not UTF-8 (byte 0x{byte:02x} at offset {offset})") from None


def printable(name: str) -> str:
    """Escape what is not UTF-8 in a file name."""
    return name.encode(errors="backslashreplace").decode()


def name_error(name: str) -> str | None:
    """Describe the error in the name of a file, None if there is none."""
    escaped = printable(name)
    return None if escaped == name else f"{escaped}: file name is not UTF-8; rename the file"


def path_below(root: Path, path: str) -> str:
    """Make an image path of a table relative to `root`; one outside of it raises `DataError`."""
    given = path
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    if "://" in path:
        if not (is_remote(root) and path.startswith(f"{root}/")):
            raise DataError(
                f"image {path!r:.200} is a URL, which is not fetched; download it first"
            )
        path = path.removeprefix(f"{root}/")
    elif os.path.isabs(path) and not is_remote(root):  # noqa: PTH117
        path = os.path.relpath(path, root)
    normal = posixpath.normpath(path)
    if normal in ("..", ".") or normal.startswith(("../", "/")) or "\0" in normal:
        remedy = "move it inside"
        if given.startswith("/"):
            remedy += ", or name the folder of all images with --images"
            remedy = likely_meant(Path(given), root).removeprefix("; ") or remedy
        raise DataError(f"image {given!r:.200} is outside of {root}; {remedy}")
    return normal


def split_of(name: str, *, inwards: bool = False) -> str | None:
    """Recognise the split in the name of a file, or else of its folder; or of any, from outside.

    ``train-00000-of-00002.parquet``, ``validation/0.tar`` and ``captions_val2017.json`` have one.
    """
    for part in name.split("/") if inwards else reversed(name.split("/")[-2:]):
        for word in re.findall(r"[a-z]+", part.lower()):
            if (split := usual_split(word)) is not None:
                return split
    return None


def warn_of_gaps(root: Path, names: Iterable[str]) -> None:
    """Warn of files that are missing in a numbered series, such as 0.tar, 1.tar and 3.tar."""
    series: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            start, number, total = match.groups("")
            series.setdefault((start, total), {})[int(number)] = number
    missing = []
    for (start, total), own in series.items():
        first, last, width = min(own), max(own), len(own[min(own)])
        if total:
            first, last = (0, int(total) - 1) if last < int(total) else (1, int(total))
        if total or (last - first <= 3 * len(own) and width < _DATE):
            gaps = set(range(first, min(last, _MAX_FILES) + 1)) - own.keys()
            missing += [f"{start}{number:0{width}d}" for number in sorted(gaps)]
    if missing:
        logger.warning(
            f"{root}: {counted(len(missing), 'file')} of a numbered series not found, such as "
            f"{missing[0]}; add them, or read the rest alone"
        )


def fingerprint(parts: Iterable[object]) -> str:
    """Return the hex SHA-256 of a list of values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part!r}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _local_files(folder: Path) -> dict[str, int | None]:
    root, seen = os.path.realpath(folder), set()
    found: dict[str, int | None] = {}
    folders, links = [""], list[str]()
    outside: dict[str, list[str]] = {"folder": [], "file": []}
    while folders or links:
        # Links come last, so that a folder is read once, under its own name.
        parent = folders.pop() if folders else links.pop()
        real = os.path.realpath(os.path.join(root, parent))  # noqa: PTH118
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(real))
        except OSError as error:
            raise DataError(f"{folder / parent}: cannot be read ({error.strerror})") from None
        for entry in entries:
            name = parent + entry.name
            if _is_clutter(entry.name):
                continue
            is_link = entry.is_symlink()
            is_folder = os.path.isdir(entry) if is_link else entry.is_dir()  # noqa: PTH112
            leads_out = is_link and not f"{os.path.realpath(entry)}/".startswith(f"{root}/")
            if leads_out:
                outside["folder" if is_folder else "file"].append(name)
            if not is_folder:
                found[name] = None
            elif not leads_out:
                (links if is_link else folders).append(f"{name}/")
    for what, names in outside.items():
        if names:
            logger.warning(
                f"{folder}: {counted(len(names), what)} behind links out of it "
                f"{'not ' if what == 'folder' else ''}read, such as {names[0]}"
            )
    return found


def _is_clutter(name: str) -> bool:
    """Recognise what editors and file managers leave behind, such as ._photo.jpg."""
    return name[0] == "." or name in _CLUTTER


def _remote_files(folder: Any) -> dict[str, int | None]:
    base = folder.path.rstrip("/")  # one listing; a walk would send a request per folder
    found: dict[str, int | None] = {}
    for path, entry in folder.fs.find(base, detail=True).items():
        name = path[len(base) :].strip("/")
        hidden = any(_is_clutter(part) for part in name.split("/") if part)
        if name and not path.endswith("/") and not hidden:
            found[name] = entry.get("size")
    return found


def _expand_braces(text: str) -> Iterator[str]:
    match = _BRACES.search(text)
    if match is None:
        if "{" in text or "}" in text:
            raise ConfigError(f"{text}: has an unpaired brace; {_BRACE_FORMS}")
        yield text
        return
    choices: Iterable[str] = match[1].split(",")
    if (limits := _RANGE.fullmatch(match[1])) is not None:
        first, last = int(limits[1]), int(limits[2])
        step = 1 if first <= last else -1
        choices = (f"{n:0{len(limits[1])}d}" for n in range(first, last + step, step))
    elif "," not in match[1]:
        raise ConfigError(f"{text}: {match[0]} is neither a range nor a list; {_BRACE_FORMS}")
    for choice in choices:
        yield from _expand_braces(f"{text[: match.start()]}{choice}{text[match.end() :]}")


def _glob(text: str) -> list[Path]:
    # The part before the first wildcard is a plain path, from which local and remote paths glob.
    plain, slash, _ = _WILDCARD.split(text, maxsplit=1)[0].rpartition("/")
    base = parse_location(plain + slash if plain or slash else ".")
    found = sorted(base.glob(text[len(plain + slash) :]), key=str)
    if not found:
        raise DataError(f"{text}: matches no file")
    return found
