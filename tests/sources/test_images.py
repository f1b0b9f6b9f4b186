import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from csalign.core.errors import DataError
from csalign.sources.images import read_image

Pixels = npt.NDArray[np.uint8]
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def read(path: Path) -> Pixels:
    image = read_image(path.read_bytes())
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: npt.NDArray[np.uint8]) -> Pixels:
    return np.repeat(values[..., None], 3, axis=2)


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_image(path.read_bytes())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rgb_is_left_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")

    assert (read(tmp_path / "x.png") == pixels).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned a quarter clockwise
    Image.fromarray(grey(RAMP)[:4]).save(tmp_path / "x.png", exif=exif)

    assert (read(tmp_path / "x.png") == np.rot90(grey(RAMP)[:4], -1)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.convert(mode).save(tmp_path / "x.png")

    assert read(tmp_path / "x.png").tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_damaged_exif_is_passed_over(tmp_path: Path) -> None:
    Image.fromarray(grey(RAMP)).save(tmp_path / "x.png", exif=b"Exif\0\0no such thing")

    assert (read(tmp_path / "x.png") == grey(RAMP)).all()


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 0, 0, 51)).save(tmp_path / "x.png")

    assert read(tmp_path / "x.png").tolist() == [[[255, 204, 204]]]


def test_a_palette_and_its_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)

    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3
    assert read(tmp_path / "plain.png").tolist() == [[red, green, blue]]
    assert read(tmp_path / "clear.png").tolist() == [[red, white, blue]]


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)

    assert np.abs(read(tmp_path / "x.jpg").astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_its_range(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / f"x.{suffix}")

    assert (read(tmp_path / f"x.{suffix}") == grey(RAMP)).all()


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(RAMP > 100).save(tmp_path / "x.png")

    assert (read(tmp_path / "x.png") == grey((RAMP > 100) * np.uint8(255))).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], lossless=True)

    assert (read(tmp_path / f"x.{suffix}") == [255, 0, 0]).all()


def test_a_suffix_does_not_decide_the_format(tmp_path: Path) -> None:
    Image.fromarray(grey(RAMP)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")

    assert (read(tmp_path / "x.jpg") == grey(RAMP)).all()


def test_what_is_no_image_is_told(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<!doctype html><title>404</title>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")

    assert error_of(tmp_path / "page.jpg").startswith("is a web page, which a server sent")
    assert error_of(tmp_path / "empty.jpg") == "is empty"
    assert error_of(tmp_path / "script.jpg") == "is not an image of a known format"


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "webp"])
def test_a_truncated_image_is_told(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    assert error_of(path)


def test_pillows_limit_of_pixels_is_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(grey(RAMP)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)

    assert error_of(tmp_path / "x.png") == "has more than 40 pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert error_of(tmp_path / "x.png") == "has more than 20 pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    assert read(tmp_path / "x.png").shape == (8, 8, 3)


def test_the_limit_of_pixels_needs_no_warnings_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(grey(RAMP)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        assert error_of(tmp_path / "x.png") == "has more than 40 pixels"


def test_a_small_file_of_a_huge_picture_is_refused_unread(tmp_path: Path) -> None:
    side = 50_000
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0),
        b"IDAT": rows,
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
    (tmp_path / "x.png").write_bytes(data)
    assert len(data) < 1 << 20

    tracemalloc.start()
    assert error_of(tmp_path / "x.png") == f"has more than {Image.MAX_IMAGE_PIXELS} pixels"
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_sliver_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (201, 1)).save(tmp_path / "x.png")

    assert error_of(tmp_path / "x.png") == "is 201 x 1, an aspect ratio above 200"


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_that_uses_a_part_of_16_bits_keeps_its_brightness(
    tmp_path: Path, name: str, bits: int
) -> None:
    Image.fromarray(RAMP.astype(np.uint16) << (bits - 8)).save(tmp_path / name)

    assert (read(tmp_path / name) == grey(RAMP)).all()


def test_the_bit_depth_that_a_tiff_states_is_used(tmp_path: Path) -> None:
    dark = RAMP // 8
    tags = {281: 4095}  # MaxSampleValue
    Image.fromarray(dark.astype(np.uint16) * 16).save(tmp_path / "tag.tiff", tiffinfo=tags)
    # Two values of 12 bits, 0x200 and 0x010, packed in three bytes.
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (278, 1), (279, 3)]
    packed = struct.pack("<2sHI4sH", b"II", 42, 12, b"\x20\x00\x10\x00", len(entries))
    for tag, value in entries:
        packed += struct.pack("<HHIHH", tag, 3, 1, value, 0)
    (tmp_path / "packed.tiff").write_bytes(packed + bytes(4))

    assert (read(tmp_path / "tag.tiff") == grey(dark)).all()
    assert read(tmp_path / "packed.tiff")[0, :, 0].tolist() == [0x20, 0x01]


@pytest.mark.parametrize("scale", [1, 257])
def test_32_bit_grey_keeps_its_brightness(tmp_path: Path, scale: int) -> None:
    Image.fromarray(RAMP.astype(np.int32) * scale).save(tmp_path / "x.tiff")

    assert (read(tmp_path / "x.tiff") == grey(RAMP)).all()


@pytest.mark.parametrize("scale", [1, 1 / 255])
def test_floating_point_grey_keeps_its_brightness(tmp_path: Path, scale: float) -> None:
    Image.fromarray(RAMP.astype(np.float32) * np.float32(scale)).save(tmp_path / "x.tiff")

    assert (read(tmp_path / "x.tiff") == grey(RAMP)).all()


def test_16_bit_grey_is_turned_upright(tmp_path: Path) -> None:
    Image.fromarray(RAMP[:4].astype(np.uint16) * 257).save(tmp_path / "x.tiff", tiffinfo={274: 6})

    assert (read(tmp_path / "x.tiff") == np.rot90(grey(RAMP)[:4], -1)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70_000]], np.int32), "grey values from 0 to 70000 of unknown range"),
        (np.array([[-1, 5]], np.int32), "grey values from -1 to 5 of"),
        (np.array([[0, 256.5]], np.float32), "grey values from 0 to 256.5 of unknown range"),
        (np.array([[0, np.nan]], np.float32), "grey values from nan to nan of"),
    ],
)
def test_pixels_of_unknown_range_are_refused(
    tmp_path: Path, values: npt.NDArray[np.generic], message: str
) -> None:
    Image.fromarray(values).save(tmp_path / "x.tiff")

    assert message in error_of(tmp_path / "x.tiff")
