import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from csalign.errors import ConfigError, DataError
from csalign.sources.captions import CaptionSource, ImageRecord, TextRecord, read_captions
from csalign.sources.tables import Columns

MakeImages = Callable[..., Path]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def texts(source: CaptionSource) -> list[tuple[str, str | None, str]]:
    return [(text.id, text.image_id, text.caption) for text in source.texts()]


def error_of(source: Path, captions: Path | None = None, columns: Columns | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_captions(source, captions=captions, columns=columns)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


@pytest.fixture
def photos(make_images: MakeImages) -> Path:
    return make_images("a.png", "a.jpg", "sub/b.c.PNG", "lone.png")


def test_a_table_joins_by_path_and_counts_captions_per_image(photos: Path) -> None:
    table = write(
        photos / "captions.csv",
        "image,caption,split",
        "a.png,first,train",
        "sub/b.c.PNG,other,test",
        './a.png,"second, quoted",train',
        ",of nothing,val",
        "a.jpg,,train",
    )

    source = read_captions(table)

    assert list(source.images()) == [
        ImageRecord("a.png", photos / "a.png", "train"),
        ImageRecord("sub/b.c.PNG", photos / "sub/b.c.PNG", "test"),
        ImageRecord("a.jpg", photos / "a.jpg", "train"),
    ]
    assert list(source.texts()) == [
        TextRecord("a.png#0", "a.png", "first", "train", 2),
        TextRecord("sub/b.c.PNG#0", "sub/b.c.PNG", "other", "test", 3),
        TextRecord("a.png#1", "a.png", "second, quoted", "train", 4),
        TextRecord("caption:5", None, "of nothing", "val", 5),
    ]


def test_a_folder_adds_the_images_that_its_table_does_not_mention(photos: Path) -> None:
    write(photos / "captions.csv", "image,caption", "lone.png,x")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "notes.txt").write_text("no image")

    source = read_captions(photos)

    assert source.image_ids == ["lone.png", "a.jpg", "a.png", "sub/b.c.PNG"]
    assert source.image_splits == [None] * 4
    assert texts(source) == [("lone.png#0", "lone.png", "x")]


def test_six_captions_of_one_image_shift_no_other(photos: Path) -> None:
    rows = [f"a.png,a{k}" for k in range(6)] + [f"a.jpg,b{k}" for k in range(5)]
    source = read_captions(write(photos / "t.csv", "image,caption", *rows))

    expected = [(f"a.png#{k}", "a.png", f"a{k}") for k in range(6)]
    assert texts(source) == expected + [(f"a.jpg#{k}", "a.jpg", f"b{k}") for k in range(5)]


def test_jsonl_may_list_captions_and_leave_keys_out(photos: Path) -> None:
    records = [
        {"file_name": "a.png", "text": ["one", " two ", ""]},
        {"text": ["loose", "looser"], "file_name": None},
        {"file_name": "a.jpg"},
    ]
    lines = [json.dumps(record) for record in records]
    source = read_captions(write(photos / "t.jsonl", lines[0], "", *lines[1:]))

    assert source.image_ids == ["a.png", "a.jpg"]
    assert texts(source) == [
        ("a.png#0", "a.png", "one"),
        ("a.png#1", "a.png", "two"),
        ("caption:3", None, "loose"),
        ("caption:3#1", None, "looser"),
    ]


@pytest.mark.parametrize(
    "header", ["Image Path\tTITLE", "filepath\ttitle", "path\tcaption_text", "file\tsentence"]
)
def test_columns_are_recognised_whatever_their_case(photos: Path, header: str) -> None:
    source = read_captions(write(photos / "t.tsv", header, "a.png\tx"))

    assert texts(source) == [("a.png#0", "a.png", "x")]


def test_columns_can_be_named(photos: Path) -> None:
    table = write(photos / "t.csv", "image,pic,caption,alt,fold", "none,a.png,none,x,7")
    source = read_captions(table, columns=Columns("pic", "alt", "fold"))

    assert list(source.texts()) == [TextRecord("a.png#0", "a.png", "x", "7", 2)]


def test_a_table_elsewhere_speaks_of_the_folder(photos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "elsewhere.csv", "image,caption", "a.png,x")

    source = read_captions(photos, captions=table)

    assert source.image_ids == ["a.png", "a.jpg", "lone.png", "sub/b.c.PNG"]


def test_an_absolute_path_inside_the_folder_is_made_relative(photos: Path) -> None:
    table = write(photos / "t.csv", "image,caption", f"{photos}/sub/../a.png,x", "a.png,y")

    assert read_captions(table).image_ids == ["a.png"]


def test_repeated_and_blank_rows_are_dropped_and_counted(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write(photos / "t.csv", "image,caption", "a.png,x", "a.png,x", ",", "", "a.jpg,x")
    with caplog.at_level(logging.WARNING):
        source = read_captions(table)

    assert texts(source) == [("a.png#0", "a.png", "x"), ("a.jpg#0", "a.jpg", "x")]
    assert [record.getMessage() for record in caplog.records] == [
        f"{table}: 1 repeated captions were kept once",
        f"{table}: 1 rows without image and caption",
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(photos: Path) -> None:
    (photos / "t.csv").write_bytes("image,caption\r\na.png,naïve\r\n".encode("utf-8-sig"))

    assert texts(read_captions(photos / "t.csv")) == [("a.png#0", "a.png", "naïve")]


def test_a_row_is_counted_by_its_first_line(photos: Path) -> None:
    table = write(photos / "t.csv", "image,caption", 'a.png,"two', 'lines"', "a.jpg,x")

    assert [text.row for text in read_captions(table).texts()] == [2, 4]


def test_unknown_images_are_named_and_counted(photos: Path) -> None:
    table = write(photos / "t.csv", "image,caption", "a.png,x", "gone.png,y", "gone.jpg,z")

    assert error_of(table) == (
        f"{table}, row 3: unknown image 'gone.png' (2 such images in all); correct the path, "
        f"which starts from {photos}, or remove the row"
    )


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "/etc/passwd", ".."])
def test_a_path_out_of_the_folder_is_refused(photos: Path, path: str) -> None:
    table = write(photos / "t.csv", "image,caption", f"{path},x")

    assert f"{table}, row 2: image {path!r} lies outside of {photos}" in error_of(table)


def test_urls_are_refused_by_name(photos: Path) -> None:
    table = write(photos / "t.csv", "image,caption", "https://example.org/a.png,x")

    message = error_of(table)

    assert "row 2: image 'https://example.org/a.png' is a URL" in message
    assert "URLs are not fetched" in error_of(Path("s3://bucket/photos"))


def test_an_image_in_two_splits_is_refused_with_both_rows(photos: Path) -> None:
    table = write(photos / "t.csv", "image,caption,split", "a.png,x,train", "a.png,y,test")

    assert error_of(table) == (
        f"{table}: image a.png is in split train in row 2 and in test in row 3; "
        "give all its rows the same split"
    )


def test_a_missing_column_lists_those_that_are_there(photos: Path) -> None:
    table = write(photos / "t.csv", "photo,caption", "a.png,x")

    assert error_of(table) == (
        f"{table}: no column looks like the image column (columns: photo, caption); "
        "name it with --image-column"
    )
    columns = Columns("photo", "words")
    assert "has no column 'words' (columns: photo, caption)" in error_of(table, columns=columns)
    columns = Columns("photo", split="fold")
    assert "has no column 'fold'" in error_of(table, columns=columns)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"image,caption\na.png,x,y\n", "row 2: has 3 cells, the header has 2; put"),
        ("t.csv", b'image,caption\na.png,x\na.png,"y\n', "row 3: is malformed (unexpected end"),
        ("t.csv", b"image,caption\na.png,\xe9\n", "row 2: is not UTF-8 (byte 0xe9 at offset 20)"),
        ("t.csv", "image,caption".encode("utf-16"), "row 1: is not UTF-8 (byte 0xff at offset 0)"),
        ("t.csv", b"image,caption\n", "t.csv: names no image"),
        ("t.csv", b"", "t.csv: names no image"),
        ("t.jsonl", b'{"image": "a.png", "caption": "x"}\n{"im', "row 2: is not valid JSON"),
        ("t.jsonl", b"[" * 100_000, "row 1: is not valid JSON"),
        ("t.jsonl", b'["a.png"]\n', "row 1: is no JSON object"),
        ("t.jsonl", b'{"image": "a.png", "caption": 3}', "row 1: caption must be text, not 3"),
        ("t.jsonl", b'{"image": "a.png", "caption": "\\ud800"}', "row 1: caption holds half"),
    ],
)
def test_a_malformed_table_is_told_by_row(
    photos: Path, name: str, content: bytes, expected: str
) -> None:
    (photos / name).write_bytes(content)
    message = error_of(photos / name)

    assert message.startswith(str(photos / name))
    assert expected in message


def test_which_table_to_use_must_be_clear(photos: Path) -> None:
    message = error_of(photos)
    assert message.startswith(f"{photos}: holds no captions table")
    assert "--captions" in message

    write(photos / "one.csv", "image,caption", "a.png,x")
    assert texts(read_captions(photos)) == [("a.png#0", "a.png", "x")]

    write(photos / "two.tsv", "image\tcaption", "a.png\ty")
    assert "holds several tables (one.csv, two.tsv); choose one with --captions" in error_of(photos)

    write(photos / "captions.tsv", "image\tcaption", "a.png\tz")
    assert texts(read_captions(photos)) == [("a.png#0", "a.png", "z")]


def test_what_is_no_source_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty" / "captions.csv", "image,caption", "a.png,x")

    assert error_of(tmp_path / "gone") == f"{tmp_path}/gone: no such file or folder"
    assert error_of(tmp_path / "empty") == f"{tmp_path}/empty: holds no images"
    assert "is no captions table; give a .csv" in error_of(photos / "a.png")
    assert "no such file; give a captions table" in error_of(photos, captions=photos / "gone.csv")
    table = write(photos / "t.csv", "image,caption", "a.png,x")
    with pytest.raises(ConfigError, match="is a table already"):
        read_captions(table, captions=table)


def test_a_file_name_that_is_not_utf_8_is_told(photos: Path) -> None:
    write(photos / "captions.csv", "image,caption", "a.png,x")
    odd = photos / "\udcff.png"
    try:
        odd.write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such name")

    assert r"file name '\udcff.png' is not UTF-8; rename the file" in error_of(photos)
