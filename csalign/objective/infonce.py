"""The pairwise term: symmetric InfoNCE."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from csalign.errors import ShapeError


def infonce(x: Tensor, y: Tensor, *, logit_scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE of matched rows, as CLIP trains with (Radford et al. 2021).

    Mean of the cross-entropies that pick y_i among all y given x_i, and x_i among all x given
    y_i, with logits logit_scale * <x_i, y_j>. Equal to open_clip's ClipLoss.

    Args:
        x: (n, d), float, unit rows.
        y: (n, d), unit rows; row i is the match of x's row i.
        logit_scale: factor on the cosines, 1 / temperature; may carry a gradient.

    Returns:
        () tensor in nats, >= 0; log n for equal logits.

    Raises:
        ShapeError: the shapes differ, or are not 2-D.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ShapeError(
            f"matched rows are needed, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    logits = logit_scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
