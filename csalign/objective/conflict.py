"""Whether two terms of an objective pull the embeddings the same way."""

from collections.abc import Callable

import torch
from torch import Tensor

Term = Callable[[Tensor, Tensor], Tensor]


def gradient(term: Term, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of a term in the embeddings of both sides.

    Args:
        term: maps (x, y) to a () tensor; one that normalises its rows has no gradient along them.
        x: (n, d), float; detached here.
        y: (m, d), float; detached here.

    Returns:
        (n + m, d) float64, first the rows of x.
    """
    sides = tuple(side.detach().clone().requires_grad_() for side in (x, y))
    with torch.enable_grad():
        value = term(*sides)
    found = torch.autograd.grad(value, sides, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.double() for grad in found])


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine between two gradients of one shape, in [-1, 1]; 0 where one of them vanishes.

    Near -1 the terms undo each other, near 0 they do not meet, near 1 they ask for the same.
    """
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else 0.0
