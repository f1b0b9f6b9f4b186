import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csalign.core.enums import Modality
from csalign.core.errors import DataError, OutputError, SchemaError
from csalign.features import streaming, writer
from csalign.features.join import ALL, Pairs, join_ids, load_rows
from csalign.features.reader import FeatureSet
from csalign.features.schema import EncoderInfo
from csalign.features.streaming import MIB, MappedRows, MemoryBudget, load_training
from csalign.features.writer import FeatureWriter, Rows

Write = Callable[..., Path]
IMAGES, TEXTS = 60, 150


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write 60 images and 150 texts in shards and row groups of few rows, in an order of theirs.

    A third of the images is split "val"; some images have no text, some texts no image.
    """
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 7)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1_000)

    def make(owners: Any = None, bad: int | None = None) -> Path:
        rng = np.random.default_rng(0)
        if owners is None:
            owners = rng.integers(-5, IMAGES - 5, TEXTS)
        x = rng.normal(size=(IMAGES, 5)).astype(np.float16)
        y = rng.normal(size=(TEXTS, 4)).astype(np.float16)
        splits = ["val" if row % 3 == 1 else "train" for row in range(IMAGES)]
        columns: dict[Modality, dict[str, Any]] = {
            Modality.IMAGE: {"id": [f"i{row}" for row in range(IMAGES)], "split": splits},
            Modality.TEXT: {
                "id": [f"t{row}" for row in range(TEXTS)],
                "image_id": [f"i{owner}" if owner >= 0 else None for owner in owners],
                "caption": [None if row % 10 == 3 else f"No {row % 40}" for row in range(TEXTS)],
                "split": [splits[owner] if owner >= 0 else "train" for owner in owners],
            },
        }
        if bad is not None:
            columns[Modality.TEXT]["image_id"][bad] = "i1000"
        encoders = {
            Modality.IMAGE: EncoderInfo(spec="eye", width=5),
            Modality.TEXT: EncoderInfo(spec="ear", width=4),
        }
        folder = tmp_path / "features"
        folder.mkdir()
        with FeatureWriter(folder, encoders, "float16") as out:
            for side, values in ((Modality.IMAGE, x), (Modality.TEXT, y)):
                for start in range(0, len(values), 9):
                    part = slice(start, start + 9)
                    own = {name: column[part] for name, column in columns[side].items()}
                    out.write(side, Rows(own, values[part]))
        return folder

    return make


def load(folder: Path, tmp_path: Path, memory: int, split: str = "train") -> Pairs:
    features = FeatureSet.open(folder)
    joined = join_ids(features, split)
    return load_training(features, joined, None, MemoryBudget(memory, tmp_path), with_keys=True)[0]


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("split", ["train", ALL])
def test_training_rows_are_those_of_the_set_with_texts_in_the_order_of_images(
    write: Write, tmp_path: Path, memory: int, split: str
) -> None:
    folder = write()
    found, expected = (
        load(folder, tmp_path, memory, split),
        load_rows(FeatureSet.open(folder), split),
    )
    order = [*expected.texts_by_image, *np.flatnonzero(expected.text_image < 0)]

    for values in (found.images, found.texts):
        assert isinstance(values, MappedRows) == (memory == 0)
    every = np.arange(len(expected.images))
    np.testing.assert_array_equal(found.images[every], expected.images)
    np.testing.assert_array_equal(found.texts[0 : len(order)], expected.texts[order])
    np.testing.assert_array_equal(found.text_image, expected.text_image[order])
    np.testing.assert_array_equal(found.caption_counts, expected.caption_counts)
    np.testing.assert_array_equal(found.texts_by_image, np.arange(expected.pairs))
    for side, taken in ((Modality.IMAGE, every), (Modality.TEXT, order)):
        np.testing.assert_array_equal(found.table_rows(side), expected.table_rows(side)[taken])
    alike = expected.caption_keys[order]
    same = found.caption_keys
    np.testing.assert_array_equal(same[:, None] == same, alike[:, None] == alike)


def test_held_out_rows_are_read_beside_in_memory(write: Write, tmp_path: Path) -> None:
    folder = write()
    features = FeatureSet.open(folder)
    train, val = (join_ids(features, split) for split in ("train", "val"))
    rows, held_out = load_training(features, train, val, MemoryBudget(0, tmp_path), with_keys=False)
    expected = load_rows(features, "val")

    assert held_out is not None
    assert held_out.name == expected.name
    for name in ("images", "texts", "text_image", "text_rows"):
        np.testing.assert_array_equal(getattr(held_out, name), getattr(expected, name))
    assert held_out.captions == expected.captions
    assert held_out.image_ids == expected.image_ids
    assert rows.caption_keys.tolist() == list(range(train.n_texts))


def test_texts_in_the_order_of_images_are_left_so(write: Write, tmp_path: Path) -> None:
    found = load(write(np.sort(np.arange(TEXTS) % IMAGES)), tmp_path, 0, ALL)

    assert found.text_rows is None
    assert found.text_image.tolist() == sorted(row % IMAGES for row in range(TEXTS))


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_damaged_shard_is_named(write: Write, tmp_path: Path, memory: int) -> None:
    folder = write()
    path = folder / "texts" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    found = content.find(FeatureSet.open(folder).texts.embeddings()[60].tobytes())
    assert found > 0
    content[found] ^= 1
    path.write_bytes(content)

    with pytest.raises(SchemaError, match=r"part-00001\.parquet"):
        load(folder, tmp_path, memory)


def test_a_row_without_direction_is_named(write: Write, tmp_path: Path) -> None:
    folder = write()
    path = folder / "images" / "part-00000.parquet"
    content = path.read_bytes()
    stored = FeatureSet.open(folder).images.embeddings()[3]
    table = pq.read_table(path)
    values = np.array(table["embedding"].to_pylist(), np.float16)
    values[3] = 0
    kind = table.schema.field("embedding").type
    flat = pa.array(values.reshape(-1))
    zeroed = pa.FixedSizeListArray.from_arrays(flat, type=kind)
    place = table.schema.get_field_index("embedding")
    pq.write_table(table.set_column(place, table.schema.field("embedding"), zeroed), path)
    document = json.loads((folder / "manifest.json").read_text())
    document["shards"]["images"][0] |= {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(document))

    assert stored.any()
    assert content != path.read_bytes()
    with pytest.raises(DataError, match=r"\(split train\): images: .* 'i3' has norm 0"):
        load(folder, tmp_path, 0)


def test_texts_of_missing_images_and_repeated_ids_are_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text 't7' belongs to image 'i1000', which is missing"):
        write(bad=7)


FLOAT16 = np.dtype(np.float16)


def filled(folder: Path, rows: int, width: int = 3) -> tuple[MappedRows, Any]:
    values = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float16)
    stored = MemoryBudget(0, folder).rows(values.shape, FLOAT16)
    assert isinstance(stored, MappedRows)
    stored[0:rows] = values
    return stored, values


@given(st.data())
def test_mapped_rows_come_back_as_from_an_array(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 40))
    stored, values = filled(tmp_path_factory.getbasetemp(), count)
    rows = np.array(data.draw(st.lists(st.integers(-count, count - 1), max_size=50)), np.int64)
    start, stop = (data.draw(st.integers(0, count + 3)) for _ in range(2))

    np.testing.assert_array_equal(stored[rows], values[rows])
    np.testing.assert_array_equal(stored[start:stop], values[start:stop])
    order = np.array(data.draw(st.permutations(range(count))))
    stored[order] = values
    values[order] = values.copy()
    np.testing.assert_array_equal(stored[0:count], values)
    assert (stored.shape, len(stored), stored.dtype) == (values.shape, count, FLOAT16)
    assert type(stored[0:1]) is np.ndarray


def test_the_file_of_mapped_rows_has_no_name(tmp_path: Path) -> None:
    filled(tmp_path, 5)

    assert not list(tmp_path.iterdir())


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory there")
def test_few_pages_of_mapped_rows_stay_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 MiB are written, and read at random; little more than 32 may stay."""
    monkeypatch.setattr(streaming, "RESIDENT_BYTES", 32 * MIB)
    stored = MemoryBudget(0, tmp_path).rows((1 << 17, 512), FLOAT16)
    before, most = resident_mib(), 0.0
    piece = np.ones((1 << 13, 512), FLOAT16)
    for start in range(0, len(stored), len(piece)):
        stored[start : start + len(piece)] = piece
        most = max(most, resident_mib() - before)
    rng = np.random.default_rng(0)
    for _ in range(16):
        assert stored[rng.integers(0, len(stored), 1_024)].all()
        most = max(most, resident_mib() - before)

    assert most < 96


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((1 << 40, 1 << 10), r"\d+ MiB free, \d+ MiB needed"), ((1 << 10, 4), "0 MiB free")],
)
def test_rows_that_fit_nowhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], reason: str
) -> None:
    if reason.startswith("0"):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match=f"{reason}.*; .* TMPDIR"):
        MemoryBudget(1_000, tmp_path).rows(shape, FLOAT16)


def test_memory_is_given_until_it_is_used_up(tmp_path: Path) -> None:
    budget = MemoryBudget(1_000, tmp_path)
    kinds = [type(budget.rows((rows, 4), FLOAT16)) for rows in (100, 26, 25)]

    assert kinds == [np.ndarray, MappedRows, np.ndarray]
    assert budget.left == 0
