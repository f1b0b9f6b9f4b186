"""Decode an image to what encoders expect: upright, opaque, 8-bit RGB."""

import logging
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from csalign.core.errors import DataError, reason_of
from csalign.core.paths import stand_in

SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"),
}
"""Suffixes of images in a folder, in lower case."""

# An encoder scales the short side up to its own size, so a sliver would grow without bound.
MAX_ASPECT = 200

_BITS_PER_SAMPLE, _MAX_SAMPLE, _S_MAX_SAMPLE = 258, 281, 341  # TIFF tags
_DEPTHS = (8, 10, 12, 14, 16)  # bits per grey value in use

logger = logging.getLogger(__name__)


def read_image(data: bytes) -> Image.Image:
    """Decode an image: first frame, EXIF orientation applied, alpha over white, 8-bit RGB.

    Grey values of 16 and 32 bits are scaled by their bit depth. Thread-safe. Images of more than
    Pillow's `Image.MAX_IMAGE_PIXELS` pixels, at which Pillow only warns, are refused.

    Raises:
        DataError: it cannot be read; the message is the reason alone, without the path.
    """
    try:
        if not data:
            raise DataError("is empty")
        with Image.open(BytesIO(data), formats=_formats()) as image:
            _check_size(*image.size)
            image.load()
            depth = _stated_depth(image) if image.mode.startswith("I") else None
            return _to_rgb(_upright(image), depth)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(stand_in(data[:1024]) or "is not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large()) from None
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DataError(f"cannot be read ({reason_of(error)})") from error


@cache
def _formats() -> tuple[str, ...]:
    # Pillow knows more formats; some run other programs or are not pictures.
    Image.init()
    wanted = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


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


def _stated_depth(image: Image.Image) -> int | None:
    """Return the bits per grey value that the file states, None if it does not."""
    if image.format in ("PPM", "JPEG2000"):
        return 16  # Pillow scales these to the full range
    tags = getattr(image, "tag_v2", {})
    largest = tags.get(_S_MAX_SAMPLE) or tags.get(_MAX_SAMPLE)
    if largest:
        return max(8, int(np.max(largest)).bit_length())
    bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 16)))
    return bits if 8 <= bits < 16 else None


def _to_rgb(image: Image.Image, depth: int | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image, depth)
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _to_8_bit(image: Image.Image, depth: int | None) -> Image.Image:
    """Scale grey values of more than 8 bits, which Pillow itself clips at 255."""
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    limit = 255 if image.mode == "F" else 0xFFFF
    if not (low >= 0 and high <= limit):  # also NaN
        raise DataError(
            f"has grey values from {low:g} to {high:g} of unknown range, not within 0 to {limit}; "
            "save it with 8 or 16 bits per value"
        )
    if image.mode == "F":
        return Image.fromarray(np.rint(pixels * (255 if high <= 1 else 1)).astype(np.uint8))
    if depth is None or high >= 1 << depth:
        depth = next(bits for bits in _DEPTHS if high < 1 << bits)
        if depth < 16 and high:
            _warn_of_depth(depth, int(high))
    return Image.fromarray((pixels >> (depth - 8)).astype(np.uint8))


@cache
def _warn_of_depth(depth: int, high: int) -> None:
    logger.warning(
        "a grey image of 16 or 32 bits has values up to %d only and is read as %d-bit; if its "
        "range is larger, save it with 8 bits per value",
        *(high, depth),
    )
