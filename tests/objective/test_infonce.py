import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.errors import ShapeError
from csalign.objective.pairwise import alignment_uniformity, infonce


def unit(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def loop_loss(x: Tensor, y: Tensor, owner: list[int], scale: float, smoothing: float) -> float:
    logits = scale * x.numpy() @ y.numpy().T
    texts, n, m = [], len(x), len(y)

    def log_softmax(row: np.ndarray, j: int) -> float:
        return float(row[j]) - math.log(sum(math.exp(value) for value in row))

    def half(row: np.ndarray, positives: list[int]) -> float:
        own = sum(log_softmax(row, j) for j in positives) / len(positives)
        even = sum(log_softmax(row, j) for j in range(len(row))) / len(row)
        return -((1 - smoothing) * own + smoothing * even)

    images = []
    for i in range(n):
        positives = [j for j in range(m) if owner[j] == i]
        if positives:
            images.append(half(logits[i], positives))
    for j in range(m):
        texts.append(half(logits[:, j], [owner[j]]))
    return (sum(images) / len(images) + sum(texts) / len(texts)) / 2


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


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_spreads_a_share_of_each_target_evenly(smoothing: float) -> None:
    x, y = unit(7, 5, 0), unit(7, 5, 1)
    expected = loop_loss(x, y, list(range(7)), 4.0, smoothing)

    found = infonce(x, y, logit_scale=4.0, label_smoothing=smoothing)
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_label_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    x = unit(3, 4, 0)

    with pytest.raises(ValueError, match="label_smoothing must be in"):
        infonce(x, x, logit_scale=1.0, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        infonce(x, x, owner=torch.arange(3), logit_scale=1.0, label_smoothing=smoothing)


@settings(max_examples=25)
@given(
    n=st.integers(1, 6),
    draws=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    seed=st.integers(0, 99),
    smoothing=st.sampled_from([0.0, 0.2]),
)
def test_several_positives_equal_a_loop_over_images_and_texts(
    n: int, draws: list[int], seed: int, smoothing: float
) -> None:
    owner = [draw % n for draw in draws]  # some images own nothing
    x, y = unit(n, 5, seed), unit(len(owner), 5, seed + 100)

    found = infonce(x, y, owner=torch.tensor(owner), logit_scale=6.0, label_smoothing=smoothing)
    assert float(found) == pytest.approx(loop_loss(x, y, owner, 6.0, smoothing), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_positive_each_is_plain_infonce(dtype: torch.dtype) -> None:
    x, y = unit(64, 16, 0).to(dtype), unit(64, 16, 1).to(dtype)

    found = infonce(x, y, owner=torch.arange(64), logit_scale=14.0)
    assert float(found) == pytest.approx(float(infonce(x, y, logit_scale=14.0)), abs=1e-6)


def test_negatives_are_told_apart_as_unpaired_rows_of_a_larger_table() -> None:
    x, y, more_x, more_y = unit(3, 6, 0), unit(3, 6, 1), unit(2, 6, 2), unit(4, 6, 3)
    found = infonce(x, y, logit_scale=5.0, negatives=(more_x, more_y))

    table = 5 * torch.cat([x, more_x]) @ torch.cat([y, more_y]).T
    forth = [table[i, i] - table[i].logsumexp(0) for i in range(3)]
    back = [table[i, i] - table[:, i].logsumexp(0) for i in range(3)]
    expected = -float(sum(forth) + sum(back)) / 6
    assert float(found) == pytest.approx(expected, abs=1e-9)
    assert found > infonce(x, y, logit_scale=5.0)
    several = infonce(x, y, owner=torch.arange(3), logit_scale=5.0, negatives=(more_x, more_y))
    assert float(several) == pytest.approx(expected, abs=1e-9)


def test_order_of_texts_does_not_matter() -> None:
    x, y, owner = unit(4, 8, 0), unit(9, 8, 1), torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 0])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))

    there = infonce(x, y, owner=owner, logit_scale=9.0)
    mixed = infonce(x, y[order], owner=owner[order], logit_scale=9.0)
    assert float(there) == pytest.approx(float(mixed), abs=1e-12)


def test_gradient_with_several_positives_is_right() -> None:
    x, y = unit(4, 3, 0).requires_grad_(), unit(6, 3, 1).requires_grad_()
    owner = torch.tensor([0, 0, 1, 3, 3, 3])

    assert torch.autograd.gradcheck(
        lambda a, b: infonce(a, b, owner=owner, logit_scale=3.0), (x, y)
    )


@pytest.mark.parametrize("owner", [[0, 1, 3], [-1, 0, 1]])
def test_an_owner_that_is_no_row_is_refused(owner: list[int]) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        infonce(unit(3, 4, 0), unit(3, 4, 1), owner=torch.tensor(owner), logit_scale=1.0)


def test_owners_that_are_not_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="owners must be int64"):
        infonce(unit(3, 4, 0), unit(3, 4, 1), owner=torch.zeros(3), logit_scale=1.0)


@pytest.mark.parametrize(
    ("y", "owner"), [((3, 4), (2,)), ((3, 5), (3,)), ((3,), (3,)), ((3, 4), (3, 1))]
)
def test_owners_that_do_not_fit_are_refused_by_shape(
    y: tuple[int, ...], owner: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError, match="an owner for each row of y"):
        infonce(
            unit(3, 4, 0),
            torch.zeros(y),
            owner=torch.zeros(owner, dtype=torch.int64),
            logit_scale=1.0,
        )


def test_alignment_and_uniformity_sum_to_infonce_in_value_and_gradient() -> None:
    sides = (unit(12, 6, 0).requires_grad_(), unit(12, 6, 1).requires_grad_())
    terms = alignment_uniformity(*sides, logit_scale=8.0)
    whole = infonce(*sides, logit_scale=8.0)
    found = torch.autograd.grad(terms.alignment + terms.uniformity, sides)
    expected = torch.autograd.grad(whole, sides)

    assert float((terms.alignment + terms.uniformity).detach()) == pytest.approx(
        float(whole.detach())
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_alignment_is_the_scaled_mean_cosine_of_pairs_and_uniformity_ignores_their_order() -> None:
    x, y = unit(5, 6, 0), unit(5, 6, 1)
    terms = alignment_uniformity(x, y, logit_scale=8.0)
    cosines = [float(np.dot(a, b)) for a, b in zip(x.numpy(), y.numpy(), strict=True)]

    assert float(terms.alignment) == pytest.approx(-8.0 * sum(cosines) / 5)
    turned = alignment_uniformity(x, y.roll(1, 0), logit_scale=8.0)
    assert float(turned.uniformity) == pytest.approx(float(terms.uniformity))


def test_terms_of_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ShapeError, match="matched rows are needed"):
        alignment_uniformity(unit(3, 4, 0), unit(2, 4, 0), logit_scale=1.0)
