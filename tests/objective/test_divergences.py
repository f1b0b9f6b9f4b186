import pytest
import torch
from torch import Tensor

from csalign.core.enums import DivergenceName
from csalign.core.errors import ShapeError
from csalign.objective.divergences import (
    cs_divergence,
    divergence,
    gaussian_jeffreys,
    mmd,
    sinkhorn_divergence,
)

ON_SETS = [name for name in DivergenceName if name is not DivergenceName.PAIRS_MSE]


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def test_each_name_is_its_function() -> None:
    x, y = rows(6, 3, 0), rows(6, 3, 1, 0.5)
    expected = {
        DivergenceName.CS: cs_divergence(x, y, sigma=0.8),
        DivergenceName.HOLDER: cs_divergence(x, y, sigma=0.8),
        DivergenceName.MMD: mmd(x, y, sigma=0.8),
        DivergenceName.GAUSSIAN_KL: gaussian_jeffreys(x, y),
        DivergenceName.SINKHORN: sinkhorn_divergence(x, y, sigma=0.8, diameter=2.0),
        DivergenceName.PAIRS_MSE: ((x - y) ** 2).sum() / 6,
        DivergenceName.NONE: torch.tensor(0.0, dtype=torch.float64),
    }

    assert {name: float(divergence(name)(x, y, sigma=0.8)) for name in DivergenceName} == {
        name: pytest.approx(float(value)) for name, value in expected.items()
    }


@pytest.mark.parametrize("name", ON_SETS)
def test_sets_of_different_sizes_have_a_gradient_on_both_sides(name: DivergenceName) -> None:
    x, y = rows(4, 3, 0).requires_grad_(), rows(7, 3, 1, 0.5).requires_grad_()
    grads = torch.autograd.grad(divergence(name)(x, y, sigma=0.8), (x, y))

    assert all((float(grad.norm()) > 0) == (name != DivergenceName.NONE) for grad in grads)


@pytest.mark.parametrize("name", DivergenceName)
def test_whether_sigma_matters_is_told(name: DivergenceName) -> None:
    x, y = rows(6, 3, 0), rows(6, 3, 1, 0.5)
    measure = divergence(name)
    differs = float(measure(x, y, sigma=0.5)) != float(measure(x, y, sigma=2.0))

    assert differs == measure.has_bandwidth


@pytest.mark.parametrize("name", DivergenceName)
def test_too_few_rows_are_refused_and_just_enough_are_not(name: DivergenceName) -> None:
    measure = divergence(name)
    enough = rows(measure.minimum, 3, 0), rows(measure.minimum, 3, 1)

    assert torch.isfinite(measure(*enough, sigma=1.0))
    with pytest.raises(ShapeError, match=r"two sets|matched|2 rows per side, got 1 and 2"):
        measure(enough[0][1:], enough[1], sigma=1.0)


@pytest.mark.parametrize("name", DivergenceName)
def test_sets_of_different_widths_are_refused(name: DivergenceName) -> None:
    with pytest.raises(ShapeError, match="two sets of rows of one width"):
        divergence(name)(rows(4, 3, 0), rows(4, 2, 1), sigma=1.0)


def test_pairs_mse_is_of_matched_rows_alone() -> None:
    x, y = rows(6, 3, 0), rows(9, 3, 1)
    measure = divergence(DivergenceName.PAIRS_MSE)
    expected = sum(float((x[i] - y[i]).square().sum()) for i in range(6)) / 6

    assert float(measure(x, y[:6], sigma=1.0)) == pytest.approx(expected)
    with pytest.raises(ShapeError, match="matched rows are needed, got 6 and 9"):
        measure(x, y, sigma=1.0)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'wasserstein' is not a valid DivergenceName"):
        divergence("wasserstein")  # type: ignore[arg-type]
