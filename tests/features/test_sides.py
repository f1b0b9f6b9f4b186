"""Feature sets of any number of sides: what is written is read, and rows are joined by items."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from csalign.core.enums import Modality, side_of
from csalign.core.errors import ConfigError, DataError, SchemaError
from csalign.features.reader import FeatureSet
from csalign.features.schema import EncoderInfo, same_rows
from csalign.features.sides import chosen_sides, load_sides
from csalign.features.writer import FeatureWriter, Rows

ITEMS: dict[str, list[str | None]] = {
    "audio": ["cow", "dog", None, "dog"],
    "image": ["dog", "owl"],
    "text": ["owl", "cow", "dog"],
}


def write(folder: Path, items: dict[str, list[str | None]], split: str | None = None) -> FeatureSet:
    folder.mkdir()
    rng = np.random.default_rng(0)
    values = {side: rng.normal(size=(4, 3 + len(side))).astype(np.float32) for side in ITEMS}
    encoders = {side: EncoderInfo(spec="x", width=values[side].shape[1]) for side in items}
    with FeatureWriter(folder, encoders, "float32", items=True) as writer:
        for side, keys in items.items():
            ids = [f"{side}-{row}" for row in range(len(keys))]
            columns = {"id": ids, "item": keys, "split": [split] * len(keys)}
            writer.write(side, Rows(columns, values[side][: len(keys)]))
    return FeatureSet.open(folder)


def test_a_set_of_three_sides_is_read_as_it_was_written(tmp_path: Path) -> None:
    features = write(tmp_path / "set", ITEMS)

    assert features.sides == ("image", "text", "audio")
    assert features.is_sided
    assert len(features.table("audio")) == 4
    assert features.table("audio").strings("item").to_pylist() == ITEMS["audio"]
    assert features.table("images") is features.images
    files = [path.relative_to(tmp_path / "set").as_posix() for path in tmp_path.rglob("*.parquet")]
    assert sorted(files) == [
        f"{own}/part-00000.parquet" for own in ("images", "sides/audio", "texts")
    ]
    assert json.loads((tmp_path / "set/manifest.json").read_text())["format_version"] == 2
    with pytest.raises(ConfigError, match="no side 'video'; its sides are image, text, audio"):
        features.table("video")


def test_rows_are_joined_by_items(tmp_path: Path) -> None:
    rows = load_sides(write(tmp_path / "set", ITEMS))

    assert rows.keys.to_pylist() == ["cow", "dog", "owl", None]
    assert rows.present.tolist() == [  # image, text, audio
        [False, True, True],
        [True, True, True],
        [True, True, False],
        [False, False, True],
    ]
    first, second = rows.pairs("audio", "text")
    assert [*zip(first, second, strict=True)] == [(0, 1), (1, 2), (3, 2)]
    taken = rows.take(np.array([False, True, False, True]))
    assert taken.sides[side_of("audio")].items.tolist() == [0, 1, 0]
    assert taken.sides[Modality.TEXT].table_rows.tolist() == [2]


def test_the_order_of_rows_and_sides_changes_no_item(tmp_path: Path) -> None:
    turned: dict[str, list[str | None]] = {
        side: keys[::-1] for side, keys in reversed(ITEMS.items())
    }
    one, other = load_sides(write(tmp_path / "a", ITEMS)), load_sides(write(tmp_path / "b", turned))

    assert one.keys.equals(other.keys)
    assert [*one.sides] == [*other.sides]
    assert (one.present == other.present).all()


def test_images_and_texts_of_a_set_without_items_are_joined_by_image_id(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    encoders = {side: EncoderInfo(spec="x", width=2) for side in ("image", "text", "audio")}
    with FeatureWriter(folder, encoders, "float32") as writer:
        writer.write("image", Rows({"id": ["a", "b"]}, np.eye(2)))
        writer.write("text", Rows({"id": ["t", "u"], "image_id": ["b", None]}, np.eye(2)))
        writer.write("audio", Rows({"id": ["1"], "item": ["b"]}, np.ones((1, 2))))
    rows = load_sides(FeatureSet.open(folder))

    assert rows.keys.to_pylist() == ["a", "b", None]
    assert rows.present.tolist() == [[True, False, False], [True, True, True], [False, True, False]]
    assert "item" not in pq.read_schema(folder / "images/part-00000.parquet").names


def test_sides_are_selected_by_name(tmp_path: Path) -> None:
    features = write(tmp_path / "set", ITEMS, split="train")

    assert chosen_sides(features, ["audio", "image"]) == ("image", "audio")
    assert [*load_sides(features, "train", ["audio", "text"]).sides] == ["text", "audio"]
    for sides, message in ((["audio"], "two sides or more"), (["video", "text"], "is not in")):
        with pytest.raises(ConfigError, match=message):
            chosen_sides(features, sides)
    with pytest.raises(DataError, match="no rows; the splits of the set are train"):
        load_sides(features, "test")


@pytest.mark.parametrize("name", ["", "Audio", "a b", "../x", "x" * 65, "-a"])
def test_names_that_no_folder_should_have_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a side"):
        side_of(name)
    write(tmp_path / "set", ITEMS)
    path = tmp_path / "set/manifest.json"
    document = json.loads(path.read_text())
    document["sides"][name] = document["sides"].pop("audio")
    path.write_text(json.dumps(document))
    with pytest.raises(SchemaError, match="cannot name a side"):
        FeatureSet.open(tmp_path / "set")


def test_a_set_to_which_a_side_is_added_has_the_same_rows(tmp_path: Path) -> None:
    fewer = {side: keys for side, keys in ITEMS.items() if side != "audio"}
    own = write(tmp_path / "set", ITEMS).manifest.fingerprint()
    before = write(tmp_path / "before", fewer).manifest.fingerprint()

    assert same_rows(own, before)
    assert same_rows(own, own + "-splits")
    assert same_rows(own, write(tmp_path / "copy", ITEMS).manifest.fingerprint())
    assert not same_rows("a+b", "a+c")
    assert not same_rows("a+b", "c+b")
