from itertools import combinations, permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from csalign.metrics.bootstrap import Place, Verdict, resample
from csalign.metrics.gap import centroid_distance, relative_modality_gap
from csalign.metrics.retrieval import mean_recall, rank_both_ways
from csalign.metrics.sides import (
    SCORES,
    FirstRanks,
    Points,
    describe_items,
    mean_of_recalls,
    rank_by_subsets,
    rank_rows,
    resample_sides,
)

Array = npt.NDArray[Any]
COUNT = 40


def unit(x: Array) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = x.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def made(seed: int = 0, names: str = "abcd", noise: float = 0.7) -> dict[str, Points]:
    """Sides of 40 items: 60 % of the memberships, and up to three rows per item and side."""
    rng = np.random.default_rng(seed)
    hidden, found = rng.normal(size=(COUNT, 6)), {}
    for name in names:
        there = np.flatnonzero(rng.random(COUNT) < 0.6)
        items = rng.permutation(np.repeat(there, rng.integers(1, 4, len(there))))
        rows = hidden[items] + noise * rng.normal(size=(len(items), 6)) + rng.normal(size=6) / 3
        found[name] = Points(unit(rows), items)
    return found


def brute_ranks(scores: Array, matches: Array, gallery: Array) -> list[int]:
    """Rank the best match of each query among the columns of the gallery; ties count against."""
    ranks = []
    for row, right in zip(scores, matches, strict=True):
        right = right & gallery
        best = row[right].max(initial=-np.inf)
        ranks.append(min(1 + int((row[gallery & ~right] >= best).sum()), int(gallery.sum())))
    return ranks


def described(sides: dict[str, Points], subset: tuple[str, ...]) -> list[dict[str, Array]]:
    found: list[dict[str, Array]] = [{} for _ in range(COUNT)]
    for name in subset:
        for item in set(sides[name].items.tolist()):
            mean = sides[name].rows[sides[name].items == item].astype(np.float64).mean(0)
            found[item][name] = mean / np.linalg.norm(mean)
    return found


def brute_score(score: str, t: Array, parts: dict[str, Array]) -> float:
    t, z = t.astype(np.float64), np.array([*parts.values()])  # the best side first
    if not len(z):
        return -np.inf
    cosines = z @ t
    if score in ("sum", "best_single"):
        return float(cosines.mean() if score == "sum" else cosines[0])
    weights = np.exp(cosines / 0.1) if score == "query_weighted" else np.ones(len(z))
    bottom = sum(
        weights[m] * weights[n] * z[m] @ z[n] for m in range(len(z)) for n in range(len(z))
    )
    return float(weights @ cosines / np.sqrt(bottom))


@pytest.mark.parametrize("strip_bytes", [1, 64 << 20])
def test_ranks_of_rows_equal_those_by_sorting(strip_bytes: int) -> None:
    sides = made()
    for a, b in permutations(sides, 2):
        x, y = sides[a], sides[b]
        matches = x.items[:, None] == y.items
        asked = matches.any(1)
        scores = x.rows.astype(np.float64) @ y.rows.astype(np.float64).T

        ranks = rank_rows(x, y, strip_bytes=strip_bytes)

        wanted = brute_ranks(scores[asked], matches[asked], np.ones(len(y.items), bool))
        assert ranks.first.tolist() == wanted
        assert ranks.owners.tolist() == x.items[asked].tolist()
        assert ranks.gallery == len(y.items)


def test_ranks_of_rows_are_those_of_two_sides() -> None:
    rng = np.random.default_rng(1)
    images, owners = unit(rng.normal(size=(50, 8))), rng.integers(0, 50, 120)
    texts = unit(images[owners] + 0.4 * rng.normal(size=(120, 8)))
    forth, back = rank_both_ways(images, texts, owners)
    x, y = Points(images, np.arange(50)), Points(texts, owners)

    assert rank_rows(x, y).first.tolist() == forth.first.tolist()
    assert rank_rows(y, x).first.tolist() == back.first.tolist()
    both = [rank_rows(x, y), rank_rows(y, x)]
    assert mean_of_recalls(both) == pytest.approx(mean_recall(forth.summary(), back.summary()))
    summary = both[0].summary()
    assert {
        name: forth.summary()[name] for name in ("R@1", "R@5", "R@10", "mrr", "median_rank")
    } == (
        pytest.approx(
            {name: summary[name] for name in ("R@1", "R@5", "R@10", "mrr", "median_rank")}
        )
    )


def test_wrong_rows_that_tie_come_first() -> None:
    rows = np.zeros((5, 3), np.float32)
    rows[:, 0] = 1
    x = Points(rows[:2], np.array([0, 1]))
    y = Points(rows, np.array([0, 0, 1, 2, 3]))

    assert rank_rows(x, y).first.tolist() == [4, 5]  # three wrong rows, four


def test_sides_without_a_common_item_have_no_queries() -> None:
    x, y = (Points(unit(np.eye(3)), np.arange(3) + start) for start in (0, 3))

    found = rank_rows(x, y).summary()

    assert found == {
        **dict.fromkeys(("R@1", "R@5", "R@10", "mrr", "median_rank", "mean_recall")),
        "queries": 0,
        "gallery": 3,
    }


@pytest.mark.parametrize("strip_bytes", [1, 64 << 20])
def test_scores_of_subsets_equal_those_by_their_formula(strip_bytes: int) -> None:
    sides = made(2)
    subsets = [own for k in (2, 3) for own in combinations("dcb", k)][::-1]
    subsets = [*sorted(subsets[1:], key=sorted), subsets[0]]

    found = rank_by_subsets(sides, COUNT, "a", subsets, strip_bytes=strip_bytes)

    target = sides["a"]
    matches = np.arange(COUNT)[:, None] == target.items
    assert [*dict.fromkeys(name for name, *_ in found)] == ["b+c", "b+d", "c+d", "b+c+d"]
    for subset in subsets:
        items, name = described(sides, subset), "+".join(sorted(subset))
        there = np.array([bool(parts) for parts in items])
        for score in SCORES:
            table = np.array([[brute_score(score, t, z) for t in target.rows] for z in items])
            asked, rows = there & matches.any(1), there[target.items]
            forth = brute_ranks(table[asked], matches[asked], np.ones(len(rows), bool))
            back = brute_ranks(table.T[rows], matches.T[rows], there)
            both = found[name, score], found[name, score, "from_target"]
            assert [one.first.tolist() for one in both] == [forth, back]
            assert [one.gallery for one in both] == [len(rows), there.sum()]


def test_sides_that_share_no_item_have_no_queries_by_subsets() -> None:
    sides = made(9, "abc")
    sides["a"] = Points(sides["a"].rows, sides["a"].items + COUNT)

    found = rank_by_subsets(sides, 2 * COUNT, "a", [("b", "c")])

    assert len(found) == 2 * len(SCORES)
    assert all(len(ranks.first) == 0 for ranks in found.values())


def test_an_item_is_described_by_the_mean_of_its_rows() -> None:
    rows = unit(np.array([[1.0, 0], [0, 1], [1, 0]]))

    vectors, has = describe_items(Points(rows, np.array([0, 0, 2])), 3)

    assert vectors == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [0, 0], [1, 0]]))
    assert has.tolist() == [True, False, True]


def ranked_of(sides: dict[str, Points]) -> dict[Place, FirstRanks]:
    found: dict[Place, FirstRanks] = {
        ("matrix", a, b): rank_rows(sides[a], sides[b]) for a, b in permutations(sides, 2)
    }
    for target in sides:
        others = tuple(name for name in sorted(sides) if name != target)
        own = rank_by_subsets(sides, COUNT, target, [others])
        found |= {("subsets", target, *place): ranks for place, ranks in own.items()}
    return found


def pairs_of(sides: dict[str, Points]) -> dict[tuple[str, str], tuple[Array, Array]]:
    found: dict[tuple[str, str], tuple[Array, Array]] = {}
    for a, b in combinations(sides, 2):
        rows = np.nonzero(sides[a].items[:, None] == sides[b].items)
        found[a, b] = rows[0], rows[1]
    return found


def drawn(sides: dict[str, Points], **options: Any) -> Any:
    options = {"resamples": 200, "seed": 0} | options
    return resample_sides(sides, COUNT, ranked_of(sides), pairs_of(sides), **options)


def test_resampled_figures_surround_the_measured_ones() -> None:
    sides = made(3, "abc")
    ranked, found = ranked_of(sides), drawn(sides)

    for place, ranks in ranked.items():
        for name, value in ranks.summary().items():
            is_two_way = place[0] == "subsets" and name in ("mean_recall", "median_rank")
            if name not in ("queries", "gallery") and not is_two_way:
                low, high = np.quantile(found.figures[*place, name], [0.001, 0.999])
                assert low <= value <= high
    mean = mean_of_recalls([own for place, own in ranked.items() if place[0] == "matrix"])
    assert found.figures["mean_recall",].mean() == pytest.approx(mean, abs=0.01)
    for (a, b), (rows_a, rows_b) in pairs_of(sides).items():
        x, y = (torch.from_numpy(sides[name].rows).double() for name in (a, b))
        matched = torch.from_numpy(rows_a), torch.from_numpy(rows_b)
        for name, value in (
            ("centroid_distance", centroid_distance(x, y)),
            ("rmg", relative_modality_gap(x, y, matched)),
        ):
            values = found.figures["gap", a, b, name]
            assert values.min() < value < values.max()
            assert values.tolist() == found.figures["gap", b, a, name].tolist()
    place = ("subsets", "a", "b+c")
    gain = found.figures[*place, "gain"]
    best, own = (
        found.figures[*place, score, "mean_recall"] for score in ("best_single", "query_weighted")
    )
    assert gain == pytest.approx(own - best)


def test_intervals_of_two_sides_are_todays() -> None:
    rng = np.random.default_rng(4)
    x, owners = unit(rng.normal(size=(COUNT, 8))), np.repeat(np.arange(COUNT), 2)
    y = unit(x[owners] + 0.5 * rng.normal(size=(2 * COUNT, 8)))
    sides = {"image": Points(x, np.arange(COUNT)), "text": Points(y, owners)}
    matrix: dict[Place, FirstRanks] = {
        ("matrix", a, b): rank_rows(sides[a], sides[b]) for a, b in permutations(sides, 2)
    }

    old = resample(rank_both_ways(x, y, owners), x, y, owners, resamples=200, seed=5)
    new = resample_sides(sides, COUNT, matrix, pairs_of(sides), resamples=200, seed=5)

    for name in ("centroid_distance", "rmg", "alignment"):
        assert new.figures["gap", "image", "text", name] == pytest.approx(old.figures[name,])
    for name in ("R@1", "R@5", "R@10", "mrr", "median_rank"):
        own = new.figures["matrix", "text", "image", name]
        assert own == pytest.approx(old.figures["text_to_image", name])
    assert new.figures["mean_recall",] == pytest.approx(old.figures["mean_recall",])


def test_differences_of_two_systems_are_paired() -> None:
    good, poor = made(6, noise=0.2), made(6, noise=1.5)

    better, worse = drawn(good), drawn(poor)

    (low, _), verdict = better.minus(worse, ("mean_recall",))
    assert verdict is Verdict.BETTER
    assert low > 0
    assert better.minus(drawn(good), ("mean_recall",)) == ((0.0, 0.0), Verdict.UNKNOWN)


def test_a_side_with_a_few_rows_has_finite_intervals() -> None:
    sides = made(7, "abc")
    few = np.flatnonzero(np.isin(sides["b"].items, sides["a"].items))[:1]
    sides["b"] = Points(sides["b"].rows[few], sides["b"].items[few])

    found = drawn(sides)

    assert ("matrix", "b", "a", "R@1") in found.figures
    assert all(np.isfinite(values).all() for values in found.figures.values())


def test_order_of_sides_items_and_rows_changes_nothing() -> None:
    sides = made(8)
    rng = np.random.default_rng(0)
    number, moved = rng.permutation(COUNT), {}
    for name in reversed([*sides]):
        order = rng.permutation(len(sides[name].items))
        moved[name] = Points(sides[name].rows[order], number[sides[name].items[order]])

    one, other = ranked_of(sides), ranked_of(moved)

    assert one.keys() == other.keys()
    for place, ranks in one.items():
        assert other[place].summary() == pytest.approx(ranks.summary())
