"""Folders as people have them: what is read, in which split, and what is named as not read."""

import base64
import io
import json
import logging
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from csalign.core.errors import DataError
from csalign.sources.records.open import SourceOptions, open_source

Row = tuple[str | None, list[str], str | None]
Make = Callable[[Path], None]


def picture(form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, form)
    return data.getvalue()


PNG, JPEG, WEBP, TGA = (picture(form) for form in ("PNG", "JPEG", "WEBP", "TGA"))
HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def write(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    for name, content in contents.items():
        put(folder / name, content)


def put(path: Path, content: bytes | str = PNG) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def tar(path: Path, *keys: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key in keys:
            for suffix, content in (("png", PNG), ("txt", f"of {key}".encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def parquet(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    pq.write_table(pa.table(texts), path)


def read(source: Path | str, **options: Any) -> list[Row]:
    """Return image, captions, and split or error of each record."""
    opened = open_source(source, SourceOptions(**options))
    rows: list[Row] = []
    for position in range(len(opened.files)):
        with opened.open(position) as file:
            for record in file.records(0, len(file)):
                if record.image is not None and record.error is None:
                    record.image.read()
                texts = [text.caption for text in record.texts]
                rows.append((record.image and record.image.id, texts, record.error or record.split))
    return rows


def image_folder(folder: Path) -> None:
    """As `datasets` writes an ImageFolder."""
    for split in ("train", "Validation"):
        for k in range(2):
            put(folder / split / f"{k}.png")
    put(folder / "train/metadata.csv", "file_name,text\n0.png,one\n1.png,two\n")
    put(folder / "Validation/metadata.jsonl", '{"file_name": "0.png", "text": "three"}\n')


def metadata_in_parquet(folder: Path) -> None:
    for split in ("train", "test"):
        put(folder / split / "0.png")
        parquet(folder / split / "metadata.parquet", file_name=["0.png"], text=[split])


def table_per_split(folder: Path) -> None:
    for name in ("train", "dev"):
        put(folder / f"{name}0.png")
        put(folder / f"{name}.csv", f"image,caption\n{name}0.png,of {name}\n")


def nested_base64(folder: Path) -> None:
    code = base64.b64encode(PNG).decode()
    for split in ("train", "test"):
        put(folder / split / "captions.tsv", f"image_base64\tcaption\n{code}\tof {split}\n")


def img2dataset_files(folder: Path) -> None:
    put(folder / "00000/000000000.jpg", JPEG)
    put(folder / "00000/000000000.txt", "a caption")
    put(folder / "00000/000000000.json", '{"caption": "a caption"}')
    put(folder / "00000_stats.json", "{}")
    parquet(folder / "00000.parquet", url=["u"], caption=["a caption"])


def kohya(folder: Path) -> None:
    for name in ("a", "b"):
        put(folder / f"{name}.png")
    put(folder / "a.caption", "one")
    put(folder / "b.png.txt", "two")


def left_by_systems(folder: Path) -> None:
    write(folder, dict.fromkeys(("a.png", "._a.png", ".DS_Store"), PNG))
    write(folder, {"Thumbs.db": PNG, "desktop.ini": PNG, "__MACOSX/._a.png": PNG})


def wrong_suffixes(folder: Path) -> None:
    write(folder, {"a.jpg": PNG, "b.PNG": WEBP, "c.jpe": JPEG, "d.JFIF": JPEG, "e.tga": TGA})


def without_suffixes(folder: Path) -> None:
    write(folder, {"3f5a0c": PNG, "b.jpg?size=large": JPEG, "c.HEIC": JPEG, "LICENSE": "MIT" * 9})


def links(folder: Path) -> None:
    put(folder / "real/a.png")
    put(folder / ".store/b.png")
    put(folder.parent / f"{folder.name}-outside/c.png")
    (folder / "again").symlink_to(folder / "real")
    (folder / "loop").symlink_to(".")
    (folder / "itself").symlink_to("itself")
    (folder / "stored").symlink_to(".store")
    (folder / "c.png").symlink_to(f"../{folder.name}-outside/c.png")
    (folder / "d").symlink_to("/")


def tar_splits(folder: Path) -> None:
    for name in ("Training", "valid", "TEST"):
        tar(folder / name / "0.tar", name[0])


def parquet_splits(folder: Path) -> None:
    for name in ("train-00000-of-00001", "flickr.validation-00000-of-00001"):
        code = base64.b64encode(PNG).decode()
        parquet(folder / f"data/{name}.parquet", image=[code], text=["x"])


def empty_first(folder: Path) -> None:
    code = base64.b64encode(PNG).decode()
    parquet(folder / "0.parquet", image=[], text=[])
    parquet(folder / "1.parquet", image=[code], text=["x"])


def split_folders(folder: Path) -> None:
    for name in ("images/train2017/1.png", "images/val2017/2.png", "testing/dev/3.png"):
        put(folder / name)


def a_class_called_train(folder: Path) -> None:
    for name in ("train/1.png", "car/2.png"):
        put(folder / name)


def texts_as_lists_and_missing(folder: Path) -> None:
    for name, text in (("a", '["one", "two"]'), ("b", "nan\n['three']\nfour"), ("c", "None")):
        put(folder / f"{name}.png")
        put(folder / f"{name}.txt", text)


def tar_of_captions(folder: Path) -> None:
    with tarfile.open(folder / "0.tar", "w") as file:
        for key, suffix, text in (
            ("a", "caption", "one"),
            ("b", "text", "two"),
            ("c", "txt", "nan"),
        ):
            for own, content in (("png", PNG), (suffix, text.encode())):
                member = tarfile.TarInfo(f"{key}.{own}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def ids_of_vsepp(folder: Path) -> None:
    for split in ("train", "dev"):
        put(folder / f"{split}_caps.txt", f"of {split}\n")
        put(folder / f"{split}_ids.txt", "0\n1\n")


def table_of_ids(folder: Path) -> None:
    put(folder / "images/x1.png")
    put(folder / "images/0002.png")
    put(folder / "captions.csv", "image_id,caption\nx1,one\n2,two\nx1,more\n")


def flickr8k_of_kaggle(folder: Path) -> None:
    put(folder / "Images/1.png")
    put(folder / "Images/2.png")
    put(folder / "captions.txt", "image,caption\n1.png,one\n2.png,two\n")


def tables_of_splits_beside_images(folder: Path) -> None:
    for split in ("train", "val"):
        put(folder / f"images/{split}1.png")
        put(
            folder / f"annotations_{split}.csv",
            f"image,caption,split\n{split}1.png,of {split},nan\n",
        )


READ: list[tuple[Make, list[Row]]] = [
    (
        texts_as_lists_and_missing,
        [
            ("a.png", ["one", "two"], None),
            ("b.png", ["three", "four"], None),
            ("c.png", [], None),
        ],
    ),
    (tar_of_captions, [("0/a", ["one"], None), ("0/b", ["two"], None), ("0/c", [], None)]),
    (ids_of_vsepp, [(None, ["of dev"], "val"), (None, ["of train"], "train")]),
    (table_of_ids, [("x1", ["one", "more"], None), ("2", ["two"], None)]),
    (flickr8k_of_kaggle, [("1.png", ["one"], None), ("2.png", ["two"], None)]),
    (
        tables_of_splits_beside_images,
        [("train1.png", ["of train"], "train"), ("val1.png", ["of val"], "val")],
    ),
    (
        image_folder,
        [
            ("Validation/0.png", ["three"], "val"),
            ("train/0.png", ["one"], "train"),
            ("train/1.png", ["two"], "train"),
            ("Validation/1.png", [], None),
        ],
    ),
    (
        metadata_in_parquet,
        [("test/0.png", ["test"], "test"), ("train/0.png", ["train"], "train")],
    ),
    (table_per_split, [("dev0.png", ["of dev"], "val"), ("train0.png", ["of train"], "train")]),
    (
        nested_base64,
        [
            ("test/captions/row:2", ["of test"], "test"),
            ("train/captions/row:2", ["of train"], "train"),
        ],
    ),
    (img2dataset_files, [("00000/000000000.jpg", ["a caption"], None)]),
    (kohya, [("a.png", ["one"], None), ("b.png", ["two"], None)]),
    (left_by_systems, [("a.png", [], None)]),
    (
        wrong_suffixes,
        [(name, [], None) for name in ("a.jpg", "b.PNG", "c.jpe", "d.JFIF", "e.tga")],
    ),
    (without_suffixes, [(name, [], None) for name in ("3f5a0c", "b.jpg?size=large", "c.HEIC")]),
    (links, [(name, [], None) for name in ("c.png", "real/a.png", "stored/b.png")]),
    (
        tar_splits,
        [
            ("TEST/0/T", ["of T"], "test"),
            ("Training/0/T", ["of T"], "train"),
            ("valid/0/v", ["of v"], "val"),
        ],
    ),
    (
        parquet_splits,
        [
            ("data/flickr.validation-00000-of-00001/1", ["x"], "val"),
            ("data/train-00000-of-00001/1", ["x"], "train"),
        ],
    ),
    (empty_first, [("1/1", ["x"], None)]),
    (
        split_folders,
        [
            ("images/train2017/1.png", [], "train"),
            ("images/val2017/2.png", [], "val"),
            ("testing/dev/3.png", [], "test"),
        ],
    ),
    (a_class_called_train, [("car/2.png", [], None), ("train/1.png", [], None)]),
]


@pytest.mark.parametrize(("make", "expected"), READ, ids=[make.__name__ for make, _ in READ])
def test_a_folder_is_read_as_what_it_is(tmp_path: Path, make: Make, expected: list[Row]) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    make(folder)

    assert read(folder) == expected


def gap(folder: Path) -> None:
    for number in (0, 1, 3):
        tar(folder / f"{number:05d}.tar", f"a{number}")


def gap_of_total(folder: Path) -> None:
    for number in (0, 3):
        parquet(folder / f"train-{number:05d}-of-00004.parquet", text=["x"])


def beside_tars(folder: Path) -> None:
    tar(folder / "0.tar", "a")
    parquet(folder / "0.parquet", url=["u"])
    put(folder / "0_stats.json", "{}")
    put(folder / "captions.csv", "image,caption\n")


def unreadable_kinds(folder: Path) -> None:
    write(folder, {"a.png": PNG, "b.HEIC": HEIC, "c.nef": b"II*\0" + bytes(40), "notes.md": "x"})


def header_alone(folder: Path) -> None:
    put(folder / "train/0.png")
    put(folder / "train/metadata.csv", "file_name,text\n0.png,one\n")
    put(folder / "test/metadata.csv", "file_name,text\n")


def header_beside_images(folder: Path) -> None:
    put(folder / "0.png")
    put(folder / "captions.csv", "image,caption\n")


def annotations_in_a_folder(folder: Path) -> None:
    put(folder / "images/0.png")
    put(folder / "annotations/captions_val2017.json", '{"images": [], "annotations": []}')


def both_texts(folder: Path) -> None:
    put(folder / "a.png")
    put(folder / "a.txt", "one")
    put(folder / "a.caption", "two")


def classes(folder: Path) -> None:
    put(folder / "cat/1.png")
    put(folder / "dog/1.png")


NAMED: list[tuple[Make, str]] = [
    (gap, "1 file of a numbered series not found, such as 00002;"),
    (gap_of_total, "2 files of a numbered series not found, such as train-00001;"),
    (beside_tars, "1 file not read (1 .csv), such as captions.csv;"),
    (unreadable_kinds, "2 files not read (1 .heic, 1 .nef), such as b.HEIC, c.nef; for HEIC inst"),
    (header_alone, "test/metadata.csv: adds no image or caption"),
    (header_beside_images, "captions.csv: adds no image or caption"),
    (annotations_in_a_folder, "such as annotations/captions_val2017.json; pass it with --captions"),
    (ids_of_vsepp, "2 files not read (2 .txt), such as dev_ids.txt, train_ids.txt;"),
    (both_texts, "1 file not read (1 .caption), such as a.caption;"),
    (classes, "names of folders are not captions"),
    (links, "1 file behind links out of it read, such as c.png"),
    (links, "1 folder behind links out of it not read, such as d"),
    (links, "1 file not read (1 without suffix), such as itself;"),
    (without_suffixes, "1 image by content, such as 3f5a0c"),
    (without_suffixes, "1 file not read (1 without suffix), such as LICENSE;"),
    (empty_first, "1 of 2 files have no rows"),
    (split_folders, "splits are taken from folder names"),
]


@pytest.mark.parametrize(("make", "message"), NAMED, ids=[make.__name__ for make, _ in NAMED])
def test_what_is_passed_over_is_counted_and_named(
    tmp_path: Path, make: Make, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    make(folder)
    with caplog.at_level(logging.INFO):
        assert read(folder)

    assert message in caplog.text


def test_the_images_of_tables_are_below_the_folder_that_is_given(tmp_path: Path) -> None:
    flickr8k_of_kaggle(tmp_path)
    put(tmp_path / "Images/3.png")

    assert read(tmp_path, images=tmp_path / "Images") == [
        ("1.png", ["one"], None),
        ("2.png", ["two"], None),
        ("3.png", [], None),
    ]


def test_a_name_in_several_folders_is_not_guessed(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        put(tmp_path / name)
    put(tmp_path / "captions.csv", "image,caption\n1.png,one\n")

    with pytest.raises(DataError, match=r"'1\.png'; did you mean 'a/1.png' or 'b/1.png'"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image_id,caption\n7,one\n", r"t.csv, row 2 unknown image '7'; correct the path"),
        ("caption\none\n", r"t.csv: names no image; .* --image-column"),
        ("image,caption\n/home/x/images/1.png,one\n", r"did you mean '1.png'"),
        ("image,caption\n/data/1.png,one\n", r"t.csv, row 2 image '/data/1.png' is outside of"),
        ("1.png: a dog\n2.png: a cat\n", "t.csv"),
    ],
)
def test_captions_of_no_image_are_refused(tmp_path: Path, table: str, message: str) -> None:
    put(tmp_path / "images/1.png")
    put(tmp_path / "t.csv", table)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "images", SourceOptions(captions=tmp_path / "t.csv"))


def test_the_split_of_a_document_is_that_of_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"image": f"{folder}2014/1.png", "caption": folder} for folder in ("train", "val")]
    for row in rows:
        put(tmp_path / row["image"])
    put(tmp_path / "coco_karpathy_train.json", json.dumps(rows))
    coco = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"image_id": 1, "caption": "one"}],
    }
    put(tmp_path / "annotations/captions_val2014.json", json.dumps(coco))

    assert read(tmp_path / "coco_karpathy_train.json") == [
        ("train2014/1.png", ["train"], "train"),
        ("val2014/1.png", ["val"], "train"),
    ]
    assert read(tmp_path / "annotations/captions_val2014.json", images=tmp_path / "val2014") == [
        ("1.png", ["one"], "val")
    ]
    assert "have no caption" not in caplog.text


def test_captions_in_the_parent_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "images/1.png")
    put(tmp_path / "captions.json", "[]")
    with caplog.at_level(logging.INFO):
        read(tmp_path / "images")

    assert f"is passed with --captions {tmp_path}/captions.json" in caplog.text


def test_what_was_chosen_is_no_gap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gap(tmp_path)
    for date in ("20240101", "20240301"):
        tar(tmp_path / "days" / f"{date}.tar", date)

    assert len(read(f"{tmp_path}/{{00000,00003}}.tar")) == 2
    assert len(read(tmp_path / "days")) == 2
    assert "numbered series" not in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "0.tar"], "contains images as well as tar, Parquet or Arrow files; choose with"),
        (["a.parquet"], "a.parquet: cannot be read ("),
        (["a.arrow"], "a.arrow: cannot be read ("),
        (["a.tar"], "a.tar: is empty; write or download it again"),
        (["a.csv"], "a.csv: has no row with an image or a caption"),
        (["train/metadata.csv", "train/metadata.jsonl", "a.png"], "contains several tables (train"),
    ],
)
def test_empty_shards_and_mixtures_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        put(tmp_path / name, PNG if name.endswith(("jpg", "png")) else b"")

    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert message in str(caught.value)
