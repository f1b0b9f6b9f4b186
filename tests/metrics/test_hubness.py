from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import logsumexp
from scipy.stats import skew

from csalign.metrics.retrieval import corrected, hubness, penalty, rank_both_ways

CORRECTIONS = ("csls", "inverted-softmax", "centre")

Array = npt.NDArray[Any]


def unit(rows: Array) -> npt.NDArray[np.float32]:
    scaled: npt.NDArray[np.float32] = rows.astype(np.float32)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled


@pytest.fixture
def sides() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 5)) + 0.4
    return unit(images), unit(np.repeat(images, 2, axis=0) + rng.normal(size=(80, 5)) - 0.4)


@pytest.mark.parametrize("strip_bytes", [4 * 80 * 7, 1 << 20])
def test_skewness_equals_scipys_of_counted_neighbours(
    sides: tuple[Array, Array], strip_bytes: int
) -> None:
    found = hubness(*sides, strip_bytes=strip_bytes)
    for name, (queries, gallery) in {
        "image_to_text": sides,
        "text_to_image": sides[::-1],
    }.items():
        counts = np.zeros(len(gallery))
        for query in queries:
            counts[np.argsort(-(gallery @ query))[:10]] += 1
        assert found[name] == pytest.approx(skew(counts))


def test_items_that_all_are_as_near_have_no_hubs() -> None:
    rows = np.eye(4, dtype=np.float32)

    assert hubness(rows, rows) == {"image_to_text": 0.0, "text_to_image": 0.0}


def scores_of(name: str, x: Array, y: Array) -> tuple[Array, Array]:
    """Corrected scores (n, m) of both directions, by the papers' formulas in float64."""
    cosines = x.astype(np.float64) @ y.T.astype(np.float64)
    if name == "csls":
        near_x = np.sort(cosines, axis=1)[:, -10:].mean(axis=1)
        near_y = np.sort(cosines, axis=0)[-10:].mean(axis=0)
        both = 2 * cosines - near_x[:, None] - near_y
        return both, both
    if name == "inverted-softmax":  # normalised over the queries, for each item
        return (
            30 * cosines - logsumexp(30 * cosines, axis=0),
            30 * cosines - logsumexp(30 * cosines, axis=1)[:, None],
        )
    x, y = (side - side.mean(axis=0) for side in (x.astype(float), y.astype(float)))
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    return x @ y.T, x @ y.T


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrected_ranks_equal_those_of_the_formula(name: str, sides: tuple[Array, Array]) -> None:
    owners = np.repeat(np.arange(40), 2)
    forth, back = rank_both_ways(*corrected(*sides, name), owners)
    scores, transposed = scores_of(name, *sides)

    for image in range(40):
        order = np.argsort(-scores[image])
        assert forth.first[image] == 1 + np.isin(order, [2 * image, 2 * image + 1]).argmax()
    for text, column in enumerate(transposed.T):
        assert back.first[text] == 1 + (np.argsort(-column) == owners[text]).argmax()


@pytest.mark.parametrize("name", ["csls", "inverted-softmax"])
def test_strips_do_not_change_a_penalty(name: str, sides: tuple[Array, Array]) -> None:
    whole, strips = penalty(*sides, name), penalty(*sides, name, strip_bytes=4 * 80 * 7)

    np.testing.assert_allclose(strips, whole, rtol=1e-5)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_of_a_single_row_are_finite(name: str) -> None:
    rows = np.ones((1, 1), np.float32)

    for side in corrected(rows, rows, name):
        assert np.isfinite(side).all()
