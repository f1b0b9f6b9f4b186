"""The matrix products of the tiled objective, by the fastest route that is right here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from csalign.core.enums import Precision
from csalign.core.onednn import multiply, speed_ratio

# A narrow lead could turn from run to run, and the last digits of what is trained with it.
_WORTHWHILE = 1.3
_TOLERANCE = 1e-5  # relative to the largest value of a product


@dataclass(frozen=True)
class Products:
    """Products of float tiles without a gradient.

    Attributes:
        onednn: whether by oneDNN's operators in place of torch's own.
        precision: what factors are rounded to; sums stay in float32.
    """

    onednn: bool
    precision: Precision

    def table(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """The product a @ b.T.

        Args:
            a: (n, d), float.
            b: (m, d).
            out: (n, m), which may be used for it.
        """
        if self.onednn:
            return multiply(a, b)
        if self._casts(a):
            halves = a.bfloat16(), b.bfloat16().T
            return torch.mm(*halves, out_dtype=torch.float32)
        return torch.mm(a, b.T, out=out)

    def add(self, out: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Add weights @ rows to out.

        Args:
            out: (n, d), changed in place.
            weights: (n, m), may be a transposed view.
            rows: (m, d).
        """
        if self.onednn:
            # A copy here is faster than the one that the operator would make.
            out.add_(multiply(weights.contiguous(), rows.T))
        elif self._casts(out):
            out.add_(torch.mm(weights.bfloat16(), rows.bfloat16(), out_dtype=torch.float32))
        elif self.precision is Precision.BFLOAT16:
            out.add_(torch.mm(weights, rows))  # which is faster than addmm then
        else:
            out.addmm_(weights, rows)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Within it the CPU rounds the factors as `precision` says, where it gains by that."""
        settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
        before = getattr(settings, "fp32_precision", None)  # since torch 2.9
        if self.precision is Precision.FLOAT32 or before is None:
            yield
            return
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before

    def _casts(self, rows: Tensor) -> bool:
        return (
            self.precision is Precision.BFLOAT16
            and rows.device.type == "cuda"
            and rows.dtype == torch.float32
        )


def pick_products(rows: Tensor, precision: Precision = Precision.FLOAT32) -> Products:
    """The products for rows of that device and dtype.

    On the CPU a short trial, once a process, tells whether oneDNN is faster.

    Args:
        rows: an example.
        precision: see `Products`; has no effect on float64, nor on CPUs without bfloat16.
    """
    plain = rows.device.type == "cpu" and rows.dtype == torch.float32
    is_full = precision is Precision.FLOAT32
    return Products(onednn=plain and is_full and _onednn_is_faster(), precision=precision)


@cache
def _onednn_is_faster() -> bool:
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay what they are
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    try:
        if not all(_is_right(w, rows) for w, rows in ((a, b), (a, b.T), (a[:3], b[:5]))):
            return False
        return speed_ratio(lambda: torch.mm(a, b.T), lambda: multiply(a, b)) >= _WORTHWHILE
    except (AttributeError, RuntimeError):
        return False


def _is_right(a: Tensor, b: Tensor) -> bool:
    expected = a @ b.T
    error = (multiply(a, b) - expected).abs().max()
    return bool(error <= _TOLERANCE * expected.abs().max())
