"""Every input of ``csalign extract``, and every way in which it can be wrong."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from csalign.cli.app import app
from csalign.features.join import ALL, load_rows
from csalign.features.reader import FeatureSet
from tests.bad_input.conftest import Refused


def png(size: tuple[int, int] = (24, 20)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.fixture
def encoder(tiny_clip: tuple[Path, Path]) -> str:
    """The tiny model by its local files."""
    return f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photos with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(png())
    (folder / "captions.csv").write_text("image,caption\na.png,one\nb.png,two\n")
    return folder


SOURCES: list[tuple[str, bytes | None, str]] = [
    ("x", None, "x: no such file or folder"),
    ("x.csv", None, "x.csv: no such file or folder"),
    ("x.csv", b"", "x.csv: "),
    ("x.csv", b"image,caption\n", "x.csv: "),
    ("x.csv", b"a,b\n1,2\n", "x.csv: "),
    ("x.csv", b"image,caption\nmissing.png,one\n", "missing.png"),
    ("x.csv", b"image,caption\n../../etc/passwd,one\n", "is outside of"),
    ("x.csv", b"image,caption\nhttp://127.0.0.1:9/a.png,one\n", "is a URL, which is not fetched"),
    ("x.csv", b"image,caption\n\xff\xfe,\n", "is not UTF-8"),
    ("x.csv", b'image,caption\n"a.png,one\n', "row 2"),
    ("x.csv", b"\x1f\x8b" + bytes(100), "x.csv: is compressed"),
    ("x.tsv", b"caption\n\n\n", "x.tsv: "),
    ("x.jsonl", b"", "x.jsonl: "),
    ("x.jsonl", b"[\n", "x.jsonl"),
    ("x.jsonl", b'{"caption": 5}\n', "x.jsonl"),
    ("x.jsonl", b'{"caption": "' + b"[" * 100_000 + b'"', "x.jsonl"),
    ("x.jsonl", b'{"caption": ' + b"[" * 100_000 + b"\n", "x.jsonl"),
    ("x.json", b"", "x.json: "),
    ("x.json", b"{}", "x.json: "),
    ("x.json", b'{"images": [], "annotations": []}', "x.json: "),
    ("x.json", b'{"images": {}, "annotations": 5}', "x.json: "),
    ("x.json", b"[" * 100_000, "x.json: "),
    ("x.json", b'{"images": [{"id": NaN}]}', "x.json: "),
    ("x.tar", b"", "x.tar: is empty"),
    ("x.tar", b"\xff" * 2000, "x.tar: is not a tar file"),
    ("x.tar", tar(("a.png", png()), ("a.txt", b"one"))[:700], "is cut short"),
    ("x.tar", tar(("a.png", b"x"), ("a.txt", b"one")), "is not an image of a known format"),
    ("x.tar", tar(("../a.png", png())), "is outside of the tar"),
    ("x.tar", tar(("a.cls", b"1")), "has neither an image nor a caption"),
    ("x.tar", tar(("a.json", b"[" * 100_000)), "its json is not valid"),
    ("x.tar", tar(), "the tar contains no sample"),
    ("x.parquet", b"", "x.parquet: "),
    ("x.parquet", b"PAR1" + bytes(100) + b"PAR1", "x.parquet: "),
    ("x.parquet", parquet(caption=["x"] * 40)[:-10], "x.parquet: "),
    ("x.parquet", parquet(caption=[1, 2]), "x.parquet: "),
    ("x.parquet", parquet(other=["x"]), "x.parquet: "),
    ("x.parquet", parquet(caption=pa.array([], pa.string())), "x.parquet: "),
    ("x.parquet", parquet(image=[b"no image"], caption=["x"]), "is not an image of a known format"),
    ("x.txt", b"", "x.txt: "),
    ("x.txt", b"\n\n", "x.txt: "),
    ("x.txt", b"\xff\n", "is not UTF-8"),
    ("x.png", png(), "x.png: is not a source"),
    ("x.zip", b"PK\x03\x04" + bytes(50), "x.zip: "),
    ("x.exe", b"MZ\0\0" * 99, "x.exe: is not a source"),
]


@pytest.mark.parametrize(("name", "content", "message"), SOURCES)
def test_sources_of_no_use_are_refused(
    tmp_path: Path, refused: Refused, encoder: str, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    refused(f"extract {name} --encoder {encoder} --out out", 1, message)


IMAGES = [
    (b"", "is empty"),
    (b"GIF89a", "a.png"),
    (b"<html></html>", "is a web page"),
    (png()[:400], "a.png"),
    (png((1, 900)), "an aspect ratio above 200"),
    (b"%PDF-1.4", "is not an image of a known format"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image of a known format"),
]


@pytest.mark.parametrize(("content", "message"), IMAGES)
def test_images_of_no_use_are_refused_and_listed(
    photos: Path, refused: Refused, encoder: str, content: bytes, message: str
) -> None:
    (photos / "a.png").write_bytes(content)
    done = refused(f"extract photos --encoder {encoder} --out out", 1, message)

    listed = photos.parent / "out.partial" / "failures.jsonl"
    assert [json.loads(line)["row"] for line in listed.read_text().splitlines()]
    assert "--max-failures" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("photos --out out", 2, "encoder is required"),
        ("photos --encoder none --out out", 2, "at least one must be an encoder"),
        ("photos --encoder nope:x --out out", 2, "nope:x: no encoder"),
        ("photos --encoder open_clip:nope/none --out out", 1, "nope"),
        ("photos --encoder open_clip:photos/captions.csv+x --out out", 1, "captions.csv"),
        ("photos --encoder open_clip:none.json+none.pt --out out", 1, "none.json"),
        ("photos --encoder ENCODER --out photos", 1, "photos: "),
        ("photos --encoder ENCODER --out photos/in", 1, "is inside photos"),
        ("photos --encoder ENCODER --out out --captions none.csv", 1, "none.csv"),
        ("photos --encoder ENCODER --out out --kind webdataset", 1, "photos"),
        ("photos --encoder ENCODER --out out --shard 5/2", 2, "shard"),
        ("photos --encoder ENCODER --out out --shard x", 2, "shard"),
        ("photos --encoder ENCODER --out out --max-failures 2", 2, "max-failures"),
        ("photos --encoder ENCODER --out out --max-tokens 2", 2, "max-tokens"),
        ("photos --encoder ENCODER --out out --dtype int8", 2, "dtype"),
        ("photos --encoder ENCODER --out out --batch-size 0", 2, "batch-size"),
        ("photos --encoder ENCODER --out out --image-column nope", 1, "nope"),
        ("photos --encoder ENCODER --out out --config none.toml", 2, "none.toml"),
        ("--encoder ENCODER --out out", 2, "missing SOURCE"),
    ],
)
def test_options_that_are_wrong_are_refused(
    photos: Path, refused: Refused, encoder: str, options: str, code: int, message: str
) -> None:
    refused(f"extract {options.replace('ENCODER', encoder)}", code, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"embed_dim": 1}', b"5"])
def test_model_configs_of_no_use_are_refused(
    photos: Path, refused: Refused, tiny_clip: tuple[Path, Path], content: bytes
) -> None:
    (photos.parent / "m.json").write_bytes(content)

    refused(f"extract photos --encoder open_clip:m.json+{tiny_clip[1]} --out out", 1, "m.json: ")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"cos\nsystem\n(S'touch owned'\ntR."])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.bin"])
def test_weights_of_no_use_are_refused(
    photos: Path, refused: Refused, tiny_clip: tuple[Path, Path], name: str, content: bytes
) -> None:
    (photos.parent / name).write_bytes(content)

    refused(f"extract photos --encoder open_clip:{tiny_clip[0]}+{name} --out out", 1, name)
    assert not (photos.parent / "owned").exists()


def test_captions_and_paths_are_kept_to_the_byte_in_every_normal_form(
    tmp_path: Path, encoder: str, normal_form: Callable[[str], str]
) -> None:
    folder = tmp_path / normal_form("fotoș é")
    folder.mkdir()
    names = [normal_form(f"é ﬁ Å {row}.png") for row in range(3)]
    captions = [normal_form(f"ô ² 한 {row}") + " x" * 300_000 * (row == 1) for row in range(3)]
    for name in names:
        (folder / name).write_bytes(png())
    rows = [{"image": image, "caption": text} for image, text in zip(names, captions, strict=True)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["extract", str(folder), "--encoder", encoder, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 0, done.output
    found = load_rows(FeatureSet.open(tmp_path / "out"), ALL)
    assert sorted(found.image_ids.to_pylist()) == sorted(names)
    assert sorted(found.captions.to_pylist()) == sorted(captions)


def test_repeated_ids_of_different_images_are_left_out(
    photos: Path, refused: Refused, encoder: str
) -> None:
    (photos / "captions.csv").write_text("image,caption,id\na.png,one,x\nb.png,two,x\n")

    refused(f"extract photos --encoder {encoder} --id-column id --out out", 1, "ids are unique")


def test_a_table_whose_images_are_elsewhere_says_how_to_name_their_folder(
    photos: Path, refused: Refused, encoder: str
) -> None:
    (photos / "captions.csv").rename(photos.parent / "t.csv")

    refused(
        f"extract t.csv --encoder {encoder} --out out",
        1,
        "run csalign extract FOLDER --captions t.csv",
    )
