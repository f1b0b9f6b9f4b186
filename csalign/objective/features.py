"""Orthogonal random features of the Gaussian kernel, and the divergences of their means.

k(a, b) = E_w cos(w . (a - b)) over w ~ N(0, 1 / sigma^2) (Rahimi and Recht 2007), so that a mean
kernel over all pairs of rows, diagonal included, is the mean over w of a product of two means of
exp(i w . x), each one pass over its rows. In blocks of as many w as rows are wide, the directions
are orthogonal and the lengths drawn as those of independent w: every w alone has the same law, and
the estimate less noise (Yu et al. 2016).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from csalign.core.errors import ShapeError
from csalign.objective.kernels import bandwidths


class RandomFeatures:
    """Frequencies drawn by a seed.

    Args:
        width: of the rows.
        count: frequencies, each with a cosine and a sine.
        seed: of the draw.
        device: where to compute.
        dtype: of the rows; the draw itself is of float64.

    Attributes:
        frequencies: (count, width), for bandwidth 1.
    """

    def __init__(
        self,
        width: int,
        *,
        count: int = 2_048,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        blocks = [_orthogonal(width, generator) for _ in range(-(-count // width))]
        self.frequencies = torch.cat(blocks)[:count].to(device, dtype)

    def mean(self, x: Tensor, *, sigma: float) -> Tensor:
        """Mean feature of some rows; differentiable.

        Args:
            x: (n, width), same dtype and device as the frequencies.
            sigma: bandwidth, > 0.

        Returns:
            (2, count): cosines, sines.

        Raises:
            ShapeError: no rows, or another width.
            ValueError: sigma is not positive and finite.
        """
        bandwidths(sigma)
        if x.ndim != 2 or not len(x) or x.shape[1] != self.frequencies.shape[1]:
            raise ShapeError(
                f"rows of width {self.frequencies.shape[1]} are needed, got {tuple(x.shape)}"
            )
        phases = x @ (self.frequencies.T / sigma)
        return torch.stack([phases.cos().mean(0), phases.sin().mean(0)])


class MeanKernels(NamedTuple):
    """Mean kernels, () tensors: x with x, y with y, x with y."""

    xx: Tensor
    yy: Tensor
    xy: Tensor


def mean_kernels(mean_x: Tensor, mean_y: Tensor) -> MeanKernels:
    """Mean kernels over all pairs, diagonals included, of two mean features, both (2, count).

    Unbiased: a cosine and a sine of one frequency make |feature|^2 1 exactly. xy may be negative.
    """
    count = mean_x.shape[1]
    return MeanKernels(
        xx=mean_x.square().sum() / count,
        yy=mean_y.square().sum() / count,
        xy=(mean_x * mean_y).sum() / count,
    )


def cs_of_means(mean_x: Tensor, mean_y: Tensor) -> Tensor:
    """Cauchy-Schwarz divergence of two mean features, both (2, count); >= 0, differentiable.

    Where xy is below what the features' noise leaves of it, sqrt(xx yy / count), its logarithm goes
    on as a straight line, so that value and gradient stay finite and still pull the sets together.
    """
    xx, yy, xy = mean_kernels(mean_x, mean_y)
    cosine = xy / (xx * yy).sqrt()
    floor = 1 / math.sqrt(mean_x.shape[1])
    below = math.log(floor) + (cosine - floor) / floor
    return -2 * torch.where(cosine > floor, cosine.clamp(min=floor).log(), below)


def _orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """(width, width) float64: orthogonal rows, as long as independent Gaussian ones."""

    def gaussian() -> Tensor:
        return torch.randn(width, width, generator=generator, dtype=torch.float64)

    found = torch.linalg.qr(gaussian())
    directions: Tensor = found.Q
    directions = directions * found.R.diagonal().sign()  # else the law is not uniform
    lengths: Tensor = torch.linalg.vector_norm(gaussian(), dim=1, keepdim=True)
    return directions * lengths
