"""Pictures of stored images, small enough for a page."""

from io import BytesIO
from pathlib import Path

from csalign.core.errors import DataError
from csalign.sources.images import SUFFIXES, read_image

LARGEST_FILE = 64 << 20  # no thumbnail of a larger one


def thumbnail(source: str | None, size: int, root: Path | None = None) -> bytes:
    """A small JPEG of an image file that is still where it was, else nothing.

    Args:
        source: path of the file.
        size: pixels of its longer side, at most.
        root: folder that a relative path starts from (default: the working directory) and must
            not lead out of. A file there may have another suffix, as a rendered drawing has.
    """
    if source is None or "://" in source or "\0" in source:
        return b""
    path = Path(source)
    try:
        if root is not None and not path.is_absolute():
            found = _below(root, path)
            if found is None:
                return b""
            path = found
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return b""
        image = read_image(path.read_bytes())
    except (DataError, OSError, ValueError):
        return b""
    image.thumbnail((size, size))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _below(root: Path, path: Path) -> Path | None:
    """The file of that name below a folder, or its one image of another suffix."""
    whole = (root / path).resolve()
    if not whole.is_relative_to(root.resolve()):
        return None
    if whole.is_file() and whole.suffix.lower() in SUFFIXES:
        return whole
    others = (whole.with_suffix(suffix) for suffix in sorted(SUFFIXES))
    return next((other for other in others if other.is_file()), None)
