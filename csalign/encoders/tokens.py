"""Keep the tokens of an item few."""

from math import isqrt

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from csalign.core.enums import Modality
from csalign.encoders.base import Floats


def limit_tokens(
    tokens: list[Floats],
    side: Modality,
    max_tokens: int | None,
    grid: tuple[int, int] | None = None,
) -> list[Floats]:
    """Leave at most `max_tokens` of each item; items that have no more stay as they are.

    Texts are cut. Images are averaged to the largest k x k, over a grid where there is one and
    over runs of neighbours where there is none.

    Args:
        tokens: n arrays (t_i, d).
        side: what the items are.
        max_tokens: one or more; None leaves everything as it is.
        grid: (rows, columns) of the image tokens, which lie row by row; by default they are taken
            for a square if their number is one.
    """
    if max_tokens is None:
        return tokens
    return [
        own if len(own) <= max_tokens else _limit(own, side, max_tokens, grid) for own in tokens
    ]


def _limit(tokens: Floats, side: Modality, max_tokens: int, grid: tuple[int, int] | None) -> Floats:
    if side is Modality.TEXT:
        return tokens[:max_tokens].copy()  # a view would keep all of them in memory
    k = isqrt(max_tokens)
    values = torch.from_numpy(np.ascontiguousarray(tokens.T, np.float32))  # (d, t)
    edge = isqrt(len(tokens))
    rows, columns = grid or (edge, edge)
    if rows * columns == len(tokens):
        squares = values.reshape(-1, rows, columns)
        pooled = adaptive_avg_pool2d(squares, (min(k, rows), min(k, columns))).flatten(1)
    else:
        pooled = adaptive_avg_pool1d(values, k * k)
    array: Floats = pooled.T.contiguous().numpy()
    return array
