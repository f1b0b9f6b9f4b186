"""Pairwise losses on matched unit rows: InfoNCE, the sigmoid loss, alignment and uniformity."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, pad

from csalign.core.errors import ShapeError
from csalign.objective.kernels import squared_distances

Negatives = tuple[Tensor | None, Tensor | None]


def infonce(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Tensor | float,
    owner: Tensor | None = None,
    label_smoothing: float = 0.0,
    negatives: Negatives = (None, None),
) -> Tensor:
    """Compute symmetric InfoNCE as in CLIP (Radford et al. 2021).

    Mean of the cross-entropies that pick y_i among all y given x_i, and x_i among all x given
    y_i, with logits logit_scale * <x_i, y_j>. Equal to open_clip's ClipLoss.

    With several rows of y per row of x, the loss of x_i is the mean of -log p(y_j | x_i) over its
    y_j, with p the softmax over all m rows of y: L_out of supervised contrastive learning (Khosla
    et al. 2020, equation 2). The two means over rows are averaged, so a row of x counts the same
    in the first half however many rows of y it has.

    Args:
        x: (n, d), float, unit rows. With an owner, rows without a match are negatives only.
        y: (m, d), unit rows.
        logit_scale: factor on the cosines, 1 / temperature; may carry a gradient.
        owner: (m,), int64, the row of x that each row of y matches; None where m = n and row i
            matches row i.
        label_smoothing: share of each target spread evenly over all rows compared, in [0, 1).
        negatives: further unit rows (k, d) of x's side, used as negatives for the rows of y, and
            (l, d) of y's side, used for the rows of x; None for none.

    Returns:
        () tensor in nats, >= 0; log n for equal logits of n pairs without negatives.

    Raises:
        ShapeError: the shapes do not fit together.
        IndexError: an owner is not in [0, n), and the tensors are on a CPU.
        ValueError: owners are not int64, or label_smoothing is not in [0, 1).
    """
    check_smoothing(label_smoothing)
    if owner is None:
        check_matched(x, y)
    else:
        check_owner(x, y, owner)
    logits = logit_scale * x @ y.T
    forth, back = logits, logits.T
    if negatives[1] is not None and len(negatives[1]):
        forth = torch.cat([forth, logit_scale * x @ negatives[1].T], dim=1)
    if negatives[0] is not None and len(negatives[0]):
        back = torch.cat([back, logit_scale * y @ negatives[0].T], dim=1)
    labels = targets = torch.arange(len(x), device=x.device)
    if owner is not None:
        owned = (labels[:, None] == owner).to(forth.dtype)
        counts = owned.sum(1, keepdim=True)
        targets = pad(owned / counts.clamp(min=1), (0, forth.shape[1] - len(y)))
        labels = owner
    forth = cross_entropy(forth, targets, label_smoothing=label_smoothing, reduction="none")
    if owner is not None:
        forth *= len(x) * counts[:, 0].clamp(max=1) / counts.clamp(max=1).sum()
    back = cross_entropy(back, labels, label_smoothing=label_smoothing)
    return (forth.mean() + back) / 2


class InfonceTerms(NamedTuple):
    """The attracting and the repelling term of InfoNCE, () tensors; their sum is InfoNCE."""

    alignment: Tensor
    uniformity: Tensor


def alignment_uniformity(x: Tensor, y: Tensor, *, logit_scale: Tensor | float) -> InfonceTerms:
    """Split InfoNCE into its alignment and its uniformity (Wang and Isola 2020, equation 1).

    Alignment is -logit_scale * mean_i <x_i, y_i>, uniformity the mean over both directions of the
    log-sum-exp of each row's logits, its positive included. Arguments and exceptions as for
    `infonce`; both terms are differentiable.
    """
    check_matched(x, y)
    logits = logit_scale * x @ y.T
    uniformity = (logits.logsumexp(1).mean() + logits.logsumexp(0).mean()) / 2
    return InfonceTerms(alignment=-logits.diagonal().mean(), uniformity=uniformity)


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    owner: Tensor | None = None,
) -> Tensor:
    """Compute the sigmoid loss of all pairs of rows (SigLIP, Zhai et al. 2023).

    -sum_ij log sigmoid(z_ij (logit_scale <x_i, y_j> + logit_bias)) / n, with z_ij = 1 for matched
    rows and -1 for all others. Equal to open_clip's SigLipLoss.

    Args:
        x: (n, d), float, unit rows.
        y: (m, d), unit rows; m = n unless owner is given.
        logit_scale: factor on the cosines; SigLIP starts at 10. May carry a gradient.
        logit_bias: added to every logit; SigLIP starts at -10, about minus the log of the number
            of negatives per positive. May carry a gradient.
        owner: as for `infonce`, whose exceptions it raises.

    Returns:
        () tensor, >= 0.
    """
    rows = torch.arange(len(x), device=x.device)
    if owner is None:
        check_matched(x, y)
        owner = rows
    else:
        check_owner(x, y, owner)
    logits = logit_scale * x @ y.T + logit_bias
    return -logsigmoid(torch.where(rows[:, None] == owner, logits, -logits)).sum() / len(x)


def align_uniform(
    x: Tensor,
    y: Tensor,
    *,
    uniformity: float,
    owner: Tensor | None = None,
    further: Negatives = (None, None),
) -> Tensor:
    """Compute alignment of pairs plus uniformity within each side (UniAlign, arXiv 2602.09507).

    mean_i |x_i - y_i|^2 + uniformity * (U(x) + U(y)) / 2, with U the log of the mean of
    exp(-2 |z_i - z_j|^2) over all pairs of rows of different items (Wang and Isola 2020, t = 2).
    Rows repel others of their side, and never those of the other side.

    Args:
        x: (n, d), float, unit rows.
        y: (m, d), unit rows; m = n unless owner is given.
        uniformity: weight of the second term, >= 0.
        owner: as for `infonce`, whose exceptions it raises; texts of one image do not repel each
            other.
        further: unpaired unit rows (k, d) of x's side and (l, d) of y's, in the uniformity only.

    Returns:
        () tensor, >= -8 * uniformity; U of a side with fewer than two items is 0.
    """
    images = torch.arange(len(x), device=x.device)
    if owner is None:
        check_matched(x, y)
        owner = images
    else:
        check_owner(x, y, owner)
    alignment = (x[owner] - y).square().sum(1).mean()
    spread = _uniformity(x, images, further[0]) + _uniformity(y, owner, further[1])
    return alignment + uniformity * spread / 2


def _uniformity(rows: Tensor, items: Tensor, further: Tensor | None) -> Tensor:
    """Compute log mean exp(-2 |a - b|^2) over the pairs of rows of different items."""
    if further is not None and len(further):
        rows = torch.cat([rows, further])
        items = torch.cat([items, -1 - torch.arange(len(further), device=items.device)])
    same = items[:, None] == items
    count = same.numel() - same.sum()
    differ = count > 0
    # Without a pair nothing is masked, so that the gradient of the 0 is finite.
    exponents = (-2 * squared_distances(rows, rows)).masked_fill(same & differ, -torch.inf)
    found = exponents.flatten().logsumexp(0) - count.clamp(min=1).to(rows.dtype).log()
    return found.where(differ, 0)


def mix_pairs(x: Tensor, y: Tensor, lam: float, permutation: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each pair with another, both sides by the same coefficient (FuseMix).

    lam x_i + (1 - lam) x_permutation(i), and the same for y, so the mixtures are still pairs
    (Vouitsis et al. 2024, after mixup). Rows are not normalised again.

    Args:
        x: (n, d), float.
        y: (n, e), float; row i matches x's row i. The widths may differ.
        lam: coefficient in [0, 1].
        permutation: (n,), int64, the row that each is mixed with.

    Raises:
        ShapeError: the shapes do not fit together.
        ValueError: the coefficient is not in [0, 1].
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or permutation.shape != x.shape[:1]:
        raise ShapeError(
            "matched rows and a partner for each are needed, got shapes "
            f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(permutation.shape)}"
        )
    if not 0 <= lam <= 1:
        raise ValueError(f"the mixing coefficient must be in [0, 1], got {lam}")
    return lam * x + (1 - lam) * x[permutation], lam * y + (1 - lam) * y[permutation]


def check_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless label_smoothing is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")


def check_matched(x: Tensor, y: Tensor) -> None:
    """Raise ShapeError unless both are 2-D and of one shape."""
    if x.ndim != 2 or x.shape != y.shape:
        raise ShapeError(
            f"matched rows are needed, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )


def check_owner(x: Tensor, y: Tensor, owner: Tensor) -> None:
    """Raise ShapeError or ValueError unless owner (m,), int64, fits to the rows of x and y."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or owner.shape != y.shape[:1]:
        raise ShapeError(
            "rows of one width and an owner for each row of y are needed, got shapes "
            f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(owner.shape)}"
        )
    if owner.dtype != torch.int64:
        raise ValueError(f"owners must be int64, got {owner.dtype}")
    if not len(x) or not len(owner):
        raise ShapeError(f"at least one row each is needed, got {len(x)} and {len(owner)}")
