import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri
from torch import Tensor

from csalign.core.errors import ShapeError
from csalign.objective.divergences import cs_divergence, cs_terms, mmd
from csalign.objective.kernels import (
    diagonal_share,
    log_mean_kernels,
    median_distance,
    tiled_log_mean_kernels,
)

SIGMAS = st.sampled_from([0.3, 1.0, 2.5])


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


sets = st.builds(rows, st.integers(1, 12), st.just(3), st.integers(0, 10_000), st.floats(-1, 1))


def loop_mean_kernel(x: Tensor, y: Tensor, sigma: float) -> float:
    total = 0.0
    for a in x.tolist():
        for b in y.tolist():
            square = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
            total += math.exp(-square / (2 * sigma**2))
    return total / (len(x) * len(y))


def loop_divergence(x: Tensor, y: Tensor, sigma: float) -> float:
    within = loop_mean_kernel(x, x, sigma) * loop_mean_kernel(y, y, sigma)
    return math.log(within / loop_mean_kernel(x, y, sigma) ** 2)


@given(x=sets, y=sets, sigma=SIGMAS)
def test_equals_a_double_loop_over_all_pairs(x: Tensor, y: Tensor, sigma: float) -> None:
    found = float(cs_divergence(x, y, sigma=sigma))

    assert found == pytest.approx(loop_divergence(x, y, sigma), rel=1e-9, abs=1e-9)


def test_float32_at_training_size_equals_the_double_loop_formula() -> None:
    x, y = (torch.nn.functional.normalize(rows(300, 64, s, 0.1 * s), dim=1) for s in (1, 2))
    exact = float(cs_divergence(x, y, sigma=0.5))

    assert float(cs_divergence(x.float(), y.float(), sigma=0.5)) == pytest.approx(exact, abs=1e-5)


@given(x=sets, y=sets, sigma=SIGMAS)
def test_is_not_negative(x: Tensor, y: Tensor, sigma: float) -> None:
    assert float(cs_divergence(x, y, sigma=sigma)) >= -1e-9


@given(x=sets, sigma=SIGMAS)
def test_is_zero_on_itself(x: Tensor, sigma: float) -> None:
    assert float(cs_divergence(x, x.clone(), sigma=sigma)) == pytest.approx(0, abs=1e-9)


@given(x=sets, y=sets, sigma=SIGMAS)
def test_is_symmetric(x: Tensor, y: Tensor, sigma: float) -> None:
    there, back = cs_divergence(x, y, sigma=sigma), cs_divergence(y, x, sigma=sigma)

    assert float(there) == pytest.approx(float(back), abs=1e-9)


@given(x=sets, y=sets, sigma=SIGMAS, seed=st.integers(0, 99), times=st.integers(2, 4))
def test_order_and_repetition_of_rows_do_not_matter(
    x: Tensor, y: Tensor, sigma: float, seed: int, times: int
) -> None:
    expected = float(cs_divergence(x, y, sigma=sigma))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))

    assert float(cs_divergence(x[order], y, sigma=sigma)) == pytest.approx(expected, abs=1e-9)
    repeated = cs_divergence(x, y.repeat(times, 1), sigma=sigma)
    assert float(repeated) == pytest.approx(expected, abs=1e-9)


@given(x=sets, y=sets, sigma=SIGMAS, scale=st.floats(0.5, 3), shift=st.floats(-2, 2))
def test_a_common_rotation_shift_and_scale_of_everything_does_not_matter(
    x: Tensor, y: Tensor, sigma: float, scale: float, shift: float
) -> None:
    rotation, _ = torch.linalg.qr(rows(3, 3, seed=5))
    moved = [scale * (side @ rotation) + shift for side in (x, y)]
    expected = float(cs_divergence(x, y, sigma=sigma))

    found = float(cs_divergence(moved[0], moved[1], sigma=scale * sigma))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(distance=st.floats(0.1, 5), sigma=SIGMAS)
def test_two_points_are_squared_distance_over_squared_bandwidth(
    distance: float, sigma: float
) -> None:
    x, y = torch.zeros(1, 1).double(), torch.full((1, 1), distance).double()

    assert float(cs_divergence(x, y, sigma=sigma)) == pytest.approx((distance / sigma) ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_in_value_and_gradient_where_every_cross_kernel_underflows(
    dtype: torch.dtype,
) -> None:
    x = rows(5, 3, 0).to(dtype).requires_grad_()
    y = (rows(4, 3, 1) + 1000).to(dtype).requires_grad_()
    value = cs_divergence(x, y, sigma=1.0)
    value.backward()  # type: ignore[no-untyped-call]

    assert float(value.detach()) > 1e5
    assert x.grad is not None
    assert y.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(y.grad).all()
    assert float(x.grad.norm()) > 0


def test_gradient_is_right() -> None:
    x, y = rows(5, 3, 0).requires_grad_(), rows(4, 3, 1, 0.5).requires_grad_()

    assert torch.autograd.gradcheck(lambda a, b: cs_divergence(a, b, sigma=0.7), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: mmd(a, b, sigma=0.7), (x, y))


def test_is_minus_twice_the_log_cosine_of_random_feature_means() -> None:
    x, y, sigma = rows(40, 3, 0), rows(60, 3, 1, 0.7), 1.0
    frequencies = rows(3, 200_000, 2) / sigma

    def mean_feature(side: Tensor) -> Tensor:
        phase = side @ frequencies
        return torch.cat([phase.cos(), phase.sin()], 1).mean(0)

    cosine = torch.nn.functional.cosine_similarity(mean_feature(x), mean_feature(y), dim=0)
    expected = -2 * math.log(float(cosine))

    assert float(cs_divergence(x, y, sigma=sigma)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_approaches_the_closed_form_of_two_smoothed_gaussians(shift: float) -> None:
    """N(m, S) smoothed on both sides of an inner product: N(m1; m2, S1 + S2 + sigma^2)."""
    deviations, sigma, n = (0.5, 1.0), 1.0, 1_500
    # Quantiles stand for a sample that has no luck in it.
    standard = torch.from_numpy(ndtri((np.arange(n) + 0.5) / n)).reshape(-1, 1)
    x, y = deviations[0] * standard, deviations[1] * standard + shift

    def log_inner(i: int, j: int, gap: float) -> float:
        variance = deviations[i] ** 2 + deviations[j] ** 2 + sigma**2
        return -0.5 * math.log(2 * math.pi * variance) - gap**2 / (2 * variance)

    expected = log_inner(0, 0, 0) + log_inner(1, 1, 0) - 2 * log_inner(0, 1, shift)

    assert float(cs_divergence(x, y, sigma=sigma)) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("x", "y"), [((2, 3), (2, 4)), ((0, 3), (2, 3)), ((2, 3), (0, 3)), ((3,), (2, 3))]
)
def test_sets_that_do_not_fit_are_refused_by_shape(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"got shapes"):
        cs_divergence(torch.zeros(x), torch.zeros(y), sigma=1.0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_a_bandwidth_that_is_not_positive_and_finite_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be positive"):
        cs_divergence(torch.zeros(1, 1), torch.zeros(1, 1), sigma=sigma)


def test_mmd_equals_its_formula() -> None:
    x, y = rows(7, 3, 0), rows(5, 3, 1, 0.4)
    expected = (
        loop_mean_kernel(x, x, 0.8) + loop_mean_kernel(y, y, 0.8) - 2 * loop_mean_kernel(x, y, 0.8)
    )

    assert float(mmd(x, y, sigma=0.8)) == pytest.approx(expected, abs=1e-12)


def test_several_bandwidths_give_the_mean_over_them() -> None:
    x, y, sigmas = rows(7, 3, 0), rows(5, 3, 1, 0.4), (0.3, 1.0, 2.5)
    expected = [loop_divergence(x, y, sigma) for sigma in sigmas]

    assert float(cs_divergence(x, y, sigma=sigmas)) == pytest.approx(sum(expected) / 3)
    means = [float(mmd(x, y, sigma=sigma)) for sigma in sigmas]
    assert float(mmd(x, y, sigma=sigmas)) == pytest.approx(sum(means) / 3)


@pytest.mark.parametrize(("sigma", "why"), [((), "at least one"), ((1.0, 0.0), "positive")])
def test_bandwidths_that_make_no_sense_are_refused(sigma: tuple[float, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mmd(torch.zeros(1, 1), torch.zeros(1, 1), sigma=sigma)


def test_cross_and_intra_terms_are_their_formulas_and_sum_to_the_divergence() -> None:
    x, y = rows(7, 3, 0), rows(5, 3, 1, 0.4)
    terms = cs_terms(x, y, sigma=0.8)
    intra = loop_mean_kernel(x, x, 0.8) * loop_mean_kernel(y, y, 0.8)

    assert float(terms.cross) == pytest.approx(-2 * math.log(loop_mean_kernel(x, y, 0.8)))
    assert float(terms.intra) == pytest.approx(math.log(intra))
    assert float(sum(terms)) == float(cs_divergence(x, y, sigma=0.8))


def test_median_distance_is_that_of_all_pairs_of_the_union() -> None:
    x, y = rows(13, 4, 0), rows(8, 4, 1)
    union = torch.cat([x, y]).numpy()
    distances = sorted(
        float(np.linalg.norm(union[i] - union[j])) for i in range(21) for j in range(i)
    )

    # torch takes the lower of two middle values.
    assert float(median_distance(x, y)) == pytest.approx(distances[(len(distances) - 1) // 2])


def test_median_distance_of_a_large_union_is_close_from_a_sample() -> None:
    x, y = rows(3_000, 4, 0), rows(2_000, 4, 1, 1.0)

    expected = float(median_distance(x, y, max_rows=9_999))
    assert float(median_distance(x, y)) == pytest.approx(expected, rel=0.03)


def test_diagonal_share_runs_from_one_over_n_to_one() -> None:
    x = rows(50, 8, 0)

    assert diagonal_share(x, sigma=1e3) == pytest.approx(1 / 50, rel=1e-3)
    assert diagonal_share(x, sigma=1e-2) == pytest.approx(1)


def test_log_mean_kernel_of_a_point_far_away_is_its_exponent() -> None:
    x, y = torch.zeros(1, 1), torch.full((1, 1), 100.0)

    assert float(log_mean_kernels(x, y, sigma=1.0)) == -5_000
    assert float(tiled_log_mean_kernels(x, y, sigma=1.0)) == -5_000


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_a_mean_kernel_in_tiles_equals_the_double_loop(tile: int) -> None:
    x, y = rows(11, 3, 0), rows(6, 3, 1, 0.4)
    found = tiled_log_mean_kernels(x, y, sigma=(0.8, 0.1), tile=tile)
    expected = [math.log(loop_mean_kernel(x, y, sigma)) for sigma in (0.8, 0.1)]

    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_the_diagonals_share_of_a_large_set_is_guessed_from_some_rows(sigma: float) -> None:
    x = torch.nn.functional.normalize(rows(1_200, 16, 0), dim=1)
    exact = float(diagonal_share(x, sigma=sigma))

    assert float(diagonal_share(x, sigma=sigma, max_rows=300)) == pytest.approx(exact, rel=0.1)
