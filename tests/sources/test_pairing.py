from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csalign.core.errors import DataError
from csalign.sources.arrays.base import Labels
from csalign.sources.pairing import (
    describe_images,
    describe_texts,
    owners_by_counts,
    owners_by_layout,
    read_label_table,
)


def labels(**columns: list[str | None]) -> Labels:
    rows = len(next(iter(columns.values())))
    return Labels("table", rows, columns, lambda row: f"table, row {row}")


@given(st.integers(1, 20), st.integers(1, 6))
def test_layouts_are_what_reshaping_gives(images: int, each: int) -> None:
    texts = np.arange(images * each)

    blocks = owners_by_layout(images, len(texts), each, "blocks")
    copies = owners_by_layout(images, len(texts), each, "copies")
    np.testing.assert_array_equal(blocks, texts // each)
    np.testing.assert_array_equal(copies, texts % images)


def test_a_layout_needs_as_many_texts_as_it_says() -> None:
    # COCO's 25,010 captions divide by 5, but are not 5 an image.
    with pytest.raises(DataError, match=r"5000 images and 25010 texts: 5 .* --text-counts FILE"):
        owners_by_layout(5_000, 25_010, 5, "blocks")


def test_counts_and_offsets_give_ragged_captions(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", np.array([2, 0, 3], np.uint8))
    np.save(tmp_path / "offsets.npy", np.array([0, 2, 2, 5]))
    (tmp_path / "counts.csv").write_text("image,count\na,2\nb,0\nc,3\n")
    pd.DataFrame({"count": [2, 0, 3]}).to_parquet(tmp_path / "counts.parquet")

    for name in ("counts.npy", "offsets.npy", "counts.csv", "counts.parquet"):
        assert owners_by_counts(tmp_path / name, 3, 5) == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.array([2, 2, 2]), "adds up to 6 captions and there are 5 texts"),
        (np.array([2, 3]), "has 2 rows and there are 3 images"),
        (np.array([2, -1, 4]), r"c\.npy, row 1: -1 captions"),
        (np.array([0, 4, 2, 5]), r"c\.npy, row 1: -2 captions"),
        (np.array([2.0, 0.0, 3.0]), "a list of integers is expected"),
        (np.array([[2, 0, 3]]), "a list of integers is expected"),
    ],
)
def test_counts_that_do_not_add_up_are_refused(
    tmp_path: Path, counts: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "c.npy", counts)

    with pytest.raises(DataError, match=message):
        owners_by_counts(tmp_path / "c.npy", 3, 5)


def test_a_count_that_is_no_number_is_named_by_its_row(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("count\n2\nmany\n")

    with pytest.raises(DataError, match=r"c\.csv, row 3: 'many' is not an integer"):
        owners_by_counts(tmp_path / "c.csv", 2, 4)


def test_equal_ids_pair_in_any_order() -> None:
    images = describe_images(3, labels(id=["a", "b", "c"]))
    texts = describe_texts(3, images, labels(id=["c", "a", "b"]))

    assert texts.image_ids == ["c", "a", "b"]


def test_ids_of_their_own_pair_by_row() -> None:
    images = describe_images(2, labels(id=["cat", "dog"]))

    assert describe_texts(2, images, labels(id=["t0", "t1"])).image_ids == ["cat", "dog"]
    assert describe_texts(2, images, None).image_ids == ["cat", "dog"]
    numbered = describe_images(2, None)
    assert describe_texts(2, numbered, labels(id=["1", "2"])).image_ids == ["0", "1"]


def test_keys_of_which_some_are_missing_are_not_paired_by_row() -> None:
    images = describe_images(3, labels(id=["0", "1", "3"]))

    with pytest.raises(DataError, match=r"only 2 of 3 images and 3 texts share an id; .* --pairs"):
        describe_texts(3, images, labels(id=["0", "2", "3"]))


def test_a_layout_and_named_images_contradict() -> None:
    images = describe_images(2, None)

    with pytest.raises(DataError, match="names the image of each text; omit"):
        describe_texts(2, images, labels(image_id=["0", "1"]), owners=[0, 1])


def test_texts_without_images_keep_what_else_is_known() -> None:
    texts = describe_texts(2, None, labels(image_id=["0", "1"], caption=["a", "b"]))

    assert texts.image_ids == [None, None]
    assert texts.captions == ["a", "b"]


def test_repeated_ids_are_named_twice() -> None:
    with pytest.raises(DataError, match="table, row 2: duplicate id 'a', also in table, row 0"):
        describe_images(3, labels(id=["a", "b", "a"]))


def test_label_tables_may_be_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image_id": [3, 4], "caption": ["a", None], "score": [0.5, 0.25]})
    frame.to_parquet(tmp_path / "t.parquet")

    assert read_label_table(tmp_path / "t.parquet").columns == {
        "image_id": ["3", "4"],
        "caption": ["a", None],
    }
    with pytest.raises(DataError, match="no such file"):
        read_label_table(tmp_path / "none.parquet")
