"""Whether two terms of an objective pull the embeddings the same way."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Term = Callable[[Tensor, Tensor], Tensor]


class GradientCosine(NamedTuple):
    """Cosines between the gradients of two terms, each in [-1, 1]; 0 where a gradient vanishes.

    Attributes:
        overall: of the gradients in both sides together.
        x: of those in x alone.
        y: of those in y alone.
    """

    overall: float
    x: float
    y: float


def gradient_cosine(term_a: Term, term_b: Term, x: Tensor, y: Tensor) -> GradientCosine:
    """Cosine between the gradients of two terms in the embeddings.

    Near -1 the terms undo each other, near 0 they do not meet, near 1 they ask for the same. A
    term that normalises its rows has no gradient along them.

    Args:
        term_a: maps (x, y) to a () tensor.
        term_b: the other term.
        x: (n, d), float; detached here.
        y: (m, d), float; detached here.
    """
    sides = tuple(side.detach().clone().requires_grad_() for side in (x, y))
    grads = []
    for term in (term_a, term_b):
        with torch.enable_grad():
            value = term(*sides)
        found = torch.autograd.grad(value, sides, allow_unused=True, materialize_grads=True)
        grads.append([grad.double().flatten() for grad in found])
    (ax, ay), (bx, by) = grads
    return GradientCosine(
        overall=_cosine(torch.cat([ax, ay]), torch.cat([bx, by])),
        x=_cosine(ax, bx),
        y=_cosine(ay, by),
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else 0.0
