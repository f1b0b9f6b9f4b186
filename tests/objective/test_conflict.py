import pytest
import torch
from torch import Tensor

from csalign.evaluation.diagnose import cosine, gradient
from csalign.objective.divergences import cs_divergence, cs_terms


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def test_the_gradient_of_a_linear_term_is_its_coefficients() -> None:
    x, y, a, b = rows(4, 3, 0), rows(5, 3, 1), rows(4, 3, 2), rows(5, 3, 3)
    found = gradient(lambda x, y: (a * x).sum() + (b * y).sum(), x, y)

    assert torch.equal(found, torch.cat([a, b]))


def test_a_side_that_a_term_does_not_see_has_no_gradient() -> None:
    found = gradient(lambda x, y: x.square().sum(), rows(6, 3, 0), rows(5, 3, 1))

    assert found[:6].abs().min() > 0
    assert not found[6:].any()


def test_cosines_tell_agreement_from_opposition() -> None:
    x, y = rows(6, 3, 0), rows(5, 3, 1)
    one = gradient(lambda x, y: cs_divergence(x, y, sigma=1.0), x, y)

    assert cosine(one, one) == pytest.approx(1)
    assert cosine(one, -3 * one) == pytest.approx(-1)
    assert cosine(one, torch.zeros_like(one)) == 0
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert cosine(a, b) == pytest.approx(0.6)


def test_distance_of_pairs_and_the_cross_term_agree_on_pairs_that_lie_together() -> None:
    x = rows(8, 3, 0)
    y = x + 0.5  # each row's partner, and its set, lie the same way
    pairs = gradient(lambda x, y: (x - y).square().sum(), x, y)
    cross = gradient(lambda x, y: cs_terms(x, y, sigma=5.0).cross, x, y)

    assert cosine(pairs, cross) > 0.3


def test_embeddings_are_left_alone_also_where_gradients_are_off() -> None:
    x, y = rows(4, 3, 0).requires_grad_(), rows(4, 3, 1)
    with torch.no_grad():
        found = gradient(lambda x, y: (x * y).sum(), x, y)

    assert torch.equal(found[:4], y)
    assert x.grad is None
