"""The sigmoid loss: each pair of rows is a question of its own, matched or not."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from csalign.core import distributed
from csalign.objective.distributed_autograd import shared, summed
from csalign.objective.owners import positives

SigmoidDivisor = Literal["rows", "pairs"]


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    owner: Tensor | None = None,
    divisor: SigmoidDivisor = "rows",
    divided: bool = False,
) -> Tensor:
    """Sigmoid loss of all pairs of rows (SigLIP, Zhai et al. 2023).

    -sum_ij log sigmoid(z_ij (logit_scale <x_i, y_j> + logit_bias)) / divisor, with z_ij = 1 for
    matched rows and -1 for all others. Equal to open_clip's SigLipLoss with its default divisor.

    Args:
        x: (n, d), float, unit rows.
        y: (m, d), unit rows; m = n unless owner is given.
        logit_scale: factor on the cosines; SigLIP starts at 10. May carry a gradient.
        logit_bias: added to every logit; SigLIP starts at -10, about minus the log of the number
            of negatives a positive. May carry a gradient.
        owner: (m,), int64, the row of x that each row of y belongs to; None where row i belongs
            to row i.
        divisor: "rows" divides by n as SigLIP does; "pairs" by n * m, the mean over all pairs, as
            SAIL does (Zhang et al. 2024).
        divided: whether each process of the job computes a part, all having the same arguments.

    Returns:
        () tensor, >= 0.

    Raises:
        ShapeError: the shapes do not fit together.
        ValueError: an owner is not in [0, n), or the divisor is neither.
    """
    if divisor not in ("rows", "pairs"):
        raise ValueError(f"divisor must be 'rows' or 'pairs', got {divisor!r}")
    matched = positives(x, y, owner)
    count = len(x) if divisor == "rows" else len(x) * len(y)
    if divided:
        x, y, logit_scale, logit_bias = (
            shared(torch.as_tensor(value, device=x.device))
            for value in (x, y, logit_scale, logit_bias)
        )
        own = distributed.share_of(len(x))
        x, matched = x[own], matched[own]
    logits = logit_scale * x @ y.T + logit_bias
    total = -logsigmoid(torch.where(matched, logits, -logits)).sum()
    return (summed(total) if divided else total) / count
