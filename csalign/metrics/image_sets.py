"""How far two sets of images lie apart, by their embeddings."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.metrics.gap import frechet_distance
from csalign.objective.kernels import squared_distances

# Of the paper on CMMD: the bandwidth, and a factor that makes figures readable.
CMMD_SIGMA = 10.0
CMMD_SCALE = 1_000.0
TILE = 2_048  # 2,048 x 2,048 float64 is 34 MB


def image_distances(x: Tensor, y: Tensor) -> dict[str, float]:
    """All figures, as ``csalign eval`` prints them under "distribution".

    Args:
        x: (n, d) real images, n >= 2, as an encoder gives them, no row of norm 0.
        y: (m, d) generated images, m >= 2.
    """
    unit_x, unit_y = (normalize(rows.double(), dim=1) for rows in (x, y))
    return {
        "frechet": frechet_distance(x, y, unbiased=True),
        "frechet_unit": frechet_distance(unit_x, unit_y, unbiased=True),
        "cmmd": cmmd(unit_x, unit_y),
    }


def cmmd(x: Tensor, y: Tensor) -> float:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024), which needs no Gaussian fit.

    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)) with k(a, b) = exp(-|a - b|^2 / 200) over
    all pairs, diagonals included, in tiles.

    Args:
        x: (n, d) unit rows.
        y: (m, d) unit rows.

    Returns:
        >= 0 up to rounding.
    """
    within = _mean_kernel(x, x) + _mean_kernel(y, y)
    return CMMD_SCALE * (within - 2 * _mean_kernel(x, y))


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    """Mean of k - 1, which keeps the digits in which kernels of this bandwidth differ."""
    total = 0.0
    for rows in _tiles(x):
        for columns in _tiles(y):
            squares = squared_distances(rows, columns)
            total += float(squares.mul_(-0.5 / CMMD_SIGMA**2).expm1_().sum())
    return total / len(x) / len(y)


def _tiles(x: Tensor) -> Iterator[Tensor]:
    for tile in torch.split(x, TILE):
        yield tile.double()
