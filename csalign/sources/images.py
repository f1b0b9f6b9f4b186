"""Decode an image to what encoders expect: upright, opaque, 8-bit RGB."""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from csalign.core.errors import DataError, reason_of
from csalign.core.paths import stand_in

# An encoder scales the short side up to its own size, so a sliver would grow without bound.
MAX_ASPECT = 200

_PHOTOMETRIC, _BITS_PER_SAMPLE, _MAX_SAMPLE = 262, 258, 281  # TIFF tags
_SAMPLE_FORMAT, _S_MIN_SAMPLE, _S_MAX_SAMPLE = 339, 340, 341
_DEPTHS = (8, 10, 12, 14, 16)  # bits per value in use
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")  # of MPO, the other frames are previews
_FLAT, _DARK, _LIGHT = 2, 32, 223  # largest difference, largest and smallest value

Pixels = npt.NDArray[Any]
Note = Callable[[str], None]


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
        # Version 2 of TGA is recognised by its end; version 1 has no sign of its own.
        tga = ("TGA",) if b"TRUEVISION-XFILE" in data[-26:] else ()
        with Image.open(BytesIO(data), formats=(*_formats(), *tga)) as image:
            _check_size(*image.size)
            args = image.tile[0].args if image.tile else ""
            stored = str(args[0] if isinstance(args, tuple) else args)  # such as RGB;16B
            image.load()
            pixels = _wide_pixels(data, image, stored, note)
            if pixels is None:
                decoded = _to_rgb(_upright(image))
            else:
                decoded = Image.fromarray(_to_8_bit(pixels, image, data, note)).convert("RGB")
            if image.format in _ANIMATED and getattr(image, "is_animated", False):
                note("with several frames or pages, of which the first is read")
        _note_if_flat(decoded, note)
        return decoded
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(stand_in(data[:1024]) or "is not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large()) from None
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DataError(f"cannot be read ({reason_of(error)})") from error


def is_image(path: Path) -> bool:
    """Recognise an image by the first bytes of its file; False if that cannot be read."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return False
    accepts = (Image.OPEN[name][1] for name in _formats())
    return len(start) == 16 and any(own is not None and own(start) is True for own in accepts)


@cache
def _formats() -> tuple[str, ...]:
    # Pillow knows more formats; some run other programs or are not pictures.
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")
    wanted = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL")
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _note_if_flat(image: Image.Image, note: Note) -> None:
    # A few of the pixels suffice for almost all pictures.
    what = None
    for side, choose in ((32, Image.Resampling.NEAREST), (256, Image.Resampling.BOX)):
        small = image.resize((min(side, image.width), min(side, image.height)), choose)
        bands = cast(tuple[tuple[int, int], ...], small.getextrema())
        lows, highs = zip(*bands, strict=True)
        if all(high - low <= _FLAT for low, high in bands):
            what = "of one colour"
        elif max(highs) < _DARK or min(lows) > _LIGHT:
            what = f"nearly {'black' if max(highs) < _DARK else 'white'}"
        else:
            return
    note(f"{what}; see whether they are pictures, rather than masks or measurements")


def _wide_pixels(data: bytes, image: Image.Image, stored: str, note: Note) -> Pixels | None:
    """Return values of more than 8 bits; None for 8 bits, or colours that use the upper 8 of 16."""
    is_grey = image.mode[0] in "FI"
    if not (is_grey or ";16" in stored):
        return None
    pixels: Pixels = np.asarray(_upright(image))
    if is_grey or pixels[..., :3].max() > 63:
        return pixels if is_grey else None
    if image.mode != "RGB":
        note("with alpha, dark as their 16 bits are not all used; save them with 8 bits")
        return None
    # Pillow keeps the upper 8 bits: the lower in the other order of bytes.
    is_big = stored[-1] == "B" or (stored[-1] == "N" and sys.byteorder == "big")
    swapped = f"{stored[:-1]}{'L' if is_big else 'B'}"
    with Image.open(BytesIO(data), formats=(str(image.format),)) as again:
        for k, tile in enumerate(again.tile):
            args = (swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped
            again.tile[k] = tile._replace(args=args)
        lower: Pixels = np.asarray(_upright(again))
    return pixels.astype(np.uint16) << 8 | lower


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
    grey: Pixels = scaled.astype(np.uint8)
    return np.invert(grey) if tags.get(_PHOTOMETRIC) == 0 else grey


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
    stated = min(16, max(8, int(np.max(largest)).bit_length())) if largest else bits
    if (largest or 8 <= bits < 16) and high < 1 << stated:
        return stated
    depth = next(bits for bits in _DEPTHS if high < 1 << bits)
    if depth < 16 and high:
        if not (pixels % 257).any():  # 8 bits that were scaled to 16
            return 16
        note(
            "with values of 16 or 32 bits that use a part of them, scaled by the bits in use; "
            "save them with 8 bits if their range is larger"
        )
    return depth
