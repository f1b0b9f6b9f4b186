import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.enums import DivergenceName, PairwiseName
from csalign.core.errors import ShapeError
from csalign.objective.divergences import cs_divergence, divergence, token_divergence
from csalign.objective.kernels import Sigma
from csalign.objective.loss import Objective, TokenBatch
from csalign.objective.pairwise import align_uniform, infonce, sigmoid_loss


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, d, generator=generator)


def unit(x: Tensor) -> Tensor:
    return normalize(x, dim=-1)


def pairwise_loss(
    name: PairwiseName, x: Tensor, y: Tensor, scale: Tensor | float, bias: float = 0.0
) -> Tensor:
    if name is PairwiseName.INFONCE:
        return infonce(x, y, logit_scale=scale)
    if name is PairwiseName.SIGMOID:
        return sigmoid_loss(x, y, logit_scale=scale, logit_bias=bias)
    if name is PairwiseName.ALIGN_UNIFORM:
        return align_uniform(x, y, uniformity=2.0)
    return torch.zeros(())


@pytest.fixture
def tokens() -> TokenBatch:
    x, y = rows(32, 8, 4).reshape(4, 8, 8), rows(20, 8, 5).reshape(4, 5, 8)
    x_mask, y_mask = torch.ones(4, 8).bool(), torch.ones(4, 5).bool()
    y_mask[1, 3:] = False
    y[1, 3:] = math.nan
    return TokenBatch(x, y, x_mask, y_mask)


def test_weight_zero_is_infonce_alone_bit_for_bit(tokens: TokenBatch) -> None:
    x, y = rows(32, 8, 0), rows(32, 8, 1)
    alone = infonce(unit(x), unit(y), logit_scale=7.0)
    parts = Objective(weight=0.0)(x, y, logit_scale=7.0, sigma=0.5)

    assert torch.equal(parts.total, alone)
    assert float(parts.divergence) == 0
    # A bandwidth of no sense and tokens of no use show that neither term is computed.
    parts = Objective()(x, y, logit_scale=7.0, sigma=-1.0, tokens=tokens, x_extra=x)
    assert torch.equal(parts.total, alone)
    assert float(parts.divergence) == float(parts.token) == 0


def test_total_is_the_pairwise_term_plus_the_weighted_divergence() -> None:
    x, y = rows(32, 8, 0), rows(32, 8, 1)
    parts = Objective(weight=0.25)(x, y, logit_scale=7.0, sigma=0.5)
    apart = cs_divergence(unit(x), unit(y), sigma=0.5)

    assert torch.equal(parts.pairwise, infonce(unit(x), unit(y), logit_scale=7.0))
    assert torch.equal(parts.divergence, apart)
    assert torch.equal(parts.total, parts.pairwise + 0.25 * apart)


@pytest.mark.parametrize("name", [DivergenceName.CS, DivergenceName.MMD])
@pytest.mark.parametrize("pairwise", PairwiseName)
@pytest.mark.parametrize("sigma", [0.5, (0.3, 0.8)])
def test_large_batches_give_the_numbers_of_the_plain_formulas(
    pairwise: PairwiseName, name: DivergenceName, sigma: Sigma
) -> None:
    inputs = [rows(n, 8, n).double() for n in (300, 300, 30, 70)]
    inputs[1] = rows(300, 8, 9).double()
    scale = torch.tensor(7.0, dtype=torch.float64)

    def plain(x: Tensor, y: Tensor, x_extra: Tensor, y_extra: Tensor, scale: Tensor) -> Tensor:
        units = unit(x), unit(y)
        value = pairwise_loss(pairwise, *units, scale)
        sets = unit(torch.cat([x, x_extra])), unit(torch.cat([y, y_extra]))
        return value + 0.3 * divergence(name)(*sets, sigma=sigma)

    def tiled(x: Tensor, y: Tensor, x_extra: Tensor, y_extra: Tensor, scale: Tensor) -> Tensor:
        objective = Objective(pairwise, name, weight=0.3)
        return objective(
            x, y, logit_scale=scale, sigma=sigma, x_extra=x_extra, y_extra=y_extra
        ).total

    results = []
    for total in (plain, tiled):
        leaves = [leaf.clone().requires_grad_() for leaf in (*inputs, scale)]
        value = total(*leaves)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        results.append((value.detach(), *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_large_batches_of_weight_zero_are_infonce_alone_bit_for_bit() -> None:
    x, y, extra = rows(300, 8, 0), rows(300, 8, 1), rows(500, 8, 2)
    alone = Objective()(x, y, logit_scale=7.0)
    beside = Objective(weight=0.3)(x, y, logit_scale=7.0, sigma=0.5, y_extra=extra)

    assert torch.equal(alone.total, alone.pairwise)
    assert torch.equal(alone.pairwise, beside.pairwise)
    assert float(alone.total) == pytest.approx(float(infonce(unit(x), unit(y), logit_scale=7.0)))


def test_large_sides_of_unlike_size_are_no_pairs() -> None:
    with pytest.raises(ShapeError, match="matched rows are needed"):
        Objective()(rows(300, 8, 0), rows(301, 8, 1), logit_scale=7.0)


@pytest.mark.parametrize("pairwise", PairwiseName)
@pytest.mark.parametrize("name", DivergenceName)
def test_every_choice_is_the_weighted_sum_of_its_terms(
    pairwise: PairwiseName, name: DivergenceName, tokens: TokenBatch
) -> None:
    x, y = rows(12, 8, 0).requires_grad_(), rows(12, 8, 1).requires_grad_()
    objective = Objective(pairwise, name, weight=0.3, token_weight=0.2)
    parts = objective(x, y, logit_scale=7.0, sigma=0.5, logit_bias=-2.0, tokens=tokens)
    units = unit(x.detach()), unit(y.detach())
    expected = (
        float(pairwise_loss(pairwise, *units, 7.0, -2.0)),
        float(divergence(name)(*units, sigma=0.5)),
        float(loop_tokens(tokens, 0.5)),
    )

    found = tuple(float(term.detach()) for term in (parts.pairwise, parts.divergence, parts.token))
    assert found == pytest.approx(expected)
    total = expected[0] + 0.3 * expected[1] + 0.2 * expected[2]
    assert float(parts.total.detach()) == pytest.approx(total)
    parts.total.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def loop_tokens(tokens: TokenBatch, sigma: float) -> float:
    x, y, x_mask, y_mask = tokens
    values = [
        float(cs_divergence(unit(x[i][x_mask[i]]), unit(y[i][y_mask[i]]), sigma=sigma))
        for i in range(len(x))
    ]
    return sum(values) / len(values)


def test_tokens_of_unit_norm_are_taken_as_they_are(tokens: TokenBatch) -> None:
    units = unit(tokens.x), unit(tokens.y)
    parts = Objective(token_weight=1.0)(
        rows(4, 8, 0), rows(4, 8, 1), logit_scale=7.0, sigma=0.5, tokens=tokens
    )
    expected = token_divergence(*units, tokens.x_mask, tokens.y_mask, sigma=0.5)

    assert float(parts.token) == pytest.approx(float(expected))


def test_names_choose_the_pairwise_loss() -> None:
    x, y = rows(6, 8, 0), rows(6, 8, 1)
    units = unit(x), unit(y)
    owner = torch.tensor([0, 0, 1, 1, 5, 5])

    for own in (None, owner):
        found = Objective(label_smoothing=0.1)(x, y, logit_scale=7.0, owner=own).pairwise
        expected = infonce(*units, logit_scale=7.0, owner=own, label_smoothing=0.1)
        assert torch.equal(found, expected)
    sigmoid = Objective(PairwiseName.SIGMOID)
    assert torch.equal(
        sigmoid(x, y, logit_scale=7.0, logit_bias=-3.0, owner=owner).pairwise,
        sigmoid_loss(*units, logit_scale=7.0, logit_bias=-3.0, owner=owner),
    )
    assert float(Objective(PairwiseName.NONE)(x, y, logit_scale=7.0).total) == 0


def test_unpaired_rows_reach_the_divergence_and_not_the_pairwise_term() -> None:
    x, y, x_extra, y_extra = (rows(n, 8, n).requires_grad_() for n in (6, 6, 3, 5))
    y = rows(6, 8, 9).requires_grad_()
    parts = Objective(weight=0.5)(
        x, y, logit_scale=7.0, sigma=0.5, x_extra=x_extra, y_extra=y_extra
    )
    apart = cs_divergence(unit(torch.cat([x, x_extra])), unit(torch.cat([y, y_extra])), sigma=0.5)

    assert torch.equal(parts.pairwise, infonce(unit(x), unit(y), logit_scale=7.0))
    assert float(parts.divergence.detach()) == pytest.approx(float(apart.detach()))
    grads = torch.autograd.grad(parts.total, (x_extra, y_extra))
    assert all(float(grad.norm()) > 0 for grad in grads)


def test_extra_rows_on_one_side_alone_are_enough() -> None:
    x, y, extra = rows(6, 8, 0), rows(6, 8, 1), rows(4, 8, 2)
    parts = Objective(weight=0.5)(x, y, logit_scale=7.0, sigma=0.5, y_extra=extra)
    apart = cs_divergence(unit(x), unit(torch.cat([y, extra])), sigma=0.5)

    assert float(parts.divergence) == pytest.approx(float(apart))


def test_pairs_mse_sees_pairs_only_and_follows_the_owners() -> None:
    x, y, owner = rows(4, 8, 0), rows(6, 8, 1), torch.tensor([0, 0, 1, 3, 3, 2])
    parts = Objective(PairwiseName.NONE, DivergenceName.PAIRS_MSE, weight=1.0)(
        x, y, logit_scale=1.0, owner=owner, x_extra=rows(9, 8, 2)
    )
    expected = sum(
        float((unit(x)[own] - unit(y)[j]).square().sum()) for j, own in enumerate(owner.tolist())
    )

    assert float(parts.total) == pytest.approx(expected / 6)
    with pytest.raises(IndexError, match="out of bounds"):
        Objective(PairwiseName.NONE, DivergenceName.PAIRS_MSE, weight=1.0)(
            x, y, logit_scale=1.0, owner=owner + 1
        )


def test_without_a_pairwise_loss_the_sides_may_differ_in_size() -> None:
    parts = Objective(PairwiseName.NONE, weight=2.0)(
        rows(4, 8, 0), rows(7, 8, 1), logit_scale=1.0, sigma=0.5
    )

    assert float(parts.total) == pytest.approx(2 * float(parts.divergence))


def test_a_token_weight_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch has no tokens"):
        Objective(token_weight=0.1)(rows(4, 8, 0), rows(4, 8, 1), logit_scale=1.0)


def test_too_few_rows_for_the_divergence_are_refused() -> None:
    objective = Objective(divergence=DivergenceName.GAUSSIAN_KL, weight=0.1)

    with pytest.raises(ShapeError, match="'gaussian-kl' needs at least 2 rows per side"):
        objective(rows(1, 8, 0), rows(1, 8, 1), logit_scale=1.0)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_that_make_no_sense_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        Objective(weight=weight)
    with pytest.raises(ValueError, match="finite and not negative"):
        Objective(token_weight=weight)


def test_choices_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"label smoothing works with infonce only.*'sigmoid'"):
        Objective(PairwiseName.SIGMOID, label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        Objective(label_smoothing=1.5)
    with pytest.raises(ValueError, match="'triplet' is not a valid PairwiseName"):
        Objective("triplet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'tv' is not a valid DivergenceName"):
        Objective(divergence="tv")  # type: ignore[arg-type]


def test_losses_may_be_named_by_plain_strings() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 4, generator=rng) for _ in range(2))

    by_name = Objective(pairwise="infonce")(x, y, logit_scale=10.0)  # type: ignore[arg-type]

    assert by_name.pairwise == Objective()(x, y, logit_scale=10.0).pairwise > 0
