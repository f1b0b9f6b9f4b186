"""Products of float32 matrices on a CPU by oneDNN.

torch multiplies float32 matrices on a CPU with MKL, which on AMD processors takes about twice as
long as oneDNN, torch's library for convolutions. What is computed differs by rounding alone.
"""

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

MIN_TERMS = 2**22  # below, preparing oneDNN takes longer than it saves


@cache
def _onednn() -> Any:
    """Return oneDNN's x @ weight.T + bias of plain tensors; None if this torch has none."""
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    try:
        two = torch.full((2, 2), 2.0)
        works = found is not None and found(two, two, None, "none", [], "").tolist() == 2 * [[8, 8]]
    except (RuntimeError, NotImplementedError, TypeError):
        works = False
    return found if works else None


def _is_plain(*tensors: Tensor) -> bool:
    """Return whether these are float32 on a CPU, and no graph of them is compiled or exported."""
    plain = all(
        type(own) in (Tensor, nn.Parameter)
        and own.dtype == torch.float32
        and own.device.type == "cpu"
        for own in tensors
    )
    is_traced = torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
    return plain and not is_traced and not torch.is_autocast_enabled("cpu")


def _suits(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN can multiply a (..., d) by b (m, d), and is faster."""
    # Sizes come last: a graph that is exported must not depend on them.
    return _is_plain(a, b) and prod(a.shape) * len(b) >= MIN_TERMS and bool(_onednn())


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b.T, (n, m), of a (n, d) and b (m, d), without a gradient."""
    if not _suits(a, b):
        return a @ b.T
    found: Tensor = _onednn()(a.detach(), b.detach(), None, "none", [], "")
    return found


class FastLinear(nn.Linear):
    """A linear layer that is multiplied by oneDNN where that is possible."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if input.ndim < 2 or not _suits(input, self.weight):
            return linear(input, self.weight, self.bias)
        found: Tensor = _Linear.apply(input.flatten(0, -2), self.weight, self.bias)
        return found.reshape(*input.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        found: Tensor = _onednn()(x, weight, bias, "none", [], "")
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T) if to_x else None,
            product(gradient.T, x.T) if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )
