"""Symmetric InfoNCE, with one or several positives a row, and what it is made of."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from csalign.objective.owners import check_matched, positives

Negatives = tuple[Tensor | None, Tensor | None]


def infonce(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Tensor | float,
    label_smoothing: float = 0.0,
    negatives: Negatives = (None, None),
) -> Tensor:
    """Symmetric InfoNCE of matched rows, as CLIP trains with (Radford et al. 2021).

    Mean of the cross-entropies that pick y_i among all y given x_i, and x_i among all x given
    y_i, with logits logit_scale * <x_i, y_j>. Equal to open_clip's ClipLoss.

    Args:
        x: (n, d), float, unit rows.
        y: (n, d), unit rows; row i is the match of x's row i.
        logit_scale: factor on the cosines, 1 / temperature; may carry a gradient.
        label_smoothing: share of each target that is spread evenly over all rows compared, in
            [0, 1).
        negatives: unit rows (k, d) beside those of x, which the rows of y have to tell from their
            matches as well, and likewise (l, d) beside y; None for none.

    Returns:
        () tensor in nats, >= 0; log n for equal logits without negatives.

    Raises:
        ShapeError: the shapes differ, or are not 2-D.
        ValueError: label_smoothing is not in [0, 1).
    """
    check_matched(x, y)
    check_smoothing(label_smoothing)
    labels = torch.arange(len(x), device=x.device)
    forth, back = _logits(x, y, logit_scale, negatives)
    forth = cross_entropy(forth, labels, label_smoothing=label_smoothing)
    back = cross_entropy(back, labels, label_smoothing=label_smoothing)
    return (forth + back) / 2


def multi_positive_infonce(
    x: Tensor,
    y: Tensor,
    owner: Tensor,
    *,
    logit_scale: Tensor | float,
    label_smoothing: float = 0.0,
    negatives: Negatives = (None, None),
) -> Tensor:
    """Symmetric InfoNCE where one row of x may own several rows of y.

    From x to y each row's loss is the mean of -log p(y_j | x_i) over the y_j that it owns, with
    p the softmax over all m rows of y: L_out of supervised contrastive learning (Khosla et al.
    2020, equation 2). From y to x each row picks its owner among the n rows of x. The two means
    over rows are averaged, so a row of x with many captions counts as much as one with a single
    caption in the first half. Equal to `infonce` where owner is 0, 1, ..., n - 1.

    Args:
        x: (n, d), float, unit rows. Rows that own nothing are negatives only.
        y: (m, d), unit rows.
        owner: (m,), int64, the row of x that each row of y belongs to.
        logit_scale: factor on the cosines, 1 / temperature; may carry a gradient.
        label_smoothing: share of each target that is spread evenly over all rows compared, in
            [0, 1).
        negatives: as in `infonce`.

    Returns:
        () tensor in nats, >= 0.

    Raises:
        ShapeError: the widths differ, or owner is not (m,).
        ValueError: an owner is not in [0, n), or label_smoothing is not in [0, 1).
    """
    check_smoothing(label_smoothing)
    owned = positives(x, y, owner)
    forth, back = _logits(x, y, logit_scale, negatives)
    some = owned.any(1)
    targets = pad(owned[some].to(forth.dtype), (0, forth.shape[1] - len(y)))
    forth = cross_entropy(
        forth[some], targets / targets.sum(1, keepdim=True), label_smoothing=label_smoothing
    )
    back = cross_entropy(back, owner, label_smoothing=label_smoothing)
    return (forth + back) / 2


def _logits(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, negatives: Negatives
) -> tuple[Tensor, Tensor]:
    """Of x with y and its negatives, (n, m + l), and of y with x and its negatives, (m, n + k)."""
    logits = logit_scale * x @ y.T
    forth, back = logits, logits.T
    if negatives[1] is not None:
        forth = torch.cat([forth, logit_scale * x @ negatives[1].T], dim=1)
    if negatives[0] is not None:
        back = torch.cat([back, logit_scale * y @ negatives[0].T], dim=1)
    return forth, back


class InfonceTerms(NamedTuple):
    """What pulls and what pushes in InfoNCE; their sum is InfoNCE.

    Attributes:
        alignment: -logit_scale * mean_i <x_i, y_i>, () tensor.
        uniformity: mean over both directions of the log-sum-exp of each row's logits, its
            positive included, () tensor.
    """

    alignment: Tensor
    uniformity: Tensor


def alignment_uniformity(x: Tensor, y: Tensor, *, logit_scale: Tensor | float) -> InfonceTerms:
    """Split InfoNCE into its alignment and its uniformity (Wang and Isola 2020, equation 1).

    Args:
        x: (n, d), float, unit rows.
        y: (n, d), unit rows; row i is the match of x's row i.
        logit_scale: factor on the cosines.

    Returns:
        Both terms, differentiable; alignment + uniformity = `infonce`.

    Raises:
        ShapeError: the shapes differ, or are not 2-D.
    """
    check_matched(x, y)
    logits = logit_scale * x @ y.T
    pushed = (logits.logsumexp(1).mean() + logits.logsumexp(0).mean()) / 2
    return InfonceTerms(alignment=-logits.diagonal().mean(), uniformity=pushed)


def check_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless label_smoothing is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
