import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.sources.records import Record, TextInput
from csalign.sources.records.open import SourceOptions, open_source

MakeImages = Callable[..., Path]
Records = Callable[..., list[Record]]
Outline = Callable[..., list[tuple[Any, ...]]]
Flaws = Callable[..., list[tuple[int | None, str]]]


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def error_of(source: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_source(source, SourceOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_image_has_the_captions_beside_it(make_images: MakeImages, records: Records) -> None:
    folder = make_images("b.png", "a.JPG", "sub/c.v2.PNG", "lone.png")
    write(folder, b="\ufeffone\r\n\n two \none\n")
    (folder / "a.TXT").write_text("of a")
    (folder / "sub" / "c.v2.txt").write_text("dots\n")
    (folder / "sub" / "c.txt").write_text("of no image")

    found = records(folder)

    assert [(r.image and r.image.id, r.texts, r.row, r.error) for r in found] == [
        ("a.JPG", (TextInput("a.JPG#0", "of a"),), None, None),
        ("b.png", (TextInput("b.png#0", "one"), TextInput("b.png#1", "two")), None, None),
        ("lone.png", (), None, None),
        ("sub/c.v2.PNG", (TextInput("sub/c.v2.PNG#0", "dots"),), None, None),
    ]
    image = found[1].image
    assert image is not None
    assert image.source == f"{folder}/b.png"
    assert image.read() == (folder / "b.png").read_bytes()
    source = open_source(folder)
    assert source.description == "folder of 4 images, 3 of them with a .txt of captions"
    assert source.files == [str(folder)]


def test_a_whole_text_can_be_one_caption(make_images: MakeImages, outline: Outline) -> None:
    folder = make_images("a.png")
    write(folder, a=" one\ntwo\n")

    assert outline(folder, caption_lines=False) == [("a.png", ["one\ntwo"], None)]
    assert outline(folder) == [("a.png", ["one", "two"], None)]


def test_images_of_one_stem_share_their_captions_and_it_is_told(
    make_images: MakeImages, outline: Outline, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images("a.jpg", "a.png", "b.png")
    write(folder, a="x", notes="of nothing")

    assert outline(folder) == [("a.jpg", ["x"], None), ("a.png", ["x"], None), ("b.png", [], None)]
    assert "images of the same stem share its captions, as a.jpg and a.png do" in caplog.text
    assert "1 .txt files are omitted, as no image has their stem (notes.txt)" in caplog.text


def test_images_alone_and_texts_alone_are_sources(
    make_images: MakeImages, outline: Outline, tmp_path: Path
) -> None:
    folder = make_images("a.png", "sub/b.png")
    assert outline(folder) == [("a.png", [], None), ("sub/b.png", [], None)]
    assert open_source(folder).sides == (Modality.IMAGE,)

    texts = tmp_path / "texts"
    texts.mkdir()
    write(texts, a="one\ntwo", b="", c="three")
    assert outline(texts) == [
        (None, ["one", "two"], None),
        (None, [], "b.txt: contains no caption"),
        (None, ["three"], None),
    ]
    assert open_source(texts).sides == (Modality.TEXT,)

    write(folder, a="x")
    assert outline(folder, kind="captions") == [(None, ["x"], None)]


def test_hidden_files_and_folders_are_passed_over(
    make_images: MakeImages, outline: Outline
) -> None:
    folder = make_images("a.png", "._a.png", ".thumbnails/b.png")

    assert outline(folder) == [("a.png", [], None)]


def test_captions_that_cannot_be_read_are_flaws(make_images: MakeImages, flaws: Flaws) -> None:
    folder = make_images("a.png", "b.png", "c.png", "d.png")
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with (folder / "b.txt").open("wb") as file:
        file.truncate((16 << 20) + 1)
    os.mkfifo(folder / "c.txt")
    (folder / "d.txt").write_text("fine")

    assert flaws(folder) == [
        (None, "its captions a.txt: is not UTF-8 (byte 0xe9 at offset 3)"),
        (None, "its captions b.txt: has 16777217 bytes, more than 16 MiB"),
        (None, "its captions c.txt: is not a regular file"),
    ]


def test_what_cannot_be_read_says_so_and_waits_for_nobody(
    make_images: MakeImages, records: Records
) -> None:
    folder = make_images("a.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "broken.png").symlink_to("gone.png")
    with (folder / "vast.png").open("wb") as file:
        file.truncate((1 << 30) + 1)

    reasons = {}
    for record in records(folder):
        assert record.image is not None
        try:
            record.image.read()
        except DataError as error:
            reasons[record.image.id] = str(error)

    assert reasons == {
        "broken.png": "cannot be read (No such file or directory)",
        "pipe.png": "is not a regular file",
        "vast.png": "has 1073741825 bytes, more than 1024 MiB",
    }


def test_the_fingerprint_follows_names_and_captions(make_images: MakeImages) -> None:
    folder = make_images("a.png", "b.png")
    marks = [open_source(folder).fingerprint]
    write(folder, a="x")
    marks.append(open_source(folder).fingerprint)
    write(folder, a="longer")
    marks.append(open_source(folder).fingerprint)
    (folder / "b.png").rename(folder / "c.png")
    marks.append(open_source(folder).fingerprint)

    assert len(set(marks)) == 4
    assert open_source(folder).fingerprint == marks[-1]


def test_a_document_beside_images_is_pointed_out(
    make_images: MakeImages, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images("a.png")
    (folder / "dataset.json").write_text("{}")
    open_source(folder)

    assert (
        "1 file not read (1 .json), such as dataset.json; pass it with --captions if it contains "
        "the captions"
    ) in caplog.text


def test_images_among_tars_must_be_chosen(make_images: MakeImages, outline: Outline) -> None:
    folder = make_images("cover.png")
    (folder / "data").mkdir()
    (folder / "data" / "0.tar").write_bytes(bytes(1024))

    assert error_of(folder) == (
        f"{folder}: contains images as well as tar, Parquet or Arrow files; choose with --kind "
        "folder, webdataset or parquet"
    )
    assert outline(folder, kind="folder") == [("cover.png", [], None)]
    assert outline(folder, kind="webdataset") == [(None, [], "the tar contains no sample")]


def test_what_is_no_source_is_refused(make_images: MakeImages, tmp_path: Path) -> None:
    folder = make_images("a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\0")
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b\x08")
    os.mkfifo(tmp_path / "pipe")

    assert error_of(tmp_path / "gone") == f"{tmp_path}/gone: no such file or folder"
    assert error_of(tmp_path / "empty") == (
        f"{tmp_path}/empty: contains no images, captions (.txt), uncompressed tar or Parquet "
        "files; pass a folder or file that does"
    )
    for name in ("x.npy", "photos/a.png"):
        assert error_of(tmp_path / name).startswith(f"{tmp_path / name}: is not a source; pass")
    assert "unpack it with gunzip first" in error_of(tmp_path / "x.tar.gz")
    assert error_of(tmp_path / "pipe") == f"{tmp_path}/pipe: is not a regular file"
    assert "contains no tar files" in error_of(folder, kind="webdataset")
    with pytest.raises(ConfigError, match="is a folder, not coco"):
        open_source(folder, SourceOptions(kind="coco"))


@pytest.mark.parametrize("table", [False, True])
def test_a_file_name_that_is_not_utf_8_is_a_flaw_of_its_own(
    make_images: MakeImages, outline: Outline, table: bool
) -> None:
    folder = make_images("a.png")
    if table:
        (folder / "captions.csv").write_text("image,caption\na.png,x\n")
    else:
        (folder / "a.txt").write_text("x")
    try:
        (folder / "\udcff.png").write_bytes(b"")
        (folder / "\udcff.doc").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such name")

    assert outline(folder) == [
        ("a.png", ["x"], None),
        (None, [], r"\udcff.png: file name is not UTF-8; rename the file"),
    ]
    assert (
        error_of(folder / "\udcff") == rf"{folder}/\udcff: file name is not UTF-8; rename the file"
    )
