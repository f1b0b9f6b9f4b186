"""Small images: of a stored image for a page, and many as a contact sheet."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from csalign.core.errors import DataError
from csalign.sources.images import SUFFIXES, read_image

LARGEST_FILE = 64 << 20  # bytes; larger files get no thumbnail
SIDE, MARGIN = 160, 8  # pixels, in a contact sheet
LINE, LINES = 14, 2  # height of a line in pixels, and lines below each image
MOST_IMAGES = 100


def thumbnail(source: str | None, size: int, root: Path | None = None) -> bytes:
    """Return a small JPEG of an image file, or nothing if it cannot be read.

    Args:
        source: path of the file.
        size: pixels of its longer side, at most.
        root: folder of relative paths (default: the working directory), which they must not
            leave. The file there may have another suffix, as a rendered drawing has.
    """
    if source is None or "://" in source or "\0" in source:
        return b""
    path: Path | None = Path(source)
    try:
        if root is not None and not Path(source).is_absolute():
            path = _find_below(root, Path(source))
        if path is None or not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return b""
        image = read_image(path.read_bytes())
    except (DataError, OSError, ValueError):
        return b""
    image.thumbnail((size, size))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def draw_sheet(images: Sequence[Path], texts: Sequence[str], path: Path) -> None:
    """Draw n >= 1 images, up to `MOST_IMAGES`, each above two lines of its text, as a JPEG."""
    count = min(len(images), MOST_IMAGES)
    columns = min(10, math.ceil(math.sqrt(count)))
    width, height = SIDE + MARGIN, SIDE + LINES * LINE + MARGIN
    size = columns * width + MARGIN, math.ceil(count / columns) * height + MARGIN
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    for number in range(count):
        left = MARGIN + number % columns * width
        top = MARGIN + number // columns * height
        with Image.open(images[number]) as image:
            image.thumbnail((SIDE, SIDE))
            sheet.paste(image, (left, top))
        for line, words in enumerate(_wrap(texts[number], font)):
            draw.text((left, top + SIDE + line * LINE), words, fill="black", font=font)
    sheet.save(path, format="JPEG", quality=90)


def _find_below(root: Path, path: Path) -> Path | None:
    """Return the file of that name below a folder, or its one image of another suffix."""
    whole = (root / path).resolve()
    if not whole.is_relative_to(root.resolve()):
        return None
    if whole.is_file() and whole.suffix.lower() in SUFFIXES:
        return whole
    others = (whole.with_suffix(suffix) for suffix in sorted(SUFFIXES))
    return next((other for other in others if other.is_file()), None)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < LINES:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > SIDE:
            # Break between words if possible, and cut the last line anywhere.
            space = rest.rfind(" ", 0, end - 1)
            end = space if space > 0 and len(lines) + 1 < LINES else end - 1
        lines.append(rest[:end].strip())
        rest = rest[end:].strip()
    return lines
