"""Files that matched their checksum, remembered in the user's cache until they change."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from csalign.core import atomic
from csalign.core.paths import is_remote

_MOST = 4_096  # files that are remembered
# Seconds since a file changed, after which another change has another time on any file system.
_SETTLED = 2.0


def matches(path: Path, sha256: str, *, again: bool = False) -> bool:
    """Compare a file with its SHA-256, `again` or unless it matched and has not changed."""
    mark = _mark(path, sha256)
    if mark is not None and not again and _exists(mark):
        return True
    found = atomic.sha256_file(path) == sha256
    if mark is not None:
        with suppress(OSError):
            if not found or _mark(path, sha256) != mark:
                mark.unlink(missing_ok=True)
            elif time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > _SETTLED:
                _remember(mark)
    return found


def is_remembered(path: Path, sha256: str) -> bool:
    """Return whether a file matched its SHA-256 before and has not changed; reads nothing of it."""
    mark = _mark(path, sha256)
    return mark is not None and _exists(mark)


def _mark(path: Path, sha256: str) -> Path | None:
    """Return the empty file that stands for a state of a file, None if it cannot be one."""
    if is_remote(path):
        return None
    try:
        own, cache = path.stat(), os.environ.get("XDG_CACHE_HOME")
        root = (
            Path(cache)
            if cache and Path(cache).is_absolute()
            else Path.home().resolve(strict=True) / ".cache"
        )
        state = (own.st_size, own.st_mtime_ns, own.st_ctime_ns, own.st_ino, sha256, path.resolve())
    except (OSError, RuntimeError):  # no home
        return None
    name = hashlib.sha256("\n".join(map(str, state)).encode("utf-8", "surrogateescape")).hexdigest()
    return root / "csalign" / "verified" / name


def _exists(mark: Path) -> bool:
    with suppress(OSError):
        return mark.is_file()
    return False


def _remember(mark: Path) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    marks = [own for own in mark.parent.iterdir() if len(own.name) == len(mark.name)]
    if len(marks) > _MOST:
        for own in sorted(marks, key=lambda own: own.stat().st_mtime)[: _MOST // 4]:
            own.unlink(missing_ok=True)
