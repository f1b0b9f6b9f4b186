"""Decode an image to what encoders expect: upright, opaque, 8-bit RGB."""

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from io import BytesIO
from threading import Lock
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from csalign.core.errors import DataError, reason_of
from csalign.core.figures import counted

SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".avif", ".tga"),
}
"""Suffixes of images in a folder, in lower case."""

# An encoder scales the short side up to its own size, so a sliver would grow without bound.
MAX_ASPECT = 200

_PHOTOMETRIC, _BITS_PER_SAMPLE, _MAX_SAMPLE = 262, 258, 281  # TIFF tags
_SAMPLE_FORMAT, _S_MIN_SAMPLE, _S_MAX_SAMPLE = 339, 340, 341
_DEPTHS = (8, 10, 12, 14, 16)  # bits per value in use
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")  # of MPO, the other frames are previews
_FLAT, _DARK, _LIGHT = 2, 32, 223  # largest difference, largest and smallest value

# What else a file is, by its first bytes.
_OTHERS = {
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file with git lfs pull",
    b"<": "is HTML, XML or SVG rather than an image; download it again",
    b"%PDF": "is a PDF; save it as an image",
    b"\xff\x0a": "is JPEG XL; install pillow-jxl-plugin to read it",
    b"\0\0\0\x0cJXL ": "is JPEG XL; install pillow-jxl-plugin to read it",
    **dict.fromkeys(
        (b"ftypheic", b"ftypheix", b"ftypmif1"), "is HEIC; install pillow-heif to read it"
    ),
}

Pixels = npt.NDArray[Any]
Note = Callable[[str], None]

logger = logging.getLogger(__name__)


class Notes:
    """Count what is noticed in images, with an example of each; any thread may add to it."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}
        self._lock = Lock()

    def add(self, example: str, what: str) -> None:
        """Count an image of which something was noticed."""
        with self._lock:
            count, first = self._found.get(what, (0, example))
            self._found[what] = count + 1, first

    def log(self) -> None:
        """Warn of all that was noticed, one line each, and forget it."""
        found, self._found = self._found, {}
        for what, (count, example) in found.items():
            logger.warning("%s %s, such as %s", counted(count, "image"), what, example)


def read_image(data: bytes, note: Note = lambda what: None) -> Image.Image:
    """Decode an image: first frame, EXIF orientation applied, alpha over white, 8-bit RGB.

    Values of more than 8 bits are scaled by the range that the file states or else by the bits
    that are in use. Colour profiles are ignored, as open_clip and timm do. Thread-safe. Images of
    more than Pillow's `Image.MAX_IMAGE_PIXELS` pixels, at which Pillow only warns, are refused.

    Args:
        data: the file.
        note: called with what is noticed, to be read after a number of images: a range that was
            guessed, several frames, or a picture that is nearly black or white, or of one colour.

    Raises:
        DataError: it cannot be read; the message is the reason alone, without the path.
    """
    try:
        if not data:
            raise DataError("is empty")
        with Image.open(BytesIO(data), formats=_formats(data)) as image:
            _check_size(*image.size)
            mode = _raw_mode(image)
            image.load()
            wide = image.mode == "F" or image.mode.startswith("I")
            pixels = np.asarray(_upright(image)) if wide else None
            if ";16" in mode and image.mode.startswith("RGB") and _is_dark(image):
                if image.mode == "RGB":
                    pixels = _wide_pixels(data, image, mode)
                else:
                    note(
                        "with alpha, dark as their 16 bits are not all used; save them with 8 bits"
                    )
            if pixels is not None:
                decoded = Image.fromarray(_to_8_bit(pixels, image, data, note)).convert("RGB")
            else:
                decoded = _to_rgb(_upright(image))
            if image.format in _ANIMATED and getattr(image, "is_animated", False):
                note("with several frames or pages, of which the first is read")
        _note_if_flat(decoded, note)
        return decoded
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(_what_else(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large()) from None
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DataError(f"cannot be read ({reason_of(error)})") from error


def is_image(start: bytes) -> bool:
    """Recognise an image that can be read by the first 16 bytes of its file."""
    accepts = (Image.OPEN[name][1] for name in _known_formats())
    return len(start) == 16 and any(own is not None and own(start) is True for own in accepts)


def _formats(data: bytes) -> tuple[str, ...]:
    # Version 2 of TGA is recognised by its end; version 1 has no sign of its own.
    return (*_known_formats(), *(["TGA"] if b"TRUEVISION-XFILE" in data[-26:] else ()))


@cache
def _known_formats() -> tuple[str, ...]:
    # Pillow knows more formats; some run other programs or are not pictures.
    Image.init()
    for plugin, register in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", "__name__")):
        with suppress(ImportError):
            opener = getattr(import_module(plugin), register)
            if callable(opener):
                opener()
    wanted = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL")
    return tuple(name for name in wanted if name in Image.OPEN)


def _what_else(data: bytes) -> str:
    start = data[:512].lstrip()
    for sign, reason in _OTHERS.items():
        if start.startswith(sign) or (sign.startswith(b"ftyp") and data[4:12] == sign):
            return reason
    return "is not an image of a known format"


def _check_size(width: int, height: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise DataError(_too_large())
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"is {width} x {height}, an aspect ratio above {MAX_ASPECT}")


def _too_large() -> str:
    return f"has more than {Image.MAX_IMAGE_PIXELS} pixels"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata, as is common on the web; the pixels are fine
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _note_if_flat(image: Image.Image, note: Note) -> None:
    # A few of the pixels suffice for almost all pictures.
    if _flatness(image.resize((32, 32), Image.Resampling.NEAREST)) is not None:
        width, height = (min(side, 256) for side in image.size)
        what = _flatness(image.resize((width, height), Image.Resampling.BOX))
        if what is not None:
            note(f"{what}; see whether they are pictures, rather than masks or measurements")


def _flatness(image: Image.Image) -> str | None:
    bands = cast(tuple[tuple[int, int], ...], image.getextrema())
    if all(high - low <= _FLAT for low, high in bands):
        return "of one colour"
    if max(high for _, high in bands) < _DARK:
        return "nearly black"
    return "nearly white" if min(low for low, _ in bands) > _LIGHT else None


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of how the pixels are stored, such as ``RGB;16B``."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) else args)


def _is_dark(image: Image.Image) -> bool:
    """Check whether the upper 8 bits of 16 use at most 6 in all colours."""
    bands = cast(tuple[tuple[int, int], ...], image.getextrema())
    return max(high for _, high in bands[:3]) < 64


def _wide_pixels(data: bytes, image: Image.Image, mode: str) -> Pixels:
    """Return all 16 bits of RGB, (h, w, 3), of which Pillow keeps the upper 8."""
    is_big = mode[-1] == "B" or (mode[-1] == "N" and sys.byteorder == "big")
    swapped = f"{mode[:-1]}{'L' if is_big else 'B'}"  # in which the lower come first
    with Image.open(BytesIO(data), formats=(str(image.format),)) as again:
        again.tile = [
            tile._replace(args=(swapped, *tile.args[1:]) if mode != tile.args else swapped)
            for tile in again.tile
        ]
        lower = np.asarray(_upright(again))
    return np.asarray(_upright(image)).astype(np.uint16) << 8 | lower


def _to_8_bit(pixels: Pixels, image: Image.Image, data: bytes, note: Note) -> Pixels:
    """Scale values of more than 8 bits, which Pillow itself clips at 255."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags and np.max(tags.get(_SAMPLE_FORMAT, 1)) == 1:
        pixels = pixels.view(np.uint32)
    low, high = pixels.min(), pixels.max()
    first, last = np.min(tags.get(_S_MIN_SAMPLE, 0)), np.max(tags.get(_S_MAX_SAMPLE, 0))
    limit = 255 if image.mode == "F" else 0xFFFF
    if image.mode == "F" and first <= low and high <= last:
        scaled = np.rint((pixels - first) * (255 / max(last - first, 1e-9)))
    elif pixels.dtype == np.uint32 and high > 1 << 31:
        scaled = pixels >> 24
    elif not (low >= 0 and high <= limit):  # also NaN
        raise DataError(
            f"has grey values from {low:g} to {high:g} of unknown range, not within 0 to {limit}; "
            "save it with 8 or 16 bits per value"
        )
    elif image.mode == "F":
        note("of floating point, read as 0 to 1 or 0 to 255 by the largest value")
        scaled = np.rint(pixels * (255 if high <= 1 else 1))
    else:
        scaled = pixels >> (_depth(pixels, image, data, note) - 8)
    grey = scaled.astype(np.uint8)
    return 255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey


def _depth(pixels: Pixels, image: Image.Image, data: bytes, note: Note) -> int:
    """Return the bits per value that a file states, or else those in use."""
    high = int(pixels.max())
    tags = getattr(image, "tag_v2", {})
    if image.format in ("PPM", "JPEG2000"):
        return 16  # Pillow scales these to the full range
    start = data[: data.find(b"IDAT")].partition(b"sBIT")[2] if image.format == "PNG" else b""
    if start:
        return start[0] if start[0] >= 8 and high < 1 << start[0] else 16
    largest = tags.get(_S_MAX_SAMPLE) or tags.get(_MAX_SAMPLE)
    bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 16)))
    stated = max(8, int(np.max(largest)).bit_length()) if largest else bits
    if (largest or 8 <= bits < 16) and high < 1 << stated:
        return stated
    depth = next(bits for bits in _DEPTHS if high < 1 << bits)
    if depth < 16 and high:
        if not (pixels % 257).any():
            return 16  # 8 bits that were scaled to 16
        note(
            "with values of 16 or 32 bits that use a part of them, scaled by the bits in use; "
            "save them with 8 bits if their range is larger"
        )
    return depth
