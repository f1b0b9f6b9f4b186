import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.errors import ShapeError
from csalign.objective.divergence import cs_divergence
from csalign.objective.features import RandomFeatures, cs_of_means, mean_kernels
from csalign.objective.kernels import log_mean_kernel


def unit(n: int, seed: int, shift: float = 0.0, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, width, generator=generator) + shift, dim=1)


def test_mean_kernels_are_those_of_all_pairs() -> None:
    x, y = unit(200, 0).double(), unit(300, 1, 0.5).double()
    features = RandomFeatures(16, count=16_384, dtype=torch.float64)
    found = mean_kernels(features.mean(x, sigma=0.7), features.mean(y, sigma=0.7))

    for (a, b), mean in zip(((x, x), (y, y), (x, y)), found, strict=True):
        assert float(mean.log()) == pytest.approx(float(log_mean_kernel(a, b, sigma=0.7)), rel=0.05)


def test_a_row_with_itself_is_one_exactly() -> None:
    mean = RandomFeatures(16, count=50, dtype=torch.float64).mean(unit(1, 0).double(), sigma=0.3)

    assert float(mean_kernels(mean, mean).xx) == pytest.approx(1)


def test_lengths_and_directions_are_those_of_independent_frequencies() -> None:
    frequencies = RandomFeatures(8, count=40_000, dtype=torch.float64).frequencies

    assert torch.allclose(torch.cov(frequencies.T), torch.eye(8).double(), atol=0.03)
    assert float(frequencies.pow(4).mean()) == pytest.approx(3, rel=0.05)  # a Gaussian's
    assert float(frequencies.norm(dim=1).var()) == pytest.approx(0.484, rel=0.05)  # chi's


def test_blocks_are_orthogonal_and_less_noisy_than_independent_frequencies() -> None:
    x, y = unit(100, 0).double(), unit(100, 1, 0.5).double()
    exact = float(cs_divergence(x, y, sigma=1.0))
    orthogonal, independent = 0.0, 0.0
    for seed in range(20):
        features = RandomFeatures(16, count=64, seed=seed, dtype=torch.float64)
        block = features.frequencies[:16]
        assert torch.allclose(block @ block.T, (block @ block.T).diagonal().diag(), atol=1e-9)
        for is_orthogonal in (True, False):
            if not is_orthogonal:
                generator = torch.Generator().manual_seed(seed)
                features.frequencies = torch.randn(64, 16, generator=generator).double()
            means = features.mean(x, sigma=1.0), features.mean(y, sigma=1.0)
            error = (float(cs_of_means(*means)) - exact) ** 2
            orthogonal += error * is_orthogonal
            independent += error * (not is_orthogonal)

    assert orthogonal < independent / 4


def test_far_sets_have_a_finite_value_and_a_gradient_that_pulls() -> None:
    x, y = unit(50, 0, 9.0).double().requires_grad_(), -unit(50, 1, 9.0).double()
    features = RandomFeatures(16, count=64, dtype=torch.float64)

    def apart(x: Tensor) -> Tensor:
        return cs_of_means(features.mean(x, sigma=1.0), features.mean(y, sigma=1.0))

    value = apart(x)
    value.backward()  # type: ignore[no-untyped-call]

    assert 4 < value.item() < 20
    assert x.grad is not None
    assert float(apart(x.detach() - 0.01 * x.grad / x.grad.norm())) < value.item()
    assert torch.autograd.gradcheck(apart, (x[:3].detach().requires_grad_(),))


def test_the_same_seed_gives_the_same_frequencies() -> None:
    first, same, other = (RandomFeatures(5, count=12, seed=seed).frequencies for seed in (1, 1, 2))

    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == (12, 5)


@pytest.mark.parametrize("shape", [(0, 5), (4, 6), (5,)])
def test_rows_that_do_not_fit_are_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="width 5"):
        RandomFeatures(5).mean(torch.zeros(shape), sigma=1.0)
