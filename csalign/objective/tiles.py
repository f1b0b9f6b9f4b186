"""Sums over all pairs of unit rows and their gradients, tile by tile, outside of autograd.

Tables of cosines are computed one tile at a time in reused buffers, so memory grows with the rows
and not with their square. InfoNCE and the kernels share them: for unit rows the Gaussian kernel is
exp((cos - 1) / sigma^2). Scales and factors stay on the device, which nothing here waits for.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csalign.core.enums import Precision
from csalign.objective.products import product

# Cosines times this neither overflow nor underflow in float32, whatever they are.
SAFE_FACTOR = 35.0
# Smaller exponents are negligible beside the largest, but their exponentials are subnormal: slow.
_MIN_EXPONENT = -80.0

log = logging.getLogger(__name__)


@cache
def supports_bfloat16(device_type: str) -> bool:
    """Return whether float32 products can round their factors to bfloat16 on a kind of device.

    Where they cannot, or where rounding would cost time, it logs a warning, once per process.
    """
    if device_type == "cuda":
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        found = version >= (2, 8) and torch.cuda.is_bf16_supported(including_emulation=False)
        needs = "torch 2.8 and a GPU of compute capability 8.0"
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        has_setting = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
        found = device_type == "cpu" and has_setting and bool(native)
        needs = "a recent torch (2.9 at least) and a CPU with AVX-512 BF16 or AMX, or a GPU"
    if not found:
        log.warning(
            "precision bfloat16 is not supported on this %s by torch %s: the objective computes in "
            "float32; bfloat16 needs %s",
            device_type,
            torch.__version__,
            needs,
        )
    return found


@dataclass(frozen=True)
class TilePlan:
    """Sums to compute, and the division of the tables into tiles."""

    pairs: int  # rows at the start of both sides that are matched, row by row
    compared: tuple[int, int]  # rows at the start of each side in InfoNCE
    kernels: int  # number of Gaussian kernels, which see all rows
    small_scale: bool  # whether the logit scale is known to be at most SAFE_FACTOR
    smoothing: float  # label smoothing of InfoNCE
    tile: int  # rows and columns of a tile, at most
    precision: Precision = Precision.FLOAT32  # of the factors of products; sums are float32
    compiled: bool = False  # whether torch.compile fuses what is done to a tile
    rank: int = 0  # number of this process among the `processes` that share the tiles
    processes: int = 1

    def spans(self, count: int, compared: int) -> list[slice]:
        """Divide rows into spans of similar size that do not cross the end of pairs or compared."""
        spans = []
        for start, stop in pairwise((0, self.pairs, compared, count)):
            if start < stop and (start < compared or self.kernels):
                parts = -(-(stop - start) // self.tile)
                edges = [start + (stop - start) * k // parts for k in range(parts + 1)]
                spans += [slice(*edge) for edge in pairwise(edges)]
        return spans

    def cross_tiles(self, n: int, m: int) -> Iterator[tuple[slice, slice]]:
        """Return this process's tiles of the table of x and y."""
        columns = self.spans(m, self.compared[1])
        tiles = ((i, j) for i in self.spans(n, self.compared[0]) for j in columns)
        return islice(tiles, self.rank, None, self.processes)

    def own_tiles(self, n: int) -> Iterator[tuple[slice, slice]]:
        """Return this process's tiles on and above the diagonal of a set's table with itself."""
        tiles = combinations_with_replacement(self.spans(n, self.pairs), 2)
        return islice(tiles, self.rank, None, self.processes)

    def directions(self, rows: slice, columns: slice) -> tuple[bool, bool]:
        """Return whether InfoNCE compares a tile's rows with its columns, and vice versa."""
        return (
            rows.stop <= self.pairs and columns.stop <= self.compared[1],
            columns.stop <= self.pairs and rows.stop <= self.compared[0],
        )


class CrossSums(NamedTuple):
    """Log-sum-exp of the logits of each paired row of x and of y, (pairs,), and of each kernel."""

    rows: Tensor
    columns: Tensor
    kernels: Tensor


class Tiles:
    """Tables of cosines of unit rows x (n, d) and y (m, d), with two reused buffers.

    The logits are scale, a () tensor, times the cosines; factors, (s,), are 1 / sigma^2 of each
    Gaussian kernel.
    """

    def __init__(self, plan: TilePlan, x: Tensor, y: Tensor, scale: Tensor, factors: Tensor):
        self.plan, self.x, self.y, self.scale, self.factors = plan, x, y, scale, factors
        cells = min(max(len(x), len(y)), plan.tile) ** 2
        self._flat = [x.new_empty(cells) for _ in range(2)]
        rounds = plan.precision is Precision.BFLOAT16 and x.dtype == torch.float32
        steps: list[Any] = [_compiled(f) if plan.compiled else f for f in _OF_TILES]
        self._log_sums, self._add_up_probabilities, self._kernel = steps
        self._rounds = rounds and supports_bfloat16(x.device.type)
        self._casts = self._rounds and x.device.type == "cuda"

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Set in this block what the plan needs of torch.

        On a CPU that is the rounding of float32 products; if compiled, that without a compiler
        functions run as they are, which autograd's threads would not have from their caller.
        """
        with ExitStack() as stack:
            if self.plan.compiled:
                stack.enter_context(torch._dynamo.config.patch(suppress_errors=True))
            if self._rounds and not self._casts:
                products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
                stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
                products.fp32_precision = "bf16"
            yield

    def cross_sums(self) -> CrossSums:
        """Sum over this process's tiles of x and y; -inf for none."""
        plan, x, y = self.plan, self.x, self.y
        rows, columns = (x.new_full((plan.pairs,), -torch.inf) for _ in range(2))
        kernels = [x.new_full((plan.kernels,), -torch.inf)]
        for i, j in plan.cross_tiles(len(x), len(y)):
            cosines, spare = self._cosines(x[i], y[j]), self._buffers(i, j)[0]
            along_rows, along_columns = plan.directions(i, j)
            if along_rows or along_columns:
                by_row, by_column = self._log_sums(cosines, self.scale, plan.small_scale, spare)
                if along_rows:
                    torch.logaddexp(rows[i], by_row, out=rows[i])
                if along_columns:
                    torch.logaddexp(columns[j], by_column, out=columns[j])
            if plan.kernels:
                shifts = self.factors * cosines.amax()
                sums = [
                    self._kernel(cosines, factor, shift, spare).sum()
                    for factor, shift in zip(self.factors, shifts, strict=True)
                ]
                kernels.append(torch.stack(sums).log() + shifts - self.factors)
        return CrossSums(rows, columns, torch.stack(kernels).logsumexp(0))

    def add_cross_gradients(
        self,
        gradients: tuple[Tensor | None, Tensor | None],
        sums: CrossSums,
        upstream: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Add the gradients of InfoNCE and of the kernels' log-sums; return that of the scale.

        Args:
            gradients: of x and y, added to in place; None where it is not needed.
            sums: result of `cross_sums`, over all processes.
            upstream: gradients of InfoNCE, (), and of each kernel's log-sum, (s,).
        """
        plan, x, y = self.plan, self.x, self.y
        share = self.scale * upstream[0] / (2 * max(plan.pairs, 1))
        kernels = (self.factors, self.factors + sums.kernels, self.factors * upstream[1])
        to_scale = x.new_zeros(())
        unused = x.new_full((), torch.inf)  # as a log-sum: gives the line a probability of 0
        for i, j in plan.cross_tiles(len(x), len(y)):
            cosines, (weights, spare) = self._cosines(x[i], y[j]), self._buffers(i, j)
            along_rows, along_columns = plan.directions(i, j)
            if along_rows or along_columns:
                lines = (
                    sums.rows[i, None] if along_rows else unused.expand(len(cosines), 1),
                    sums.columns[j] if along_columns else unused.expand(cosines.shape[1]),
                )
                self._add_up_probabilities(
                    cosines, self.scale, plan.small_scale, lines, share, (weights, spare)
                )
                self._subtract_targets(weights, share, i, j)
                to_scale += torch.dot(weights.flatten(), cosines.flatten())
            else:
                weights.zero_()
            for factor, shift, outer in zip(*kernels, strict=True):
                weights.addcmul_(self._kernel(cosines, factor, shift, spare), outer)
            if gradients[0] is not None:
                self._add_product(gradients[0][i], weights, y[j])
            if gradients[1] is not None:
                self._add_product(gradients[1][j], weights.T, x[i])
        return to_scale / self.scale

    def own_sums(self, rows: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Sum the kernels between the rows of one set, computing half of the table.

        Returns the log of the sum of each kernel over all rows, (s,), and if needed for each kernel
        sum_j k(r_i, r_j) r_j, (s, n, d), of which the gradient is a multiple.
        """
        pulled = rows.new_zeros(self.plan.kernels, *rows.shape) if with_gradient else None
        sums = rows.new_zeros(self.plan.kernels)
        for i, j in self.plan.own_tiles(len(rows)):
            cosines, spare = self._cosines(rows[i], rows[j]), self._buffers(i, j)[0]
            for k, factor in enumerate(self.factors):
                # The sum cannot underflow, since each row is at distance 0 from itself.
                kernel = self._kernel(cosines, factor, factor, spare)
                sums[k] += (1 if i == j else 2) * kernel.sum()
                if pulled is not None:
                    self._add_product(pulled[k, i], kernel, rows[j])
                    if i != j:
                        self._add_product(pulled[k, j], kernel.T, rows[i])
        return sums.log(), pulled

    def _buffers(self, rows: slice, columns: slice) -> list[Tensor]:
        shape = rows.stop - rows.start, columns.stop - columns.start
        return [flat[: math.prod(shape)].view(shape) for flat in self._flat]

    def _cosines(self, a: Tensor, b: Tensor) -> Tensor:
        if self._casts:
            return torch.mm(a.bfloat16(), b.bfloat16().T, out_dtype=torch.float32)
        return torch.mm(a, b.T) if self._rounds else product(a, b)

    def _add_product(self, out: Tensor, weights: Tensor, rows: Tensor) -> None:
        out.add_(self._cosines(weights, rows.T))

    def _subtract_targets(
        self, weights: Tensor, share: Tensor, rows: slice, columns: slice
    ) -> None:
        """Subtract share times the targets of both directions from a tile."""
        plan = self.plan
        if plan.smoothing:
            directions = plan.directions(rows, columns)
            for compares, compared in zip(directions, reversed(plan.compared), strict=True):
                if compares:
                    weights.sub_(share * plan.smoothing / compared)
        start = max(rows.start, columns.start)
        stop = min(rows.stop, columns.stop, plan.pairs)
        if start < stop:
            matched = weights[start - rows.start : stop - rows.start]
            matched = matched[:, start - columns.start : stop - columns.start]
            matched.diagonal().sub_(2 * share * (1 - plan.smoothing))


def _log_sums(
    cosines: Tensor, scale: Tensor, small_scale: bool, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute log-sum-exp of a tile's logits along its rows and columns."""
    logits = torch.mul(cosines, scale, out=spare)
    if not small_scale:
        return logits.logsumexp(1), logits.logsumexp(0)
    logits.exp_()
    return logits.sum(1).log_(), logits.sum(0).log_()


def _add_up_probabilities(
    cosines: Tensor,
    scale: Tensor,
    small_scale: bool,
    log_sums: tuple[Tensor, Tensor],
    share: Tensor,
    out: tuple[Tensor, Tensor],
) -> None:
    """Write share times (softmax along rows + softmax along columns) into the first of `out`."""
    found, spare = out
    if small_scale:
        rows, columns = (share * (-sums).exp() for sums in log_sums)
        torch.mul(cosines, scale, out=found).exp_()
        found.mul_(torch.add(rows, columns, out=spare))
        return
    for sums, tensor in zip(log_sums, out, strict=True):
        _kernel(cosines, scale, sums, tensor)
    found.add_(spare).mul_(share)


def _kernel(cosines: Tensor, factor: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Compute exp(factor * cosine - shift), which must not overflow."""
    return torch.mul(cosines, factor, out=out).sub_(shift).clamp_(min=_MIN_EXPONENT).exp_()


# What is done to a tile between products, most of the time beside them on a GPU.
_OF_TILES = (_log_sums, _add_up_probabilities, _kernel)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of tiles, for all their shapes."""
    return torch.compile(function, dynamic=True)
