import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from csalign.objective.divergences import gaussian_jeffreys


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def fits(x: Tensor, y: Tensor, shrinkage: float) -> list[tuple[np.ndarray, np.ndarray]]:
    sides = [side.numpy() for side in (x, y)]
    spreads = [np.cov(side, rowvar=False, bias=True).reshape(side.shape[1], -1) for side in sides]
    width = sides[0].shape[1]
    common = shrinkage * (np.trace(spreads[0]) + np.trace(spreads[1])) / (2 * width) + 1e-6
    return [
        (side.mean(0), (1 - shrinkage) * spread + common * np.eye(width))
        for side, spread in zip(sides, spreads, strict=True)
    ]


def textbook_kl(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray]) -> float:
    inverse, shift = np.linalg.inv(q[1]), q[0] - p[0]
    logs = np.linalg.slogdet(q[1])[1] - np.linalg.slogdet(p[1])[1]
    return float(np.trace(inverse @ p[1]) + shift @ inverse @ shift - len(shift) + logs) / 2


sets = st.builds(rows, st.integers(2, 12), st.just(4), st.integers(0, 999), st.floats(-1, 1))


@settings(max_examples=25)
@given(x=sets, y=sets, shrinkage=st.sampled_from([0.05, 0.5, 1.0]))
def test_equals_the_textbook_sum_of_both_kls_of_the_shrunk_fits(
    x: Tensor, y: Tensor, shrinkage: float
) -> None:
    p, q = fits(x, y, shrinkage)
    expected = textbook_kl(p, q) + textbook_kl(q, p)

    found = float(gaussian_jeffreys(x, y, shrinkage=shrinkage))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_one_column_equals_the_integral_of_the_two_densities() -> None:
    x, y = rows(50, 1, 0), 0.7 * rows(40, 1, 1) + 0.5
    p, q = (norm(mean[0], np.sqrt(c[0, 0])) for mean, c in fits(x, y, 0.1))

    def integrand(t: float) -> float:
        return float((p.pdf(t) - q.pdf(t)) * (p.logpdf(t) - q.logpdf(t)))

    assert float(gaussian_jeffreys(x, y)) == pytest.approx(quad(integrand, -12, 12)[0], rel=1e-5)


def test_a_large_sample_tends_to_the_closed_form_of_diagonal_gaussians() -> None:
    deviations, shift = np.array([0.5, 1.0, 2.0]), np.array([0.5, -1.0, 0.0])
    x = rows(200_000, 3, 0)
    y = rows(200_000, 3, 1) * torch.from_numpy(deviations) + torch.from_numpy(shift)
    ratio = deviations**2
    expected = 0.5 * np.sum(1 / ratio + ratio - 2 + shift**2 * (1 + 1 / ratio))

    assert float(gaussian_jeffreys(x, y, shrinkage=1e-6)) == pytest.approx(expected, rel=0.02)


@settings(max_examples=25)
@given(x=sets, y=sets, seed=st.integers(0, 99))
def test_laws_of_a_divergence(x: Tensor, y: Tensor, seed: int) -> None:
    value = float(gaussian_jeffreys(x, y))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rotation, _ = torch.linalg.qr(rows(4, 4, seed))

    assert value >= 0
    assert float(gaussian_jeffreys(x, x.clone())) == 0
    assert float(gaussian_jeffreys(y, x)) == pytest.approx(value)
    assert float(gaussian_jeffreys(x[order], y.repeat(3, 1))) == pytest.approx(value)
    assert float(gaussian_jeffreys(x @ rotation, y @ rotation)) == pytest.approx(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_rows_than_columns_and_far_sets_are_finite_in_value_and_gradient(
    dtype: torch.dtype,
) -> None:
    x = rows(3, 20, 0).to(dtype).requires_grad_()
    y = (rows(5, 20, 1) + 1000).to(dtype).requires_grad_()
    value = gaussian_jeffreys(x, y)
    grads = torch.autograd.grad(value, (x, y))

    assert float(value.detach()) > 1e5
    assert all(bool(torch.isfinite(grad).all()) and float(grad.norm()) > 0 for grad in grads)


def test_two_collapsed_sets_are_finite() -> None:
    x, y = torch.zeros(4, 3), torch.ones(4, 3)

    assert 0 < float(gaussian_jeffreys(x, y)) < float("inf")


def test_gradient_is_right() -> None:
    x, y = rows(3, 4, 0).requires_grad_(), rows(6, 4, 1, 0.5).requires_grad_()

    assert torch.autograd.gradcheck(gaussian_jeffreys, (x, y))


def test_a_value_that_is_not_finite_gives_nan_and_no_exception() -> None:
    x = rows(4, 3, 0)
    x[0, 0] = torch.nan

    assert torch.isnan(gaussian_jeffreys(x, rows(4, 3, 1)))


@pytest.mark.parametrize("shrinkage", [0.0, -0.1, 1.1])
def test_shrinkage_out_of_range_is_refused(shrinkage: float) -> None:
    with pytest.raises(ValueError, match="shrinkage must be in"):
        gaussian_jeffreys(rows(4, 3, 0), rows(4, 3, 1), shrinkage=shrinkage)


def test_a_covariance_that_rounds_to_singular_gives_nan_and_not_a_wrong_number() -> None:
    x, y = 1e6 * rows(3, 30, 0).float(), 1e6 * rows(3, 30, 1).float()

    assert torch.isnan(gaussian_jeffreys(x, y, shrinkage=1e-12))
    assert torch.isfinite(gaussian_jeffreys(x, y))
