from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csalign.metrics.retrieval import DirectionRanks, mean_recall, rank_both_ways

Array = npt.NDArray[Any]


def brute_force(
    queries: Array, gallery: Array, own: list[list[int]]
) -> tuple[list[int], list[float]]:
    """First rank and average precision by sorting, a tied wrong item ahead of a match."""
    first, precision = [], []
    for query, matches in zip(queries.astype(np.float64), own, strict=True):
        scores = gallery.astype(np.float64) @ query
        order = sorted(range(len(gallery)), key=lambda j: (-scores[j], j in matches))
        ranks = [position for position, j in enumerate(order, 1) if j in matches]
        first.append(ranks[0])
        precision.append(float(np.mean([(i + 1) / rank for i, rank in enumerate(ranks)])))
    return first, precision


@st.composite
def galleries(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """Few distinct directions, so that many scores are exactly equal; some texts unpaired."""
    n, m = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    axes = np.eye(4, dtype=np.float32)
    images = axes[draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))]
    texts = axes[draw(st.lists(st.integers(0, 3), min_size=m, max_size=m))]
    owners = draw(
        st.lists(st.integers(-1, n - 1), min_size=m, max_size=m).filter(lambda o: max(o) >= 0)
    )
    return images, texts, np.array(owners)


@given(galleries(), st.sampled_from([16, None]))
def test_ranks_equal_a_brute_force_sort_with_ties_against_the_model(
    case: tuple[Array, Array, Array], tile: int | None
) -> None:
    images, texts, owners = case
    image_to_text, text_to_image = rank_both_ways(images, texts, owners, tile=tile)
    queried = sorted({int(o) for o in owners if o >= 0})
    captions = [[j for j, o in enumerate(owners) if o == i] for i in queried]
    paired = [j for j, o in enumerate(owners) if o >= 0]

    first, precision = brute_force(images[queried], texts, captions)
    assert image_to_text.first.tolist() == first
    assert image_to_text.average_precision.tolist() == pytest.approx(precision)
    first, precision = brute_force(texts[paired], images, [[int(owners[j])] for j in paired])
    assert text_to_image.first.tolist() == first
    assert text_to_image.average_precision.tolist() == pytest.approx(precision)


@pytest.mark.parametrize("tile", [16, 48, None])
def test_real_valued_ranks_equal_brute_force_with_six_captions_on_one_image(
    tile: int | None,
) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 16)).astype(np.float32)
    owners = np.concatenate([np.repeat(np.arange(40), 5), [7]])
    texts = (images[owners] + 1.5 * rng.normal(size=(201, 16))).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    image_to_text, _ = rank_both_ways(images, texts, owners, tile=tile)

    captions = [np.flatnonzero(owners == i).tolist() for i in range(40)]
    assert image_to_text.first.tolist() == brute_force(images, texts, captions)[0]


def test_true_recall_and_r_precision_equal_sets_of_the_first_items() -> None:
    rng = np.random.default_rng(3)
    images = rng.normal(size=(12, 6)).astype(np.float32)
    owners = rng.permutation(np.concatenate([np.arange(12), rng.integers(0, 12, 20), [-1] * 4]))
    texts = (images[owners] + 2 * rng.normal(size=(36, 6))).astype(np.float32)
    image_to_text, text_to_image = rank_both_ways(images, texts, owners)

    order = np.argsort(-(images @ texts.T), axis=1)  # no two scores are equal
    for image, listed in enumerate(order):
        right = set(np.flatnonzero(owners == image))
        for column, k in enumerate((1, 5, 10)):
            share = len(right & set(listed[:k])) / len(right)
            assert image_to_text.recalled[image, column] == share
        precision = len(right & set(listed[: len(right)])) / len(right)
        assert image_to_text.r_precision[image] == precision
    summary = text_to_image.summary()
    assert summary["true_recall@5"] == summary["R@5"]  # a caption has one image
    assert summary["r_precision"] == summary["R@1"]


def test_an_image_counts_once_any_of_its_captions_is_found() -> None:
    images = np.eye(3, dtype=np.float32)
    texts = images[[0, 1, 2, 2]]
    image_to_text, text_to_image = rank_both_ways(images, texts, np.array([0, 0, 1, 2]))

    # Image 1's only caption looks like image 2, so all three others tie or win ahead of it.
    assert image_to_text.first.tolist() == [1, 4, 2]
    assert text_to_image.first.tolist() == [1, 3, 3, 1]
    assert image_to_text.summary()["R@1"] == pytest.approx(1 / 3)


def test_collapsed_embeddings_get_the_worst_rank_and_not_the_best() -> None:
    same = np.full((50, 4), 0.5, np.float32)
    ranks = rank_both_ways(same, same, np.arange(50))

    assert all((direction.first == 50).all() for direction in ranks)


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_rows_tie_wherever_they_lie(threads: int) -> None:
    rng = np.random.default_rng(1)
    few = rng.normal(size=(7, 33)).astype(np.float32)
    few /= np.linalg.norm(few, axis=1, keepdims=True)
    images = few[np.arange(900) % 7]
    texts = images[:]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    image_to_text, text_to_image = rank_both_ways(images, texts, np.arange(900))
    torch.set_num_threads(before)
    alike = np.bincount(np.arange(900) % 7)[np.arange(900) % 7]

    assert image_to_text.first.tolist() == alike.tolist()
    assert text_to_image.first.tolist() == alike.tolist()


def test_an_image_of_very_many_captions_is_ranked_too() -> None:
    rng = np.random.default_rng(2)
    texts = rng.normal(size=(3_000, 8)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    owners = np.where(np.arange(3_000) % 3 == 0, -1, np.arange(3_000) % 2 * (np.arange(3_000) < 9))
    image_to_text, _ = rank_both_ways(texts[:2], texts, owners)
    captions = [np.flatnonzero(owners == image).tolist() for image in range(2)]
    first, precision = brute_force(texts[:2], texts, captions)

    assert image_to_text.first.tolist() == first
    assert image_to_text.average_precision.tolist() == pytest.approx(precision)


def clustered(kind: str) -> tuple[Array, Array, Array]:
    """300 images with none to six captions, whose scores are spread, equal by runs, or close."""
    rng = np.random.default_rng(4)
    images = rng.normal(size=(300, 24))
    owners = rng.permutation(np.repeat(np.arange(-1, 300), rng.integers(0, 7, 301)))
    texts = images[owners] + 2 * rng.normal(size=(len(owners), 24))
    if kind == "tied":
        images, texts = images[np.arange(300) % 9], images[rng.integers(0, 9, len(owners))]
    elif kind == "clustered":
        centres = 3 * rng.normal(size=(12, 24))
        images, texts = images + centres[np.arange(300) % 12], texts + centres[owners % 12]
    sides = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts))
    return (*(side.astype(np.float32) for side in sides), owners)


def same(found: Any, expected: Any) -> bool:
    return all(
        np.array_equal(one.first, other.first)
        and np.array_equal(one.average_precision, other.average_precision)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", ["spread", "tied", "clustered"])
def test_the_size_of_tiles_changes_no_rank(kind: str) -> None:
    case = clustered(kind)
    whole = rank_both_ways(*case)

    assert max(direction.first.max() for direction in whole) > 40
    for tile in (32, 64, 8_192):
        assert same(rank_both_ways(*case, tile=tile), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["spread", "tied", "clustered"])
def test_a_device_gives_the_ranks_of_the_cpu(kind: str) -> None:
    case = clustered(kind)

    for tile in (64, None):
        assert same(rank_both_ways(*case, torch.device("cuda"), tile=tile), rank_both_ways(*case))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [2, 3, 7])
def test_threads_give_the_ranks_of_one_and_torch_keeps_its_own(count: int) -> None:
    case = clustered("tied")
    torch.set_num_threads(1)
    alone = rank_both_ways(*case, tile=32)
    torch.set_num_threads(count)

    assert same(rank_both_ways(*case, tile=32), alone)
    assert torch.get_num_threads() == count
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == count


@pytest.mark.usefixtures("threads")
def test_a_failure_in_one_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "ge", fail)
    torch.set_num_threads(3)

    with pytest.raises(MemoryError):
        rank_both_ways(*clustered("spread"), tile=32)
    assert torch.get_num_threads() == 3


def test_summary_figures_follow_from_the_ranks() -> None:
    ranks = DirectionRanks(
        np.array([1, 3, 7, 20]),
        np.array([1, 0.5, 0.2, 0.1]),
        np.array([[0.5, 0.5, 1], [0, 1, 1], [0, 0, 0.5], [0, 0, 0]]),
        np.array([0.5, 0, 0, 0]),
    )

    assert ranks.summary() == {
        "R@1": 0.25,
        "R@5": 0.5,
        "R@10": 0.75,
        "true_recall@1": 0.125,
        "true_recall@5": 0.375,
        "true_recall@10": 0.625,
        "r_precision": 0.125,
        "mean_rank": 7.75,
        "median_rank": 5.0,
        "mrr": pytest.approx((1 + 1 / 3 + 1 / 7 + 1 / 20) / 4),
        "map": pytest.approx(0.45),
    }
    assert mean_recall(ranks.summary(), ranks.summary()) == pytest.approx(0.5)
