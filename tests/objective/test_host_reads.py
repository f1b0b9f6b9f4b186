"""The objective reads no tensor on the host, so that a device never waits for it."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from csalign.core.enums import DivergenceName, PairwiseName
from csalign.objective.divergences import holder, sinkhorn_divergence
from csalign.objective.kernels import (
    Sigma,
    diagonal_share,
    log_mean_kernels,
    median_distance,
)
from csalign.objective.loss import LossParts, Objective, TokenBatch

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"}


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fail on an operation whose result or shape the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [index for index in indices if index is not None and index.dtype == torch.bool]
        assert name not in READS, name
        assert not masks, f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "read",
    [float, bool, Tensor.nonzero, lambda x: x[x > 0], lambda x: 1 if x > 0 else 2],
)
def test_a_read_of_any_kind_is_found(read: Callable[[Tensor], object]) -> None:
    with NoHostReads(), pytest.raises(AssertionError):
        read(torch.ones(1))


def objective_of(
    pairwise: PairwiseName, divergence: DivergenceName, owned: bool, n: int, **options: Any
) -> tuple[LossParts, list[Tensor]]:
    """Return the terms and the gradients of a batch with all kinds of rows."""
    x, y = rows(n, 8, 0), rows(n, 8, 1)
    owner = torch.arange(n) // 2 if owned else None
    extra = rows(9, 8, 2), rows(7, 8, 3)
    token_x, token_y = rows(18, 8, 4).reshape(3, 6, 8), rows(12, 8, 5).reshape(3, 4, 8)
    masks = torch.ones(3, 6).bool(), torch.ones(3, 4).bool()
    masks[0][0], masks[1][1, 2:] = False, False
    scale = torch.tensor(7.0)
    leaves = [side.requires_grad_() for side in (x, y, *extra, token_x, token_y, scale)]
    smoothing = 0.1 if pairwise is PairwiseName.INFONCE else 0.0
    objective = Objective(pairwise, divergence, 0.5, 0.3, label_smoothing=smoothing)
    call: dict[str, Any] = {"logit_scale": scale, "logit_bias": torch.tensor(-3.0), **options}
    tokens = TokenBatch(token_x, token_y, *masks)
    with NoHostReads():
        parts = objective(
            x, y, owner=owner, x_extra=extra[0], y_extra=extra[1], negatives=(5, 4),
            tokens=tokens, **call,
        )  # fmt: skip
        parts.total.backward()  # type: ignore[no-untyped-call]
    return parts, [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("n", [40, 256])
@pytest.mark.parametrize(("pairwise", "divergence"), [*product(PairwiseName, DivergenceName)])
def test_no_loss_reads_a_tensor_and_tensors_equal_floats(
    pairwise: PairwiseName, divergence: DivergenceName, n: int, owned: bool
) -> None:
    case = pairwise, divergence, owned, n
    expected = objective_of(*case, sigma=0.5, max_scale=7.0)
    found = objective_of(*case, sigma=torch.tensor(0.5))

    for one, other in zip(found[0], expected[0], strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(found[1]) == len(expected[1])
    for gradient, same in zip(found[1], expected[1], strict=True):
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, same, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("n", [40, 256])
@pytest.mark.parametrize("name", [DivergenceName.CS, DivergenceName.MMD, DivergenceName.SINKHORN])
def test_several_bandwidths_may_be_one_tensor(name: DivergenceName, n: int) -> None:
    case = PairwiseName.INFONCE, name, False, n
    expected, gradients = objective_of(*case, sigma=(0.3, 0.8))
    found, others = objective_of(*case, sigma=torch.tensor([0.3, 0.8]))

    torch.testing.assert_close(found.total, expected.total, rtol=1e-4, atol=1e-5)
    for gradient, same in zip(others, gradients, strict=True):
        torch.testing.assert_close(gradient, same, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.5, torch.tensor(0.5), torch.tensor([0.2, 0.5])])
def test_measures_of_a_kernel_are_tensors(sigma: Sigma) -> None:
    x, y = (normalize(rows(50, 8, seed), dim=1) for seed in (0, 1))
    with NoHostReads():
        middle, share = median_distance(x, y), diagonal_share(x, sigma=sigma, max_rows=30)
        transport = sinkhorn_divergence(x, y, sigma=sigma, diameter=2.0)
        kernels = log_mean_kernels(x, y, sigma=sigma)
        apart = holder((x, y, x + y), sigma)

    assert middle.shape == share.shape == transport.shape == apart.shape == ()
    assert float(share) == pytest.approx(float(diagonal_share(x, sigma=0.5, max_rows=30)))
    assert float(kernels[-1]) == pytest.approx(float(log_mean_kernels(x, y, sigma=0.5)))
