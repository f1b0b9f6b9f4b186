import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.errors import ShapeError
from csalign.metrics.landmarks import MeanKernels, estimate_mean_kernels
from csalign.objective.divergences import cs_divergence, mmd
from csalign.objective.kernels import log_mean_kernels


def clusters(n: int, m: int, width: int = 16, apart: float = 0.5) -> tuple[Tensor, Tensor]:
    """Unit rows around 20 centres, the two sets moved apart."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(20, width, generator=generator)
    noise = torch.randn(n + m, width, generator=generator)
    rows = centres[torch.randint(20, (n + m,), generator=generator)] + 0.4 * noise
    rows[:n, 0] += apart * width**0.5
    x, y = torch.split(normalize(rows, dim=1), [n, m])
    return x, y


def measured(
    x: Tensor, y: Tensor, sigma: float = 0.5, seed: int = 0, landmarks: int = 128
) -> MeanKernels:
    (found,) = estimate_mean_kernels(
        x, y, sigmas=(sigma,), seed=seed, base=landmarks, witnesses=landmarks
    )
    return found


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0])
def test_estimates_scatter_around_the_truth_as_their_errors_say(sigma: float) -> None:
    x, y = clusters(1_500, 2_500)
    seeds = 40
    means = [measured(x, y, sigma, seed) for seed in range(seeds)]
    found = [
        {"cs_divergence": own.cs_divergence(), "mmd": own.mmd(), **own.uniformity()}
        for own in means
    ]
    truths = {
        "cs_divergence": float(cs_divergence(x.double(), y.double(), sigma=sigma)),
        "mmd": float(mmd(x.double(), y.double(), sigma=sigma)),
        "cross": float(log_mean_kernels(x.double(), y.double(), sigma=sigma)),
    }
    for name, truth in truths.items():
        estimates = [values[name] for values in found]
        scores = [(estimate.value - truth) / estimate.error for estimate in estimates]

        assert 0.6 < (sum(score**2 for score in scores) / seeds) ** 0.5 < 1.5
        assert abs(sum(scores) / seeds) < 0.6
        assert all(abs(estimate.value / truth - 1) < 0.15 for estimate in estimates)


def test_landmarks_that_are_all_rows_make_it_exact() -> None:
    x, y = clusters(60, 90)
    means = measured(x, y)
    exact = [float(log_mean_kernels(a.double(), b.double(), sigma=0.5)) for a, b in _pairs(x, y)]

    assert [float(own[0]) for own in means[:3]] == pytest.approx(exact, abs=1e-5)
    assert means.cs_divergence().error == 0


def _pairs(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x, x), (y, y), (x, y)]


def test_a_single_row_meets_a_large_set() -> None:
    x, y = clusters(1, 2_000)
    found = measured(x, y)
    truth = float(cs_divergence(x.double(), y.double(), sigma=0.5))

    assert float(found.xx[0]) == pytest.approx(0, abs=1e-5)
    assert found.cs_divergence().value == pytest.approx(truth, abs=5 * found.cs_divergence().error)
    assert found.uniformity()["image"] == (0, 0)


def test_several_bandwidths_are_those_one_by_one_and_the_seed_matters() -> None:
    x, y = clusters(900, 1_100)
    both = estimate_mean_kernels(x, y, sigmas=(0.5, 1.0), seed=3, base=64, witnesses=64)
    for sigma, means in zip((0.5, 1.0), both, strict=True):
        one, other = means.cs_divergence(), measured(x, y, sigma, 3, 64).cs_divergence()

        assert one.value == pytest.approx(other.value, abs=1e-6)
        assert one.error == pytest.approx(other.error, rel=1e-3)
        assert one.value != measured(x, y, sigma, 4, 64).cs_divergence().value


def test_a_set_is_as_far_from_itself_as_the_error_says() -> None:
    x, _ = clusters(2_000, 1)
    found = measured(x, x.clone())

    assert 0 <= found.cs_divergence().value < 4 * found.cs_divergence().error
    assert 0 <= found.mmd().value < 4 * found.mmd().error


def test_kernel_means_that_underflow_give_no_number() -> None:
    x, _ = clusters(1_000, 1, apart=30.0)
    found = measured(x, -x, sigma=0.05).cs_divergence()

    assert math.isnan(found.value)
    assert math.isnan(found.error)


def test_half_precision_rows_are_taken_as_they_are() -> None:
    x, y = clusters(800, 800)
    half, whole = (measured(*sides).cs_divergence() for sides in ((x.half(), y.half()), (x, y)))

    assert half.value == pytest.approx(whole.value, rel=1e-2)


def test_sets_that_do_not_fit_are_refused() -> None:
    x, y = clusters(10, 10)

    with pytest.raises(ShapeError, match="rows of one width"):
        estimate_mean_kernels(x[:, :3], y, sigmas=(0.5,), seed=0)
    with pytest.raises(ValueError, match="sigma must be positive"):
        estimate_mean_kernels(x, y, sigmas=(0.0,), seed=0)
