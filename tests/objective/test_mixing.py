import pytest
import torch

from csalign.core.errors import ShapeError
from csalign.objective.pairwise import mix_pairs

X = torch.tensor([[0.0, 0.0], [1.0, 2.0], [4.0, 4.0]])
Y = torch.tensor([[1.0], [2.0], [3.0]])
TURN = torch.tensor([1, 2, 0])


def test_both_sides_are_mixed_by_the_same_coefficient_and_partner() -> None:
    x, y = mix_pairs(X, Y, 0.25, TURN)

    assert x.tolist() == [[0.75, 1.5], [3.25, 3.5], [1.0, 1.0]]
    assert y.tolist() == [[1.75], [2.75], [1.5]]


def test_a_linear_relation_of_the_sides_survives() -> None:
    x, y = mix_pairs(X, X @ torch.tensor([[2.0], [-1.0]]), 0.3, TURN)

    torch.testing.assert_close(y, x @ torch.tensor([[2.0], [-1.0]]))


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_a_coefficient_out_of_range_is_refused(lam: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        mix_pairs(X, Y, lam, TURN)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="a partner for each"):
        mix_pairs(X, Y[:2], 0.5, TURN)
    with pytest.raises(ShapeError, match="a partner for each"):
        mix_pairs(X, Y, 0.5, TURN[:2])
