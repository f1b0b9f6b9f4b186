import pytest
import torch
from torch import Tensor

from csalign.objective.conflict import gradient_cosine
from csalign.objective.divergence import cs_divergence, cs_terms


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def test_linear_terms_have_the_cosines_of_their_coefficients() -> None:
    x, y = rows(4, 3, 0), rows(5, 3, 1)
    a, b = (rows(4, 3, 2), rows(5, 3, 3)), (rows(4, 3, 4), rows(5, 3, 5))

    def cosine(p: Tensor, q: Tensor) -> float:
        return float((p * q).sum() / (p.norm() * q.norm()))

    found = gradient_cosine(
        lambda x, y: (a[0] * x).sum() + (a[1] * y).sum(),
        lambda x, y: (b[0] * x).sum() + (b[1] * y).sum(),
        x,
        y,
    )
    assert found.x == pytest.approx(cosine(a[0], b[0]))
    assert found.y == pytest.approx(cosine(a[1], b[1]))
    assert found.overall == pytest.approx(cosine(torch.cat(a), torch.cat(b)))


def test_a_term_agrees_with_itself_and_opposes_its_negative() -> None:
    x, y = rows(6, 3, 0), rows(5, 3, 1)

    def term(x: Tensor, y: Tensor) -> Tensor:
        return cs_divergence(x, y, sigma=1.0)

    assert gradient_cosine(term, term, x, y) == pytest.approx((1, 1, 1))
    assert gradient_cosine(term, lambda x, y: -term(x, y), x, y) == pytest.approx((-1, -1, -1))


def test_a_side_that_a_term_does_not_see_has_cosine_zero() -> None:
    x, y = rows(6, 3, 0), rows(5, 3, 1)
    found = gradient_cosine(
        lambda x, y: x.square().sum(), lambda x, y: x.square().sum() + y.sum(), x, y
    )

    assert found.x == pytest.approx(1)
    assert found.y == 0
    assert 0 < found.overall < 1


def test_distance_of_pairs_and_the_cross_term_agree_on_pairs_that_lie_together() -> None:
    x = rows(8, 3, 0)
    y = x + 0.5  # each row's partner, and its set, lie the same way
    found = gradient_cosine(
        lambda x, y: (x - y).square().sum(),
        lambda x, y: cs_terms(x, y, sigma=5.0).cross,
        x,
        y,
    )

    assert found.overall > 0.3


def test_embeddings_are_left_alone_also_where_gradients_are_off() -> None:
    x, y = rows(4, 3, 0).requires_grad_(), rows(4, 3, 1)
    with torch.no_grad():
        found = gradient_cosine(lambda x, y: (x * y).sum(), lambda x, y: (x * y).sum(), x, y)

    assert found.overall == pytest.approx(1)
    assert x.grad is None
