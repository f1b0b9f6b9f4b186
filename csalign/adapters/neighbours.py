"""Which rows of two sets are each other's nearest, with hubs held back."""

import torch
from torch import Tensor

CHUNK_ROWS = 2_048


def mutual_neighbours(x: Tensor, y: Tensor, *, k: int = 10) -> tuple[Tensor, Tensor]:
    """Pairs of rows that are each other's nearest by CSLS (Conneau et al. 2018, 1710.04087).

    CSLS is 2 cos(x, y) minus the mean cosine of x to its k nearest rows of y, and of y to its k
    nearest of x: a row that is near to everything is nobody's partner for that alone.

    Args:
        x: (n, d), unit rows, n >= 1.
        y: (m, d), unit rows, m >= 1, same dtype and device.
        k: neighbours that tell how crowded a row's surroundings are; fewer where there are fewer.

    Returns:
        (p,) rows of x, ascending, and their (p,) partners in y, each at most once.
    """
    crowd_x, crowd_y = _crowding(x, y, k), _crowding(y, x, k)
    to_y, to_x = _nearest(x, y, crowd_y), _nearest(y, x, crowd_x)
    rows = torch.arange(len(x), device=x.device)
    chosen = rows[to_x[to_y] == rows]
    return chosen, to_y[chosen]


def nearest_mean(known: Tensor, values: Tensor, rows: Tensor, *, k: int = 10) -> Tensor:
    """For each row the mean of a value over the k known rows that are nearest by cosine.

    Args:
        known: (n, d), unit rows, n >= 1.
        values: (n,), float.
        rows: (m, d), unit rows.
        k: fewer where fewer are known.

    Returns:
        (m,), of the dtype of `values`.
    """
    k = min(k, len(known))
    parts = [
        values[(part @ known.T).topk(k).indices].mean(1) for part in torch.split(rows, CHUNK_ROWS)
    ]
    return torch.cat(parts) if parts else values[:0]


def _crowding(x: Tensor, y: Tensor, k: int) -> Tensor:
    k = min(k, len(y))
    return torch.cat([(part @ y.T).topk(k).values.mean(1) for part in torch.split(x, CHUNK_ROWS)])


def _nearest(x: Tensor, y: Tensor, crowding: Tensor) -> Tensor:
    return torch.cat([(2 * part @ y.T - crowding).argmax(1) for part in torch.split(x, CHUNK_ROWS)])
