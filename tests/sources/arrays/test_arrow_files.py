from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.sources.arrays.base import CHUNK_ROWS, Vectors
from csalign.sources.arrays.opening import read_both, read_side

NEITHER: dict[Modality, str | None] = {Modality.IMAGE: None, Modality.TEXT: None}


def numbers(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def whole(vectors: Vectors) -> Any:
    return np.concatenate([chunk for chunk, _ in vectors.chunks()])


def labels(vectors: Vectors) -> dict[str, list[str | None]]:
    assert vectors.labels is not None
    return {name: vectors.labels.column(name).to_pylist() for name in vectors.labels.names}


def from_pandas(path: Path, x: Any, y: Any, captions: list[str]) -> None:
    frame = pd.DataFrame({"image_embedding": list(x), "text_embedding": list(y)})
    frame["caption"], frame["image_path"] = captions, [f"{row}.jpg" for row in range(len(x))]
    frame.to_parquet(path)


def from_polars(path: Path, x: Any, y: Any, captions: list[str]) -> None:
    frame = pl.DataFrame(
        {
            "image_embedding": pl.Series(x, dtype=pl.Array(pl.Float32, x.shape[1])),
            "text_embedding": pl.Series(y.tolist(), dtype=pl.List(pl.Float32)),
            "caption": captions,
            "image_path": [f"{row}.jpg" for row in range(len(x))],
        }
    )
    frame.write_ipc(path) if path.suffix == ".arrow" else frame.write_parquet(path)


def from_datasets(path: Path, x: Any, y: Any, captions: list[str]) -> None:
    rows = {
        "image_embedding": x.tolist(),
        "text_embedding": y.tolist(),
        "caption": captions,
        "image_path": [f"{row}.jpg" for row in range(len(x))],
    }
    vector = datasets.List(datasets.Value("float32"))
    features = datasets.Features(
        {
            "image_embedding": vector,
            "text_embedding": vector,
            "caption": datasets.Value("string"),
            "image_path": datasets.Value("string"),
        }
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(path) if path.suffix else dataset.save_to_disk(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.parquet", from_pandas),
        ("x.parquet", from_polars),
        ("x.arrow", from_polars),
        ("x.parquet", from_datasets),
        ("dataset", from_datasets),
    ],
)
def test_both_sides_of_one_table_are_read_whoever_wrote_it(
    tmp_path: Path, name: str, write: Callable[[Path, Any, Any, list[str]], None]
) -> None:
    x, y = numbers(60, 4), numbers(60, 3)
    captions = [f"caption {row}" for row in range(60)]
    write(tmp_path / name, x, y, captions)
    sides = read_both(tmp_path / name, NEITHER)

    np.testing.assert_array_equal(whole(sides[Modality.IMAGE]), x)
    np.testing.assert_array_equal(whole(sides[Modality.TEXT]), y)
    assert labels(sides[Modality.TEXT])["caption"] == captions
    assert labels(sides[Modality.IMAGE])["image_path"][7] == "7.jpg"


def test_a_dataset_dict_gives_its_splits(tmp_path: Path) -> None:
    parts = {
        name: datasets.Dataset.from_dict({"embeddings": numbers(n, 4).tolist()})
        for name, n in (("train", 5), ("test", 3))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    vectors = read_side(tmp_path / "set", Modality.IMAGE)

    assert labels(vectors)["split"] == ["train"] * 5 + ["test"] * 3
    expected = np.concatenate([numbers(5, 4), numbers(3, 4)])
    np.testing.assert_array_equal(whole(vectors), expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("fixed", [True, False])
def test_each_list_type_of_arrow_is_read(tmp_path: Path, bits: int, fixed: bool) -> None:
    x = numbers(30, 4, dtype=f"f{bits // 8}")
    flat = pa.array(x.reshape(-1))
    column = (
        pa.FixedSizeListArray.from_arrays(flat, 4)
        if fixed
        else pa.LargeListArray.from_arrays(pa.array(np.arange(0, 124, 4)), flat)
    )
    pq.write_table(pa.table({"vector": column, "id": np.arange(30)}), tmp_path / "x.parquet")
    vectors = read_side(tmp_path / "x.parquet", Modality.TEXT)

    assert vectors.is_half is (bits == 16)
    assert labels(vectors)["id"][:2] == ["0", "1"]
    np.testing.assert_array_equal(whole(vectors), x)


def test_a_row_group_is_read_in_parts(tmp_path: Path) -> None:
    x = numbers(3 * CHUNK_ROWS, 2)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 2)
    pq.write_table(pa.table({"embedding": column}), tmp_path / "x.parquet", row_group_size=len(x))
    chunks = [chunk for chunk, _ in read_side(tmp_path / "x.parquet", Modality.IMAGE).chunks()]

    assert len(chunks) == 3
    np.testing.assert_array_equal(np.concatenate(chunks), x)


def test_a_folder_of_parquet_is_one_table_in_natural_order(tmp_path: Path) -> None:
    parts = {i: numbers(4, 3) + i for i in (0, 1, 2, 10)}
    for i, part in parts.items():
        ids = [f"{i}-{row}" for row in range(4)]
        frame = pd.DataFrame({"id": ids, "embedding": list(part)})
        frame.to_parquet(tmp_path / f"part_{i}.parquet", row_group_size=2)
    (tmp_path / "notes.txt").write_text("not an embedding")
    vectors = read_side(tmp_path, Modality.IMAGE)

    np.testing.assert_array_equal(whole(vectors), np.concatenate([*parts.values()]))
    assert labels(vectors)["id"][-1] == "10-3"
    assert vectors.labels is not None
    assert vectors.labels.where(15).endswith("part_10.parquet, row 3")


def test_a_part_without_rows_is_passed_over(tmp_path: Path) -> None:
    pq.write_table(lists(), tmp_path / "part_0.parquet")
    pq.write_table(lists([1, 2], [3, 4]), tmp_path / "part_1.parquet")

    assert whole(read_side(tmp_path, Modality.IMAGE)).tolist() == [[1, 2], [3, 4]]


def test_a_column_can_be_named_in_two_ways(tmp_path: Path) -> None:
    x, y = numbers(5, 3), numbers(5, 2)
    path = tmp_path / "x.parquet"
    pd.DataFrame({"left": list(x), "right": list(y)}).to_parquet(path)

    with pytest.raises(DataError, match=r"arrays: left, right\); name it with --image-column"):
        read_side(path, Modality.IMAGE)
    for vectors in (
        read_side(Path(f"{path}:right"), Modality.TEXT),
        read_side(path, Modality.TEXT, "right"),
        read_both(path, {Modality.IMAGE: "left", Modality.TEXT: "right"})[Modality.TEXT],
    ):
        np.testing.assert_array_equal(whole(vectors), y)
    with pytest.raises(DataError, match=r"has no array 'up' \(arrays: left, right\)"):
        read_side(path, Modality.TEXT, "up")
    with pytest.raises(ConfigError, match="pass one"):
        read_side(Path(f"{path}:right"), Modality.TEXT, "left")
    with pytest.raises(
        DataError, match=r"left, right\); name them, .* --image-column left --text-column right"
    ):
        read_both(path, NEITHER)


def lists(*rows: Any) -> pa.Table:
    return pa.table({"embedding": pa.array(rows, pa.list_(pa.float32()))})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lists([1, 2], [3, 4], [5]), r"row 2: has width 1, the first has 2"),
        (lists([1, 2], None), r"row 1: has no embedding"),
        (lists([1, 2], [3, 4], [None, 6]), r"row 2: contains nulls"),
        (lists(None, [1, 2]), r"row 0: has no embedding"),
        (pa.table({"embedding": pa.array([[1, 2]])}), r"has dtype int64, .* scale"),
        (pa.table({"embedding": pa.array([1.0])}), "no array looks like the image embeddings"),
        (pa.table({"text_embedding": [[1.0]]}), "no array looks like the image embeddings"),
        (lists(), "is empty"),
    ],
)
def test_columns_that_are_no_embeddings_are_refused_by_row(
    tmp_path: Path, table: pa.Table, message: str
) -> None:
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)

    with pytest.raises((DataError, ShapeError), match=r"x\.parquet.*" + message):
        whole(read_side(tmp_path / "x.parquet", Modality.IMAGE))


def test_the_row_of_a_later_batch_is_counted_in_its_file(tmp_path: Path) -> None:
    rows = [[1.0, 2.0]] * (CHUNK_ROWS + 5)
    rows[CHUNK_ROWS + 3] = [1.0]
    pq.write_table(lists(*rows), tmp_path / "x.parquet")

    with pytest.raises(
        DataError, match=rf"x\.parquet:embedding, row {CHUNK_ROWS + 3}: has width 1"
    ):
        whole(read_side(tmp_path / "x.parquet", Modality.IMAGE))


def test_damaged_tables_and_datasets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pd.DataFrame({"embedding": list(numbers(50, 4))}).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read"):
        read_side(path, Modality.IMAGE)
    folder = tmp_path / "set"
    datasets.Dataset.from_dict({"embeddings": numbers(50, 4).tolist()}).save_to_disk(folder)
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"\.arrow: cannot be read"):
        whole(read_side(folder, Modality.IMAGE))
    arrow.unlink()
    with pytest.raises(DataError, match=r"\.arrow: cannot be read"):
        read_side(folder, Modality.IMAGE)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: is damaged"):
        read_side(folder, Modality.IMAGE)
