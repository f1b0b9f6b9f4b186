"""The divergences by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from csalign.core.enums import DivergenceName
from csalign.core.errors import ShapeError
from csalign.objective.divergence import cs_divergence, cs_of_means, mmd, mmd_of_means
from csalign.objective.gaussian import gaussian_jeffreys
from csalign.objective.kernels import Sigma, check_sets
from csalign.objective.sinkhorn import sinkhorn_divergence


@dataclass(frozen=True)
class Divergence:
    """A measure of how far apart two sets of rows lie.

    Attributes:
        name: what it is chosen by.
        minimum: rows that each side needs.
        has_bandwidth: whether sigma changes it.
        matched: whether it compares matched rows and so has no use for unpaired ones.
        of_means: computes it from `FusedTerms.log_means`, None where they do not tell it.
    """

    name: DivergenceName
    minimum: int
    has_bandwidth: bool
    matched: bool
    _compute: Callable[[Tensor, Tensor, Sigma], Tensor]
    of_means: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, y: Tensor, *, sigma: Sigma, pairs: int | None = None) -> Tensor:
        """Compute it.

        Args:
            x: (n, d), float.
            y: (m, d), same dtype and device.
            sigma: bandwidth or bandwidths, > 0; not read without `has_bandwidth`.
            pairs: so many rows at the start of both sides are matched, row by row; default: all,
                and then m must be n. Read with `matched` alone.

        Returns:
            () tensor, differentiable in both.

        Raises:
            ShapeError: the shapes do not fit together, or a side has fewer than `minimum` rows.
            ValueError: sigma is not positive and finite.
        """
        check_sets(x, y)
        if self.matched:
            x, y = _matched_rows(x, y, pairs)
        if min(len(x), len(y)) < self.minimum:
            raise ShapeError(
                f"the divergence {self.name.value!r} needs {self.minimum} rows a side or more, "
                f"got {len(x)} and {len(y)}"
            )
        return self._compute(x, y, sigma)


def pairs_mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared Euclidean distance of matched rows, x and y both (n, d); () tensor."""
    return (x - y).square().sum(1).mean()


def divergence(name: DivergenceName) -> Divergence:
    """The divergence of a name.

    Args:
        name: "cs", "mmd", "gaussian-kl" (`gaussian_jeffreys`), "sinkhorn" (sigma is the blur),
            "pairs-mse", or "none", a constant 0.

    Raises:
        ValueError: there is no such name.
    """
    return _DIVERGENCES[DivergenceName(name)]


def _matched_rows(x: Tensor, y: Tensor, pairs: int | None) -> tuple[Tensor, Tensor]:
    count = len(x) if pairs is None else pairs
    if (pairs is None and len(x) != len(y)) or not 0 <= count <= min(len(x), len(y)):
        raise ShapeError(f"{count} matched rows are needed, got {len(x)} and {len(y)}")
    return x[:count], y[:count]


_DIVERGENCES = {
    DivergenceName.CS: Divergence(
        DivergenceName.CS,
        minimum=1,
        has_bandwidth=True,
        matched=False,
        _compute=lambda x, y, sigma: cs_divergence(x, y, sigma=sigma),
        of_means=cs_of_means,
    ),
    DivergenceName.MMD: Divergence(
        DivergenceName.MMD,
        minimum=1,
        has_bandwidth=True,
        matched=False,
        _compute=lambda x, y, sigma: mmd(x, y, sigma=sigma),
        of_means=mmd_of_means,
    ),
    DivergenceName.GAUSSIAN_KL: Divergence(
        DivergenceName.GAUSSIAN_KL,
        minimum=2,
        has_bandwidth=False,
        matched=False,
        _compute=lambda x, y, _: gaussian_jeffreys(x, y),
    ),
    DivergenceName.SINKHORN: Divergence(
        DivergenceName.SINKHORN,
        minimum=1,
        has_bandwidth=True,
        matched=False,
        _compute=lambda x, y, sigma: sinkhorn_divergence(x, y, sigma=sigma),
    ),
    DivergenceName.PAIRS_MSE: Divergence(
        DivergenceName.PAIRS_MSE,
        minimum=1,
        has_bandwidth=False,
        matched=True,
        _compute=lambda x, y, _: pairs_mse(x, y),
    ),
    DivergenceName.NONE: Divergence(
        DivergenceName.NONE,
        minimum=1,
        has_bandwidth=False,
        matched=False,
        # An empty sum is 0 and keeps the graph.
        _compute=lambda x, y, _: x[:0].sum() + y[:0].sum(),
    ),
}
