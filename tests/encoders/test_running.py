from typing import Any

import numpy as np
import pytest
import torch

from csalign.core.enums import Modality
from csalign.encoders.base import EncoderOptions
from csalign.encoders.running import limit_tokens, ready


def numbered(count: int, width: int = 3) -> Any:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def test_items_within_the_limit_stay_as_they_are() -> None:
    tokens = [numbered(9), numbered(0), numbered(4)]

    for limit in (None, 9, 100):
        for side in Modality:
            limited = limit_tokens(tokens, side, limit)
            assert all(new is old for new, old in zip(limited, tokens, strict=True))


def test_texts_are_cut_one_by_one() -> None:
    tokens = [numbered(9), numbered(0), numbered(4)]

    limited = limit_tokens(tokens, Modality.TEXT, 4)

    assert [len(own) for own in limited] == [4, 0, 4]
    np.testing.assert_array_equal(limited[0], tokens[0][:4])
    assert limited[0].base is None


@pytest.mark.parametrize(("limit", "kept"), [(35, 25), (16, 16), (15, 9), (4, 4), (3, 1), (1, 1)])
def test_squares_are_pooled_to_the_largest_square_allowed(limit: int, kept: int) -> None:
    (limited,) = limit_tokens([numbered(36)], Modality.IMAGE, limit)

    assert limited.shape == (kept, 3)
    assert limited.dtype == np.float32
    np.testing.assert_allclose(limited.mean(axis=0), numbered(36).mean(axis=0), rtol=1e-6)


def test_a_grid_is_pooled_over_its_rows_and_columns() -> None:
    tokens = numbered(24)  # 4 rows of 6

    (limited,) = limit_tokens([tokens], Modality.IMAGE, 4, grid=(4, 6))

    expected = tokens.reshape(2, 2, 2, 3, 3).mean(axis=(1, 3)).reshape(4, 3)
    np.testing.assert_allclose(limited, expected)
    (flat,) = limit_tokens([tokens[:18]], Modality.IMAGE, 16, grid=(2, 9))
    assert flat.shape == (8, 3)


def test_tokens_without_a_grid_are_averaged_over_neighbours() -> None:
    (limited,) = limit_tokens([numbered(8)], Modality.IMAGE, 5)

    np.testing.assert_allclose(limited, numbered(8).reshape(4, 2, 3).mean(axis=1))


def test_half_precision_weights_stay_half_under_autocast() -> None:
    # An 8-billion-parameter checkpoint in float32 would not fit where its float16 does.
    options = EncoderOptions(torch.device("cpu"), precision="float16")

    kept = ready(torch.nn.Linear(3, 2).half(), options)
    widened = ready(torch.nn.Linear(3, 2).bfloat16(), options)

    assert kept.weight.dtype == torch.float16
    assert widened.weight.dtype == torch.float32
