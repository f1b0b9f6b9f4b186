"""Decode an image the way encoders want it: upright, opaque, 8-bit RGB."""

from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from csalign.core.errors import DataError

SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"),
}
"""What counts as an image in a folder, whatever its case."""

# An encoder scales the short side up to its own size, so a sliver would grow without bound.
MAX_ASPECT = 200


def read_image(data: bytes) -> Image.Image:
    """Decode an image: first frame, EXIF orientation applied, alpha over white, 8-bit RGB.

    May run in several threads. Pillow's limit of pixels, `Image.MAX_IMAGE_PIXELS`, at which it
    warns, is the limit.

    Raises:
        DataError: it cannot be read; the message is the reason alone, without the path.
    """
    try:
        if not data:
            raise DataError("is empty")
        with Image.open(BytesIO(data), formats=_formats()) as image:
            _check_pixels(*image.size)
            _check_sides(*image.size)
            image.load()
            return _to_rgb(_upright(image))
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("is no image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large()) from None
    except Exception as error:  # what a decoder raises on damaged bytes is not bounded
        raise DataError(_reason(error)) from error


@cache
def _formats() -> tuple[str, ...]:
    # Pillow knows more formats; some of them run other programs or are no pictures.
    Image.init()
    wanted = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


def _check_pixels(width: int, height: int) -> None:
    # Pillow itself only warns, up to twice its limit.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise DataError(_too_large())


def _too_large() -> str:
    return f"has more than {Image.MAX_IMAGE_PIXELS} pixels"


def _check_sides(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"is {width} x {height}, more than {MAX_ASPECT} times as long as wide")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata, as is common on the web; the pixels are fine
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.mode == "F":
        raise DataError("has floating-point pixels, whose range is not known")
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit grey at 255, which turns most of it white.
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise DataError("has 32-bit pixels, whose range is not known")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"cannot be read ({lines[0] if lines else type(error).__name__})"
