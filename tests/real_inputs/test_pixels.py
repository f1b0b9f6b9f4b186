"""Pictures as people have them: the pixels that encoders see, and what is said of a guess."""

import io
import logging
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from csalign.core.errors import DataError
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract import extract
from csalign.sources.images import read_image

Pixels = npt.NDArray[Any]

X, Y = np.meshgrid(np.linspace(0, 6, 96), np.linspace(0, 4, 64))
GREY: Pixels = (127.5 + 127.5 * np.sin(X * Y)).astype(np.uint8)
WIDE = GREY.astype(np.uint16)
RGB: Pixels = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
GREYS = np.repeat(GREY[..., None], 3, axis=2)
PARTLY = "with values of 16 or 32 bits that use a part of them"
FLOATS = "of floating point, read as 0 to 1 or 0 to 255"
FRAMES = "with several frames or pages, of which the first is read"


def saved(pixels: Pixels | Image.Image, form: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def png(pixels: Pixels, significant: int | None = None) -> bytes:
    """Write a PNG of 16 bits per value, which Pillow writes for grey only."""
    height, width = pixels.shape[:2]
    colours = {2: 0, 3: 2}[pixels.ndim]
    sbit = [] if significant is None else [(b"sBIT", bytes([significant] * (1 + colours)))]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)),
        *sbit,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def tiff(pixels: Pixels, order: str = "<", photometric: int | None = None) -> bytes:
    """Write an uncompressed TIFF of any type and byte order."""
    height, width = pixels.shape[:2]
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]
    if photometric is None:
        photometric = 1 if samples == 1 else 2
    bits, form = 8 * pixels.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: samples}
    tags |= {278: height, 279: len(data), 339: form}
    start = 8 + len(data)
    after = start + 2 + 12 * len(tags) + 4
    entries, rest = b"", b""
    for tag, value in tags.items():
        if tag in (258, 339) and samples > 1:
            entries += struct.pack(f"{order}HHII", tag, 3, samples, after + len(rest))
            rest += struct.pack(f"{order}{samples}H", *[value] * samples)
        else:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + rest


def lab() -> bytes:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(GREYS), *profiles, outputMode="LAB")
    assert image is not None
    return saved(image, "TIFF")


def animated(form: str) -> bytes:
    others = [Image.fromarray(255 - GREYS)]
    return saved(GREYS, form, save_all=True, append_images=others, **{"lossless": True})


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    return saved(np.ascontiguousarray(RGB[::-1, ::-1]), "PNG", exif=exif)


def palette() -> bytes:
    image = Image.fromarray(GREY).convert("P")
    image.putpalette([value for k in range(256) for value in (k, k, k)])
    return saved(image, "PNG", transparency=0)


def on_white() -> Pixels:
    return np.where(GREY == 0, 255, GREY).astype(np.uint8)


# Bytes, the right grey or RGB values, their tolerance, and the start of what is said.
READ: dict[str, tuple[bytes, Pixels, int, str | None]] = {
    "8 bits": (saved(RGB, "PNG"), RGB, 0, None),
    "16 bits, grey": (png(WIDE * 257), GREY, 0, None),
    "12 of 16 bits, grey PNG": (png(WIDE * 16), GREY, 0, PARTLY),
    "10 of 16 bits, grey TIFF": (saved(WIDE * 4, "TIFF"), GREY, 0, PARTLY),
    "14 of 16 bits, big-endian TIFF": (tiff(WIDE * 64, ">"), GREY, 0, PARTLY),
    "12 bits, dark, as stated by sBIT": (png(WIDE // 4 * 16, 12), GREY // 4, 0, None),
    "16 bits, dark, scaled from 8": (png(WIDE // 4 * 257), GREY // 4, 0, None),
    "12 bits, as stated by MaxSampleValue": (
        saved(WIDE // 4 * 16, "TIFF", tiffinfo={281: 4095}),
        GREY // 4,
        0,
        None,
    ),
    "16 bits, RGB": (png(RGB.astype(np.uint16) * 257), RGB, 0, None),
    "12 of 16 bits, RGB PNG": (png(RGB.astype(np.uint16) * 16), RGB, 0, PARTLY),
    "12 of 16 bits, RGB TIFF": (tiff(RGB.astype(np.uint16) * 16), RGB, 0, PARTLY),
    "12 of 16 bits, RGB big-endian": (tiff(RGB.astype(np.uint16) * 16, ">"), RGB, 0, PARTLY),
    "12 of 16 bits, white is zero": (tiff(4080 - WIDE * 16, photometric=0), GREY, 1, PARTLY),
    "12 of 16 bits, compressed": (
        saved(WIDE * 16, "TIFF", compression="tiff_lzw"),
        GREY,
        0,
        PARTLY,
    ),
    "int32 to 255": (saved(GREY.astype(np.int32), "TIFF"), GREY, 0, PARTLY),
    "uint32, full range": (tiff(GREY.astype(np.uint32) * 0x1010101), GREY, 0, None),
    "int16": (tiff(GREY.astype(np.int16) * 16), GREY, 0, PARTLY),
    "float to 1": (saved(GREY.astype(np.float32) / 255, "TIFF"), GREY, 0, FLOATS),
    "float to 255": (saved(GREY.astype(np.float32), "TIFF"), GREY, 0, FLOATS),
    "float to 10, as stated": (
        saved(GREY.astype(np.float32) / np.float32(25.5), "TIFF", tiffinfo={341: 10.0}),
        GREY,
        1,
        None,
    ),
    "PGM of 12 bits": (b"P5 96 64 4080 " + (WIDE * 16).astype(">u2").tobytes(), GREY, 1, None),
    "TGA": (saved(RGB, "TGA"), RGB, 0, None),
    "CMYK TIFF": (saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB, 1, None),
    "CMYK JPEG of Adobe": (
        saved(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100),
        RGB,
        6,
        None,
    ),
    "YCbCr": (saved(Image.fromarray(GREYS).convert("YCbCr"), "TIFF"), GREYS, 3, None),
    "Lab": (lab(), GREYS, 3, None),
    "grey and alpha": (saved(Image.fromarray(GREY).convert("LA"), "PNG"), GREY, 0, None),
    "palette with a transparent entry": (palette(), on_white(), 0, None),
    "GIF of two frames": (animated("GIF"), GREYS, 0, FRAMES),
    "APNG of two frames": (animated("PNG"), GREYS, 0, FRAMES),
    "WebP of two frames": (animated("WEBP"), GREYS, 0, FRAMES),
    "TIFF of two pages": (animated("TIFF"), GREYS, 0, FRAMES),
    "upside down by EXIF": (turned(), RGB, 0, None),
    "another profile": (
        saved(
            RGB,
            "PNG",
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes(),
        ),
        RGB,
        0,
        None,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_picture_has_the_pixels_of_its_8_bit_version(name: str) -> None:
    data, expected, tolerance, said = READ[name]
    notes: list[str] = []
    pixels = np.asarray(read_image(data, notes.append)).astype(int)
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)

    assert np.abs(pixels - expected).max() <= tolerance
    assert abs(pixels.mean() - expected.mean()) <= 1
    assert len(notes) == (said is not None)
    assert all(note.startswith(said or "") for note in notes)


FLAT: dict[str, tuple[Image.Image, str | None]] = {
    "mask of 0 and 1": (Image.fromarray(GREY // 128), "of one colour"),
    "class numbers": (Image.fromarray(GREY // 13), "nearly black"),
    "class numbers in colours": (
        Image.fromarray(GREY // 13).convert("P", dither=Image.Dither.NONE),
        "nearly bl",
    ),
    "a colour": (Image.new("RGB", (40, 30), (9, 90, 200)), "of one colour"),
    "transparent": (Image.new("RGBA", (40, 30), (9, 90, 200, 0)), "of one colour"),
    "faint": (Image.fromarray(255 - GREY // 10), "nearly white"),
    "a hot pixel": (Image.fromarray(np.pad([[40]], 300).astype(np.uint8)), "nearly black"),
    "black and white": (Image.fromarray(GREY > 128), None),
    "a line on white": (Image.fromarray(np.where(X > 3, 0, 255).astype(np.uint8)), None),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_picture_of_nearly_one_brightness_is_noticed(name: str) -> None:
    image, said = FLAT[name]
    notes: list[str] = []
    read_image(saved(image, "PNG"), notes.append)

    assert len(notes) == (said is not None)
    assert all(note.startswith(said or "") for note in notes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.where(X > 3, np.nan, 1.0), "has grey values from nan to nan of unknown range"),
        (X - 3, "has grey values from -3 to 3 of unknown range"),
        (X * 1000, "has grey values from 0 to 6000 of unknown range"),
    ],
)
def test_a_range_that_cannot_be_guessed_is_refused(values: Pixels, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_image(saved(values.astype(np.float32), "TIFF"))

    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("save it with 8 or 16 bits per value")


def test_alpha_with_12_of_16_bits_is_said_to_be_dark() -> None:
    values = np.dstack([RGB.astype(np.uint16) * 16, np.full_like(WIDE, 65535)])
    notes: list[str] = []
    read_image(tiff(values), notes.append)

    assert notes[0].startswith("with alpha, dark as their 16 bits are not all used")


def in_folder(place: Path, data: bytes) -> Path:
    (place / "pictures").mkdir()
    (place / "pictures" / "a.png").write_bytes(data)
    return place / "pictures"


def in_tar(place: Path, data: bytes) -> Path:
    with tarfile.open(place / "0.tar", "w") as file:
        member = tarfile.TarInfo("a.png")
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))
    return place / "0.tar"


def in_parquet(place: Path, data: bytes) -> Path:
    pq.write_table(pa.table({"image": pa.array([data], pa.binary())}), place / "0.parquet")
    return place / "0.parquet"


@pytest.mark.parametrize("write", [in_folder, in_tar, in_parquet])
@pytest.mark.parametrize("encoder", ["timm:test_vit+none", "open_clip"])
def test_every_source_and_encoder_sees_the_same_and_says_so_in_one_line(
    tmp_path: Path,
    tiny_clip: tuple[Path, Path],
    write: Callable[[Path, bytes], Path],
    encoder: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}" if encoder == "open_clip" else encoder
    vectors = []
    for form, data in (("8", saved(GREY, "PNG")), ("12", png(WIDE * 16))):
        place = tmp_path / form
        place.mkdir()
        config: dict[str, Any] = {"image_encoder": name, "text_encoder": "none"}
        out = place / "out"
        extract(ExtractConfig(source=str(write(place, data)), out=out, dtype="float32", **config))
        vectors.append(pq.read_table(out / "images")["embedding"].to_pylist()[0])

    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)
    lines = [record.getMessage() for record in caplog.records if PARTLY in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"1 image {PARTLY}")
    assert str(tmp_path / "12") in lines[0]


def test_what_is_noticed_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k in range(3):
        Image.new("RGB", (40, 30), (k, 0, 0)).save(tmp_path / f"{k}.png")
    Image.fromarray(RGB).save(tmp_path / "3.png")
    config: dict[str, Any] = {"image_encoder": "timm:test_vit+none", "text_encoder": "none"}
    out = tmp_path.parent / f"{tmp_path.name}-out"
    with caplog.at_level(logging.WARNING):
        extract(ExtractConfig(source=str(tmp_path), out=out, workers=1, **config))

    assert "3 images of one colour; see whether they are pictures" in caplog.text
    assert f"(such as {tmp_path}/0.png)" in caplog.text
