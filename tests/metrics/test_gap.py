import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import cross_val_score
from torch import Tensor
from torch.nn.functional import normalize

from csalign.metrics import gap
from csalign.objective.divergences import cs_divergence, mmd


def unit(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    rng = np.random.default_rng(seed)
    return normalize(torch.from_numpy(rng.normal(size=(n, d))) + shift, dim=1)


def separability(x: Tensor, y: Tensor, text_image: npt.NDArray[np.int64]) -> float:
    folds = gap.pair_folds(len(x), text_image, np.random.default_rng(0))
    return gap.linear_separability(x, y, *folds)


def test_frechet_distance_equals_scipys_matrix_root() -> None:
    x, y = unit(200, 6, 0), unit(150, 6, 1, 0.5)
    covariances = [np.cov(side.numpy().T, bias=True) for side in (x, y)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    mean = float((x.mean(0) - y.mean(0)).square().sum())
    expected = mean + np.trace(covariances[0] + covariances[1] - 2 * root)

    assert gap.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 99))
def test_frechet_distance_is_finite_zero_on_itself_and_symmetric_with_few_rows(
    n: int, m: int, seed: int
) -> None:
    x, y = unit(n, 8, seed), unit(m, 8, seed + 1)

    assert gap.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert gap.frechet_distance(x, y) == pytest.approx(gap.frechet_distance(y, x), abs=1e-9)


def test_relative_modality_gap_equals_a_loop() -> None:
    x, y = unit(20, 5, 0), unit(30, 5, 1, 0.3)
    owners = torch.arange(30) % 20

    def distance(a: Tensor, b: Tensor) -> float:
        return (1 - float(a @ b)) / 2

    def within(side: Tensor) -> float:
        n = len(side)
        return float(
            np.mean([distance(side[i], side[j]) for i in range(n) for j in range(n) if i != j])
        )

    pairs = float(np.mean([distance(x[o], y[j]) for j, o in enumerate(owners)]))
    expected = pairs / (pairs + (within(x) + within(y)) / 2)

    assert gap.relative_modality_gap(x, y, (owners, torch.arange(30))) == pytest.approx(expected)


def test_uniformity_and_alignment_equal_scipys_distances() -> None:
    x, y = unit(40, 5, 0), unit(30, 5, 1)

    expected = np.log(np.exp(-2 * pdist(x.numpy()) ** 2).mean())
    assert gap.uniformity(x) == pytest.approx(expected)
    suite = gap.gap_suite(x.numpy(), y.numpy(), np.arange(30), sigma=0.7, seed=0)
    expected = np.log(np.exp(-2 * cdist(x.numpy(), y.numpy()) ** 2).mean())
    assert suite["uniformity"]["cross"] == pytest.approx(expected)
    assert suite["uniformity"]["image"] == pytest.approx(gap.uniformity(x))
    assert suite["cs_divergence"] == pytest.approx(float(cs_divergence(x, y, sigma=0.7)))
    assert suite["mmd"] == pytest.approx(float(mmd(x, y, sigma=0.7)))
    expected = np.mean(np.linalg.norm(x[:30].numpy() - y.numpy(), axis=1) ** 2)
    assert gap.alignment(x, y, (torch.arange(30), torch.arange(30))) == pytest.approx(expected)


def test_uniformity_of_a_large_set_is_that_of_rows_drawn_by_the_seed() -> None:
    clusters = torch.cat([unit(500, 5, 0), unit(500, 5, 1, 3.0)])  # the first rows say little
    found = [gap.uniformity(clusters, max_rows=400, seed=seed) for seed in (0, 0, 1)]

    assert found[0] == found[1] != found[2]
    assert found[0] == pytest.approx(gap.uniformity(clusters), abs=0.1)
    assert gap.uniformity(clusters[:400]) < gap.uniformity(clusters) - 0.5


def test_effective_rank_counts_equal_directions() -> None:
    axes = torch.cat([torch.eye(6), -torch.eye(6)]).double().numpy()
    suite = gap.gap_suite(axes, axes[:1].repeat(5, 0), np.zeros(5, int), sigma=0.5, seed=0)

    assert suite["effective_rank"] == {"image": pytest.approx(6), "text": 1}


def test_linear_separability_agrees_with_sklearns_cross_validation() -> None:
    x, y = unit(300, 10, 0), unit(300, 10, 1, 0.25)
    both = torch.cat([x, y]).numpy()
    labels = np.repeat([0, 1], 300)
    expected = cross_val_score(LinearDiscriminantAnalysis(), both, labels, cv=5).mean()

    assert separability(x, y, -np.ones(300, np.int64)) == pytest.approx(expected, abs=0.04)
    assert 0.55 < expected < 0.9


def test_linear_separability_of_one_cloud_is_a_coin_toss_and_of_two_is_one() -> None:
    apart = -np.ones(400, np.int64)

    assert separability(unit(400, 10, 0), unit(400, 10, 1), apart) == pytest.approx(0.5, abs=0.06)
    assert separability(unit(50, 10, 0, 2), unit(50, 10, 1, -2), apart[:50]) == 1


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_linear_separability_of_perfectly_aligned_pairs_is_a_coin_toss(noise: float) -> None:
    x = unit(500, 256, 0)
    y = normalize(x + noise * unit(500, 256, 1), dim=1)

    assert separability(x, y, np.arange(500)) == pytest.approx(0.5, abs=0.05)


def test_collapsed_sets_cannot_be_told_apart() -> None:
    same = unit(1, 8, 0).repeat(50, 1)

    assert separability(same, same, np.arange(50)) == 0.5


def test_centroid_distance_of_opposite_points_is_two() -> None:
    x = torch.tensor([[1.0, 0.0]]).double()

    assert gap.centroid_distance(x, -x) == 2


def test_the_suite_is_finite_for_a_single_pair() -> None:
    x = np.ones((1, 4), np.float32) / 2
    suite = gap.gap_suite(x, x, np.array([0]), sigma=0.5, seed=0)

    assert suite["centroid_distance"] == 0
    assert suite["rmg"] == 0
    assert suite["linear_separability"] == 0.5
    assert suite["effective_rank"] == {"image": 1.0, "text": 1.0}


def test_the_parts_of_the_frechet_distance_add_up() -> None:
    x, y = unit(80, 6, 0), unit(80, 6, 1, shift=1.0)
    suite = gap.gap_suite(x.numpy(), y.numpy(), np.arange(80), sigma=0.5, seed=0)
    parts = suite["frechet_parts"]

    centred = gap.frechet_distance(x - x.mean(0), y - y.mean(0))

    assert parts["centroid"] == pytest.approx(suite["centroid_distance"] ** 2)
    assert parts["distribution"] == pytest.approx(centred, abs=1e-9)
    assert sum(parts.values()) == suite["frechet"]


def test_figures_of_large_sets_take_all_rows_and_have_standard_errors() -> None:
    x, y = (unit(1_500, 6, seed, 0.2 * seed).float().numpy() for seed in (0, 1))
    exact = gap.gap_suite(x, y, np.arange(1_500), sigma=0.4, seed=0)
    suites = [
        gap.gap_suite(x, y, np.arange(1_500), sigma=0.4, seed=seed, max_rows=1_000)
        for seed in (0, 0, 1)
    ]
    errors = suites[0].pop("standard_errors")

    assert suites[0] | {"standard_errors": errors} == suites[1]
    assert "standard_errors" not in exact
    for name in ("cs_divergence", "mmd"):
        assert suites[0][name] != suites[2][name]
        assert suites[0][name] == pytest.approx(exact[name], abs=5 * errors[name])
        assert 0 < errors[name] < 0.01 * exact[name]
    for part, error in errors["uniformity"].items():
        found, truth = suites[0]["uniformity"][part], exact["uniformity"][part]
        assert found == pytest.approx(truth, abs=5 * error)
        assert 0 < error < 0.01


def test_kernel_means_too_small_for_an_estimate_are_those_of_a_sample(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = unit(1_500, 6, 0, 2.0).float().numpy()
    suite = gap.gap_suite(x, -x, np.arange(1_500), sigma=0.05, seed=0, max_rows=100)

    assert "standard_errors" not in suite
    assert 100 < suite["cs_divergence"] < np.inf
    assert "of 100 rows per side" in caplog.text


def test_rows_of_several_chunks_give_numpys_figures() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(gap.CHUNK_ROWS + 4_000, 3)), rng.normal(size=(50, 3)) + 0.5
    covariances = [np.cov(side.T, bias=True) for side in (x, y)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    mean = np.square(x.mean(0) - y.mean(0)).sum()
    expected = mean + np.trace(covariances[0] + covariances[1] - 2 * root)

    found = gap.frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_spectrum_is_that_of_numpys_covariance() -> None:
    rows = np.random.default_rng(4).normal(size=(300, 80)) * np.linspace(1, 3, 80)
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]

    suite = gap.gap_suite(rows, np.ones((5, 80)), np.zeros(5, int), sigma=0.5, seed=0)
    assert suite["spectrum"]["image"] == pytest.approx(values[:64] / values.sum())
    assert suite["spectrum"]["text"] == [0] * 5
