"""The modality gap: how far apart two sets of unit embeddings are, each figure with its source.

x are images (n, d), y are texts (m, d), both unit rows of any float dtype; sums over rows are
float64, in chunks. If a side has more than `MAX_ROWS`, the mean kernels over all
pairs of rows are estimated by landmarks, with standard errors, and the linear classifier uses
`MAX_ROWS` per side.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
CHUNK_ROWS, PAIRS_AT_A_TIME = 4_096, 2_048
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
    rng = np.random.default_rng(seed)
    samples = _samples(x, y, max_rows, rng)
    paired = np.flatnonzero(text_image >= 0)
    folds = pair_folds(len(x), text_image, rng)
    return _figures(x, y, (text_image[paired], paired), samples, folds, sigma, seed)


def gap_of_items(
    x: Array,
    y: Array,
    items: tuple[Ints, Ints],
    pairs: tuple[Ints, Ints],
    *,
    sigma: float,
    seed: int,
    max_rows: int = MAX_ROWS,
) -> dict[str, Any]:
    """Compute what `gap_suite` does for two sides with any number of rows per item.

    Args:
        x: (n, d), unit rows, "image" in the figures by side.
        y: (m, d), unit rows, "text" in the figures by side.
        items: number of the item of each row, (n,) and (m,).
        pairs: all pairs of rows that share an item, (k,) and (k,); without any "alignment" and
            "rmg" are None.
        sigma: bandwidth of the CS and MMD figures.
        seed: of the sampling above `max_rows` rows and of the classifier's folds.
        max_rows: rows per side up to which all pairs of rows are computed.
    """
    rng = np.random.default_rng(seed)
    samples = _samples(x, y, max_rows, rng)
    of_item = rng.permutation(1 + max(int(own.max(initial=0)) for own in items)) % 5
    folds = of_item[items[0]], of_item[items[1]]
    found = _figures(x, y, pairs, samples, folds, sigma, seed)
    return found if len(pairs[0]) else found | {"alignment": None, "rmg": None}


def _samples(x: Array, y: Array, max_rows: int, rng: np.random.Generator) -> list[Ints]:
    """Draw at most `max_rows` rows per side, ascending."""
    return [np.sort(rng.choice(n, min(n, max_rows), replace=False)) for n in (len(x), len(y))]


def _figures(
    x: Array,
    y: Array,
    pairs: tuple[Ints, Ints],
    samples: Sequence[Ints],
    folds: tuple[Ints, Ints],
    sigma: float,
    seed: int,
) -> dict[str, Any]:
    images, texts = torch.from_numpy(x), torch.from_numpy(y)
    matched = torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])
    rows_x, rows_y = samples
    few_x, few_y = images[rows_x], texts[rows_y]
    folds_x, folds_y = folds
    tick("covariances")
    moments = _Moments.of(images), _Moments.of(texts)
    (rank_x, spectrum_x), (rank_y, spectrum_y) = (_spectrum(own.root) for own in moments)
    figures, errors = _kernel_figures(images, texts, (few_x, few_y), sigma, seed)
    tick("gap")
    apart = alignment(images, texts, matched)
    parts = _frechet_parts(*moments)
    return {
        "centroid_distance": math.sqrt(parts["centroid"]),
        "rmg": _rmg(apart, *moments),
        "cs_divergence": figures["cs_divergence"],
        "mmd": figures["mmd"],
        "frechet": sum(parts.values()),
        "frechet_parts": parts,
        "linear_separability": linear_separability(few_x, few_y, folds_x[rows_x], folds_y[rows_y]),
        "alignment": apart,
        "uniformity": figures["uniformity"],
        "effective_rank": {"image": rank_x, "text": rank_y},
        "spectrum": {"image": spectrum_x, "text": spectrum_y},
        **({"standard_errors": errors} if errors else {}),
    }


def _kernel_figures(
    x: Tensor, y: Tensor, few: tuple[Tensor, Tensor], sigma: float, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the figures that are mean kernels, and their standard errors, {} if exact."""
    sigmas = tuple({sigma: None, UNIFORMITY_SIGMA: None})
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
    x, y = (own.double() for own in few)
    return _values_and_errors(exact_mean_kernels(x, y, sigmas=sigmas))[0], {}


def _values_and_errors(means: list[MeanKernels]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nest the figures of the mean kernels at both bandwidths as `gap_suite` does."""
    at_sigma, of_uniformity = means[0], means[-1]
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
    return _rmg(alignment(x, y, pairs), _Moments.of(x), _Moments.of(y))


def _rmg(apart: float, *moments: "_Moments") -> float:
    # Unit rows: (1 - cos) / 2 = |x - y|^2 / 4.
    across, within = apart / 4, sum(own.distance_within() for own in moments) / 2
    return across / (across + within) if across + within else 0.0


class _Moments(NamedTuple):
    """Moments of rows (n, d), in float64."""

    rows: int
    mean: Tensor  # (d,)
    squares: float  # sum of the squared norms
    root: Tensor  # R with R^T R = the biased covariance, at most (d, d); if so, rows are orthogonal

    @classmethod
    def of(cls, x: Tensor) -> "_Moments":
        n, width = x.shape
        shift = _mean(x[:CHUNK_ROWS])
        total, gram = torch.zeros(width).double(), torch.zeros(width, width).double()
        for chunk in _chunks(x):
            centred = chunk - shift
            total += centred.sum(0)
            if n >= width:
                gram += _gram(centred)
        mean = shift + total / n
        if n < width:
            root = (x.double() - mean) / math.sqrt(n)
            return cls(n, mean, float(x.double().square().sum()), root)
        covariance = gram / n - torch.outer(total, total) / n**2
        values, vectors = torch.linalg.eigh(covariance)
        rounding = width * torch.finfo(values.dtype).eps * values[-1]
        values = torch.where(values < rounding, 0, values)
        squares = float(n * (covariance.trace() + mean.square().sum()))
        return cls(n, mean, squares, values.sqrt()[:, None] * vectors.T)

    def distance_within(self) -> float:
        """Compute the mean of (1 - cos) / 2 over the pairs of different rows."""
        n = self.rows
        if n < 2:
            return 0.0
        # sum_{i != j} x_i . x_j = |sum_i x_i|^2 - sum_i |x_i|^2, without the n x n matrix.
        off_diagonal = float((self.mean * n).square().sum()) - self.squares
        return (1 - off_diagonal / (n * (n - 1))) / 2


def _gram(x: Tensor) -> Tensor:
    """Compute x^T x (d, d), by numpy, which uses that it is symmetric."""
    rows = x.numpy()
    return torch.from_numpy(rows.T @ rows)


def frechet_distance(x: Tensor, y: Tensor, *, unbiased: bool = False) -> float:
    """Compute the Frechet distance between Gaussian fits (Dowson and Landau 1982; FID uses it).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of rows of any norm. With C = R^T R the trace
    of the root is the sum of the singular values of R_x R_y^T, so rank-deficient covariances need
    no regularising. `unbiased` divides covariances by n - 1, as FID does, not by n.
    """
    return sum(_frechet_parts(_Moments.of(x), _Moments.of(y), unbiased=unbiased).values())


def _frechet_parts(x: _Moments, y: _Moments, *, unbiased: bool = False) -> dict[str, float]:
    """Split the Frechet distance into that of the means, and that of the centred Gaussians."""
    root_x, root_y = (
        own.root * (math.sqrt(own.rows / (own.rows - 1)) if unbiased else 1) for own in (x, y)
    )
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    traces = root_x.square().sum() + root_y.square().sum()
    centroid = float((x.mean - y.mean).square().sum())
    return {"centroid": centroid, "distribution": max(0.0, float(traces - 2 * cross))}


def _spectrum(root: Tensor) -> tuple[float, list[float]]:
    """Return effective rank (Roy and Vetterli 2007) and the largest `SPECTRUM` variance shares.

    The rank is 1 and the shares are 0 where all rows coincide.
    """
    is_square = len(root) == root.shape[1]
    values = root.norm(dim=1).sort().values.flip(0) if is_square else torch.linalg.svdvals(root)
    if float(values.sum()) <= 1e-12:
        return 1.0, torch.zeros_like(values)[:SPECTRUM].tolist()
    shares = values / values.sum()
    rank = math.exp(float(torch.special.entr(shares).sum()))
    return rank, (values.square() / values.square().sum())[:SPECTRUM].tolist()


def linear_separability(x: Tensor, y: Tensor, folds_x: Ints, folds_y: Ints) -> float:
    """Measure the balanced accuracy of a linear classifier of x versus y; 0.5 without a gap.

    Regularised linear discriminant analysis, the mean over held-out folds; a row on the plane
    counts half. 0.5 where a fold would leave a side empty. Folds are those of `pair_folds`: a twin
    of a held-out row among the training rows, with the other label, would lower the figure.
    """
    origin, names, correct = _mean(x), np.unique(folds_x), []
    sides = []
    for rows, of in ((x, folds_x), (y, folds_y)):
        parts = [rows[torch.from_numpy(of == name)] - origin for name in names]
        sides.append([torch.cat([own, own.new_ones(len(own), 1)], dim=1) for own in parts])
    if any(len(names) < 2 or min(map(len, own)) == 0 for own in sides):
        return 0.5
    grams = [[_gram(rows) for rows in own] for own in sides]
    for k in range(len(names)):
        plane = _fisher_plane(*(torch.stack(own[:k] + own[k + 1 :]).sum(0) for own in grams))
        for own, sign in zip(sides, (1, -1), strict=True):
            score = sign * (own[k] @ plane)
            correct.append(((score > 0).double() + (score == 0).double() / 2).mean())
    return float(torch.stack(correct).mean())


def pair_folds(
    images: int, text_image: Ints, rng: np.random.Generator, folds: int = 5
) -> tuple[Ints, Ints]:
    """Draw a fold per image; a text gets its image's, or a random one without an image."""
    of_image = rng.permutation(images) % folds
    of_text = rng.permutation(len(text_image)) % folds
    return of_image, np.where(text_image >= 0, of_image[text_image], of_text)


def _fisher_plane(*grams: Tensor) -> Tensor:
    """Fit a regularised linear discriminant between two sets: weights and bias (d + 1,).

    A set is given by R^T R, (d + 1, d + 1), of its rows with a 1 at the end.
    """
    x, y = (gram[-1, :-1] / gram[-1, -1] for gram in grams)
    covariances = [
        gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean, mean)
        for gram, mean in zip(grams, (x, y), strict=True)
    ]
    within = (covariances[0] + covariances[1]) / 2
    ridge = 1e-3 * within.trace() / len(within) + 1e-12
    weights = torch.linalg.solve(within + ridge * torch.eye(len(within)).double(), x - y)
    return torch.cat([weights, -(weights @ (x + y))[None] / 2])


def alignment(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor]) -> float:
    """Average the squared distance of matched pairs, in [0, 4] (Wang and Isola 2020, alpha 2)."""
    return float(pair_distances(x, y, pairs).mean(dtype=torch.float64))


def pair_distances(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the squared distances (k,) of the rows pairs[0] of x from the rows pairs[1] of y."""
    parts = zip(*(torch.split(rows, PAIRS_AT_A_TIME) for rows in pairs), strict=True)
    return torch.cat([(x[own] - y[matched]).square().sum(1) for own, matched in parts])


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
