import numpy as np
import numpy.typing as npt
import pytest

from csalign.metrics.approximate import IndexName, rank_both_ways_by_index
from csalign.metrics.retrieval import rank_both_ways

Floats = npt.NDArray[np.float32]
KINDS: list[IndexName] = ["ivf", "hnsw"]


def clouds(n: int, noise: float) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Images, two captions of each, and some captions without an image."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(n, 16)).astype(np.float32)
    owners = np.concatenate([np.repeat(np.arange(n), 2), np.full(5, -1)])
    texts = (images[owners] + noise * rng.normal(size=(len(owners), 16))).astype(np.float32)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    return unit[0], unit[1], owners


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_lists_everything_gives_the_exact_ranks(kind: IndexName) -> None:
    case = clouds(60, 1.0)
    ranks, recalls = rank_both_ways_by_index(*case, kind, listed=1_000, probed=1.0)

    assert recalls == (1.0, 1.0)
    for found, exact in zip(ranks, rank_both_ways(*case), strict=True):
        assert found.first.tolist() == exact.first.tolist()
        assert found.average_precision.tolist() == pytest.approx(exact.average_precision.tolist())


def test_equal_scores_count_against_the_model() -> None:
    same = np.full((50, 4), 0.5, np.float32)
    ranks, _ = rank_both_ways_by_index(same, same, np.arange(50), "ivf")

    assert all((direction.first == 50).all() for direction in ranks)


def test_an_unlisted_match_counts_as_last() -> None:
    images, texts, owners = clouds(1_500, 3.0)
    (_, text_to_image), recalls = rank_both_ways_by_index(images, texts, owners, "ivf", listed=10)
    unlisted = text_to_image.first > 10

    assert all(0.1 < recall < 0.99 for recall in recalls)
    assert 0 < unlisted.sum() < len(unlisted)
    assert (text_to_image.first[unlisted] == len(images)).all()
    assert (text_to_image.average_precision[unlisted] == 0).all()
