"""The objective runs on a GPU without making the host wait, forth and back."""

from typing import Any

import pytest
import torch
from torch import Tensor

from csalign.core.enums import DivergenceName, PairwiseName, Precision
from csalign.objective.kernels import diagonal_share, median_distance
from csalign.objective.loss import Objective, TokenBatch
from tests.cuda.pretend import pretended

WIDTH = 16
FEW, MANY = 40, 300  # plain formulas, and tiles
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "negatives": {"negatives": (7, 5)},
    "several bandwidths": {"sigma": (0.5, 1.0)},
    "fixed scale": {"logit_scale": 100.0, "sigma": 0.05},
    "owner": {"owner": True},
}


def rows(count: int) -> Tensor:
    return torch.randn(count, WIDTH, device="cuda", requires_grad=True)


def run(objective: Objective, count: int, **options: Any) -> list[Tensor | None]:
    """Compute a value and the gradients of both sides, their extra rows and the scale."""
    texts = count + 11 if options.pop("owner", False) else count
    x, y, x_extra, y_extra = rows(count), rows(texts), rows(9), rows(6)
    log_scale = torch.full((), 3.0, device="cuda", requires_grad=True)
    sigma = torch.full((), 0.5, device="cuda")
    given: dict[str, Any] = {"logit_scale": log_scale.exp(), "sigma": sigma, **options}
    if texts > count:
        given["owner"] = torch.arange(texts, device="cuda") % count
    if objective.pairwise is PairwiseName.SIGMOID:
        given["logit_bias"] = torch.full((), -10.0, device="cuda", requires_grad=True)
    if objective.token_weight:
        tokens = [torch.randn(8, size, WIDTH, device="cuda") for size in (5, 7)]
        masks = [torch.rand(8, size, device="cuda") > 0.5 for size in (5, 7)]
        given["tokens"] = TokenBatch(*tokens, *masks)
    parts = objective(x, y, x_extra=x_extra, y_extra=y_extra, **given)
    assert all(part.device.type == "cuda" for part in parts if part is not None)
    parts.total.backward()
    return [x.grad, y.grad]


CASES = [
    (pairwise, divergence, "plain") for pairwise in PairwiseName for divergence in DivergenceName
]
CASES += [(pairwise, DivergenceName.CS, name) for pairwise in PairwiseName for name in OPTIONS]
CASES += [(PairwiseName.INFONCE, divergence, "owner") for divergence in DivergenceName]


@pytest.mark.parametrize(("pairwise", "divergence", "options"), sorted({*CASES}))
def test_every_loss_and_divergence_reads_nothing(
    pairwise: PairwiseName, divergence: DivergenceName, options: str
) -> None:
    # Tiles are those of InfoNCE and of the kernels.
    is_tiled = pairwise is PairwiseName.INFONCE or divergence in ("cs", "mmd")
    objective = Objective(pairwise=pairwise, divergence=divergence, weight=0.1, uniformity=1.0)
    with pretended() as reads:
        for count in (FEW, MANY) if is_tiled else (FEW,):
            gradients = run(objective, count, **OPTIONS[options])

    assert all(own is not None and own.device.type == "cuda" for own in gradients)
    assert not reads.lines
    assert not reads.uploads


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_tokens_and_rounded_products_read_nothing(
    count: int, precision: Precision, smoothing: float
) -> None:
    objective = Objective(
        weight=0.1, token_weight=0.1, label_smoothing=smoothing, precision=precision
    )
    with pretended() as reads:
        run(objective, count, negatives=(7, 5))

    assert not reads.lines
    assert not reads.uploads


def test_bandwidths_stay_on_the_device() -> None:
    with pretended() as reads:
        x, y = rows(FEW).detach(), rows(MANY).detach()
        sigma = median_distance(x, y)
        share = diagonal_share(x, sigma=sigma)

    assert (sigma.device.type, share.device.type) == ("cuda", "cuda")
    assert not reads.lines
    assert not reads.uploads
