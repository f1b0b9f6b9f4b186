from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csalign.features import keys
from csalign.features.keys import compact, first_alike, row_keys, string_keys, text_keys

TEXTS = st.lists(st.text(alphabet="abé \0", max_size=5), max_size=30)


def firsts(values: Sequence[object]) -> list[int]:
    return [values.index(value) for value in values]


@given(TEXTS, st.integers(0, 3))
def test_keys_of_strings_are_equal_where_strings_are(texts: list[str], skipped: int) -> None:
    found = string_keys(pa.array(texts, pa.string())[skipped:])

    assert first_alike(found).tolist() == firsts(texts[skipped:])


@given(TEXTS)
def test_long_columns_are_hashed_in_pieces_to_the_same_keys(texts: list[str]) -> None:
    whole = string_keys(pa.array(texts, pa.string()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_PIECE_BYTES", 3)
        pieces = string_keys(pa.array(texts, pa.string()))

    assert whole.tolist() == pieces.tolist()


def test_another_salt_gives_other_keys() -> None:
    strings = pa.array(["a", "b", ""])

    assert not set(string_keys(strings).tolist()) & set(string_keys(strings, 1).tolist())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_keys_of_rows_are_equal_where_their_bytes_are(dtype: type, width: int) -> None:
    rows: Any = np.random.default_rng(0).normal(size=(6, width)).astype(dtype)
    rows[4] = rows[1]
    rows[5, 0], rows[2, 0] = -0.0, 0.0
    rows[5, 1:] = rows[2, 1:]

    assert first_alike(row_keys(rows)).tolist() == [0, 1, 2, 3, 1, 5]


def test_captions_are_told_by_case_and_outer_space_and_unknown_ones_by_embedding() -> None:
    captions = pa.array(["A cat", " a CAT ", None, "a dog", None, ""])
    rows = np.array([[1], [2], [3], [4], [3], [3]], np.float32)

    assert first_alike(text_keys(captions, rows)).tolist() == [0, 0, 2, 3, 2, 5]


def test_positions_are_kept_in_as_few_bits_as_hold_them() -> None:
    assert compact(np.array([0, 2**31 - 1])).dtype == np.int32
    assert compact(np.array([0, 2**31])).dtype == np.int64
