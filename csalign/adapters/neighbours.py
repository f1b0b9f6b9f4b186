"""What rows have from those that are nearest to them."""

import torch
from torch import Tensor

CHUNK_ROWS = 2_048


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
