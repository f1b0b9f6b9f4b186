"""Mixing of pairs into new pairs."""

from torch import Tensor

from csalign.core.errors import ShapeError


def mix_pairs(
    x: Tensor, y: Tensor, lam: Tensor | float, permutation: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix each pair with another, both sides by the same coefficient (FuseMix).

    lam_i x_i + (1 - lam_i) x_permutation(i), and the same of y, so that the mixtures are still
    pairs (Vouitsis et al. 2024, after mixup). Rows are not normalised again.

    Args:
        x: (n, d), float.
        y: (n, e), float; row i is the match of x's row i. The widths may differ.
        lam: one coefficient in [0, 1], or (n,) of them.
        permutation: (n,), int64, the row that each is mixed with.

    Returns:
        (n, d) and (n, e).

    Raises:
        ShapeError: the shapes do not fit together.
        ValueError: a coefficient is not in [0, 1].
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or permutation.shape != x.shape[:1]:
        raise ShapeError(
            "matched rows and a partner for each are needed, got shapes "
            f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(permutation.shape)}"
        )
    if isinstance(lam, Tensor) and lam.ndim:
        if lam.shape != x.shape[:1]:
            raise ShapeError(f"{len(x)} coefficients are needed, got shape {tuple(lam.shape)}")
        lam = lam[:, None]
    inside = (lam >= 0) & (lam <= 1) if isinstance(lam, Tensor) else 0 <= lam <= 1
    if not (inside.all() if isinstance(inside, Tensor) else inside):
        raise ValueError("mixing coefficients must be in [0, 1]")
    mixed_x = lam * x + (1 - lam) * x[permutation]
    return mixed_x, lam * y + (1 - lam) * y[permutation]
