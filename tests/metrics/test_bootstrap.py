from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from csalign.metrics import bootstrap, gap
from csalign.metrics.bootstrap import Resamples, Verdict, percentiles, resample
from csalign.metrics.retrieval import DirectionRanks, mean_recall, rank_both_ways

Array = npt.NDArray[Any]
CENTROID, RMG = ("centroid_distance",), ("rmg",)


def unit(x: Array) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = x.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def captioned(seed: int = 0, images: int = 30) -> tuple[Array, Array, Array]:
    """One to three captions an image, two images without any, three captions without an image."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images - 2), rng.integers(1, 4, images - 2))
    owners = rng.permutation(np.concatenate([owners, [-1, -1, -1]]))
    x = rng.normal(size=(images, 5))
    y = x[owners] + 0.8 * rng.normal(size=(len(owners), 5)) + 0.3
    return unit(x), unit(y), owners


def drawn(x: Array, y: Array, owners: Array, *, resamples: int = 50, **options: Any) -> Resamples:
    ranks = rank_both_ways(x, y, owners)
    return resample(ranks, x, y, owners, resamples=resamples, **{"seed": 0, **options})


def ranked(first: Array) -> DirectionRanks:
    """Of queries with one match each."""
    recalled = np.stack([first <= k for k in (1, 5, 10)], axis=1).astype(np.float64)
    return DirectionRanks(first.astype(np.int64), 1 / first, recalled, recalled[:, 0])


def by_ranks(first: Array, owners: Array | None = None, *, resamples: int = 300) -> Resamples:
    """Resamples where only the ranks of the text queries matter."""
    owners = np.arange(len(first)) if owners is None else owners
    rows = np.ones((len(first), 1), np.float32)
    images = ranked(np.ones(len(np.unique(owners))))
    return resample(
        (images, ranked(first)),
        rows[: owners.max() + 1],
        rows,
        owners,
        resamples=resamples,
        seed=0,
    )


def draws_of(x: Array, owners: Array, resamples: int) -> Array:
    return np.concatenate(list(bootstrap.Units.of(len(x), owners).draws(resamples, 0, 7)))


def test_resampled_figures_equal_a_loop_that_repeats_rows() -> None:
    x, y, owners = captioned()
    ranks = rank_both_ways(x, y, owners)
    found = drawn(x, y, owners, resamples=20).figures
    queried, paired = np.unique(owners[owners >= 0]), np.flatnonzero(owners >= 0)
    unpaired = np.flatnonzero(owners < 0)
    centroids = []
    for row, weights in enumerate(draws_of(x, owners, 20)):
        of_text = np.empty(len(y), np.int64)
        of_text[paired], of_text[unpaired] = weights[owners[paired]], weights[len(x) :]
        summaries: list[dict[str, float]] = []
        for direction, repeats in zip(ranks, (weights[queried], of_text[paired]), strict=True):
            name = bootstrap.DIRECTIONS[len(summaries)]
            repeated = direction.take(np.repeat(np.arange(len(repeats)), repeats))
            summaries.append(repeated.summary())
            for key, value in summaries[-1].items():
                assert found[name, key][row] == pytest.approx(value), key
        assert found["mean_recall",][row] == pytest.approx(mean_recall(*summaries))
        images = torch.from_numpy(np.repeat(x, weights[: len(x)], axis=0))
        texts = torch.from_numpy(np.repeat(y, of_text, axis=0))
        centroids.append(gap.centroid_distance(images, texts))
        apart = np.square(x[owners[paired]] - y[paired]).sum(axis=1)
        expected = np.average(apart, weights=of_text[paired])
        assert found["alignment",][row] == pytest.approx(expected, rel=1e-5)
        within = np.mean([loop_within(x, weights[: len(x)]), loop_within(y, of_text)])
        assert found[RMG][row] == pytest.approx(expected / 4 / (expected / 4 + within), rel=1e-5)
    measured = gap.centroid_distance(torch.from_numpy(x), torch.from_numpy(y))
    squares = np.square(centroids)
    recentred = np.sqrt(np.maximum(0, squares - squares.mean() + measured**2))
    np.testing.assert_allclose(found[CENTROID], recentred, rtol=1e-4)


def loop_within(rows: Array, weights: Array) -> float:
    """Mean of (1 - cos) / 2 over drawn pairs of rows that are not one and the same."""
    pairs = weights[:, None] * weights[None, :]
    np.fill_diagonal(pairs, 0)
    return float(np.average((1 - rows @ rows.T) / 2, weights=pairs))


def test_captions_follow_their_image() -> None:
    owners = np.repeat(np.arange(40), 5)
    first = np.where(owners % 2 == 0, 1.0, 20.0)
    together = by_ranks(first, owners).figures["text_to_image", "R@1"]
    apart = by_ranks(first).figures["text_to_image", "R@1"]

    # 40 independent witnesses, not 200.
    assert together.std() == pytest.approx(0.5 / np.sqrt(40), rel=0.15)
    assert apart.std() == pytest.approx(0.5 / np.sqrt(200), rel=0.15)


def test_intervals_of_a_recall_cover_its_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        first = np.where(rng.random(100) < 0.3, 1.0, 20.0)
        low, high = by_ranks(first).intervals()["text_to_image"]["R@1"]
        covered += low <= 0.3 <= high

    assert 0.9 * 200 <= covered <= 0.99 * 200


def test_intervals_of_a_narrow_gap_hold_it_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    figures = []
    for _ in range(200):
        x = rng.normal(size=(100, 20))
        y = x + 0.7 * rng.normal(size=x.shape) + 0.05
        rows = (unit(x), unit(y), np.arange(100))
        one = ranked(np.ones(100))
        intervals = resample((one, one), *rows, resamples=200, seed=0).intervals()
        measured = gap.centroid_distance(*map(torch.from_numpy, rows[:2]))
        figures.append((measured, *intervals["centroid_distance"]))
    measured, low, high = np.array(figures).T

    assert ((low <= measured) & (measured <= high)).all()
    assert 0.9 <= ((low <= measured.mean()) & (measured.mean() <= high)).mean() <= 0.995


def test_the_same_seed_gives_the_same_bytes_in_chunks_of_any_size() -> None:
    rows = captioned()
    once = drawn(*rows).figures
    again, other = drawn(*rows).figures, drawn(*rows, seed=1).figures
    chunked = drawn(*rows, cells=200).figures

    for place, values in once.items():
        assert values.tobytes() == again[place].tobytes()
        np.testing.assert_allclose(values, chunked[place], rtol=1e-5)
    assert not np.array_equal(once["mean_recall",], other["mean_recall",])


@pytest.mark.parametrize("spread", [1, 3, 10_000])
def test_medians_are_found_however_far_from_the_middle(spread: int) -> None:
    rng = np.random.default_rng(0)
    # One image with half of all texts: the median jumps with how often that image is drawn.
    owners = np.concatenate([np.zeros(2_000, np.int64), np.arange(1, 2_001)])
    first = rng.integers(1, spread + 1, 4_000) + np.where(owners == 0, spread, 0)
    found = by_ranks(first, owners, resamples=20).figures["text_to_image", "median_rank"]

    for row, median in zip(draws_of(np.empty(2_001), owners, 20), found, strict=True):
        assert median == np.median(np.repeat(first, row[owners]))


def test_a_system_is_no_better_than_itself() -> None:
    one, same = drawn(*captioned()), drawn(*captioned())

    for place in one.figures:
        assert one.minus(same, place) == ((0, 0), Verdict.UNKNOWN)


def test_a_clearly_better_system_is_better_and_the_other_worse() -> None:
    rng = np.random.default_rng(0)
    good, bad = (by_ranks(np.where(rng.random(100) < p, 1.0, 20.0)) for p in (0.6, 0.3))
    interval, verdict = good.minus(bad, ("mean_recall",))

    assert verdict is Verdict.BETTER
    assert 0 < interval[0] < 0.15 < interval[1]
    assert bad.minus(good, ("mean_recall",))[1] is Verdict.WORSE


def test_pairs_tell_apart_what_intervals_side_by_side_do_not() -> None:
    first = np.where(np.arange(200) < 80, 1.0, 20.0)
    slightly = np.where(np.arange(200) < 90, 1.0, 20.0)
    base, better = by_ranks(first), by_ranks(slightly)
    place = ("text_to_image", "R@1")

    assert better.minus(base, place)[1] is Verdict.BETTER
    assert percentiles(base.figures[place])[1] > percentiles(better.figures[place])[0]


def test_a_handful_of_images_tells_nothing() -> None:
    few = [by_ranks(np.full(bootstrap.FEWEST_IMAGES - 1, rank)) for rank in (1.0, 20.0)]
    more = [by_ranks(np.full(bootstrap.FEWEST_IMAGES, rank)) for rank in (1.0, 20.0)]

    assert few[0].minus(few[1], ("mean_recall",))[1] is Verdict.UNKNOWN
    assert more[0].minus(more[1], ("mean_recall",))[1] is Verdict.BETTER


def test_one_pair_has_intervals_without_width() -> None:
    row = unit(np.ones((1, 4)))
    intervals = drawn(row, row, np.array([0])).intervals()

    assert intervals["mean_recall"] == [1, 1]
    assert intervals["rmg"] == [0, 0]
    assert intervals["centroid_distance"] == pytest.approx([0, 0])
