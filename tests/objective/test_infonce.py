import math

import pytest
import torch
from open_clip import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from csalign.errors import ShapeError
from csalign.objective.infonce import infonce
from csalign.objective.loss import alignment_loss


def unit(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_open_clips_loss(scale: float) -> None:
    x, y = unit(64, 16, 0), unit(64, 16, 1)
    expected = ClipLoss()(x, y, torch.tensor(scale, dtype=torch.float64))

    assert float(infonce(x, y, logit_scale=scale)) == pytest.approx(float(expected), abs=1e-6)


def test_equal_logits_give_log_n() -> None:
    same = unit(1, 8, 0).repeat(10, 1)

    assert float(infonce(same, same, logit_scale=5.0)) == pytest.approx(math.log(10))


def test_orthonormal_pairs_give_the_closed_form() -> None:
    n, scale = 6, 3.0
    x = torch.eye(n, dtype=torch.float64)
    expected = math.log(1 + (n - 1) * math.exp(-scale))

    assert float(infonce(x, x, logit_scale=scale)) == pytest.approx(expected)


def test_gradient_is_right_in_both_sides_and_the_scale() -> None:
    x, y = unit(5, 4, 0).requires_grad_(), unit(5, 4, 1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda a, b, s: infonce(a, b, logit_scale=s), (x, y, scale))


@pytest.mark.parametrize(("x", "y"), [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((3,), (3,))])
def test_rows_that_do_not_match_are_refused(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="matched rows are needed"):
        infonce(torch.zeros(x), torch.zeros(y), logit_scale=1.0)


def test_weight_zero_is_infonce_alone_bit_for_bit() -> None:
    x, y = (3 * unit(32, 8, seed).float() for seed in (0, 1))
    parts = alignment_loss(x, y, logit_scale=7.0, cs_weight=0.0, sigma=0.5)
    alone = infonce(normalize(x, dim=1), normalize(y, dim=1), logit_scale=7.0)

    assert torch.equal(parts.total, alone)
    assert float(parts.cs) == 0


def test_total_is_the_pairwise_term_plus_the_weighted_divergence() -> None:
    parts = alignment_loss(
        unit(32, 8, 0), unit(32, 8, 1), logit_scale=7.0, cs_weight=0.25, sigma=0.5
    )

    assert float(parts.total) == pytest.approx(float(parts.infonce) + 0.25 * float(parts.cs))
    assert float(parts.cs) > 0
