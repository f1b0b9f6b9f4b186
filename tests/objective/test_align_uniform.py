import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.enums import PairwiseName
from csalign.core.errors import ShapeError
from csalign.objective.loss import Objective
from csalign.objective.pairwise import align_uniform


def unit(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def spread(rows: Tensor, items: list[int]) -> float:
    """Loop over ordered pairs of rows of different items."""
    squares = [
        sum((a - b) ** 2 for a, b in zip(rows[i].tolist(), rows[j].tolist(), strict=True))
        for i, j in itertools.permutations(range(len(rows)), 2)
        if items[i] != items[j]
    ]
    return math.log(sum(math.exp(-2 * square) for square in squares) / len(squares))


def test_equals_a_double_loop() -> None:
    x, y = unit(6, 5, 0), unit(6, 5, 1)
    near = sum(float((a - b).square().sum()) for a, b in zip(x, y, strict=True)) / 6
    expected = near + 0.7 * (spread(x, [*range(6)]) + spread(y, [*range(6)])) / 2

    assert float(align_uniform(x, y, uniformity=0.7)) == pytest.approx(expected, rel=1e-12)


def test_texts_of_one_image_are_near_it_and_do_not_repel_each_other() -> None:
    x, y, owner = unit(3, 5, 0), unit(5, 5, 1), [2, 0, 0, 1, 2]
    near = sum(float((x[own] - y[j]).square().sum()) for j, own in enumerate(owner)) / 5
    expected = near + 0.7 * (spread(x, [0, 1, 2]) + spread(y, owner)) / 2

    found = align_uniform(x, y, uniformity=0.7, owner=torch.tensor(owner))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_unpaired_rows_repel_those_of_their_side() -> None:
    x, y, more = unit(4, 5, 0), unit(4, 5, 1), unit(3, 5, 2)
    near = float((x - y).square().sum(1).mean())
    expected = near + (spread(x, [*range(4)]) + spread(torch.cat([y, more]), [*range(7)])) / 2

    found = align_uniform(x, y, uniformity=1.0, further=(None, more))
    assert float(found) == pytest.approx(expected, rel=1e-12)
    objective = Objective(PairwiseName.ALIGN_UNIFORM, uniformity=1.0)
    parts = objective(x, 3 * y, logit_scale=1.0, y_extra=2 * more, negatives=(0, 3))
    assert float(parts.total) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("owner", [None, torch.tensor([0, 1, 2, 3, 3])])
def test_gradient_is_right_in_both_sides(owner: Tensor | None) -> None:
    n = 5 if owner is None else 4
    x, y = unit(n, 4, 0).requires_grad_(), unit(5, 4, 1).requires_grad_()

    assert torch.autograd.gradcheck(
        lambda a, b: align_uniform(a, b, uniformity=0.5, owner=owner), (x, y)
    )


def test_does_not_change_under_a_rotation_of_both_sides_an_exchange_and_an_order() -> None:
    x, y = unit(7, 5, 0), unit(7, 5, 1)
    turn, order = torch.linalg.qr(unit(5, 5, 2))[0], torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found = float(align_uniform(x, y, uniformity=1.0))

    for others in ((x @ turn, y @ turn), (y, x), (x[order], y[order])):
        assert float(align_uniform(*others, uniformity=1.0)) == pytest.approx(found, rel=1e-12)


def test_pairs_that_coincide_have_no_alignment_left_and_a_simplex_is_most_uniform() -> None:
    x = unit(8, 7, 0)
    assert float(align_uniform(x, x, uniformity=0.0)) == 0
    assert float(align_uniform(x, -x, uniformity=0.0)) == pytest.approx(4)
    # Eight rows in seven dimensions can be a simplex, whose squared distances are all 16 / 7.
    simplex = normalize(torch.eye(8, dtype=torch.float64) - 1 / 8, dim=1)
    least = float(align_uniform(simplex, simplex, uniformity=1.0))
    assert least == pytest.approx(-2 * 16 / 7)
    assert all(
        float(align_uniform(unit(8, 8, seed), unit(8, 8, seed), uniformity=1.0)) > least
        for seed in range(5)
    )


def test_a_single_pair_is_only_pulled_together() -> None:
    x, y = unit(1, 4, 0).requires_grad_(), unit(1, 4, 1).requires_grad_()
    found = align_uniform(x, y, uniformity=1.0)
    found.backward()  # type: ignore[no-untyped-call]

    assert float(found.detach()) == pytest.approx(float((x - y).square().sum().detach()))
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ShapeError, match="matched rows are needed"):
        align_uniform(unit(3, 4, 0), unit(2, 4, 0), uniformity=1.0)
    with pytest.raises(ValueError, match="finite and not negative"):
        Objective(PairwiseName.ALIGN_UNIFORM, uniformity=-1.0)
