"""The modality gap: how far two sets of unit embeddings lie apart, each figure by its source.

All take unit rows and compute in float64. x are images (n, d), y are texts (m, d), d their width;
`matches` are the row pairs (image, text).
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from csalign.objective.divergence import cs_divergence, mmd
from csalign.objective.kernel import squared_distances

Array = npt.NDArray[Any]

# Quadratic figures use at most so many rows a side: 5,000 x 5,000 float64 is 200 MB.
MAX_ROWS = 5_000


def gap_suite(x: Array, y: Array, text_image: Array, *, sigma: float, seed: int) -> dict[str, Any]:
    """All figures of the gap, as ``csalign eval --json`` prints them under "gap".

    Args:
        x: (n, d), unit image embeddings.
        y: (m, d), unit text embeddings.
        text_image: (m,) image row of each text, -1 for none.
        sigma: bandwidth of the CS and MMD figures.
        seed: of the sampling above `MAX_ROWS` rows and of the classifier's folds.
    """
    paired = np.flatnonzero(text_image >= 0)
    images, texts = torch.from_numpy(x).double(), torch.from_numpy(y).double()
    own = images[torch.from_numpy(text_image[paired])]
    matched = texts[torch.from_numpy(paired)]
    rng = np.random.default_rng(seed)
    few_x, few_y = _at_most(images, rng), _at_most(texts, rng)
    return {
        "centroid_distance": centroid_distance(images, texts),
        "rmg": relative_modality_gap(images, texts, own, matched),
        "cs_divergence": float(cs_divergence(few_x, few_y, sigma=sigma)),
        "mmd": float(mmd(few_x, few_y, sigma=sigma)),
        "frechet": frechet_distance(images, texts),
        "linear_separability": linear_separability(few_x, few_y, seed=seed),
        "alignment": alignment(own, matched),
        "uniformity": {
            "image": uniformity(few_x),
            "text": uniformity(few_y),
            "cross": cross_uniformity(few_x, few_y),
        },
        "effective_rank": {"image": effective_rank(images), "text": effective_rank(texts)},
    }


def centroid_distance(x: Tensor, y: Tensor) -> float:
    """Norm of the difference of the two means, in [0, 2] (Liang et al. 2022)."""
    return float((x.mean(0) - y.mean(0)).norm())


def relative_modality_gap(x: Tensor, y: Tensor, own: Tensor, matched: Tensor) -> float:
    """Relative modality gap, RMG = p / (p + w), in [0, 1] (Schrodi et al. 2024).

    p is the mean of (1 - cos) / 2 over matched pairs; w the mean of the same over all ordered
    pairs i != j inside each modality, averaged over the two. Captions of one image count as
    distinct rows.

    Args:
        x: (n, d) all images.
        y: (m, d) all texts.
        own: (k, d) image of each matched pair.
        matched: (k, d) text of each matched pair.
    """
    pairs = float((1 - (own * matched).sum(1)).mean() / 2)
    within = (_mean_distance_within(x) + _mean_distance_within(y)) / 2
    return pairs / (pairs + within) if pairs + within else 0.0


def _mean_distance_within(x: Tensor) -> float:
    n = len(x)
    if n < 2:
        return 0.0
    # sum_{i != j} x_i . x_j = |sum_i x_i|^2 - sum_i |x_i|^2, without the n x n matrix.
    off_diagonal = float(x.sum(0).square().sum() - x.square().sum())
    return (1 - off_diagonal / (n * (n - 1))) / 2


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance between Gaussian fits (Dowson and Landau 1982; FID uses it).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), with biased covariances. The trace of the
    root is the sum of the singular values of X' Y'^T / sqrt(n m), so rank-deficient covariances
    (fewer rows than columns) need no regularising.
    """
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    root_x, root_y = _covariance_root(centred_x), _covariance_root(centred_y)
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    traces = root_x.square().sum() + root_y.square().sum()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return max(0.0, float(mean + traces - 2 * cross))


def _covariance_root(centred: Tensor) -> Tensor:
    """R with R^T R = covariance, (min(n, d), d)."""
    scaled = centred / math.sqrt(len(centred))
    return torch.linalg.qr(scaled, mode="r").R if len(scaled) > scaled.shape[1] else scaled


def linear_separability(x: Tensor, y: Tensor, *, seed: int, folds: int = 5) -> float:
    """Balanced accuracy of a linear classifier telling the modalities apart; 0.5 is no gap.

    Ridge regression onto -1 / +1 with each modality weighted alike, on `folds` held-out folds.

    Returns:
        In [0, 1]; 0.5 where a side has fewer rows than there are folds.
    """
    if min(len(x), len(y)) < folds:
        return 0.5
    rng = np.random.default_rng(seed)
    fold_x, fold_y = (torch.from_numpy(rng.permutation(len(side)) % folds) for side in (x, y))
    correct = []
    for fold in range(folds):
        train_x, train_y = x[fold_x != fold], y[fold_y != fold]
        weights, bias = _fisher_plane(train_x, train_y)
        correct.append((x[fold_x == fold] @ weights + bias > 0).double().mean())
        correct.append((y[fold_y == fold] @ weights + bias < 0).double().mean())
    return float(torch.stack(correct).mean())


def _fisher_plane(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Regularised linear discriminant between two sets: weights (d,) and bias ()."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    within = (torch.cov(x.T, correction=0) + torch.cov(y.T, correction=0)) / 2
    within = within.reshape(x.shape[1], x.shape[1])
    ridge = 1e-3 * within.trace() / len(within) + 1e-12
    weights = torch.linalg.solve(within + ridge * torch.eye(len(within)).double(), mean_x - mean_y)
    return weights, -weights @ (mean_x + mean_y) / 2


def alignment(own: Tensor, matched: Tensor) -> float:
    """Mean squared distance of matched pairs, in [0, 4] (Wang and Isola 2020, alpha 2)."""
    return float((own - matched).square().sum(1).mean())


def uniformity(x: Tensor) -> float:
    """Mean pairwise Gaussian potential, in the log domain, <= 0 (Wang and Isola 2020, t 2).

    log mean exp(-2 |x_i - x_j|^2) over pairs i < j.
    """
    n = len(x)
    if n < 2:
        return 0.0
    upper = torch.triu_indices(n, n, offset=1)
    exponents = -2 * squared_distances(x, x)[upper[0], upper[1]]
    return float(torch.logsumexp(exponents, 0)) - math.log(len(exponents))


def cross_uniformity(x: Tensor, y: Tensor) -> float:
    """Uniformity across the modalities, log mean exp(-2 |x_i - y_j|^2) over all pairs, <= 0."""
    exponents = -2 * squared_distances(x, y)
    return float(torch.logsumexp(exponents.flatten(), 0)) - math.log(exponents.numel())


def effective_rank(x: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007).

    Of the centred rows; between 1 and min(n - 1, d), 1 where all rows coincide.
    """
    centred = x - x.mean(0)
    values = torch.linalg.svdvals(_covariance_root(centred))
    if float(values.sum()) <= 1e-12:
        return 1.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return math.exp(-float((shares * shares.log()).sum()))


def _at_most(x: Tensor, rng: np.random.Generator) -> Tensor:
    if len(x) <= MAX_ROWS:
        return x
    rows = np.sort(rng.choice(len(x), MAX_ROWS, replace=False))
    return x[torch.from_numpy(rows)]
