import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import webdataset
from upath import UPath

from csalign.core.errors import DataError
from csalign.sources.records import Record
from csalign.sources.records.open import open_source

MakeImages = Callable[..., Path]
Records = Callable[..., list[Record]]
Outline = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty folder in an object store."""
    name = f"bucket-{uuid.uuid4().hex}"
    if request.param == "memory":
        return f"memory://{name}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def put(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            target = UPath(url) / path.relative_to(folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


def read(found: list[Record]) -> dict[str, bytes]:
    return {record.image.id: record.image.read() for record in found if record.image}


def test_a_folder_is_read_from_an_object_store(
    store: str, make_images: MakeImages, records: Records, outline: Outline
) -> None:
    folder = make_images("a.png", "sub/b c#1.PNG", ".hidden/c.png")
    (folder / "a.txt").write_text("one\ntwo")
    put(folder, f"{store}/photos")

    assert outline(f"{store}/photos") == [
        ("a.png", ["one", "two"], None),
        ("sub/b c#1.PNG", [], None),
    ]
    found = records(f"{store}/photos/")
    assert read(found) == {
        name: (folder / name).read_bytes() for name in ("a.png", "sub/b c#1.PNG")
    }
    assert found[0].image is not None
    assert found[0].image.source == f"{store}/photos/a.png"
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(f"{store}/none")


def test_an_object_store_that_refuses_is_told_in_one_line(
    s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    s3fs.S3FileSystem.clear_instance_cache()

    with pytest.raises(DataError, match=r"^s3://none/x: .*[^\n]*$"):
        open_source("s3://none/x")


def test_a_table_is_read_from_an_object_store(
    store: str, make_images: MakeImages, records: Records, outline: Outline
) -> None:
    folder = make_images("a.png", "b.png")
    rows = [("a.png", "x"), (f"{store}/t/b.png", "y"), ("gone.png", "z"), ("../t/a.png", "no")]
    lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    put(folder, f"{store}/t")

    for source in (f"{store}/t", f"{store}/t/captions.jsonl"):
        *found, climbing = outline(source)
        assert found == [("a.png", ["x"], None), ("b.png", ["y"], None), ("gone.png", ["z"], None)]
        assert "is outside of" in climbing[2]
    images = [record.image for record in records(f"{store}/t")]
    assert images[1] is not None
    assert images[1].read() == (folder / "b.png").read_bytes()
    assert images[2] is not None
    with pytest.raises(DataError, match="cannot be read"):
        images[2].read()


def test_tars_are_read_from_an_object_store(store: str, tmp_path: Path, outline: Outline) -> None:
    (tmp_path / "wds").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / "wds" / f"{shard}.tar")) as writer:
            writer.write({"__key__": "k", "jpg": b"pixels", "txt": f"of {shard}"})
    put(tmp_path / "wds", f"{store}/wds")

    expected = [("0/k", ["of 0"], None), ("1/k", ["of 1"], None)]
    for name in ("", "/{0..1}.tar", "/*.tar", f"/0.tar::{store}/wds/1.tar"):
        assert outline(f"{store}/wds{name}") == expected
    source = open_source(f"{store}/wds/0.tar")
    with source.open(0) as volume:
        assert read(list(volume.records(0, 1))) == {"0/k": b"pixels"}


def test_parquet_is_read_from_an_object_store(store: str, tmp_path: Path, records: Records) -> None:
    (tmp_path / "hub").mkdir()
    table = pa.table({"image": [{"bytes": b"pixels", "path": None}], "caption": ["x"]})
    pq.write_table(table, tmp_path / "hub" / "test-0.parquet")
    put(tmp_path / "hub", f"{store}/hub")

    for source in (f"{store}/hub", f"{store}/hub/test-0.parquet"):
        found = records(source)
        assert read(found) == {"test-0/1": b"pixels"}
        assert found[0].split == "test"
