from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.core.enums import Modality
from csalign.core.errors import DataError, SchemaError
from csalign.features import schema, writer
from csalign.features.reader import FeatureSet, batch_tokens
from csalign.features.tokens import TokenCache, TokenRows, Wanted, pad_tokens, take_together

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 4_000)


def both(folder: Path, budget: int) -> list[TokenRows]:
    features = FeatureSet.open(folder)
    cache = TokenCache(budget)
    return [TokenRows(features.table(side), cache) for side in Modality]


def stored(source: TokenRows) -> list[np.ndarray]:
    batches = source.table.read(schema.TOKENS)
    return [tokens for _, batch in batches for tokens in batch_tokens(batch)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups decoded so far."""
    seen: list[int] = []
    decode = TokenRows.decode

    def record(source: TokenRows, group: int) -> Any:
        seen.append(group)
        return decode(source, group)

    monkeypatch.setattr(TokenRows, "decode", record)
    return seen


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("budget", [0, 9_000, 1 << 20])
def test_any_rows_come_back_padded_whatever_fits(
    write_tokens: Write, dtype: str, budget: int
) -> None:
    images, _ = both(write_tokens(dtype=dtype), budget)
    expected = stored(images)
    rng = np.random.default_rng(0)

    assert len(images.groups) > 4
    for _ in range(5):
        rows = rng.integers(0, 120, 30)
        values, mask = images.take(rows)
        assert values.dtype == dtype
        assert not values[~mask].any()
        for own, there, row in zip(values, mask, rows, strict=True):
            np.testing.assert_array_equal(own[there], expected[row])
        assert images.cache.bytes <= budget


def test_a_row_group_is_decoded_once_where_all_fit_and_its_size_is_not_underestimated(
    write_tokens: Write, decoded: list[int]
) -> None:
    images, texts = both(write_tokens(), 1 << 20)
    rng = np.random.default_rng(0)
    for _ in range(10):
        take_together([Wanted(source, rng.permutation(120)) for source in (images, texts)])

    assert len(decoded) == len(images.groups) + len(texts.groups)
    sizes = [
        (group.bytes, sum(array.nbytes for array in source.decode(number)))
        for source in (images, texts)
        for number, group in enumerate(source.groups)
    ]
    assert all(stated >= found for stated, found in sizes)
    assert images.cache.bytes == sum(found for _, found in sizes)


def test_the_cache_never_holds_more_than_its_budget_and_drops_what_was_used_least_lately(
    write_tokens: Write, decoded: list[int]
) -> None:
    images, _ = both(write_tokens(), 0)
    cache = images.cache
    cache.budget = 3 * max(group.bytes for group in images.groups)
    order = [0, 1, 2, 0, 3, 0, 4, 0]
    for group in order:
        cache.block(images, group)
        assert cache.bytes <= cache.budget

    assert decoded == [0, 1, 2, 3, 4]
    assert cache.holds(images, 0)
    assert not cache.holds(images, 1)


def test_cached_row_groups_are_used_before_others_replace_them(
    write_tokens: Write, decoded: list[int]
) -> None:
    images, texts = both(write_tokens(), 0)
    images.cache.budget = images.groups[0].bytes + texts.groups[0].bytes
    first = np.array([0])
    last = np.array([119])
    take_together([Wanted(images, first), Wanted(texts, first)])
    take_together([Wanted(images, np.array([119, 0])), Wanted(texts, np.array([119, 0]))])

    assert len(decoded) == 4
    take_together([Wanted(images, last), Wanted(texts, last)])
    assert len(decoded) == 4


def test_draws_take_tokens_without_replacement_each_as_often_as_the_others(
    write_tokens: Write,
) -> None:
    images, _ = both(write_tokens(), 1 << 20)
    expected = stored(images)
    row = next(row for row, tokens in enumerate(expected) if len(tokens) == 7)
    rows = np.full(4_000, row)
    values, mask = images.take(rows, np.random.default_rng(0).random((4_000, 3)))

    assert mask.all()
    assert mask.shape == (4_000, 3)
    same = (values[:, :, None] == expected[row]).all(-1)  # (rows, drawn, stored)
    assert (same.sum(2) == 1).all()
    assert (same.sum(1) <= 1).all()
    np.testing.assert_allclose(same.sum((0, 1)), 4_000 * 3 / 7, rtol=0.06)


def test_rows_with_fewer_tokens_than_drawn_keep_all_in_order(write_tokens: Write) -> None:
    images, _ = both(write_tokens(), 1 << 20)
    rows = np.arange(120)
    drawn = images.take(rows, np.random.default_rng(0).random((120, 7)))

    for found, plain in zip(drawn, images.take(rows), strict=True):
        np.testing.assert_array_equal(found, plain)


def test_rows_without_any_token_are_all_padding() -> None:
    values, mask = pad_tokens([np.zeros((0, 3), np.float16)] * 2)

    assert values.shape == (2, 1, 3)
    assert not mask.any()


def test_a_side_without_tokens_is_refused(write_tokens: Write) -> None:
    features = FeatureSet.open(write_tokens(sides=[Modality.IMAGE]))

    with pytest.raises(DataError, match="stores no text tokens"):
        TokenRows(features.texts, TokenCache(0))


def test_a_damaged_shard_is_named(write_tokens: Write) -> None:
    folder = write_tokens()
    images, _ = both(folder, 0)
    path = next((folder / "images").glob("*.parquet"))
    content = bytearray(path.read_bytes())
    content[2_000:2_100] = bytes(100)
    path.write_bytes(content)

    with pytest.raises(SchemaError, match=r"part-00000\.parquet: cannot be read"):
        images.take(np.arange(120))
