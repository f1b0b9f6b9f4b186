"""oneDNN's matrix products, which are faster than torch's own on some CPUs.

torch multiplies float32 with MKL, which is about half as fast as oneDNN where it keeps to older
instructions than the CPU has. The operators are private to torch, the ones that torch.compile puts
in place of a frozen linear layer: who uses them tries them first, and is ready for AttributeError
and RuntimeError.
"""

import time
from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def pack(weight: Any) -> torch.Tensor:
    """A weight (out, in) laid out for `multiply`; opaque to most of torch."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The product x @ weight.T + bias, without a gradient.

    Args:
        x: (..., in), on the CPU, float32 or bfloat16.
        weight: (out, in), of the same dtype, packed or not.
        bias: (out,), if any.
    """
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def speed_ratio(plain: Callable[[], object], other: Callable[[], object]) -> float:
    """How many times as fast as `plain` `other` is, at their best of five calls each."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(5):  # in turns, so that a busy machine slows both
            for call, taken in zip((plain, other), times, strict=True):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])
