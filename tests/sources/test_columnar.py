import base64
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.sources.images import read_image
from csalign.sources.records import Record
from csalign.sources.records.open import SourceOptions, open_source

MakeImages = Callable[..., Path]
Records = Callable[..., list[Record]]
Outline = Callable[..., list[tuple[Any, ...]]]
Flaws = Callable[..., list[tuple[int | None, str]]]


def error_of(source: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_source(source, SourceOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.fixture
def hub() -> datasets.Dataset:
    """Three pictures with captions, as the `datasets` library holds them."""
    pictures = [Image.new("RGB", (6, 4), (60 * k, 0, 0)) for k in range(3)]
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))}
    )
    rows = {"image": pictures, "caption": [["a", "b"], ["c"], []]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_parquet_of_the_datasets_library_is_read(
    tmp_path: Path, hub: datasets.Dataset, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    hub.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    hub.select([0]).to_parquet(str(tmp_path / "data" / "validation-00000-of-00001.parquet"))

    with caplog.at_level(logging.INFO):
        found = records(tmp_path)

    train, val = "data/train-00000-of-00001", "data/validation-00000-of-00001"
    assert [
        (r.image and r.image[:2], [tuple(text) for text in r.texts], r.split, r.row) for r in found
    ] == [
        (
            (f"{train}/1", f"{tmp_path}/{train}.parquet/1"),
            [(f"{train}/1#0", "a", 1), (f"{train}/1#1", "b", 1)],
            *("train", 1),
        ),
        ((f"{train}/2", f"{tmp_path}/{train}.parquet/2"), [(f"{train}/2#0", "c", 2)], "train", 2),
        ((f"{train}/3", f"{tmp_path}/{train}.parquet/3"), [], "train", 3),
        (
            (f"{val}/1", f"{tmp_path}/{val}.parquet/1"),
            [(f"{val}/1#0", "a", 1), (f"{val}/1#1", "b", 1)],
            *("val", 1),
        ),
    ]
    assert "splits are taken from file names (train, val)" in caplog.text
    pictures = [read_image(r.image.read()).getpixel((0, 0)) for r in found if r.image]
    assert pictures == [(0, 0, 0), (60, 0, 0), (120, 0, 0), (0, 0, 0)]
    source = open_source(tmp_path)
    assert (source.total, source.sides) == (4, (Modality.IMAGE, Modality.TEXT))
    assert source.description == "2 Parquet files of images and texts"


def test_what_datasets_saves_to_disk_is_read(
    tmp_path: Path, hub: datasets.Dataset, outline: Outline
) -> None:
    datasets.DatasetDict({"train": hub, "test": hub.select([1])}).save_to_disk(str(tmp_path / "x"))

    assert outline(tmp_path / "x") == [
        ("test/data-00000-of-00001/1", ["c"], "test"),
        *(
            (f"train/data-00000-of-00001/{row + 1}", captions, "train")
            for row, captions in enumerate((["a", "b"], ["c"], []))
        ),
    ]
    assert len(outline(tmp_path / "x" / "test" / "data-00000-of-00001.arrow")) == 1


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string()])
def test_plain_bytes_and_base64_are_images(
    make_images: MakeImages, records: Records, kind: pa.DataType
) -> None:
    folder = make_images("a.png", "b.png")
    content = [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    cells = content if kind != pa.string() else [base64.b64encode(c).decode() for c in content]
    columns = {"jpg": pa.array([*cells, None], kind), "text": ["x", None, "y"], "split": ["s"] * 3}
    path = write(folder / "x" / "t.parquet", columns)

    found = records(path)

    assert [r.image.read() for r in found if r.image] == content
    assert [(r.image and r.image.id, [t.id for t in r.texts], r.split) for r in found] == [
        ("t/1", ["t/1#0"], "s"),
        ("t/2", [], "s"),
        (None, ["caption:3"], "s"),
    ]


def test_rows_of_one_path_are_gathered_across_files(
    make_images: MakeImages, outline: Outline, records: Records
) -> None:
    folder = make_images("a.png", "b.png")
    write(folder / "t" / "0.parquet", {"path": ["a.png", "b.png"], "caption": ["x", "y"]})
    write(folder / "t" / "1.parquet", {"path": ["a.png", None], "caption": ["z", "alone"]})

    assert outline(folder / "t", images=folder) == [
        ("a.png", ["x", "z"], None),
        ("b.png", ["y"], None),
        (None, ["alone"], None),
    ]
    assert records(folder / "t", images=folder)[2].texts[0].id == "1/caption:2"


def test_pictures_may_be_named_rather_than_held(
    make_images: MakeImages, records: Records, flaws: Flaws
) -> None:
    folder = make_images("sub/a.png")
    paths = ["sub/a.png", "../x.png", None]
    structs = [{"bytes": None, "path": path} for path in paths]
    path = write(folder / "t.parquet", {"image": structs, "caption": ["x", "y", None]})

    found = records(path)

    assert found[0].image is not None
    assert found[0].image.read() == (folder / "sub/a.png").read_bytes()
    assert flaws(path) == [
        (2, f"image '../x.png' is outside of {folder}; move it inside"),
        (3, "has neither an image nor a caption"),
    ]


def test_ids_of_a_column_gather_adjacent_rows(tmp_path: Path, outline: Outline) -> None:
    columns = {
        "image": [b"1", b"1", b"2", b"1", b"3", b"4", b"4"],
        "caption": ["a", "b", "c", "d", "e", "f", "g"],
        "split": ["train"] * 5 + ["val", "test"],
        "cocoid": [7, 7, 8, 7, None, 9, 9],
    }
    expected = [
        ("7", ["a", "b"], "train"),
        ("8", ["c"], "train"),
        ("t/4", ["d"], "train"),
        ("t/5", ["e"], "train"),
        (None, [], "its rows are in several splits, one of them val"),
    ]
    path = write(tmp_path / "t.parquet", columns, row_group_size=2)
    assert outline(path, id_column="cocoid") == expected

    write(tmp_path / "u.parquet", columns)
    found = [entry[0] for entry in outline(tmp_path, id_column="cocoid") if entry[0]]
    assert found == ["t/7", "t/8", "t/4", "t/5", "u/7", "u/8", "u/4", "u/5"]


def test_captions_alone_are_streamed(tmp_path: Path, records: Records) -> None:
    for name in ("0.parquet", "1.parquet"):
        pl.DataFrame({"TEXT": ["x", None], "url": ["u", "v"]}).write_parquet(tmp_path / name)

    assert [[t.id for t in r.texts] or r.error for r in records(tmp_path)] == [
        *(["0/caption:1"], "has neither an image nor a caption"),
        *(["1/caption:1"], "has neither an image nor a caption"),
    ]
    assert [t.id for t in records(tmp_path / "0.parquet")[0].texts] == ["caption:1"]


def test_any_range_of_rows_is_the_same_rows(tmp_path: Path) -> None:
    rows = 100
    columns = {"image": [bytes([row]) for row in range(rows)], "caption": [""] * rows}
    path = write(tmp_path / "t.parquet", columns, row_group_size=40)
    with open_source(path).open(0) as volume:
        for start, stop in (
            (0, 100),
            (37, 45),
            (45, 83),
            (99, 100),
            (80, 81),
            (3, 300),
            (100, 200),
        ):
            images = [record.image for record in volume.records(start, stop)]
            read = [image and image.read() for image in images]
            assert read == [bytes([row]) for row in range(start, min(stop, rows))]


def test_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"image": [[1.0]], "caption": ["x"]})
    assert "column 'image' contains list<" in error_of(path)
    path = write(tmp_path / "t.parquet", {"image": [b"x"], "caption": [3]})
    assert "column 'caption' contains int64, not text or lists of text; name another" in error_of(
        path
    )
    path = write(tmp_path / "t.parquet", {"vector": [b"x"]})
    assert "no column looks like images or captions (columns: vector)" in error_of(path)
    path = write(tmp_path / "u" / "0.parquet", {"image": [b"x"]})
    write(tmp_path / "u" / "1.parquet", {"caption": ["x"]})
    assert "1.parquet: has other columns than 0.parquet" in error_of(tmp_path / "u")


def test_damaged_files_are_told(tmp_path: Path) -> None:
    columns = {"image": [bytes(100) for _ in range(1000)], "caption": [f"{k}" for k in range(1000)]}
    path = write(tmp_path / "t.parquet", columns, compression="none", use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert error_of(path).startswith(f"{path}: cannot be read (")
    path.write_bytes(b"PAR1")
    assert error_of(path).startswith(f"{path}: cannot be read (")


def test_rows_that_a_file_says_it_has_and_has_not_are_flaws(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"caption": ["a", "b", "c"]}), path)
    # The rows of the file, not of its row group: 3 as Thrift writes it, and then a list begins.
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x16\x06\x19", b"\x16\x0a\x19", 1))
    assert pq.read_metadata(path).num_rows == 5
    with open_source(path).open(0) as volume:
        found = list(volume.records(0, len(volume)))

    assert [record.texts[0].caption for record in found[:3]] == ["a", "b", "c"]
    assert [record.error for record in found[3:]] == [
        "has fewer rows than it states; write or download it again"
    ] * 2


def test_damaged_rows_are_flaws_and_other_groups_are_read(tmp_path: Path, flaws: Flaws) -> None:
    columns = {"image": [bytes(100) for _ in range(1000)], "caption": [f"{k}" for k in range(1000)]}
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 500}
    path = write(tmp_path / "t.parquet", columns, **options)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 2000 + data[2004:])
    found = flaws(path)

    assert [row for row, _ in found] == list(range(1, 501))
    assert found[0][1].startswith("cannot be read (")


@pytest.mark.parametrize("images", [[b"x"] * 3, ["a.png", "b.png", "c.png"]])
def test_a_file_that_cannot_be_read_is_a_flaw_among_others(
    tmp_path: Path, outline: Outline, images: list[Any]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("0.parquet", "1.parquet", "2.parquet"):
        kept = [f"{name}{image}" if isinstance(image, str) else image for image in images]
        write(folder / name, {"image": kept, "caption": ["x", "y", "z"]})
    whole = (folder / "0.parquet").read_bytes()
    (folder / "0.parquet").write_bytes(whole[:-20])
    found = outline(folder, kind="parquet")

    assert len(found) == 7
    assert found[0][0] is None
    assert str(found[0][2]).startswith("cannot be read (")
    assert "write or download it again" in str(found[0][2])
    for name in ("1.parquet", "2.parquet"):
        (folder / name).write_bytes(b"PAR1")
    assert error_of(folder).startswith(f"none of 3 files can be read: {folder}/0.parquet: cannot")


def test_text_that_is_not_utf_8_is_a_flaw(tmp_path: Path, outline: Outline) -> None:
    raw = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    path = write(tmp_path / "t.parquet", {"caption": raw})

    assert outline(path) == [
        (None, ["fine"], None),
        (None, [], "caption must be text, not invalid UTF-8"),
    ]


def test_pandas_writes_lists_of_captions(make_images: MakeImages, outline: Outline) -> None:
    folder = make_images("a.png")
    frame = pd.DataFrame({"filename": ["a.png"], "sentences_raw": [["x", "y"]], "split": ["test"]})
    frame.to_parquet(folder / "t.parquet")

    assert outline(folder / "t.parquet") == [("a.png", ["x", "y"], "test")]
