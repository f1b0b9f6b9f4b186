"""Caption files as people have them: the captions of each image, or why they are refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from PIL import Image

from csalign.core.errors import DataError
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.records.open import SourceOptions, open_source

Found = list[tuple[str | None, list[str]]]
PLAIN: Found = [("a.jpg", ["A dog runs.", "Two dogs"]), ("b.jpg", ["A cat, sleeping"])]
LISTS: dict[str, list[Any]] = {
    "image": ["a.jpg", "b.jpg"],
    "caption": [["A dog runs.", "Two dogs"], ["A cat, sleeping"]],
}
ROWS = [("a.jpg", "A dog runs."), ("a.jpg", "Two dogs"), ("b.jpg", "A cat, sleeping")]
FRAME = pd.DataFrame(ROWS, columns=["image", "caption"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("a.jpg", "b.jpg", "c.jpg", "000000391895.jpg", "d.png", "d.webp"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def read(path: Path, **options: Any) -> tuple[Found, list[str]]:
    """Return image and captions of each record of a source, and the errors of the others."""
    source = open_source(path, SourceOptions(**options))
    with source.open(0) as file:
        records = list(file.records(0, len(file)))
    for record in records:
        ids = [text.id for text in record.texts]
        assert record.image is None or ids == [f"{record.image.id}#{k}" for k in range(len(ids))]
    found = [
        (record.image and record.image.id, [text.caption for text in record.texts])
        for record in records
        if record.error is None
    ]
    return found, [str(record.error) for record in records if record.error is not None]


def lines(separator: str, *, header: str = "", number: bool = False) -> str:
    counts = [0, 1, 0]
    rows = [
        f"{image}{f'#{k}' if number else ''}{separator}{caption}\n"
        for k, (image, caption) in zip(counts, ROWS, strict=True)
    ]
    return header + "".join(rows)


def quoted(text: str) -> str:
    return text.replace("A cat, sleeping", '"A cat, sleeping"')


CAPTIONED: dict[str, tuple[str, str | bytes]] = {
    "flickr30k-token": ("results_20130124.token", lines("\t", number=True)),
    "flickr8k-token": ("Flickr8k.token.txt", lines("\t", number=True)),
    "flickr30k-csv": (
        "results.csv",
        "image_name| comment_number| comment\n"
        "a.jpg| 0| A dog runs.\na.jpg| 1| Two dogs\nb.jpg| 0| A cat, sleeping\n",
    ),
    "list-with-commas.txt": ("list.txt", lines(",")),
    "list-with-commas.csv": ("list.csv", lines(",")),
    "list-with-quoted-commas": ("list.csv", quoted(lines(","))),
    "list-with-spaces-after-commas": ("list.csv", lines(", ")),
    "list-with-captions-in-front": (
        "list.csv",
        "A dog runs.,a.jpg\nTwo dogs,a.jpg\nA cat, sleeping,b.jpg\n",
    ),
    "list-with-bars": ("list.lst", lines("|")),
    "list-with-tabs": ("list.tsv", lines("\t")),
    "list-with-spaces": ("list.txt", lines(" ")),
    "list-with-spaces-and-numbers": ("list.token", lines("  ", number=True)),
    "list-without-suffix": ("captions", lines("\t")),
    "list-with-comment-numbers": (
        "list.csv",
        "a.jpg,0,A dog runs.\na.jpg,1,Two dogs\nb.jpg,0,A cat, sleeping\n",
    ),
    "list-below-a-comment": ("list.txt", "# name and caption\n\n" + lines("\t")),
    "pandas-without-header": ("list.csv", FRAME.to_csv(header=False)),
    "pandas-with-index": ("t.csv", FRAME.to_csv()),
    "numbers-in-a-table": ("t.csv", quoted(lines(",", header="image,caption\n", number=True))),
    "unquoted-commas": ("t.csv", lines(",", header="image,caption\n")),
    "sep-line": ("t.csv", lines(";", header="sep=;\nimage;caption\n")),
    "sep-line-and-windows": (
        "t.csv",
        "\ufeff" + lines(";", header="sep=;\nimage;caption\n").replace("\n", "\r\n"),
    ),
    "macintosh": ("t.csv", quoted(lines(",", header="image,caption\n")).replace("\n", "\r")),
    "utf-16": ("t.csv", quoted(lines(",", header="image,caption\n")).encode("utf-16")),
    "utf-16-of-excel": (
        "t.txt",
        b"\xfe\xff" + lines("\t", header="image\tcaption\n").encode("utf-16-be"),
    ),
    "comments": ("t.csv", quoted(lines(",", header="# made in 2013\n#\n\nimage,caption\n"))),
    "header-behind-a-hash": ("t.tsv", lines("\t", header="#image\tcaption\n")),
    "spaces-in-the-header": ("t.csv", quoted(lines(",", header=" Image Name , Caption Text \n"))),
    "camels-in-the-header": ("t.csv", quoted(lines(",", header="imagePath,Captions\n"))),
    "trailing-separators": (
        "t.csv",
        'image,caption,,\na.jpg,A dog runs.,,\na.jpg,Two dogs,,\nb.jpg,"A cat, sleeping",,\n',
    ),
    "trailing-separators-below-the-header": (
        "t.csv",
        'image,caption\na.jpg,A dog runs.,\na.jpg,Two dogs,\nb.jpg,"A cat, sleeping",,\n',
    ),
    "spaces-before-quotes": (
        "t.csv",
        'image, caption\na.jpg, "A dog runs."\na.jpg, "Two dogs"\nb.jpg, "A cat, sleeping"\n',
    ),
    "json-in-cells": (
        "t.csv",
        pd.DataFrame({**LISTS, "caption": [json.dumps(c) for c in LISTS["caption"]]}).to_csv(
            index=False
        ),
    ),
    "lists-in-cells": ("t.csv", pd.DataFrame(LISTS).to_csv(index=False)),
    "arrays-in-cells": (
        "t.csv",
        pd.DataFrame({**LISTS, "caption": [np.array(c) for c in LISTS["caption"]]}).to_csv(),
    ),
    "tuples-in-cells": (
        "t.tsv",
        pd.DataFrame({**LISTS, "caption": [tuple(c) for c in LISTS["caption"]]}).to_csv(sep="\t"),
    ),
    "numbered-columns": (
        "t.csv",
        'image,caption_1,caption_2\na.jpg,A dog runs.,Two dogs\nb.jpg,"A cat, sleeping",\n',
    ),
    "numbered-from-0": (
        "t.csv",
        'filename,sent_1,sent_0\na.jpg,Two dogs,A dog runs.\nb.jpg,nan,"A cat, sleeping"\n',
    ),
    "one-name-for-all-captions": (
        "t.csv",
        'image,caption,caption\na.jpg,A dog runs.,Two dogs\nb.jpg,"A cat, sleeping",\n',
    ),
    "numbered-without-header": (
        "t.tsv",
        "a.jpg\tA dog runs.\tTwo dogs\nb.jpg\tA cat, sleeping\t\n",
    ),
    "jsonl-with-commas": (
        "t.jsonl",
        "".join(json.dumps({"image": i, "caption": c}) + ",\n" for i, c in ROWS),
    ),
    "jsonl-with-indents": (
        "t.jsonl",
        "\n".join(json.dumps({"image": i, "caption": c}, indent=2) for i, c in ROWS),
    ),
    "jsonl-that-is-a-list": ("t.jsonl", FRAME.to_json(orient="records", indent=1)),
    "jsonl-by-another-name": ("t.json", FRAME.to_json(orient="records", lines=True)),
    "json-with-a-last-comma": (
        "t.json",
        "[\n" + "".join(json.dumps({"image": i, "caption": c}) + ",\n" for i, c in ROWS) + "]",
    ),
    "json-columns": ("t.json", FRAME.to_json()),
    "json-table": ("t.json", FRAME.to_json(orient="table")),
    "json-index": ("t.json", FRAME.to_json(orient="index")),
    "json-values": ("t.json", FRAME.to_json(orient="values")),
    "json-lists": ("t.json", json.dumps(FRAME.to_dict(orient="list"))),
    "json-plural-lists": (
        "t.json",
        json.dumps({"images": LISTS["image"], "captions": LISTS["caption"]}),
    ),
    "json-by-image": (
        "t.json",
        json.dumps(dict(zip(LISTS["image"], LISTS["caption"], strict=True))),
    ),
    "json-objects-by-image": (
        "t.json",
        json.dumps(
            {
                i: {"captions": c, "width": 8}
                for i, c in zip(LISTS["image"], LISTS["caption"], strict=True)
            }
        ),
    ),
    "json-below-data": ("t.json", json.dumps({"data": FRAME.to_dict(orient="records")})),
    "json-images-with-captions": (
        "t.json",
        json.dumps(
            {
                "info": {},
                "images": [
                    {"file_name": i, "captions": c}
                    for i, c in zip(LISTS["image"], LISTS["caption"], strict=True)
                ],
            }
        ),
    ),
    "json-by-split": (
        "t.json",
        json.dumps(
            {"train": FRAME[:2].to_dict(orient="records"), "val": FRAME[2:].to_dict("records")}
        ),
    ),
    "karpathy-with-tokens-alone": (
        "d.json",
        json.dumps(
            {
                "images": [
                    {"filename": i, "sentences": [{"tokens": text.split()} for text in c]}
                    for i, c in zip(LISTS["image"], LISTS["caption"], strict=True)
                ]
            }
        ),
    ),
    "coco-with-floats": (
        "captions.json",
        json.dumps(
            {
                "images": [{"id": k, "file_name": f"{'ab'[k]}.jpg"} for k in range(2)],
                "annotations": [{"image_id": float(i == "b.jpg"), "caption": c} for i, c in ROWS],
            }
        ),
    ),
    "coco-with-lists": (
        "captions.json",
        json.dumps(
            {
                "images": [{"id": str(k), "file_name": f"{'ab'[k]}.jpg"} for k in range(2)],
                "annotations": [{"image_id": k, "caption": LISTS["caption"][k]} for k in range(2)],
            }
        ),
    ),
    "coco-with-boxes": (
        "captions.json",
        json.dumps(
            {
                "images": [{"id": k, "file_name": f"{'ab'[k]}.jpg"} for k in range(2)],
                "annotations": [
                    {"image_id": 0, "bbox": [0, 0, 1, 1], "category_id": 3},
                    *({"image_id": int(i == "b.jpg"), "caption": c} for i, c in ROWS),
                ],
            }
        ),
    ),
}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", CAPTIONED)
def test_captions_belong_to_their_images(folder: Path, name: str) -> None:
    file, content = CAPTIONED[name]
    path = written(folder / file, content)
    try:
        assert read(path) == (PLAIN, [])
    finally:
        path.unlink()


TEXTS: dict[str, tuple[str, str, list[str]]] = {
    "unicode-line-ends": (
        "t.csv",
        "caption\na dog on\u2028the beach\na cat\x85sits\na page\x0cand \x0bmore\n",
        ["a dog on\u2028the beach", "a cat\x85sits", "a page\x0cand \x0bmore"],
    ),
    "unicode-line-ends-in-json": (
        "t.jsonl",
        '{"caption": "a dog\u2028on\u2029the beach"}\n{"caption": "a\x85b"}\n',
        ["a dog\u2028on\u2029the beach", "a\x85b"],
    ),
    "bare-quotes": (
        "t.tsv",
        'id\tcaption\n1\t"unclosed at the start\n2\ta plain one\n3\tends with "quotes"\n'
        '4\t"Hello" said she\n5\tan end"\n6\t"so be it"\n',
        [
            *('"unclosed at the start', "a plain one", 'ends with "quotes"', '"Hello" said she'),
            *('an end"', "so be it"),
        ],
    ),
    "bare-quotes-and-commas": (
        "t.csv",
        'id,caption\n1,"Hello" said he\n2,an "end"\n',
        ['"Hello" said he', 'an "end"'],
    ),
    "quoted-lines": (
        "t.tsv",
        'id\tcaption\n1\t"two\nlines"\n2\t"with ""quotes"""\n',
        ["two\nlines", 'with "quotes"'],
    ),
    "escaped-quotes": (
        "t.csv",
        'id,caption\n1,"she said \\"hi, you\\" to him"\n2,"a 6\\""\n',
        ['she said "hi, you" to him', 'a 6"'],
    ),
    "missing-values": (
        "t.csv",
        "id,caption\n1,nan\n2,None of the dogs\n3,NULL\n4,<NA>\n5,None\n6,A nan bread\n7,N/A\n",
        ["None of the dogs", "A nan bread"],
    ),
    "names-that-are-words": (
        "t.csv",
        "id,caption\n1,null\n2,none\n3,undefined\n",
        ["null", "none", "undefined"],
    ),
    "missing-values-in-lists": (
        "t.jsonl",
        '{"caption": ["a", null, "nan"]}\n{"caption": NaN}\n{"caption": "[\'b\', None, nan]"}\n',
        ["a", "b"],
    ),
    "brackets-in-captions": (
        "t.csv",
        'caption\n[sound of music] plays\n(a dog)\n"[""Stop"" sign] on a wall"\n[a street]\n',
        ["[sound of music] plays", "(a dog)", '["Stop" sign] on a wall', "[a street]"],
    ),
    "quotes-in-lists": (
        "t.csv",
        pd.DataFrame({"caption": [["a dog's", 'b "c"', "'d' \"e's\"", "f\ng \\ h, [i]"]]}).to_csv(),
        ["a dog's", 'b "c"', "'d' \"e's\"", "f\ng \\ h, [i]"],
    ),
    "quotes-in-arrays": (
        "t.csv",
        pd.DataFrame({"caption": [np.array(["a dog's", 'b "c"', "d, e"])] * 2}).to_csv(),
        ["a dog's", 'b "c"', "d, e"] * 2,
    ),
    "cc3m": (
        "Train_GCC-training.tsv",
        "a very typical bus station\thttp://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/AAAA/t\n"
        'sierra looked stunning, "top" to toe\thttp://78.media.tumblr.com/3b133294bdc7c7784b7\n',
        ["a very typical bus station", 'sierra looked stunning, "top" to toe'],
    ),
    "header-of-one-column": (
        "t.txt",
        "caption\nA dog, running\nA cat\n",
        ["A dog, running", "A cat"],
    ),
    "captions-with-commas": (
        "t.txt",
        "A dog, running\n#sunset at the beach\nimage of a cat\n",
        ["A dog, running", "#sunset at the beach", "image of a cat"],
    ),
    "captions-that-name-a-file": (
        "t.txt",
        "a photo of a.jpg\na dog\n",
        ["a photo of a.jpg", "a dog"],
    ),
    "empty-lists": ("t.csv", 'id,caption\n1,[]\n2,"[\'a\']"\n3,"[None, nan]"\n', ["a"]),
    "lists-of-postgres": ("t.csv", 'id,caption\n1,"{""a dog"",""two""}"\n', ["a dog", "two"]),
    "objects-in-cells": (
        "t.csv",
        pd.DataFrame(
            {"sentences": [[{"raw": "a's", "sentid": 1}, {"tokens": ["b", "c"]}]]}
        ).to_csv(),
        ["a's", "b c"],
    ),
    "json-list-of-captions": ("t.json", '["A dog.", "A cat."]', ["A dog.", "A cat."]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_captions_alone_are_what_they_are(tmp_path: Path, name: str) -> None:
    file, content, expected = TEXTS[name]
    found, errors = read(written(tmp_path / file, content))

    assert [text for _, texts in found for text in texts] == expected
    assert errors == []


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "unknown-header": ("t.csv", "Bild;Beschreibung\na.jpg;x\n", r"\(columns: Bild, Beschreibung\)"),
    "unknown-header-in-txt": (
        "t.txt",
        "Bild,Satz\na.jpg,x\nb.jpg,y\n",
        r"\(columns: Bild, Satz",
    ),
    "captions-without-header": ("t.csv", "A dog runs.\nTwo cats.\n", "write a header such as"),
    "two-captions-or-one": (
        "t.csv",
        "a.jpg,A dog,a cat is\nb.jpg,A man is,a plan\n",
        "write a header",
    ),
    "mxnet": ("t.lst", "0\t12\ta.jpg\n1\t5\tb.jpg\n", "write a header such as"),
    "class-list": ("t.txt", "a.jpg\t0\nb.jpg\t1\n", "write a header such as"),
    "two-images": ("t.csv", "image,image\na.jpg,b.jpg\n", "has the column 'image' twice"),
    "boxes": (
        "instances.json",
        '{"images": [{"id": 1, "file_name": "a.jpg"}],'
        ' "annotations": [{"image_id": 1, "bbox": 0}]}',
        r"annotations have no captions \(keys: image_id, bbox\).*captions_val2017.json",
    ),
    "pandas-without-names": (
        "t.csv",
        pd.DataFrame(ROWS).to_csv(),
        r"\(columns: column 1, 0, 1\); name them with --image-column",
    ),
    "utf-16-without-mark": ("t.csv", "caption\na\n".encode("utf-16-le"), "row 1: contains NUL"),
    "json-split": ("t.json", FRAME.to_json(orient="split"), "keys: columns, index, data"),
    "settings": ("t.json", '{"name": "x", "version": "1"}', r"keys: name, version"),
    "columns-of-two-lengths": (
        "t.json",
        '{"image": ["a.jpg"], "caption": ["x", "y"]}',
        "keys: image",
    ),
    "cut-json": ("t.json", '[{"image": "a.jpg", "caption": "x"},\n', "is not valid JSON"),
    "compressed": ("t.csv.gz", b"\x1f\x8b\x08\0", "unpack it with gunzip"),
    "latin-1": ("t.csv", "légende;image\nx;a.jpg\n".encode("cp1252"), "is not UTF-8 .* iconv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused_with_a_remedy(folder: Path, name: str) -> None:
    file, content, expected = REFUSED[name]
    path = written(folder / file, content)
    try:
        with pytest.raises(DataError, match=expected) as caught:
            open_source(path)
        assert str(caught.value).startswith(str(path))
    finally:
        path.unlink()


ERRORS: dict[str, tuple[str, str, Found, list[str]]] = {
    "list-that-is-cut": (
        "t.csv",
        "image,caption\na.jpg,\"['A dog', 'A c]\"\nb.jpg,B\n",
        [("b.jpg", ["B"])],
        ["caption looks like a list and cannot be read as one (['A dog', 'A c]); write a JSON"],
    ),
    "swallowed-row": (
        "t.csv",
        'image,caption,n\na.jpg,"A dog,1\nb.jpg,"B" too,2\nc.jpg,C,3\n',
        [("b.jpg", ['"B" too']), ("c.jpg", ["C"])],
        ["is malformed (',' expected after '\"')"],
    ),
    "swallowed-rows": (
        "t.csv",
        'image,caption\na.jpg,"A dog\nb.jpg,B\nc.jpg,C"\nb.jpg,D\n',
        [("b.jpg", ["B", "D"]), ("c.jpg", ['C"'])],
        ["has a quote that is not closed in its line"],
    ),
    "commas-in-bare-quotes": (
        "t.csv",
        'image,n,caption\na.jpg,"A, b" c\nb.jpg,1,B\n',
        [("b.jpg", ["B"])],
        ["is malformed (',' expected after '\"')"],
    ),
    "stems-of-several-files": (
        "t.csv",
        "image,caption\n/home/me/b.jpg,B\nd.jpg,D\n",
        [],
        [
            "image '/home/me/b.jpg' is outside of",
            "unknown image 'd.jpg'; did you mean 'd.png' or 'd.webp'?",
        ],
    ),
    "missing-separator": (
        "results.csv",
        "image_name| comment_number| comment\na.jpg| 4   A dog runs\nb.jpg| 0| B\n",
        [("b.jpg", ["B"])],
        ["has 2 cells, the header has 3"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_rows_are_named_and_no_others(folder: Path, name: str) -> None:
    file, content, expected, errors = ERRORS[name]
    path = written(folder / file, content)
    try:
        found, flaws = read(path)
    finally:
        path.unlink()

    assert sorted(found, key=str) == expected
    assert [flaw[: len(error)] for flaw, error in zip(flaws, errors, strict=True)] == errors


def test_how_a_list_is_read_and_what_is_missing_are_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(folder / "list.txt", lines("\t", number=True) + "c.jpg#0\tnan\n")
    with caplog.at_level(logging.INFO):
        source = open_source(path)
    path.unlink()

    assert source.description == "list without header of image, caption, separated by tabs"
    assert "1 of 4 rows have no caption, or a missing value such as nan" in caplog.text


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("t.tsv", lines("\t", number=True), {"image": ["a.jpg", "a.jpg", "b.jpg"]}),
        ("t.csv", "a.jpg\nb.jpg\n", {"image": ["a.jpg", "b.jpg"]}),
        (
            "t.csv",
            "sep=;\nid;caption\n1;nan\n2;x, y\n",
            {"id": ["1", "2"], "caption": [None, "x, y"]},
        ),
        ("t.tsv", 'id\tcaption\n1\t"a\n2\tb"\n', {"id": ["1", "2"], "caption": ['"a', 'b"']}),
        ("t.csv", "id,caption\n1,a\n".encode("utf-16"), {"id": ["1"], "caption": ["a"]}),
        ("t.csv", b"id,caption\r1,a\r2,b\r", {"id": ["1", "2"], "caption": ["a", "b"]}),
        ("t.csv", "name,class\nx,cat\n", {"name": ["x"], "class": ["cat"]}),
        ("t.csv", "# of 2013\nid,caption\n1,a,\n", {"id": ["1"], "caption": ["a"]}),
    ],
)
def test_tables_of_labels_are_read_alike(
    tmp_path: Path, file: str, content: str | bytes, expected: dict[str, list[str | None]]
) -> None:
    labels = read_label_table(written(tmp_path / file, content))

    assert {name: labels.column(name).to_pylist() for name in expected} == expected


def test_a_list_of_captions_is_no_label(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "id,caption\n1,\"['a', 'b']\"\n")

    with pytest.raises(DataError, match="row 2: has a list of captions in column 'caption'; write"):
        read_label_table(path)


@pytest.mark.parametrize("write", [pl.DataFrame.write_parquet, pl.DataFrame.write_ndjson])
def test_numbered_columns_of_other_tables(
    folder: Path, write: Callable[[pl.DataFrame, Path], None]
) -> None:
    suffix = "parquet" if write is pl.DataFrame.write_parquet else "jsonl"
    path = folder / f"t.{suffix}"
    frame = {"image": ["a.jpg", "b.jpg"], "caption1": ["A dog runs.", "A cat, sleeping"]}
    write(pl.DataFrame({**frame, "caption2": ["Two dogs", "nan"]}), path)
    try:
        assert read(path) == (PLAIN, [])
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("name", "file"), [("a", "a.jpg"), ("a.png", "a.jpg"), ("391895", "000000391895.jpg")]
)
def test_names_mean_the_only_image_of_their_stem(folder: Path, name: str, file: str) -> None:
    path = written(folder / "t.csv", f"image,caption\n{name},one\n")
    source = open_source(path)
    with source.open(0) as opened:
        [record] = opened.records(0, 1)
    path.unlink()

    assert record.image is not None
    assert record.image.source == (folder / file).as_posix()
