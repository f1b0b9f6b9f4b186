import math

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.errors import ShapeError
from csalign.objective.pairwise import sigmoid_loss


def unit(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (100.0, -30.0)])
def test_equals_open_clips_loss(scale: float, bias: float) -> None:
    x, y = unit(32, 16, 0), unit(32, 16, 1)
    expected = SigLipLoss()(x, y, scale, bias)

    found = sigmoid_loss(x, y, logit_scale=scale, logit_bias=bias)
    assert float(found) == pytest.approx(float(expected), abs=1e-12)


def test_several_positives_equal_a_double_loop() -> None:
    x, y, owner = unit(3, 5, 0), unit(4, 5, 1), [2, 0, 0, 1]
    total = 0.0
    for i in range(3):
        for j in range(4):
            sign = 1 if owner[j] == i else -1
            total += math.log1p(math.exp(-sign * (6.0 * float(x[i] @ y[j]) - 2.0)))

    found = sigmoid_loss(x, y, logit_scale=6.0, logit_bias=-2.0, owner=torch.tensor(owner))
    assert float(found) == pytest.approx(total / 3)


def test_gradient_is_right_in_both_sides_the_scale_and_the_bias() -> None:
    x, y = unit(5, 4, 0).requires_grad_(), unit(5, 4, 1).requires_grad_()
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))

    assert torch.autograd.gradcheck(
        lambda a, b, s, t: sigmoid_loss(a, b, logit_scale=s, logit_bias=t), (x, y, scale, bias)
    )


def test_huge_logits_stay_finite() -> None:
    x, y = unit(4, 3, 0).float(), unit(4, 3, 1).float()

    assert torch.isfinite(sigmoid_loss(x, y, logit_scale=1e4, logit_bias=-1e4))


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ShapeError, match="matched rows are needed"):
        sigmoid_loss(unit(3, 4, 0), unit(2, 4, 0), logit_scale=1.0, logit_bias=0.0)
