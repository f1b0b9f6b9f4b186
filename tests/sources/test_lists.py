import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.sources.records import Record
from csalign.sources.records.open import SourceOptions, open_source

MakeImages = Callable[..., Path]
Outline = Callable[..., list[tuple[Any, ...]]]


def test_a_text_file_is_a_caption_a_line(
    tmp_path: Path, records: Callable[..., list[Record]]
) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\ncaf\xe9\none\n")

    found = records(tmp_path / "t.txt")

    assert [(r.row, [tuple(text) for text in r.texts]) for r in found] == [
        (1, [("caption:1", "one", 1)]),
        (3, [("caption:3", "two", 3)]),
        (4, []),
        (5, [("caption:5", "one", 5)]),
    ]
    assert str(found[2].error).startswith("is not UTF-8 (byte 0xe9 at offset ")
    assert open_source(tmp_path / "t.txt").sides == (Modality.TEXT,)


def test_a_text_file_with_a_header_is_a_table(make_images: MakeImages, outline: Outline) -> None:
    folder = make_images("Images/a.jpg")  # as the copy of Flickr8k on Kaggle
    (folder / "captions.txt").write_text("image,caption\na.jpg,A dog .\n")

    assert outline(folder / "captions.txt", images=folder / "Images") == [
        ("a.jpg", ["A dog ."], None)
    ]


def test_a_list_names_images_and_records(
    make_images: MakeImages, outline: Outline, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images("a.png", "b.png")
    monkeypatch.chdir(folder)
    lines = [
        *("a.png", "", f"{folder}/b.png", "./a.png", "gone.png", "https://example.org/c.png"),
        *(json.dumps({"image": "a.png", "caption": "x"}), '{"image": '),
    ]
    Path("list").write_text("\n".join(lines))

    assert outline("list", kind="list") == [
        ("a.png", ["x"], None),
        (f"{folder}/b.png", [], None),
        (
            *(None, []),
            "unknown image 'gone.png'; correct the path, which starts from the working directory, "
            "or remove the row",
        ),
        (None, [], "image 'https://example.org/c.png' is not a file; URLs are not fetched"),
        (
            None,
            [],
            "is not valid JSON (Expecting value: line 1 column 10 (char 9)); each line must be one "
            "object",
        ),
    ]


def test_a_list_with_a_root_stays_below_it(make_images: MakeImages, outline: Outline) -> None:
    folder = make_images("sub/a.png")
    (folder / "list.txt").write_text("a.png\n../sub/a.png\n")

    assert outline(folder / "list.txt", kind="list", images=folder / "sub") == [
        ("a.png", [], None),
        (None, [], f"image '../sub/a.png' is outside of {folder}/sub; move it inside"),
    ]


def test_a_list_comes_from_stdin(make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_images("a.png")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(f"{folder}/a.png".encode())))

    source = open_source(Path("-"))
    with source.open(0) as volume:
        records = list(volume.records(0, len(volume)))

    assert source.files == ["stdin"]
    assert [r.image and r.image.read() for r in records] == [(folder / "a.png").read_bytes()]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\n")))
    with pytest.raises(DataError, match=r"^stdin: has no row with an image or a caption"):
        open_source("-", SourceOptions())


def test_a_list_with_nul_bytes_is_refused_in_a_line(
    make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images("a.png")
    lines = f"{folder}/a.png\0".encode() * 5000
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(lines)))

    with open_source("-").open(0) as file:
        [record] = file.records(0, len(file))
    assert str(record.error).startswith("contains NUL bytes, as of find -print0")


def test_an_absolute_path_elsewhere_is_told_of_the_option(
    make_images: MakeImages, tmp_path: Path, flaws: Callable[..., list[tuple[int, str]]]
) -> None:
    folder = make_images("a.png")
    table = tmp_path / "tables" / "t.csv"
    table.parent.mkdir()
    table.write_text(f"image,caption\n{folder}/a.png,x\n")

    assert flaws(table)[0][1].endswith(
        "move it inside, or name the folder of all images with --images"
    )
    assert flaws(table, images=folder) == []
