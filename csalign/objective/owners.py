"""Which rows of two sets belong together."""

import torch
from torch import Tensor

from csalign.core.errors import ShapeError


def check_matched(x: Tensor, y: Tensor) -> None:
    """Raise ShapeError unless both are 2-D and of one shape."""
    if x.ndim != 2 or x.shape != y.shape:
        raise ShapeError(
            f"matched rows are needed, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )


def check_owner(x: Tensor, y: Tensor, owner: Tensor) -> None:
    """Check that every row of y names a row of x.

    Args:
        x: (n, d).
        y: (m, d).
        owner: (m,), int64, the row of x that each row of y belongs to.

    Raises:
        ShapeError: x and y are not 2-D of one width, or owner is not (m,).
        ValueError: an owner is not in [0, n), or owner does not hold integers.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or owner.shape != y.shape[:1]:
        raise ShapeError(
            "rows of one width and an owner for each row of y are needed, got shapes "
            f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(owner.shape)}"
        )
    if owner.dtype != torch.int64:
        raise ValueError(f"owners must be int64, got {owner.dtype}")
    if not len(owner) or int(owner.min()) < 0 or int(owner.max()) >= len(x):
        raise ValueError(f"every row of y needs an owner from 0 to {len(x) - 1}")


def positives(x: Tensor, y: Tensor, owner: Tensor | None) -> Tensor:
    """The matched pairs as a table.

    Args:
        x: (n, d).
        y: (m, d).
        owner: (m,), int64; None where row i of y belongs to row i of x.

    Returns:
        (n, m), bool.

    Raises:
        ShapeError: see `check_owner` and `check_matched`.
        ValueError: see `check_owner`.
    """
    rows = torch.arange(len(x), device=x.device)
    if owner is None:
        check_matched(x, y)
        owner = rows
    else:
        check_owner(x, y, owner)
    return rows[:, None] == owner
