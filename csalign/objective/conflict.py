"""Agreement of the gradients of two terms of an objective."""

from collections.abc import Callable

import torch
from torch import Tensor

Term = Callable[[Tensor, Tensor], Tensor]


def gradient(term: Term, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of a term in the embeddings of both sides, (n + m, d) float64, rows of x first.

    The term maps x (n, d) and y (m, d), detached here, to a () tensor; one that normalises its rows
    has no gradient along them.
    """
    sides = tuple(side.detach().clone().requires_grad_() for side in (x, y))
    with torch.enable_grad():
        value = term(*sides)
    found = torch.autograd.grad(value, sides, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.double() for grad in found])


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine between two gradients, in [-1, 1]: opposed to agreeing; 0 where one vanishes."""
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else 0.0
