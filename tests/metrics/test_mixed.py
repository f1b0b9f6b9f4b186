from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import ndcg_score

from csalign.metrics.bootstrap import FoldMeans, resample
from csalign.metrics.mixed import MixedRanks, SideRanks, rank_mixed
from csalign.metrics.neighbours import Neighbours
from csalign.metrics.retrieval import rank_both_ways

Array = npt.NDArray[Any]


def unit(x: Array) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = x.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def captioned(seed: int = 0, images: int = 25, offset: float = 0.0) -> tuple[Array, Array, Array]:
    """One to three captions an image, two images without any, three captions without an image."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images - 2), rng.integers(1, 4, images - 2))
    owners = rng.permutation(np.concatenate([owners, [-1, -1, -1]]))
    x = rng.normal(size=(images, 12))
    y = x[owners] + 0.7 * rng.normal(size=(len(owners), 12)) + offset
    return unit(x), unit(y), owners


def pairs(images: int, *, noise: float = 0.5, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, 16))
    y = x + noise * rng.normal(size=x.shape)
    return unit(x), unit(y), np.arange(images)


def by_loop(x: Array, y: Array, owners: Array, side: int) -> dict[str, Array]:
    """Grade each query of a side by scikit-learn and by sorting, without ties."""
    rows, owner_of = np.concatenate([x, y]), np.concatenate([np.arange(len(x)), owners])
    is_text = np.arange(len(rows)) >= len(x)
    found: dict[str, list[float]] = {"ndcg": [], "recall": [], "same_side": []}
    for query, owner in enumerate(owner_of):
        if is_text[query] != side or owner not in owners or owner < 0:
            continue
        others = np.delete(np.arange(len(rows)), query)
        scores, is_right = rows[others] @ rows[query], owner_of[others] == owner
        first = np.argsort(-scores)[:10]
        found["ndcg"].append(ndcg_score([is_right], [scores], k=10))
        found["recall"].append(is_right[first].sum() / is_right.sum())
        found["same_side"].append((is_text[others][first] == side).mean())
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("strip_bytes", [64 << 20, 1_000])
@pytest.mark.parametrize("offset", [0.0, 0.6])
def test_figures_equal_those_of_scikit_learn_and_of_a_loop(offset: float, strip_bytes: int) -> None:
    x, y, owners = captioned(offset=offset)

    ranks = rank_mixed(x, y, owners, seed=0, strip_bytes=strip_bytes)

    for side, own in enumerate(ranks):
        for name, values in by_loop(x, y, owners, side).items():
            np.testing.assert_allclose(getattr(own, name), values, atol=1e-12)


@pytest.mark.parametrize("copies", [1, 4])
def test_neighbours_of_the_ranking_give_the_same(copies: int) -> None:
    x, y, owners = captioned()
    y, owners = np.tile(y, (copies, 1)), np.tile(owners, copies)  # scores tie
    found = Neighbours(len(x)), Neighbours(len(y))
    rank_both_ways(x, y, owners, tile=16, neighbours=found)

    ranks = rank_mixed(x, y, owners, seed=0, neighbours=found)

    for own, expected in zip(ranks, rank_mixed(x, y, owners, seed=0), strict=True):
        for values, wanted in zip(own, expected, strict=True):
            np.testing.assert_allclose(values, wanted)


def test_a_summary_is_the_mean_over_queries_and_then_over_sides() -> None:
    ranks = rank_mixed(*captioned(), seed=0)

    found: Any = ranks.summary()

    assert found["image"]["ndcg@10"] == pytest.approx(ranks.image.ndcg.mean())
    assert found["text"]["same_side@10"] == pytest.approx(ranks.text.same_side.mean())
    for name in ("ndcg@10", "recall@10", "same_side@10"):
        assert found[name] == pytest.approx((found["image"][name] + found["text"][name]) / 2)


def summary(x: Array, y: Array, owners: Array) -> Any:
    return rank_mixed(x, y, owners, seed=0).summary()


def test_an_offset_hides_the_other_side_and_a_mean_shift_removes_it() -> None:
    *sides, owners = pairs(300)
    plain = summary(sides[0], sides[1], owners)
    x, y = (
        unit(np.hstack([rows, np.full((300, 1), end)]))
        for rows, end in zip(sides, (1.5, -1.5), strict=True)
    )
    shifted_x, shifted_y = (unit(rows - rows.mean(axis=0)) for rows in (x, y))

    gap, closed = summary(x, y, owners), summary(shifted_x, shifted_y, owners)

    assert gap["same_side@10"] == 1
    assert gap["ndcg@10"] == gap["recall@10"] == 0
    assert closed["same_side@10"] < 0.5
    assert closed["ndcg@10"] > 0.7
    assert closed["ndcg@10"] == pytest.approx(plain["ndcg@10"], abs=0.05)


def test_random_sides_are_mixed_by_chance() -> None:
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(400, 16))), unit(rng.normal(size=(400, 16)))

    found = summary(x, y, np.arange(400))

    assert found["same_side@10"] == pytest.approx(0.5, abs=0.03)
    assert found["ndcg@10"] < 0.03


def test_with_several_captions_the_mean_of_both_sides_is_a_half_by_chance() -> None:
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(150, 16))), unit(rng.normal(size=(600, 16)))

    found = summary(x, y, np.repeat(np.arange(150), 4))

    assert found["image"]["same_side@10"] == pytest.approx(0.2, abs=0.05)
    assert found["same_side@10"] == pytest.approx(0.5, abs=0.03)


def test_identical_sides_are_found_first_and_alternate() -> None:
    x, _, owners = pairs(200)

    found = summary(x, x, owners)

    assert found["ndcg@10"] == found["recall@10"] == 1
    assert found["same_side@10"] == 0.5


def test_ties_count_against_the_model() -> None:
    collapsed = np.ones((30, 1), np.float32)

    found = summary(collapsed, collapsed, np.arange(30))

    assert found["ndcg@10"] == found["recall@10"] == 0
    assert found["same_side@10"] == 1


def test_a_gallery_below_ten_rows_is_listed_completely() -> None:
    x, y, owners = pairs(2)

    found = summary(x, y, owners)

    assert found["recall@10"] == 1
    assert found["same_side@10"] == pytest.approx(1 / 3)


def test_queries_are_drawn_by_the_seed() -> None:
    x, y, owners = captioned()
    full = rank_mixed(x, y, owners, seed=0)

    few, again, others = (rank_mixed(x, y, owners, seed=seed, most=5) for seed in (1, 1, 2))

    assert [len(own.owners) for own in few] == [5, 5]
    np.testing.assert_equal(few, again)
    assert not np.array_equal(few.text.owners, others.text.owners)
    of_image = dict(zip(full.image.owners, full.image.ndcg, strict=True))
    assert few.image.ndcg.tolist() == [of_image[owner] for owner in few.image.owners]


def repeated(ranks: MixedRanks, weights: Array) -> MixedRanks:
    copies: Any = [[np.repeat(field, weights[own.owners]) for field in own] for own in ranks]
    return MixedRanks(*(SideRanks(*own) for own in copies))


def test_resamples_equal_repeated_queries_and_are_nested() -> None:
    x, y, owners = captioned()
    ranks = rank_mixed(x, y, owners, seed=0)
    weights = np.random.default_rng(0).integers(0, 3, (4, len(x) + 3))

    found = ranks.figures(weights)

    for row, values in enumerate(weights):
        copies: Any = repeated(ranks, values).summary()
        assert found["mixed", "text", "ndcg@10"][row] == pytest.approx(copies["text"]["ndcg@10"])
        assert found["mixed", "same_side@10"][row] == pytest.approx(copies["same_side@10"])
    drawn = resample(
        rank_both_ways(x, y, owners), x, y, owners, resamples=50, seed=0, further=[ranks]
    )
    low, high = drawn.intervals()["mixed"]["image"]["recall@10"]
    assert low <= ranks.image.recall.mean() <= high
    assert drawn.minus(drawn, ("mixed", "ndcg@10"))[0] == (0, 0)


def test_figures_of_folds_are_averaged() -> None:
    x, y, _ = pairs(40)
    halves = [np.arange(20), np.arange(20, 40)]
    ranks = [rank_mixed(x[own], y[own], np.arange(20), seed=0) for own in halves]
    weights = np.random.default_rng(0).integers(0, 3, (3, 40))

    found = FoldMeans(list(zip(halves, ranks, strict=True))).figures(weights)

    place = ("mixed", "recall@10")
    apart = [own.figures(weights[:, rows])[place] for rows, own in zip(halves, ranks, strict=True)]
    np.testing.assert_allclose(found[place], np.mean(apart, axis=0))
