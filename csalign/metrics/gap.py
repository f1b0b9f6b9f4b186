"""The modality gap: how far apart two sets of unit embeddings are, each figure with its source.

x are images (n, d), y are texts (m, d), both unit rows of any float dtype; every figure is computed
in float64, sums over rows in chunks. If a side has more than `MAX_ROWS`, the mean kernels over all
pairs of rows are estimated by landmarks, with standard errors, and the linear classifier uses
`MAX_ROWS` per side.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.progress import tick
from csalign.metrics.landmarks import (
    MeanKernels,
    estimate_mean_kernels,
    exact_mean_kernels,
    without_diagonal,
)
from csalign.objective.kernels import tiled_log_mean_kernels

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

MAX_ROWS = 5_000
CHUNK_ROWS = 65_536
SPECTRUM = 64
UNIFORMITY_SIGMA = 0.5  # exp(-2 |x - y|^2) is the Gaussian kernel of this bandwidth
CMMD_SIGMA, CMMD_SCALE = 10.0, 1_000.0  # of the paper on CMMD

log = logging.getLogger(__name__)


def gap_suite(
    x: Array, y: Array, text_image: Ints, *, sigma: float, seed: int, max_rows: int = MAX_ROWS
) -> dict[str, Any]:
    """Compute all figures of the gap, as ``csalign eval --json`` prints them under "gap".

    Their formulas and sources are in `csalign.metrics.explain`. "standard_errors" is present where
    a figure is an estimate, nested as the figures are.

    Args:
        x: (n, d), unit image embeddings.
        y: (m, d), unit text embeddings.
        text_image: (m,) image row of each text, -1 for none.
        sigma: bandwidth of the CS and MMD figures.
        seed: of the sampling above `max_rows` rows and of the classifier's folds.
        max_rows: rows per side up to which all pairs of rows are computed.
    """
    images, texts = torch.from_numpy(x), torch.from_numpy(y)
    paired = np.flatnonzero(text_image >= 0)
    pairs = torch.from_numpy(text_image[paired]), torch.from_numpy(paired)
    rng = np.random.default_rng(seed)
    rows_x, rows_y = (
        np.sort(rng.choice(n, min(n, max_rows), replace=False)) for n in (len(x), len(y))
    )
    few_x, few_y = images[rows_x].double(), texts[rows_y].double()
    folds_x, folds_y = pair_folds(len(x), text_image, rng)
    tick("covariances")
    roots = _covariance_root(images), _covariance_root(texts)
    (rank_x, spectrum_x), (rank_y, spectrum_y) = map(_spectrum, roots)
    figures, errors = _kernel_figures(images, texts, (few_x, few_y), sigma, seed)
    tick("gap")
    parts = _frechet_parts(centroid_distance(images, texts), *roots)
    return {
        "centroid_distance": centroid_distance(images, texts),
        "rmg": relative_modality_gap(images, texts, pairs),
        "cs_divergence": figures["cs_divergence"],
        "mmd": figures["mmd"],
        "frechet": sum(parts.values()),
        "frechet_parts": parts,
        "linear_separability": linear_separability(few_x, few_y, folds_x[rows_x], folds_y[rows_y]),
        "alignment": alignment(images, texts, pairs),
        "uniformity": figures["uniformity"],
        "effective_rank": {"image": rank_x, "text": rank_y},
        "spectrum": {"image": spectrum_x, "text": spectrum_y},
        **({"standard_errors": errors} if errors else {}),
    }


def _kernel_figures(
    x: Tensor, y: Tensor, few: tuple[Tensor, Tensor], sigma: float, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the figures that are mean kernels, and their standard errors, {} if exact."""
    sigmas = sigma, UNIFORMITY_SIGMA
    if len(few[0]) < len(x) or len(few[1]) < len(y):
        values, errors = _values_and_errors(estimate_mean_kernels(x, y, sigmas=sigmas, seed=seed))
        if all(map(math.isfinite, (errors["cs_divergence"], errors["mmd"]))):
            return values, errors
        log.warning(
            "at bandwidth %g the kernel means are too small to estimate from all rows; the CS "
            "divergence, MMD and uniformity are those of %d rows per side, drawn by the seed",
            sigma,
            max(map(len, few)),
        )
    return _values_and_errors(exact_mean_kernels(*few, sigmas=sigmas))[0], {}


def _values_and_errors(means: list[MeanKernels]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nest the figures of the mean kernels at both bandwidths as `gap_suite` does."""
    at_sigma, of_uniformity = means
    cs, mmd, parts = at_sigma.cs_divergence(), at_sigma.mmd(), of_uniformity.uniformity()
    values, errors = (
        {
            "cs_divergence": cs[k],
            "mmd": mmd[k],
            "uniformity": {name: found[k] for name, found in parts.items()},
        }
        for k in (0, 1)
    )
    return values, errors


def centroid_distance(x: Tensor, y: Tensor) -> float:
    """Compute the norm of the difference of the two means, in [0, 2] (Liang et al. 2022)."""
    return float((_mean(x) - _mean(y)).norm())


def relative_modality_gap(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor]) -> float:
    """Compute the relative modality gap, RMG = p / (p + w), in [0, 1] (Schrodi et al. 2024).

    p is the mean of (1 - cos) / 2 over the matched image and text rows of pairs, (k,) each; w the
    mean over all ordered pairs i != j inside each modality, averaged over the two.
    """
    # Unit rows: (1 - cos) / 2 = |x - y|^2 / 4.
    across = alignment(x, y, pairs) / 4
    within = (_mean_distance_within(x) + _mean_distance_within(y)) / 2
    return across / (across + within) if across + within else 0.0


def _mean_distance_within(x: Tensor) -> float:
    n = len(x)
    if n < 2:
        return 0.0
    # sum_{i != j} x_i . x_j = |sum_i x_i|^2 - sum_i |x_i|^2, without the n x n matrix.
    squares = sum(float(chunk.square().sum()) for chunk in _chunks(x))
    off_diagonal = float((_mean(x) * n).square().sum()) - squares
    return (1 - off_diagonal / (n * (n - 1))) / 2


def frechet_distance(x: Tensor, y: Tensor, *, unbiased: bool = False) -> float:
    """Compute the Frechet distance between Gaussian fits (Dowson and Landau 1982; FID uses it).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of rows of any norm. With C = R^T R the trace
    of the root is the sum of the singular values of R_x R_y^T, so rank-deficient covariances need
    no regularising. `unbiased` divides covariances by n - 1, as FID does, not by n.
    """
    roots = (
        _covariance_root(rows) * (math.sqrt(len(rows) / (len(rows) - 1)) if unbiased else 1)
        for rows in (x, y)
    )
    return sum(_frechet_parts(centroid_distance(x, y), *roots).values())


def _frechet_parts(centroid: float, root_x: Tensor, root_y: Tensor) -> dict[str, float]:
    """Split the Frechet distance into that of the means, and that of the centred Gaussians."""
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    traces = root_x.square().sum() + root_y.square().sum()
    return {"centroid": centroid**2, "distribution": max(0.0, float(traces - 2 * cross))}


def _spectrum(root: Tensor) -> tuple[float, list[float]]:
    """Return effective rank (Roy and Vetterli 2007) and the largest `SPECTRUM` variance shares.

    The rank is 1 and the shares are 0 where all rows coincide.
    """
    values = torch.linalg.svdvals(root)
    if float(values.sum()) <= 1e-12:
        return 1.0, torch.zeros_like(values)[:SPECTRUM].tolist()
    shares = values / values.sum()
    rank = math.exp(float(torch.special.entr(shares).sum()))
    return rank, (values.square() / values.square().sum())[:SPECTRUM].tolist()


def _covariance_root(x: Tensor) -> Tensor:
    """Compute R with R^T R = the biased covariance, at most (d, d), by one QR per chunk."""
    mean = _mean(x)
    root = torch.zeros(0, x.shape[1], dtype=torch.float64)
    for chunk in _chunks(x):
        root = torch.cat([root, (chunk - mean) / math.sqrt(len(x))])
        if len(root) > root.shape[1]:
            root = torch.linalg.qr(root, mode="r").R
    return root


def linear_separability(x: Tensor, y: Tensor, folds_x: Ints, folds_y: Ints) -> float:
    """Measure the balanced accuracy of a linear classifier of x versus y; 0.5 without a gap.

    Regularised linear discriminant analysis, the mean over held-out folds; a row on the plane
    counts half. 0.5 where a fold would leave a side empty. Folds are those of `pair_folds`: a twin
    of a held-out row among the training rows, with the other label, would lower the figure.
    """
    correct = []
    for fold in np.unique(folds_x):
        here_x, here_y = (torch.from_numpy(folds == fold) for folds in (folds_x, folds_y))
        if any(not here.any() or here.all() for here in (here_x, here_y)):
            return 0.5
        weights, bias = _fisher_plane(x[~here_x], y[~here_y])
        for side, sign in ((x[here_x], 1), (y[here_y], -1)):
            score = sign * (side @ weights + bias)
            correct.append(((score > 0).double() + (score == 0).double() / 2).mean())
    return float(torch.stack(correct).mean())


def pair_folds(
    images: int, text_image: Ints, rng: np.random.Generator, folds: int = 5
) -> tuple[Ints, Ints]:
    """Draw a fold per image; a text gets its image's, or a random one without an image."""
    of_image = rng.permutation(images) % folds
    of_text = rng.permutation(len(text_image)) % folds
    return of_image, np.where(text_image >= 0, of_image[text_image], of_text)


def _fisher_plane(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a regularised linear discriminant between two sets: weights (d,) and bias ()."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    roots = _covariance_root(x), _covariance_root(y)
    within = (roots[0].T @ roots[0] + roots[1].T @ roots[1]) / 2
    ridge = 1e-3 * within.trace() / len(within) + 1e-12
    weights = torch.linalg.solve(within + ridge * torch.eye(len(within)).double(), mean_x - mean_y)
    return weights, -weights @ (mean_x + mean_y) / 2


def alignment(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor]) -> float:
    """Average the squared distance of matched pairs, in [0, 4] (Wang and Isola 2020, alpha 2)."""
    total = 0.0
    for own, matched in zip(*(torch.split(rows, CHUNK_ROWS) for rows in pairs), strict=True):
        total += float((x[own].double() - y[matched].double()).square().sum())
    return total / len(pairs[0])


def uniformity(x: Tensor, *, max_rows: int | None = None, seed: int = 0) -> float:
    """Compute log mean exp(-2 |x_i - x_j|^2), i < j, of unit rows (Wang and Isola 2020, t 2).

    Sets of more than `max_rows` (default: none) are represented by that many rows, drawn at random
    by the seed.
    """
    if max_rows is not None and len(x) > max_rows:
        chosen = np.random.default_rng(seed).choice(len(x), max_rows, replace=False)
        x = x[torch.from_numpy(np.sort(chosen))]
    log_mean = tiled_log_mean_kernels(x, x, sigma=UNIFORMITY_SIGMA)
    return float(without_diagonal(log_mean, len(x)))


def image_distances(x: Tensor, y: Tensor) -> dict[str, float]:
    """Compute the distances of two sets of images, as ``csalign eval`` prints "distribution".

    x (n, d) are real, y (m, d) generated images, n and m >= 2, as an encoder returns them, without
    rows of norm 0.
    """
    unit_x, unit_y = (normalize(rows.double(), dim=1) for rows in (x, y))
    return {
        "frechet": frechet_distance(x, y, unbiased=True),
        "frechet_unit": frechet_distance(unit_x, unit_y, unbiased=True),
        "cmmd": cmmd(unit_x, unit_y),
    }


def cmmd(x: Tensor, y: Tensor) -> float:
    """Compute the CLIP maximum mean discrepancy of unit rows (Jayasumana et al. 2024).

    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)) with k(a, b) = exp(-|a - b|^2 / 200) over
    all pairs, diagonals included; >= 0 up to rounding. Needs no Gaussian fit.
    """
    sets = ((x, x), (y, y), (x, y))
    own_x, own_y, cross = (
        float(tiled_log_mean_kernels(*pair, sigma=CMMD_SIGMA).exp()) for pair in sets
    )
    return CMMD_SCALE * (own_x + own_y - 2 * cross)


def _mean(x: Tensor) -> Tensor:
    return x.mean(0, dtype=torch.float64)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    for chunk in torch.split(x, CHUNK_ROWS):
        yield chunk.double()
