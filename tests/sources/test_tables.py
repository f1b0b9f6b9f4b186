import base64
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.images import read_image
from csalign.sources.records import Record, TextInput
from csalign.sources.records.files import open_file, read_lines
from csalign.sources.records.open import SourceOptions, open_source
from csalign.sources.records.tables import TableReader

MakeImages = Callable[..., Path]
Records = Callable[..., list[Record]]
Outline = Callable[..., list[tuple[Any, ...]]]
Flaws = Callable[..., list[tuple[int | None, str]]]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def error_of(source: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_source(source, SourceOptions(**options))
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


@pytest.fixture
def photos(make_images: MakeImages) -> Path:
    return make_images("a.png", "a.jpg", "sub/b.c.PNG", "lone.png")


def test_a_table_joins_by_path_and_gathers_the_captions_of_an_image(
    photos: Path, records: Records
) -> None:
    table = write(
        photos / "captions.csv",
        "image,caption,split",
        "a.png,first,train",
        "sub/b.c.PNG,other,test",
        './a.png,"second, quoted",train',
        ",of nothing,val",
        "a.jpg,,train",
    )

    found = records(table)

    assert [(r.image and r.image[:2], *r[1:]) for r in found] == [
        (
            ("a.png", f"{photos}/a.png"),
            (TextInput("a.png#0", "first", 2), TextInput("a.png#1", "second, quoted", 4)),
            *("train", 2, None),
        ),
        (
            ("sub/b.c.PNG", f"{photos}/sub/b.c.PNG"),
            (TextInput("sub/b.c.PNG#0", "other", 3),),
            *("test", 3, None),
        ),
        (None, (TextInput("caption:5", "of nothing", 5),), "val", 5, None),
        (("a.jpg", f"{photos}/a.jpg"), (), "train", 6, None),
    ]
    assert found[0].image is not None
    assert found[0].image.read() == (photos / "a.png").read_bytes()


def test_a_source_tells_what_it_is(photos: Path) -> None:
    source = open_source(write(photos / "t.csv", "path,title,x", "a.png,x,"))

    assert (
        source.description == "CSV table with images in column 'path', captions in column 'title'"
    )
    assert source.files == [f"{photos}/t.csv"]
    assert source.sides == (Modality.IMAGE, Modality.TEXT)
    assert source.total == 1


def test_the_fingerprint_follows_the_records(photos: Path) -> None:
    def mark(*lines: str, **options: Any) -> str:
        table = write(photos / "t.csv", *lines)
        return open_source(table, SourceOptions(**options)).fingerprint

    rows = ("image,caption,title", "a.png,x,y")
    marks = [mark(*rows), mark(*rows, caption_column="title"), mark(*rows, "a.jpg,x,y")]
    assert len(set(marks)) == 3
    assert mark(*rows) == marks[0]


def test_six_captions_of_one_image_shift_no_other(photos: Path, outline: Outline) -> None:
    rows = [f"a.png,a{k}" for k in range(6)] + [f"a.jpg,b{k}" for k in range(5)]

    assert outline(write(photos / "t.csv", "image,caption", *rows)) == [
        ("a.png", [f"a{k}" for k in range(6)], None),
        ("a.jpg", [f"b{k}" for k in range(5)], None),
    ]


def test_jsonl_may_list_captions_and_leave_keys_out(photos: Path, records: Records) -> None:
    entries = [
        {"text": ["loose", "looser"]},
        {"file_name": "a.png", "text": ["one", " two ", ""]},
        {"file_name": "a.jpg"},
        {"file_name": "a.png", "text": "three", "split": None},
    ]
    lines = [json.dumps(entry) for entry in entries]
    found = records(write(photos / "t.jsonl", lines[0], "", *lines[1:]))

    assert [[tuple(text) for text in record.texts] for record in found] == [
        [("caption:1", "loose", 1), ("caption:1#1", "looser", 1)],
        [("a.png#0", "one", 3), ("a.png#1", "two", 3), ("a.png#2", "three", 5)],
        [],
    ]


@pytest.mark.parametrize(
    "header",
    [
        *("Image Path\tTITLE", "filepath\ttitle", "path\tcaption_text", "file\tsentence"),
        *("Image Path\traw_caption", "jpg\tsentences_raw", "image,caption", "image_name| comment"),
        "file;text",
    ],
)
def test_columns_are_recognised_whatever_their_case_and_separator(
    photos: Path, outline: Outline, header: str
) -> None:
    separator = next(sign for sign in "\t,|;" if sign in header)

    for name in ("t.tsv", "t.csv"):
        table = write(photos / name, header, f"a.png{separator} x")
        assert outline(table) == [("a.png", ["x"], None)]


def test_columns_can_be_named(photos: Path, outline: Outline) -> None:
    table = write(photos / "t.csv", "image,pic,caption,alt,fold", "none,a.png,none,x,7")
    options = {"image_column": "pic", "caption_column": "alt", "split_column": "fold"}

    assert outline(table, **options) == [("a.png", ["x"], "7")]


def test_tables_of_pandas_and_polars_are_read(photos: Path, outline: Outline) -> None:
    rows = {"image": ["a.png", "a.jpg", "a.png"], "caption": ['say "hi"', "x\ny", "café, ☕"]}
    expected = [("a.png", ['say "hi"', "café, ☕"], None), ("a.jpg", ["x\ny"], None)]

    pd.DataFrame(rows).to_csv(photos / "p.csv", index=False)
    pd.DataFrame(rows).to_json(photos / "p.jsonl", orient="records", lines=True)
    pl.DataFrame(rows).write_csv(photos / "q.tsv", separator="\t")
    pl.DataFrame(rows).write_ndjson(photos / "q.ndjson")
    pl.DataFrame(rows).write_parquet(photos / "q.parquet")

    for name in ("p.csv", "p.jsonl", "q.tsv", "q.ndjson", "q.parquet"):
        assert outline(photos / name) == expected


def test_a_table_without_images_is_captions_alone(
    photos: Path, outline: Outline, caplog: pytest.LogCaptureFixture
) -> None:
    table = write(photos / "t.csv", "caption,url", "x,https://example.org", "y,")

    assert outline(table) == [(None, ["x"], None), (None, ["y"], None)]
    assert open_source(table).sides == (Modality.TEXT,)
    assert "no column looks like images, only captions are read (columns: caption, url)" in (
        caplog.text
    )


def test_a_table_without_captions_is_images_alone(photos: Path, outline: Outline) -> None:
    table = write(photos / "t.csv", "image,split", "a.png,train", "a.jpg,")

    assert outline(table) == [("a.png", [], "train"), ("a.jpg", [], None)]
    assert open_source(table).sides == (Modality.IMAGE,)


def test_captions_alone_can_be_asked_for(photos: Path, outline: Outline) -> None:
    table = write(photos / "t.csv", "image,caption", "https://example.org/a.png,x")

    assert outline(table, kind="captions") == [(None, ["x"], None)]


def test_a_table_elsewhere_speaks_of_the_folder(
    photos: Path, tmp_path: Path, outline: Outline
) -> None:
    table = write(tmp_path / "elsewhere.csv", "image,caption", "a.png,x")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "notes.txt").write_text("no image")

    expected = [("a.png", ["x"], None), *((n, [], None) for n in ("a.jpg", "lone.png"))]
    assert outline(photos, captions=table) == [*expected, ("sub/b.c.PNG", [], None)]
    assert outline(table, images=photos) == expected[:1]


@pytest.mark.parametrize("name", ["captions.csv", "metadata.jsonl", "other.tsv", "t.parquet"])
def test_a_folder_with_a_table_adds_the_images_that_it_does_not_mention(
    photos: Path, outline: Outline, name: str
) -> None:
    table = pl.DataFrame({"file_name": ["lone.png"], "text": ["x"]})
    writers: dict[str, Callable[[Path], Any]] = {
        ".csv": table.write_csv,
        ".tsv": lambda path: table.write_csv(path, separator="\t"),
        ".jsonl": table.write_ndjson,
        ".parquet": table.write_parquet,
    }
    writers[Path(name).suffix](photos / name)

    found = outline(photos)

    assert [entry[0] for entry in found] == ["lone.png", "a.jpg", "a.png", "sub/b.c.PNG"]
    assert [entry[1] for entry in found] == [["x"], [], [], []]


def test_an_absolute_path_inside_the_folder_is_made_relative(
    photos: Path, outline: Outline
) -> None:
    table = write(photos / "t.csv", "image,caption", f"{photos}/sub/../a.png,x", "a.png,y")

    assert outline(table) == [("a.png", ["x", "y"], None)]


def test_repeated_and_blank_rows_are_dropped_and_counted(
    photos: Path, outline: Outline, caplog: pytest.LogCaptureFixture
) -> None:
    table = write(photos / "t.csv", "image,caption", "a.png,x", "a.png,x", ",", "", "a.jpg,x")
    with caplog.at_level(logging.WARNING):
        open_source(table)

    assert [record.getMessage() for record in caplog.records] == [
        f"{table}: 1 rows without image and caption",
        f"{table}: 1 repeated captions were kept once",
    ]
    assert outline(table) == [("a.png", ["x"], None), ("a.jpg", ["x"], None)]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(photos: Path, outline: Outline) -> None:
    (photos / "t.csv").write_bytes("image,caption\r\na.png,naïve\r\n".encode("utf-8-sig"))

    assert outline(photos / "t.csv") == [("a.png", ["naïve"], None)]


def test_a_row_is_counted_by_its_first_line(photos: Path, records: Records) -> None:
    table = write(photos / "t.csv", "image,caption", 'a.png,"two', 'lines"', "a.jpg,x")

    assert [record.row for record in records(table)] == [2, 4]


def test_ids_can_come_from_a_column(photos: Path, outline: Outline) -> None:
    table = write(
        photos / "t.csv",
        "id,image,caption",
        *("7,a.png,x", "8,a.png,y", "7,./a.png,z", "7,a.jpg,no", "9,,alone", "9,,again"),
    )

    assert outline(table, id_column="id") == [
        ("7", ["x", "z"], None),
        ("8", ["y"], None),
        (None, [], "has the id '7' of another image, in row 2; ids are unique"),
        (None, ["alone"], None),
        (None, [], "has the id '9' of row 6; ids are unique"),
    ]


def test_ten_bad_rows_of_two_thousand_are_ten_flaws(
    make_images: MakeImages, outline: Outline, flaws: Flaws
) -> None:
    folder = make_images("a.png", "b.png")
    names = ("a.png", "b.png")
    rows = [f"{names[row % 2]},caption {row},train".encode() for row in range(2000)]
    bad = {
        100: (b"a.png,x,train,more", "has 4 cells, the header has 3; put double quotes"),
        200: (b'a.png,"x,"y,train', "is malformed (',' expected after '\"'); quote cells"),
        300: (b'a.png,"never closed,train', "is malformed (',' expected after '\"'); quote"),
        400: (b"a.png,caf\xe9,train", "is not UTF-8 (byte 0xe9 at offset"),
        500: (b"gone.png,x,train", "unknown image 'gone.png'; correct the path, which starts fro"),
        600: (b"../secret.png,x,train", "image '../secret.png' is outside of"),
        700: (b"/etc/passwd,x,train", "image '/etc/passwd' is outside of"),
        800: (b"https://example.org/a.png,x,train", "is a URL, which is not fetched; download"),
        900: (b"a.png,x,test", "image a.png is in split train in row 2 and in test in row 902"),
        1000: (b"x" * 5000 + b",x,train", "has an image path of 5000 characters; if it is an"),
    }
    rows[350] = b'a.png,"well, quoted",train'
    for row, (line, _) in bad.items():
        rows[row] = line
    (folder / "t.csv").write_bytes(b"\n".join([b"image,caption,split", *rows]))

    found = flaws(folder / "t.csv")

    assert [row for row, _ in found] == [row + 2 for row in bad]
    for (_, flaw), (_, expected) in zip(found, bad.values(), strict=True):
        assert expected in flaw
    good = [entry for entry in outline(folder / "t.csv") if entry[0]]
    assert [entry[0] for entry in good] == ["a.png", "b.png"]
    assert sum(len(entry[1]) for entry in good) == 1990
    assert "well, quoted" in good[0][1]


def test_bad_lines_of_json_are_flaws(photos: Path, outline: Outline) -> None:
    (photos / "t.jsonl").write_bytes(
        b'{"im\n{"image": "a.png", "caption": "x"}\n' + b"[" * 100_000 + b'\n["a.png"]\n'
        b'{"image": "a.png", "caption": 3}\n{"image": "a.png", "caption": "\\ud800"}\n'
        b'{"image": {"bytes": 1}}\n{"image": "a.png", "caption": "caf\xe9"}\n'
        b'{"image": "a.png", "caption": "y"}'
    )

    found = outline(photos / "t.jsonl")

    assert found.pop(1) == ("a.png", ["x", "y"], None)
    expected = [
        *("is not valid JSON", "is not valid JSON", "is not a JSON object; each line"),
        *("caption must be text, not 3", "caption contains half of a surrogate pair"),
        *("image must be text, not {'bytes': 1}", "is not UTF-8 (byte 0xe9 at offset"),
    ]
    for (_, _, flaw), start in zip(found, expected, strict=True):
        assert flaw.startswith(start)


def test_an_image_without_its_file_is_listed_by_row(photos: Path, flaws: Flaws) -> None:
    table = write(
        photos / "t.csv", "image,caption", "a.png,x", "gone.png,y", "nul\0.png,z", f"{'x' * 300},c"
    )

    assert flaws(table) == [
        (
            3,
            f"unknown image 'gone.png'; correct the path, which starts from {photos}, or remove "
            "the row",
        ),
        (
            4,
            "contains NUL bytes, as of find -print0 or UTF-16; write one entry per line, in UTF-8",
        ),
        (
            5,
            f"unknown image '{'x' * 199}; correct the path, which starts from {photos}, or remove "
            "the row",
        ),
    ]


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "/etc/passwd", ".."])
def test_a_path_out_of_the_folder_is_a_flaw(photos: Path, flaws: Flaws, path: str) -> None:
    table = write(photos / "t.csv", "image,caption", f"{path},x")

    [(row, flaw)] = flaws(table)
    assert row == 2
    assert flaw.startswith(f"image {path!r} is outside of {photos}; move it inside")


def test_images_in_base64_are_read_from_their_rows(photos: Path, records: Records) -> None:
    encoded = [
        base64.b64encode((photos / name).read_bytes()).decode() for name in ("a.png", "a.jpg")
    ]
    tables = [
        write(photos / "t.tsv", "n\timage\tcaption", *(f"\t{code}\tx" for code in encoded)),
        write(photos / "u.csv", "base64,caption", *(f"{code},é" for code in encoded)),
        write(
            photos / "v.csv", "image,caption", *(f'"data:image/png;base64,{c}",x' for c in encoded)
        ),
        write(photos / "w.jsonl", *(json.dumps({"caption": "é", "image": c}) for c in encoded)),
    ]
    for table in tables:
        found = records(table)

        assert [r.image.read() for r in found if r.image] == [
            (photos / name).read_bytes() for name in ("a.png", "a.jpg")
        ]
        first = 1 if table.suffix == ".jsonl" else 2
        assert [r.image.id for r in found if r.image] == [f"row:{first}", f"row:{first + 1}"]
        assert found[0].image is not None
        assert found[0].image.source == f"{table}/{first}"
        assert read_image(found[0].image.read()).size == (40, 36)


def test_what_is_no_base64_is_told_when_it_is_read(photos: Path, records: Records) -> None:
    table = write(photos / "t.csv", "image_base64,caption", "no!,x")
    image = records(table)[0].image

    assert image is not None
    with pytest.raises(DataError, match=r"^is not valid base64$"):
        image.read()


def test_a_missing_column_lists_those_that_are_there(photos: Path) -> None:
    table = write(photos / "t.csv", "photo,words", "a.png,x")

    assert error_of(table) == (
        f"{table}: no column looks like images or captions (columns: photo, words); name them "
        "with --image-column and --caption-column, write a header such as image,caption above the "
        "first row if there is none, or read a folder's images without the table with --kind folder"
    )
    assert "has no column 'word' (columns: photo, words)" in error_of(table, caption_column="word")
    message = error_of(table, image_column="photo", split_column="fold")
    assert "has no column 'fold'" in message
    lines = write(photos / "t.jsonl", '{"photo": "a.png"}', '{"words": "x"}')
    assert "has no column 'image' (columns: photo, words)" in error_of(lines, image_column="image")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"caf\xe9,image\n", "row 1: is not UTF-8 (byte 0xe9 at offset 3)"),
        ("t.csv", "image,caption".encode("utf-16"), "has no row with an image or a caption"),
        ("t.csv", b"image,image\n", "has the column 'image' twice; rename one"),
        ("t.csv", b"image,caption\n", "has no row with an image or a caption"),
        ("t.csv", b"", "has no row with an image or a caption"),
        ("t.jsonl", b"\n", "has no row with an image or a caption"),
    ],
)
def test_a_table_of_no_use_is_refused(
    photos: Path, name: str, content: bytes, expected: str
) -> None:
    (photos / name).write_bytes(content)
    message = error_of(photos / name)

    assert message.startswith(str(photos / name))
    assert expected in message


def test_a_line_without_end_is_refused() -> None:
    file = io.BytesIO(b"image,caption\na.png," + b"x" * (1 << 20))

    with pytest.raises(DataError) as caught:
        list(read_lines(Path("t.csv"), file, max_bytes=1 << 20))
    assert str(caught.value) == "t.csv, row 2: is longer than 1 MiB; end each row with a line break"


def test_which_table_to_use_must_be_clear(photos: Path, outline: Outline) -> None:
    write(photos / "one.csv", "image,caption", "a.png,x")
    assert ("a.png", ["x"], None) in outline(photos)

    write(photos / "two.tsv", "image\tcaption", "a.png\ty")
    assert error_of(photos) == (
        f"{photos}: contains several tables (one.csv, two.tsv); choose one with --captions"
    )
    assert ("a.png", ["y"], None) in outline(photos, captions=photos / "two.tsv")
    assert all(not captions for _, captions, _ in outline(photos, kind="folder"))

    write(photos / "captions.tsv", "image\tcaption", "a.png\tz")
    assert ("a.png", ["z"], None) in outline(photos)


def test_captions_are_for_folders(photos: Path) -> None:
    table = write(photos / "t.csv", "image,caption", "a.png,x")

    assert "no such file; pass a captions table" in error_of(photos, captions=photos / "gone.csv")
    with pytest.raises(ConfigError, match="is not a folder; pass the folder of its images"):
        open_source(table, SourceOptions(captions=table))


@pytest.mark.parametrize(
    "content",
    [
        b'id,caption\n1,"a, ""b"""\n2,\n\n3,"two\nlines"\n4, x \n',
        b"\xef\xbb\xbfid;caption\r\n1;a\r\n2;b\r\n",
        b"id\tcaption\n1\ta\n",
        b"id,caption\n",
        b"",
    ],
)
def test_a_table_in_one_piece_is_what_its_lines_are(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    table = read_label_table(tmp_path / "t.csv")
    with open_file(tmp_path / "t.csv") as file:
        rows = list(TableReader(tmp_path / "t.csv", SourceOptions(), ".csv").values(file))

    columns = {name: table.column(name).to_pylist() for name in table.names}
    assert table.rows == len(rows)
    for row, (number, _, values, error) in enumerate(rows):
        assert error is None
        assert table.where(row) == f"{tmp_path}/t.csv, row {number}"
        assert {name: column[row] or "" for name, column in columns.items()} == values


@pytest.mark.parametrize("lines", [["image,caption"], ["image,caption", "a.png,", "b.png,"]])
def test_captions_that_contain_none_are_refused(
    photos: Path, tmp_path: Path, lines: list[str]
) -> None:
    table = write(tmp_path / "none.csv", *lines)

    assert f"{table}: contains no captions; " in error_of(photos, captions=table)


def test_rows_without_a_caption_are_counted(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write(tmp_path / "half.csv", "image,caption", "a.png,a thing", "sub/b.c.PNG,")
    open_source(photos, SourceOptions(captions=table))

    assert f"{table}: 1 of 2 rows have no caption" in caplog.text
