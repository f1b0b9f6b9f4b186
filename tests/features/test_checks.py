import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csalign.core.errors import DataError
from csalign.features.checks import (
    check_directions,
    find_unusable,
    unit_rows,
    warn_of_queries,
)
from csalign.features.join import (
    PairedRows,
    compact,
    find_images,
    hash_rows,
    repeated_ids,
    text_keys,
)

IDS = st.lists(st.text(alphabet="abé \0", max_size=3), max_size=30)


def firsts(values: Sequence[object]) -> list[int]:
    return [values.index(value) for value in values]


@given(IDS, st.lists(st.none() | st.text(alphabet="abé \0", max_size=3), max_size=30))
def test_images_are_found_by_id_and_repeated_ids_are_listed(
    ids: list[str], owners: list[str | None]
) -> None:
    column = pa.chunked_array([pa.array(ids[:7], pa.string()), pa.array(ids[7:], pa.string())])
    rows, missing = find_images(pa.chunked_array([owners], pa.string()), column)

    assert rows.tolist() == [ids.index(own) if own in ids else -1 for own in owners]
    assert missing.tolist() == [
        row for row, own in enumerate(owners) if own is not None and own not in ids
    ]
    assert set(repeated_ids(column).to_pylist()) == {own for own in ids if ids.count(own) > 1}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_hashes_of_rows_are_equal_where_their_bytes_are(dtype: type, width: int) -> None:
    rows: Any = np.random.default_rng(0).normal(size=(6, width)).astype(dtype)
    rows[4] = rows[1]
    rows[5, 0], rows[2, 0] = -0.0, 0.0
    rows[5, 1:] = rows[2, 1:]

    assert firsts(hash_rows(rows).tolist()) == [0, 1, 2, 3, 1, 5]
    assert hash_rows(rows, chunk=4).tolist() == hash_rows(rows).tolist()


def test_captions_are_compared_without_case_and_outer_space_and_unknown_ones_by_embedding() -> None:
    captions = pa.array(["A cat", " a CAT ", None, "a dog", None, ""])
    rows = np.array([[1], [2], [3], [4], [3], [3]], np.float32)

    assert firsts(text_keys(captions, rows).tolist()) == [0, 0, 2, 3, 2, 5]


def test_positions_are_kept_in_as_few_bits_as_hold_them() -> None:
    assert compact(np.array([0, 2**31 - 1])).dtype == np.int32
    assert compact(np.array([0, 2**31])).dtype == np.int64


def test_rows_without_a_direction_are_found_with_a_remedy() -> None:
    rows = np.array([[3, 4], [0, 0], [np.nan, 1], [1e-9, 0], [7e4, 0], [1e20, 0]], np.float32)

    assert find_unusable(rows[:1]) == find_unusable(rows[:1], "float16") == {}
    assert find_unusable(rows) == {
        1: "has norm 0; encode it again or omit it",
        2: "is not finite; encode it again or omit it",
        5: "has norm 1e+20; scale the embeddings to norms about 1, which changes no result",
    }
    half = find_unusable(rows, "float16")
    assert list(half) == [1, 2, 3, 4, 5]
    assert half[3] == "has norm 0 once stored as float16; use --dtype float32"
    assert half[4] == "is not finite once stored as float16; use --dtype float32"
    with pytest.raises(DataError, match=r"^set: images: the embedding of 'b' has norm 0; "):
        check_directions(rows, pa.array(list("abcdef")), "set: images")
    np.testing.assert_allclose(unit_rows(rows[:1], pa.array(["a"]), "set"), [[0.6, 0.8]])


def pairs(images: Any, texts: Any | None = None) -> PairedRows:
    texts = images if texts is None else texts
    names = pa.array([str(row) for row in range(len(images))])
    return PairedRows(
        name="rows",
        images=images,
        texts=texts,
        text_image=np.arange(len(images)),
        image_ids=names,
        text_ids=names,
        captions=names,
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_small_galleries_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    different = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    warn_of_queries(pairs(different), "s")
    assert not warnings(caplog)
    warn_of_queries(pairs(different[:20]), "s")

    (few,) = warnings(caplog)
    assert few.startswith("s: only 20 images have texts, so each is 5.0 % of a recall")
