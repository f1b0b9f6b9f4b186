"""Thumbnails of stored images, for a page."""

import logging
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from csalign.core.errors import DataError
from csalign.sources.images import read_image
from csalign.sources.records.files import IMAGE_SUFFIXES

LARGEST_FILE = 64 << 20  # bytes; larger files get no thumbnail

log = logging.getLogger(__name__)


@dataclass
class Pictures:
    """Find and shrink the pictures of a page; count those whose file is missing.

    Attributes:
        size: pixels of the longer side of a thumbnail, at most.
        folder: that the user named for the pictures, by their source or id, which must not leave
            it. The file there may have another suffix, as a rendered drawing has.
        root: folder that relative sources started from when the features were written, if known;
            without `folder` it is searched before the working directory.
    """

    size: int
    folder: Path | None = None
    root: str | None = None
    wanted: int = 0
    missing: list[str] = field(default_factory=list)

    def thumbnail(self, source: str | None, name: str | None = None) -> bytes:
        """Return a small JPEG of an image file, or nothing if there is none that can be read."""
        if source is None or "://" in source or "\0" in source:
            return b""
        self.wanted += 1
        try:
            if (path := self._find(source, name)) is None:
                self.missing.append(source)
                return b""
            if path.stat().st_size > LARGEST_FILE:
                return b""
            image = read_image(path.read_bytes())
        except (DataError, OSError, ValueError):
            return b""
        image.thumbnail((self.size, self.size))
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return buffer.getvalue()

    def warn(self) -> None:
        """Warn if pictures are missing."""
        if self.missing:
            log.warning(
                "%d of %d pictures not found under %s (such as %s); pass %s folder with --pictures",
                *(len(self.missing), self.wanted, self.folder or self.root or Path.cwd()),
                *(self.missing[0], "another" if self.folder else "their"),
            )

    def _find(self, source: str, name: str | None) -> Path | None:
        if self.folder is not None:
            places = [_find_below(self.folder, Path(each)) for each in (source, name) if each]
            places.append(Path(source) if Path(source).is_absolute() else None)
        else:
            places = [Path(self.root or "", source), Path(source)]
        return next((path for path in places if path is not None and path.is_file()), None)


def _find_below(root: Path, path: Path) -> Path | None:
    """Return the file of that name below a folder, or its one image of another suffix."""
    whole = (root / path).resolve()
    if not whole.is_relative_to(root.resolve()):
        return None
    if whole.is_file() and whole.suffix.lower() in IMAGE_SUFFIXES:
        return whole
    others = (whole.with_suffix(suffix) for suffix in sorted(IMAGE_SUFFIXES))
    return next((other for other in others if other.is_file()), None)
