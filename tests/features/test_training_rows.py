from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.core.enums import Modality
from csalign.core.errors import DataError, SchemaError
from csalign.features import join, keys, shard, training_rows, writer
from csalign.features.join import ALL, join_ids, load_rows
from csalign.features.manifest import EncoderInfo
from csalign.features.memory_map import MappedRows, Room
from csalign.features.reader import FeatureSet
from csalign.features.shard import Rows
from csalign.features.training_rows import TrainingRows, load_training
from csalign.features.writer import FeatureWriter

Write = Callable[..., Path]
IMAGES, TEXTS = 60, 150


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write 60 images and 150 texts in shards and row groups of few rows, in an order of theirs.

    A third of the images is split "val"; some images have no text, some texts no image.
    """
    monkeypatch.setattr(shard, "ROW_GROUP_ROWS", 7)
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


def load(folder: Path, tmp_path: Path, memory: int, split: str = "train") -> TrainingRows:
    features = FeatureSet.open(folder)
    joined = join_ids(features, split)
    return load_training(features, joined, None, Room(memory, tmp_path), with_keys=True)[0]


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
    rows, held_out = load_training(features, train, val, Room(0, tmp_path), with_keys=False)
    expected = load_rows(features, "val")

    assert held_out is not None
    assert held_out.name == expected.name
    for name in ("images", "texts", "text_image", "text_rows"):
        np.testing.assert_array_equal(getattr(held_out, name), getattr(expected, name))
    assert held_out.captions == expected.captions
    assert held_out.image_ids == expected.image_ids
    assert rows.caption_keys.tolist() == list(range(train.texts))


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


def test_a_row_without_direction_is_named(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    monkeypatch.setattr(training_rows, "batch_vectors", lambda batch, _: np.zeros((len(batch), 5)))

    with pytest.raises(DataError, match=r"\(split train\): images: .* 'i0' has norm 0"):
        load(folder, tmp_path, 0)


def test_ids_that_share_a_key_are_told_apart(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    expected = load(folder, tmp_path, 0).text_image
    real = keys.string_keys

    def crowded(strings: Any, salt: int = 0) -> Any:
        return real(strings, salt) % np.uint64(40) if salt < 2 else real(strings, salt)

    monkeypatch.setattr(join, "string_keys", crowded)

    np.testing.assert_array_equal(load(folder, tmp_path, 0).text_image, expected)
