import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.objective.divergence import cs_divergence
from csalign.objective.running import RunningDivergence


def unit(n: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, 12, generator=generator) + shift, dim=1).double()


def steps(count: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of some steps, of different numbers."""
    return [(unit(20 + i, i), unit(30, 100 + i, 0.4)) for i in range(count)]


def test_it_is_the_divergence_of_all_rows_of_the_last_steps() -> None:
    running = RunningDivergence(steps=3, count=4_096)
    found = [float(running(x, y, sigma=0.8)) for x, y in steps(6)]
    for i, value in enumerate(found):
        sides = zip(*steps(6)[max(0, i - 2) : i + 1], strict=True)
        x, y = (torch.cat(side) for side in sides)

        assert value == pytest.approx(float(cs_divergence(x, y, sigma=0.8)), rel=0.08)


def test_its_gradient_is_that_of_the_divergence_of_all_rows() -> None:
    running = RunningDivergence(steps=2, count=4_096)
    (before_x, before_y), (x, y) = steps(2)
    running(before_x, before_y, sigma=0.8)
    found, exact = (x.clone().requires_grad_() for _ in range(2))
    running(found, y, sigma=0.8).backward()  # type: ignore[no-untyped-call]
    whole = cs_divergence(torch.cat([before_x, exact]), torch.cat([before_y, y]), sigma=0.8)
    whole.backward()  # type: ignore[no-untyped-call]

    assert found.grad is not None
    assert exact.grad is not None
    assert float(torch.cosine_similarity(found.grad.flatten(), exact.grad.flatten(), 0)) > 0.97
    assert float(found.grad.norm()) == pytest.approx(float(exact.grad.norm()), rel=0.1)


def test_another_bandwidth_is_that_of_the_earlier_rows_too() -> None:
    running = RunningDivergence(steps=2, count=4_096)
    (x, y), (further_x, further_y) = steps(2)
    running(x, y, sigma=2.0)
    found = float(running(further_x, further_y, sigma=(0.7, 1.1)))
    exact = cs_divergence(torch.cat([x, further_x]), torch.cat([y, further_y]), sigma=(0.7, 1.1))

    assert found == pytest.approx(float(exact), rel=0.08)


def test_the_seed_draws_the_frequencies() -> None:
    ((x, y),) = steps(1)
    first, same, other = (
        float(RunningDivergence(count=64, seed=seed)(x, y, sigma=0.8)) for seed in (0, 0, 1)
    )

    assert first == same != other
