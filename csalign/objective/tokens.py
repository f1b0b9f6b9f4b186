"""The token term: the divergence between the two token sets of each sample."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.errors import ShapeError
from csalign.objective.kernels import Sigma, bandwidths


def token_divergence(
    x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, *, sigma: Sigma
) -> Tensor:
    """Mean over the batch of the CS divergence between each sample's two sets of tokens.

    `cs_divergence` of the tokens that are there, sample by sample; samples in which a side has no
    token are left out. What padding holds, even NaN, changes neither value nor gradient.

    Args:
        x: (b, v, d), float, any norm: rows are taken as they are, see `unit_tokens`.
        y: (b, l, d), same dtype and device; l may differ from v.
        x_mask: (b, v), bool, True where there is a token.
        y_mask: (b, l), bool.
        sigma: bandwidth, > 0; the mean over several.

    Returns:
        () tensor in nats, >= 0 up to rounding; 0 where every sample is left out.

    Raises:
        ShapeError: the shapes do not fit together.
        ValueError: a mask is not boolean, or sigma is not positive and finite.
    """
    sigmas = bandwidths(sigma)
    _check_tokens(x, y, x_mask, y_mask)
    both = x_mask.any(1) & y_mask.any(1)
    x, x_mask, y, y_mask = x[both], x_mask[both], y[both], y_mask[both]
    if not len(x):
        return x.sum() + y.sum()  # an empty sum is 0 and keeps the graph
    own_x = _log_mean_kernels(x, x, x_mask, x_mask, sigmas)
    own_y = _log_mean_kernels(y, y, y_mask, y_mask, sigmas)
    return (own_x + own_y - 2 * _log_mean_kernels(x, y, x_mask, y_mask, sigmas)).mean()


def unit_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Tokens of norm 1, and zeros for padding.

    Args:
        x: (b, v, d), float.
        mask: (b, v), bool.
    """
    return normalize(x.masked_fill(~mask[..., None], 0), dim=-1)


def _log_mean_kernels(
    x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, sigmas: tuple[float, ...]
) -> Tensor:
    """(s, b): log of the mean kernel between each sample's tokens, for each bandwidth."""
    x, y = x.masked_fill(~x_mask[..., None], 0), y.masked_fill(~y_mask[..., None], 0)
    norms = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :]  # (b, v, l)
    squares = torch.baddbmm(norms, x, y.mT, alpha=-2).clamp(min=0)
    absent = ~(x_mask[:, :, None] & y_mask[:, None, :])
    counts = (x_mask.sum(1) * y_mask.sum(1)).to(x.dtype)
    sums = [
        squares.mul(-0.5 / s**2).masked_fill(absent, -torch.inf).flatten(1).logsumexp(1)
        for s in sigmas
    ]
    return torch.stack(sums) - counts.log()


def _check_tokens(x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor) -> None:
    fits = x.ndim == y.ndim == 3 and len(x) == len(y) and x.shape[2] == y.shape[2]
    if not fits or x_mask.shape != x.shape[:2] or y_mask.shape != y.shape[:2]:
        raise ShapeError(
            "two batches of tokens of one width with their masks are needed, got shapes "
            f"{tuple(x.shape)}, {tuple(y.shape)}, {tuple(x_mask.shape)} and {tuple(y_mask.shape)}"
        )
    if x_mask.dtype != torch.bool or y_mask.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {x_mask.dtype} and {y_mask.dtype}")
