"""The Hoelder divergence of several sets of rows."""

import math
from itertools import combinations
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.errors import ShapeError
from csalign.objective.divergences import cs_divergence, holder

SIGMAS = st.sampled_from([0.3, 1.0, 2.5])


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


sets = st.builds(rows, st.integers(1, 8), st.just(3), st.integers(0, 10_000), st.floats(-1, 1))
several = st.lists(sets, min_size=2, max_size=4)


def loop_divergence(sides: list[Tensor], sigma: float) -> float:
    count = len(sides)

    def density(point: list[float], side: Tensor) -> float:
        squares = [math.dist(point, row) ** 2 for row in side.tolist()]
        return sum(math.exp(-square / (2 * sigma**2)) for square in squares) / len(side)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    powers = [mean([density(z, own) ** (count - 1) for z in own.tolist()]) for own in sides]
    products = [
        mean(
            [
                math.prod(density(z, other) for other in sides if other is not own)
                for z in own.tolist()
            ]
        )
        for own in sides
    ]
    return -count * math.log(mean(products) / math.prod(powers) ** (1 / count))


@given(sides=several, sigma=SIGMAS)
def test_equals_loops_over_all_rows(sides: list[Tensor], sigma: float) -> None:
    found = float(holder(sides, sigma))

    assert found == pytest.approx(loop_divergence(sides, sigma), rel=1e-9, abs=1e-9)


@given(x=sets, y=sets, sigma=SIGMAS)
def test_of_two_sets_is_the_cauchy_schwarz_divergence(x: Tensor, y: Tensor, sigma: float) -> None:
    expected = float(cs_divergence(x, y, sigma=sigma))

    assert float(holder((x, y), sigma)) == pytest.approx(expected, abs=1e-9)


@given(x=sets, sigma=SIGMAS, count=st.integers(2, 5))
def test_is_zero_for_equal_sets(x: Tensor, sigma: float, count: int) -> None:
    assert float(holder([x.clone() for _ in range(count)], sigma)) == pytest.approx(0, abs=1e-9)


@given(sides=several, sigma=SIGMAS)
def test_is_not_negative_for_random_sets(sides: list[Tensor], sigma: float) -> None:
    assert float(holder(sides, sigma)) >= -1e-9


@given(sides=several, sigma=SIGMAS, seed=st.randoms())
def test_the_order_of_the_sets_does_not_matter(
    sides: list[Tensor], sigma: float, seed: Random
) -> None:
    other = seed.sample(sides, len(sides))

    assert float(holder(other, sigma)) == pytest.approx(float(holder(sides, sigma)), abs=1e-9)


def test_grows_as_one_set_leaves_the_others() -> None:
    x, y, z = (rows(20, 3, seed) for seed in range(3))
    values = [float(holder((x, y, z + shift), 1.0)) for shift in (0.0, 0.5, 1.0, 2.0)]

    assert values == sorted(values)
    assert values[-1] > values[0] + 1


@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_wide_kernels_is_the_sum_over_pairs(count: int) -> None:
    sides = [rows(10, 3, seed, shift=seed) for seed in range(count)]
    pairs = sum(float(cs_divergence(x, y, sigma=100.0)) for x, y in combinations(sides, 2))

    assert float(holder(sides, 100.0)) == pytest.approx(pairs, rel=1e-2)


def test_gradient_is_right() -> None:
    sides = [rows(4 + seed, 3, seed, 0.3 * seed).requires_grad_() for seed in range(3)]

    assert torch.autograd.gradcheck(lambda *own: holder(own, (0.7, 1.5)), sides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_in_value_and_gradient_where_kernels_underflow(dtype: torch.dtype) -> None:
    sides = [(rows(5, 3, seed) + 1000 * seed).to(dtype).requires_grad_() for seed in range(3)]
    value = holder(sides, 1.0)
    grads = torch.autograd.grad(value, sides)

    assert float(value.detach()) > 1e5
    assert all(torch.isfinite(grad).all() and float(grad.norm()) > 0 for grad in grads)


def test_float32_at_training_size_is_close() -> None:
    sides = [normalize(rows(200, 64, seed, 0.1 * seed), dim=1) for seed in range(3)]
    exact = float(holder(sides, 0.5))

    assert float(holder([side.float() for side in sides], 0.5)) == pytest.approx(exact, abs=1e-4)


def test_sets_that_do_not_fit_are_refused() -> None:
    x = rows(4, 3, 0)

    with pytest.raises(ShapeError, match="of one width"):
        holder((x, x, rows(4, 2, 1)), 1.0)
    with pytest.raises(ShapeError, match="of one width"):
        holder((x, x[:0]), 1.0)
    with pytest.raises(ValueError, match="at least 2 sets, got 1"):
        holder((x,), 1.0)
    with pytest.raises(ValueError, match="sigma must be positive"):
        holder((x, x), 0.0)
