import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import SchemaError
from csalign.features import schema, verified
from csalign.features.pages import full_levels, read_vectors
from csalign.features.reader import FeatureSet, FeatureTable, batch_vectors
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows

Array = npt.NDArray[Any]


def vectors(rows: int, width: int) -> Array:
    return np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float16)


def make(folder: Path, values: Array, dtype: str = "float16", pieces: int = 1) -> FeatureTable:
    folder.mkdir()
    encoders = {Modality.IMAGE: EncoderInfo(spec="eye", width=values.shape[1])}
    with FeatureWriter(folder, encoders, dtype) as out:
        for part in np.array_split(np.arange(len(values)), pieces):
            out.write(Modality.IMAGE, Rows({"id": [f"{n:05d}" for n in part]}, values[part]))
    return FeatureSet.open(folder).images


def file_of(table: FeatureTable) -> Path:
    return table.folder / table.shards[0].path


def direct(path: Path, width: int, dtype: Any, *, is_verified: bool = False) -> Array | None:
    """Read the embeddings of the first row group as pages; None if they are in another form."""
    with pq.ParquetFile(path) as file, path.open("rb", buffering=0) as raw:
        group = file.metadata.row_group(0)
        place = [file.schema.column(n).path for n in range(group.num_columns)].index(
            "embedding.list.element"
        )
        out = np.zeros((group.num_rows, width), dtype)
        column = file.schema.column(place)
        return (
            out
            if read_vectors(raw, group.column(place), column, out, verified=is_verified)
            else None
        )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "csalign" / "verified"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    names: list[str] = []
    real = atomic.sha256_file

    def count(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(atomic, "sha256_file", count)
    return names


def settle(path: Path) -> None:
    while time.time() - path.stat().st_ctime < 2.05:
        time.sleep(0.05)


@pytest.mark.parametrize("width", [1, 3, 8, 16, 100, 512])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_new_sets_are_read_as_pages_and_by_other_readers_alike(
    tmp_path: Path, width: int, dtype: str
) -> None:
    values = vectors(70, width).astype(dtype)
    table = make(tmp_path / "set", values, dtype, pieces=3)
    path = file_of(table)

    read = pq.read_table(path, page_checksum_verification=True)

    assert read.schema.equals(schema.table_schema(Modality.IMAGE, dtype, width))
    np.testing.assert_array_equal(batch_vectors(read.to_batches()[0], "embedding"), values)
    np.testing.assert_array_equal(np.stack(pd.read_parquet(path)["embedding"].tolist()), values)
    np.testing.assert_array_equal(direct(path, width, dtype), values)
    np.testing.assert_array_equal(table.embeddings(), values)


def test_several_row_groups_and_rows_of_some_of_them(tmp_path: Path) -> None:
    values = vectors(20_000, 16)
    table = make(tmp_path / "set", values, pieces=7)
    rows = np.array([0, 8_191, 8_192, 19_999])

    assert pq.ParquetFile(file_of(table)).metadata.num_row_groups == 3
    np.testing.assert_array_equal(table.take(rows), values[rows])
    np.testing.assert_array_equal(table.embeddings(), values)
    found = [
        (first, batch.column("id")[0].as_py()) for first, batch in table.read("embedding", "id")
    ]
    assert found == [(0, "00000"), (8_192, "08192"), (16_384, "16384")]


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"use_byte_stream_split": ["embedding.list.element"]},
        {"data_page_version": "2.0"},
        {},  # without checksums
    ],
)
def test_other_forms_are_left_to_arrow(tmp_path: Path, options: dict[str, Any]) -> None:
    values = vectors(64, 16)
    table = make(tmp_path / "set", values)
    path = tmp_path / "other.parquet"
    usual: dict[str, Any] = {"compression": None, "use_dictionary": False}
    pq.write_table(pq.read_table(file_of(table)), path, **usual | options)

    assert direct(path, 16, np.float16) is None
    read = pq.read_table(path).to_batches()[0]
    np.testing.assert_array_equal(batch_vectors(read, "embedding"), values)


def test_pages_that_arrow_wrote_are_read(tmp_path: Path) -> None:
    values = vectors(3_000, 512)
    table = make(tmp_path / "set", values)
    path = tmp_path / "arrow.parquet"
    rows = pq.read_table(file_of(table))
    pq.write_table(
        rows, path, compression=None, use_dictionary=False, write_page_checksum=True,
        write_batch_size=1 << 16,
    )  # fmt: skip

    np.testing.assert_array_equal(direct(path, 512, np.float16), values)


def test_nulls_and_lists_of_other_lengths_are_left_to_arrow(tmp_path: Path) -> None:
    path = tmp_path / "lists.parquet"
    number = pa.float32()
    ragged = pa.list_(pa.field("element", number, nullable=False))
    for lists in ([[1.0], [2.0, 3.0, 4.0]], [[1.0, 2.0], None, [3.0, 4.0]]):
        field = pa.field("embedding", ragged, nullable=None in lists)
        pq.write_table(
            pa.table([pa.array(lists, ragged)], pa.schema([field])),
            path, compression=None, use_dictionary=False, write_page_checksum=True,
        )  # fmt: skip
        assert direct(path, 2, np.float32) is None


def test_levels_of_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="0 x 4"):
        full_levels(0, 4)


def flipped(content: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_byte_in_a_value_is_found_on_the_first_read(tmp_path: Path, cache: Path) -> None:
    values = vectors(50, 16)
    table = make(tmp_path / "set", values)
    path = file_of(table)
    content = path.read_bytes()
    path.write_bytes(flipped(content, content.index(values.tobytes()) + 40, 3))

    assert direct(path, 16, np.float16) is None
    with pytest.raises(SchemaError, match=r"part-00000\.parquet: does not match the manifest"):
        table.embeddings()
    with pytest.raises(SchemaError, match=r"part-00000\.parquet: cannot be read"):
        table.take(None)
    assert not list(cache.glob("*"))


def test_a_file_that_matched_is_not_hashed_again_until_it_changes(
    tmp_path: Path, cache: Path, hashed: list[str]
) -> None:
    values = vectors(50, 16)
    table = make(tmp_path / "set", values)
    path = file_of(table)
    settle(path)

    for _ in range(3):
        np.testing.assert_array_equal(table.embeddings(), values)
    assert hashed == ["part-00000.parquet"]
    table.verify()
    assert len(hashed) == 2
    assert len(list(cache.iterdir())) == 1

    content = path.read_bytes()
    path.write_bytes(flipped(content, content.index(values.tobytes()) + 40, 3))
    os.utime(path, ns=(0, 0))
    with pytest.raises(SchemaError, match="does not match the manifest"):
        table.embeddings()
    path.write_bytes(content)
    np.testing.assert_array_equal(table.embeddings(), values)
    assert len(hashed) == 4


def test_a_file_that_just_changed_is_not_remembered(
    tmp_path: Path, cache: Path, hashed: list[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    sha256 = atomic.sha256_file(path)

    assert verified.matches(path, sha256)
    assert not verified.is_remembered(path, sha256)
    assert not cache.exists()


def test_damage_that_appears_later_is_forgotten_by_verify(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    sha256 = atomic.sha256_file(path)
    settle(path)
    assert verified.matches(path, sha256)
    (mark,) = cache.iterdir()

    assert verified.is_remembered(path, sha256)
    assert not verified.matches(path, "0" * 64)
    path.write_bytes(b"Content")
    assert not verified.is_remembered(path, sha256)
    assert not verified.matches(path, sha256)
    assert mark.exists()


@pytest.mark.parametrize("place", ["file", "file/home", "missing"])
def test_without_a_cache_files_are_hashed_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str], place: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place) if place == "file" else "")
    monkeypatch.setenv("HOME", str(tmp_path / place))
    table = make(tmp_path / "set", vectors(5, 4))
    settle(file_of(table))

    for _ in range(2):
        assert len(table.embeddings()) == 5
    assert len(hashed) == 2
    assert not (tmp_path / "missing").exists()


def test_remembered_files_are_bounded(tmp_path: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    for number in range(4_200):
        (cache / f"{number:064x}").touch()
    path = tmp_path / "file"
    path.write_bytes(b"content")
    settle(path)

    assert verified.matches(path, atomic.sha256_file(path))
    assert len(list(cache.iterdir())) < 4_100
    assert verified.is_remembered(path, atomic.sha256_file(path))


def rows_of(table: FeatureTable) -> tuple[list[str], Array]:
    batches = [batch for _, batch in table.read("id", "embedding")]
    ids = [name for batch in batches for name in batch.column("id").to_pylist()]
    return ids, np.concatenate([batch_vectors(batch, "embedding") for batch in batches])


@pytest.mark.parametrize("kind", ["flip", "truncate", "flip pages"])
def test_damage_anywhere_gives_the_right_rows_or_is_reported(
    tmp_path: Path, cache: Path, kind: str
) -> None:
    values = vectors(30, 16)
    table = make(tmp_path / "set", values, pieces=2)
    path, ids = file_of(table), [f"{n:05d}" for n in range(30)]
    content = path.read_bytes()
    start = content.index(values[:1].tobytes()) - 350  # before the levels, and the header
    rng = np.random.default_rng(len(kind))
    found = 0
    for _ in range(400):
        if kind == "truncate":
            changed = content[: rng.integers(len(content))]
            changed += bytes(len(content) - len(changed)) * int(rng.integers(2))
        else:
            first = start if kind == "flip pages" else 0
            last = start + 380 if kind == "flip pages" else len(content)
            changed = content
            for _ in range(rng.integers(1, 4)):
                changed = flipped(changed, int(rng.integers(first, last)), int(rng.integers(8)))
        path.write_bytes(changed)
        try:
            opened = FeatureSet.open(table.folder).images
            read = rows_of(opened)
        except SchemaError:
            found += 1
            continue
        assert read[0] == ids
        np.testing.assert_array_equal(read[1], values)
    assert found > 100


class Limited(io.FileIO):
    """A file that fails when much more is read of it than it contains."""

    read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(-1 if size is None else size)
        self.read_bytes += len(found)
        assert self.read_bytes < 1 << 20
        return found


def test_any_bytes_as_pages_end_soon_and_are_refused_or_right(tmp_path: Path) -> None:
    values = vectors(30, 16)
    path = file_of(make(tmp_path / "set", values))
    content = path.read_bytes()
    with pq.ParquetFile(path) as file:
        chunk, column = file.metadata.row_group(0).column(3), file.schema.column(3)
    start, size = chunk.data_page_offset, chunk.total_compressed_size
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(2_000):
        changed = bytearray(content)
        count = int(rng.integers(1, 40))
        at = start + rng.integers(0, 60)
        changed[at : at + count] = rng.bytes(count)
        path.write_bytes(bytes(changed[: start + rng.integers(size)] if count == 1 else changed))
        out = np.zeros_like(values)
        with Limited(str(path)) as raw:
            if read_vectors(raw, chunk, column, out, verified=False):
                np.testing.assert_array_equal(out, values)
            else:
                refused += 1
    assert refused > 1_900
