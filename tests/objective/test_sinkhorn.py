import math

import numpy as np
import ot
import pytest
import torch
from geomloss import SamplesLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from csalign.objective.divergences import sinkhorn_divergence


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def unit(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return normalize(rows(n, d, seed, shift), dim=1)


sets = st.builds(rows, st.integers(1, 8), st.just(3), st.integers(0, 999), st.floats(-1, 1))


def loop_transport(x: Tensor, y: Tensor, blur: float) -> float:
    epsilon = blur**2
    cost = [
        [sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 2 for b in y.tolist()]
        for a in x.tolist()
    ]
    n, m = len(x), len(y)
    f, g = [0.0] * n, [0.0] * m

    def softmin(values: list[float]) -> float:
        smallest = min(values)
        total = sum(math.exp((smallest - value) / epsilon) for value in values)
        return smallest - epsilon * math.log(total / len(values))

    for _ in range(500):
        f = [softmin([cost[i][j] - g[j] for j in range(m)]) for i in range(n)]
        g = [softmin([cost[i][j] - f[i] for i in range(n)]) for j in range(m)]
    return sum(f) / n + sum(g) / m


@pytest.mark.parametrize("sizes", [(5, 5), (3, 6), (1, 4)])
def test_equals_plain_sinkhorn_iterations_in_a_loop(sizes: tuple[int, int]) -> None:
    x, y = rows(sizes[0], 3, 0), rows(sizes[1], 3, 1, 0.4)
    expected = (
        loop_transport(x, y, 0.8) - (loop_transport(x, x, 0.8) + loop_transport(y, y, 0.8)) / 2
    )

    found = float(sinkhorn_divergence(x, y, sigma=0.8, iterations=500))
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("blur", [0.2, 0.5])
def test_equals_geomloss_in_value_and_gradient(blur: float) -> None:
    x, y = unit(30, 6, 0, 0.3).requires_grad_(), unit(25, 6, 1).requires_grad_()
    theirs = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.999, backend="tensorized")(x, y)
    ours = sinkhorn_divergence(x, y, sigma=blur, iterations=500)

    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-3)
    # Theirs is on the way to the limit: the distance falls with 1 - scaling.
    for own, other in zip(
        torch.autograd.grad(ours, (x, y)), torch.autograd.grad(theirs, (x, y)), strict=True
    ):
        assert float((own - other).norm()) < 0.01 * float(other.norm())


def pot_transport(x: np.ndarray, y: np.ndarray, epsilon: float) -> float:
    cost = ot.dist(x, y) / 2
    weights = ot.unif(len(x)), ot.unif(len(y))
    plan = ot.sinkhorn(*weights, cost, epsilon, method="sinkhorn_log", stopThr=1e-12)
    entropy = np.sum(plan * np.log(plan / np.outer(*weights)))
    return float(np.sum(plan * cost) + epsilon * entropy)


def test_equals_pots_transport_plan() -> None:
    x, y, blur = unit(20, 6, 0, 0.3).numpy(), unit(15, 6, 1).numpy(), 0.5
    cross, own_x, own_y = (pot_transport(a, b, blur**2) for a, b in ((x, y), (x, x), (y, y)))

    found = sinkhorn_divergence(torch.from_numpy(x), torch.from_numpy(y), sigma=blur, iterations=99)
    assert float(found) == pytest.approx(cross - (own_x + own_y) / 2, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_iterations_are_within_a_hundredth_on_unit_rows(dtype: torch.dtype) -> None:
    x, y = unit(100, 8, 0, 0.2), unit(80, 8, 1)
    exact = float(sinkhorn_divergence(x, y, sigma=0.2, iterations=2_000))

    found = sinkhorn_divergence(x.to(dtype), y.to(dtype), sigma=0.2)
    assert float(found) == pytest.approx(exact, rel=0.01)


def test_wide_blur_tends_to_half_the_squared_distance_of_the_means() -> None:
    x, y = rows(9, 3, 0), rows(7, 3, 1, 0.5)
    expected = float((x.mean(0) - y.mean(0)).square().sum()) / 2

    assert float(sinkhorn_divergence(x, y, sigma=100.0)) == pytest.approx(expected, rel=1e-3)


def test_narrow_blur_tends_to_half_the_squared_wasserstein_distance() -> None:
    x, y = rows(9, 3, 0), rows(9, 3, 1, 0.5)
    exact = ot.emd2(ot.unif(9), ot.unif(9), ot.dist(x.numpy(), y.numpy()) / 2)

    found = float(sinkhorn_divergence(x, y, sigma=0.1, iterations=2_000))
    assert found == pytest.approx(exact, rel=0.02)


@settings(max_examples=10)
@given(x=sets, y=sets, seed=st.integers(0, 99))
def test_laws_of_a_divergence(x: Tensor, y: Tensor, seed: int) -> None:
    def value(a: Tensor, b: Tensor) -> float:
        return float(sinkhorn_divergence(a, b, sigma=1.5, iterations=100))

    there = value(x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rotation, _ = torch.linalg.qr(rows(3, 3, seed))

    assert there >= -1e-9
    assert value(x, x.clone()) == pytest.approx(0, abs=1e-9)
    assert value(y, x) == pytest.approx(there, abs=1e-9)
    assert value(x[order], y.repeat(3, 1)) == pytest.approx(there, abs=1e-8)
    assert value(x @ rotation, y @ rotation) == pytest.approx(there, abs=1e-8)


def test_unconverged_sets_that_are_equal_are_at_zero_all_the_same() -> None:
    x = rows(9, 3, 0)

    assert float(sinkhorn_divergence(x, x.clone(), sigma=0.1)) == pytest.approx(0, abs=1e-12)


def test_gradient_is_right_once_converged() -> None:
    x, y = rows(3, 2, 0).requires_grad_(), rows(4, 2, 1, 0.4).requires_grad_()

    assert torch.autograd.gradcheck(
        lambda a, b: sinkhorn_divergence(a, b, sigma=1.5, iterations=100), (x, y), atol=1e-6
    )


def test_several_blurs_give_the_mean_over_them() -> None:
    x, y = rows(4, 3, 0), rows(5, 3, 1, 0.4)
    one, other = (float(sinkhorn_divergence(x, y, sigma=sigma)) for sigma in (0.5, 2.0))

    assert float(sinkhorn_divergence(x, y, sigma=(0.5, 2.0))) == pytest.approx((one + other) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_in_value_and_gradient_for_far_sets(dtype: torch.dtype) -> None:
    x = rows(5, 3, 0).to(dtype).requires_grad_()
    y = (rows(4, 3, 1) + 1000).to(dtype).requires_grad_()
    value = sinkhorn_divergence(x, y, sigma=1.0)
    grads = torch.autograd.grad(value, (x, y))

    assert float(value.detach()) == pytest.approx(3 * 1000**2 / 2, rel=0.01)
    assert all(bool(torch.isfinite(grad).all()) and float(grad.norm()) > 0 for grad in grads)


def test_a_value_that_is_not_finite_gives_nan_and_no_exception() -> None:
    x = rows(4, 3, 0)
    x[0, 0] = torch.nan

    assert torch.isnan(sinkhorn_divergence(x, rows(4, 3, 1), sigma=1.0))
