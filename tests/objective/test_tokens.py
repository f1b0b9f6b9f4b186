import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.errors import ShapeError
from csalign.objective.divergences import cs_divergence, token_divergence, unit_tokens

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(b: int, v: int, length: int, seed: int, present: float = 0.6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, v, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(b, length, 4, generator=generator, dtype=torch.float64) + 0.3
    x_mask = torch.rand(b, v, generator=generator) < present
    y_mask = torch.rand(b, length, generator=generator) < present
    return x, y, x_mask, y_mask


def loop(x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, sigma: float) -> Tensor:
    values = [
        cs_divergence(x[i][x_mask[i]], y[i][y_mask[i]], sigma=sigma)
        for i in range(len(x))
        if x_mask[i].any() and y_mask[i].any()
    ]
    return sum(values, torch.zeros((), dtype=torch.float64)) / max(1, len(values))


@settings(max_examples=25)
@given(
    b=st.integers(1, 5),
    v=st.integers(1, 6),
    length=st.integers(1, 4),
    seed=st.integers(0, 999),
    present=st.sampled_from([0.2, 0.6, 1.0]),
    sigma=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_equals_a_loop_over_samples_without_their_padding(
    b: int, v: int, length: int, seed: int, present: float, sigma: float
) -> None:
    tokens = batch(b, v, length, seed, present)

    found = float(token_divergence(*tokens, sigma=sigma))
    assert found == pytest.approx(float(loop(*tokens, sigma)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_changes_neither_value_nor_gradient(filler: float) -> None:
    x, y, x_mask, y_mask = batch(6, 5, 4, 3)
    x_mask[0] = False  # a sample that is left out whole
    clean = (x.requires_grad_(), y.requires_grad_())
    dirty = (
        x.detach().masked_fill(~x_mask[..., None], filler).requires_grad_(),
        y.detach().masked_fill(~y_mask[..., None], filler).requires_grad_(),
    )
    expected = loop(x, y, x_mask, y_mask, 0.8)
    found = token_divergence(*dirty, x_mask, y_mask, sigma=0.8)

    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    for own, other in zip(
        torch.autograd.grad(found, dirty), torch.autograd.grad(expected, clean), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_unit_tokens_are_unit_rows_and_padding_is_zero_with_no_gradient() -> None:
    x, _, mask, _ = batch(3, 5, 4, 0)
    dirty = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
    units = unit_tokens(dirty, mask)
    grad = torch.autograd.grad(units.pow(3).sum(), dirty)[0]

    torch.testing.assert_close(units[mask], normalize(x[mask], dim=1))
    assert not units[~mask].any()
    assert not grad[~mask].any()
    assert torch.isfinite(grad).all()


def test_several_bandwidths_give_the_mean_over_them() -> None:
    tokens = batch(4, 5, 3, 1)
    each = [float(token_divergence(*tokens, sigma=sigma)) for sigma in (0.5, 2.0)]

    assert float(token_divergence(*tokens, sigma=(0.5, 2.0))) == pytest.approx(sum(each) / 2)


def test_no_sample_with_both_sides_is_zero_with_a_zero_gradient() -> None:
    x, y, x_mask, y_mask = batch(3, 4, 4, 0)
    x.fill_(math.nan).requires_grad_()
    value = token_divergence(x, y, torch.zeros_like(x_mask), y_mask, sigma=1.0)

    assert float(value.detach()) == 0
    assert not torch.autograd.grad(value, x)[0].any()


def test_far_apart_tokens_are_finite_in_value_and_gradient() -> None:
    x, y, x_mask, y_mask = (
        side.float() if side.dtype != torch.bool else side for side in batch(3, 4, 5, 0, 1.0)
    )
    sides = (x.requires_grad_(), (y + 1000).requires_grad_())
    value = token_divergence(*sides, x_mask, y_mask, sigma=1.0)
    grads = torch.autograd.grad(value, sides)

    assert float(value.detach()) > 1e5
    assert all(bool(torch.isfinite(grad).all()) and float(grad.norm()) > 0 for grad in grads)


def test_gradient_is_right() -> None:
    x, y, x_mask, y_mask = batch(2, 3, 4, 0)

    assert torch.autograd.gradcheck(
        lambda a, b: token_divergence(a, b, x_mask, y_mask, sigma=0.7),
        (x.requires_grad_(), y.requires_grad_()),
    )


@pytest.mark.parametrize(
    ("x", "y", "x_mask"),
    [
        ((2, 3, 4), (2, 5, 3), (2, 3)),
        ((2, 3, 4), (3, 5, 4), (2, 3)),
        ((2, 3, 4), (2, 5, 4), (2, 5)),
        ((3, 4), (2, 5, 4), (3,)),
    ],
)
def test_batches_that_do_not_fit_are_refused_by_shape(
    x: tuple[int, ...], y: tuple[int, ...], x_mask: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError, match="two batches of tokens of one width"):
        token_divergence(
            torch.zeros(x),
            torch.zeros(y),
            torch.ones(x_mask).bool(),
            torch.ones(y[:2]).bool(),
            sigma=1.0,
        )


def test_masks_of_numbers_are_refused() -> None:
    x, y, x_mask, y_mask = batch(2, 3, 4, 0)

    with pytest.raises(ValueError, match="masks must be boolean"):
        token_divergence(x, y, x_mask.float(), y_mask, sigma=1.0)
