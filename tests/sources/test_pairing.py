from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csalign.core.errors import DataError
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.image_rows import ImageRows, describe_images
from csalign.sources.labels import Labels
from csalign.sources.layouts import owners_by_counts, owners_by_layout
from csalign.sources.pairing import Rules, TextRows, describe_texts


def labels(name: str = "table", **columns: list[Any]) -> Labels:
    arrays = {key: pa.array(own, pa.large_string()) for key, own in columns.items()}
    rows = len(next(iter(arrays.values())))
    return Labels(name, rows, lambda row: f"{name}, row {row}").with_columns(arrays)


def paired(images: ImageRows, found: tuple[TextRows, str | None]) -> list[str | None]:
    owners = found[0].owners
    return images.ids.take(pa.array(owners, mask=owners < 0)).to_pylist()  # type: ignore[no-any-return]


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
        assert owners_by_counts(tmp_path / name, 3, 5).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.array([2, 2, 2]), "adds up to 6 captions and there are 5 texts"),
        (np.array([2, 3]), "has 2 rows and there are 3 images"),
        (np.array([2, -1, 4]), r"c\.npy, row 1: -1 captions"),
        (np.array([0, 4, 2, 5]), r"c\.npy, row 1: -2 captions"),
        (np.array([2.0, 0.0, 3.0]), "not a list of integers"),
        (np.array([[2, 0, 3]]), "not a list of integers"),
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
    found = describe_texts(3, images, labels("texts", id=["c", "a", "b"]))

    assert paired(images, found) == ["c", "a", "b"]
    assert found[1] == "id"


def test_text_ids_of_their_own_pair_by_row() -> None:
    images = describe_images(2, labels(id=["cat", "dog"]))

    found = describe_texts(2, images, labels(text_id=["t0", "t1"]))
    assert paired(images, found) == ["cat", "dog"]
    assert found[1] == "row order"
    assert paired(images, describe_texts(2, images, None)) == ["cat", "dog"]
    numbered = describe_images(2, None)
    assert paired(numbered, describe_texts(2, numbered, labels(id=["1", "2"]))) == ["0", "1"]


def test_keys_that_share_nothing_are_shown() -> None:
    images = describe_images(2, labels(id=["cat", "dog"]))
    texts = labels("t.csv", id=["t0", "t1"])
    message = (
        r"^t\.csv: id: .* 't0', 't1' of the texts, 'cat', 'dog' of the images; .*--pair-by order"
    )

    with pytest.raises(DataError, match=message):
        describe_texts(2, images, texts)
    insisted = describe_texts(2, images, texts, Rules(by="order"))
    assert paired(images, insisted) == ["cat", "dog"]


def test_keys_of_which_some_are_missing_are_not_paired_by_row() -> None:
    images = describe_images(3, labels(id=["0", "1", "3"]))

    with pytest.raises(DataError, match=r"'2' of text row 1 is unknown \(1 texts .* --pairs"):
        describe_texts(3, images, labels("texts", id=["0", "2", "3"]))


def test_a_layout_and_named_images_contradict() -> None:
    images = describe_images(2, None)

    with pytest.raises(DataError, match="names the image of each text; omit"):
        describe_texts(2, images, labels(image_id=["0", "1"]), Rules(owners=np.array([0, 1])))


def test_texts_without_images_keep_what_else_is_known() -> None:
    texts, pairing = describe_texts(2, None, labels(image_id=["0", "1"], caption=["a", "b"]))

    assert (texts.owners.tolist(), pairing) == ([-1, -1], None)
    assert texts.columns["caption"].to_pylist() == ["a", "b"]


def test_repeated_ids_are_named_twice() -> None:
    with pytest.raises(DataError, match="table, row 2: duplicate id 'a', also in table, row 0"):
        describe_images(3, labels(id=["a", "b", "a"]))


def test_label_tables_may_be_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image_id": [3, 4], "caption": ["a", None], "score": [0.5, 0.25]})
    frame.to_parquet(tmp_path / "t.parquet")

    table = read_label_table(tmp_path / "t.parquet")
    assert {name: table.column(name).to_pylist() for name in table.names} == {
        "image_id": ["3", "4"],
        "caption": ["a", None],
        "score": ["0.5", "0.25"],
    }
    with pytest.raises(DataError, match="no such file"):
        read_label_table(tmp_path / "none.parquet")


def test_image_ids_that_are_not_found_are_not_replaced_by_ids_equal_by_chance() -> None:
    images = describe_images(2, labels(id=["0", "1"]))

    with pytest.raises(DataError, match=r"t: image_id: image 'x' of text row 0 is unknown"):
        describe_texts(2, images, labels("t", id=["0", "1"], image_id=["x", None]))
    unpaired = describe_texts(2, images, labels("t", id=["0", "1"], image_id=[None, None]))
    assert paired(images, unpaired) == [None, None]
