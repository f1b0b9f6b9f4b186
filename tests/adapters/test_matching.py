import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.canonical import (
    OutputMap,
    Outputs,
    match_moments,
    nearest_mean,
    transport,
)
from csalign.adapters.model import KINDS, build_side
from csalign.adapters.side import SideShape

RNG = torch.Generator().manual_seed(0)


def rows(offset: float, scales: Tensor, count: int = 4_000) -> Tensor:
    return torch.randn(count, len(scales), generator=RNG) * scales + offset


def even(values: Tensor) -> Outputs:
    return Outputs(values, torch.ones(len(values)))


def mapped(values: Tensor, change: OutputMap) -> Tensor:
    return normalize(values @ change.weight.T + change.bias, dim=1)


X, Y = rows(0.5, torch.tensor([3.0, 2, 1, 1])), rows(-1.0, torch.tensor([1.0, 1, 2, 1]))


def test_both_sides_come_to_one_mean_and_nearer_covariances() -> None:
    first, second = match_moments(even(X), even(Y))
    before = normalize(X, dim=1), normalize(Y, dim=1)
    after = mapped(X, first), mapped(Y, second)

    assert (before[0].mean(0) - before[1].mean(0)).norm() > 0.5
    assert max(side.mean(0).norm() for side in after) < 1e-3
    apart = [(a.T.cov() - b.T.cov()).norm() for a, b in (before, after)]
    assert apart[1] < 0.7 * apart[0]


def test_the_means_alone_can_be_matched() -> None:
    first, second = match_moments(even(X), even(Y), covariances=False)

    assert torch.equal(first.weight, torch.eye(4))
    assert max(mapped(X, first).mean(0).norm(), mapped(Y, second).mean(0).norm()) < 1e-3


def test_rows_that_count_for_nothing_change_nothing() -> None:
    junk = rows(9.0, torch.full((4,), 5.0), 1_000)
    weights = torch.cat([torch.ones(len(X)), torch.zeros(1_000)])
    clean = match_moments(even(X), even(Y))
    with_junk = match_moments(Outputs(torch.cat([X, junk]), weights), even(Y))

    for own, other in zip(clean, with_junk, strict=True):
        torch.testing.assert_close(own, other)


def test_a_frozen_side_stays_and_the_other_goes_to_it() -> None:
    first, second = match_moments(even(X), Outputs(Y, torch.ones(len(Y)), is_frozen=True))

    assert torch.equal(second.weight, torch.eye(4))
    assert not second.bias.any()
    gap = mapped(X, first).mean(0) - normalize(Y, dim=1).mean(0)
    assert gap.norm() < 1e-3


def test_sides_that_agree_and_sides_that_do_not_vary_stay_as_they_are() -> None:
    centred = torch.cat([X, -X])
    for side in (centred, torch.cat([torch.eye(4), -torch.eye(4)])):
        change, _ = match_moments(even(side), even(side))
        torch.testing.assert_close(change.weight, torch.eye(4))
        assert change.bias.norm() < 1e-2
    constant = match_moments(even(torch.ones(9, 4)), even(torch.ones(5, 4)))
    assert all(torch.isfinite(part).all() for change in constant for part in change)


def test_transport_takes_one_covariance_to_the_other() -> None:
    own, other = (torch.randn(5, 9, generator=RNG, dtype=torch.float64) for _ in range(2))
    own, other = own @ own.T, other @ other.T
    found = transport(own, other)

    torch.testing.assert_close(found @ own @ found, other)
    torch.testing.assert_close(found, found.T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_takes_any_map_of_its_outputs_or_says_that_it_does_not(kind: str) -> None:
    side = build_side(SideShape(kind, 6, 6, hidden=8)).eval()
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=RNG))
    values = torch.randn(7, 6, generator=RNG)
    weight, bias = torch.randn(6, 6, generator=RNG), torch.randn(6, generator=RNG)
    before = side(values)
    if not side.accepts_output_map:
        with pytest.raises(ValueError, match=f"{kind}: takes no map of its outputs"):
            side.then(weight, bias)
        return
    side.then(weight, bias)

    torch.testing.assert_close(side(values), before @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_a_value_is_the_mean_over_the_nearest() -> None:
    known = normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), dim=1)
    values = torch.tensor([1.0, 3.0, 50.0])

    torch.testing.assert_close(nearest_mean(known, values, known[:1], k=2), torch.tensor([2.0]))
    torch.testing.assert_close(nearest_mean(known, values, known[2:], k=9), torch.tensor([18.0]))
    assert nearest_mean(known, values, known[:0]).shape == (0,)
