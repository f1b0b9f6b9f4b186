from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from csalign.metrics.labels import graded_both_ways

Array = npt.NDArray[Any]


def test_figures_equal_sklearns_without_ties() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(14, 6)).astype(np.float32)
    owners = rng.permutation(np.concatenate([np.arange(12), rng.integers(0, 12, 25), [-1] * 3]))
    texts = (images[owners] + rng.normal(size=(40, 6))).astype(np.float32)
    groups = rng.integers(0, 4, 14)
    # Strips of three queries.
    forth, back = graded_both_ways(images, texts, owners, groups, strip_bytes=4 * 40 * 3)

    of_text = np.where(owners >= 0, groups[owners], -1)
    queried, paired = np.arange(12), np.flatnonzero(owners >= 0)
    cases = [
        (forth, images[queried] @ texts.T, groups[queried][:, None] == of_text),
        (back, texts[paired] @ images.T, of_text[paired][:, None] == groups),
    ]
    for found, scores, right in cases:
        for row in range(len(scores)):
            precision = average_precision_score(right[row], scores[row])
            assert found.average_precision[row] == pytest.approx(precision)
            ndcg = ndcg_score(right[row : row + 1].astype(float), scores[row : row + 1], k=10)
            assert found.ndcg[row] == pytest.approx(ndcg)
        assert found.summary() == pytest.approx(
            {"map": found.average_precision.mean(), "ndcg@10": found.ndcg.mean()}
        )


def test_a_tied_wrong_item_ranks_ahead() -> None:
    same = np.ones((4, 1), np.float32)
    forth, _ = graded_both_ways(same, same, np.arange(4), np.array([0, 0, 1, 2]))

    # Of image 0 the captions 0 and 1 are right; 2 and 3 tie, so the ranks are 3 and 4.
    assert forth.average_precision[0] == pytest.approx((1 / 3 + 2 / 4) / 2)
    expected = (1 / np.log2(4) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert forth.ndcg[0] == pytest.approx(expected)
    assert forth.average_precision[2] == pytest.approx(1 / 4)
