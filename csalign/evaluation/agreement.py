"""How well two encoders agree on pairs before anything is trained, and what stands in the way."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.side import UnitRows, loud_scale
from csalign.core.enums import Modality
from csalign.core.figures import percent
from csalign.features import schema
from csalign.features.checks import WINDOWS, alike
from csalign.features.join import Array, Joined, Pairs, text_keys
from csalign.features.reader import FeatureSet

Ints = npt.NDArray[np.int64]

NEIGHBOURS = 10
COMPARED = 2_000  # pairs, and unpaired rows of a side
LEAST_TO_COMPARE = 200  # pairs; of fewer the agreement is not known well enough
HARDLY = 0.02  # above chance; encoders that reach a recall of some 10 % agree by 0.04
CHANCE_DEVIATIONS = 4
LEAST_UNPAIRED = 100  # rows, and half of the paired ones, to compare distributions
PROJECTIONS = 128
FAR, FAR_SPREAD = 2.0, 0.25  # beyond this times the noise, and this share of the spread
MEAN_ENERGY, TOP_ENERGY = 0.8, 0.25  # much for a mean, and for one direction
ERRORS = 3  # standard errors that removing a direction must gain
MANY_PAIRS = 10_000  # beyond which unpaired rows bring nothing


class Sample(NamedTuple):
    """Rows that a forecast is made from."""

    images: Array  # (n, d) of different images in random order
    texts: Array  # (n, e), one of each image
    keys: Ints  # (n,), equal for equal captions
    unpaired: Mapping[Modality, Array]  # rows (k, d) and (l, e) without a partner, k, l >= 0

    @property
    def distinct(self) -> Ints:
        """Positions of pairs without a second one of a caption, ascending."""
        return np.sort(np.unique(self.keys, return_index=True)[1])


@dataclass(frozen=True)
class Shift:
    """Sliced Wasserstein distance of a side's unpaired rows to its paired ones."""

    value: float
    noise: float  # between two halves of the paired rows, of as many rows each
    spread: float  # standard deviation of the paired rows along a direction

    @property
    def is_far(self) -> bool:
        """Return whether the distance is beyond the noise, and large beside the spread."""
        return self.value > max(FAR * self.noise, FAR_SPREAD * self.spread)


@dataclass(frozen=True)
class Agreement:
    """Figures of a `Sample`, named as in the block "forecast"."""

    compared: int  # pairs
    cka: float
    mutual_knn: float
    mutual_knn_chance: float
    mutual_knn_uncentred: float  # of the rows with their means
    centring_errors: float  # standard errors that are gained by removing the means
    sliced_wasserstein: Mapping[Modality, Shift]  # of sides with enough unpaired rows
    mean_energy: Mapping[Modality, float]  # squared norm of the mean unit row, in [0, 1]
    top_energy: Mapping[Modality, float]  # share of the first principal direction, in [0, 1]
    removal: Mapping[Modality, float]  # `mutual_knn` without the first direction
    removal_errors: Mapping[Modality, float]  # standard errors that are gained by that
    effective_rank: Mapping[Modality, float]  # exp of the entropy of the variances
    repeated: Mapping[Modality, float]  # share of rows equal to an earlier one

    @property
    def is_random(self) -> bool:
        """Return whether the neighbours agree by chance."""
        # Of random pairs some NEIGHBOURS**2 neighbours agree, about as a Poisson number.
        return self.mutual_knn < self.mutual_knn_chance + CHANCE_DEVIATIONS / self.compared

    @property
    def excess(self) -> float:
        """`mutual_knn` above chance."""
        return self.mutual_knn - self.mutual_knn_chance

    @property
    def agreed(self) -> str:
        """`mutual_knn` in words."""
        return f"mutual {NEIGHBOURS}-NN {self.mutual_knn:.3f}, chance {self.mutual_knn_chance:.3f}"

    def findings(self) -> Iterator[str]:
        """Word what stands in the way of an alignment; nothing of fewer than 200 pairs."""
        if self.compared < LEAST_TO_COMPARE:
            return
        if self.is_random:
            yield f"the pairs look random ({self.agreed}); check the keys that join them"
        elif self.excess < HARDLY:
            yield f"the encoders hardly agree ({self.agreed}): expect low recall"
        yield from self.directions()
        yield from self.unpaired()

    def unpaired(self) -> Iterator[str]:
        """Word which unpaired rows differ from the paired ones."""
        for side, shift in self.sliced_wasserstein.items():
            if shift.is_far:
                yield (
                    f"the unpaired {side.plural} lie far from the paired ones (sliced Wasserstein "
                    f"{shift.value:.3f}, noise {shift.noise:.3f}) and may mislead; use rows of the "
                    "same source, or leave them out"
                )

    def directions(self) -> Iterator[str]:
        """Word which directions, or means, to remove."""
        for side in Modality:
            if self.top_energy[side] > TOP_ENERGY and self.removal_errors[side] > ERRORS:
                yield (
                    f"one direction has {percent(self.top_energy[side], 0)} of the variance of "
                    f"{side.plural}, and neighbours agree better without it (mutual "
                    f"{NEIGHBOURS}-NN {self.removal[side]:.3f} instead of {self.mutual_knn:.3f}); "
                    "a closed form scales it down, other adapters profit from removing it first"
                )
        loud = [side.plural for side in Modality if self.mean_energy[side] > MEAN_ENERGY]
        if loud and self.centring_errors > ERRORS:
            yield (
                f"the mean has most of the energy of {' and '.join(loud)}, and neighbours agree "
                f"better without it (mutual {NEIGHBOURS}-NN {self.mutual_knn:.3f} instead of "
                f"{self.mutual_knn_uncentred:.3f}); a closed form removes it, a raw search must"
            )


def sample_rows(rows: Pairs, unpaired: Mapping[Modality, Array]) -> Sample:
    """Sample pairs of rows in memory, or mapped."""
    texts = one_per_image(rows.text_image, rows.caption_keys, COMPARED, np.random.default_rng(0))
    order = np.argsort(texts)  # mapped rows are read in order
    back = np.argsort(order)
    images = rows.images[rows.text_image[texts[order]]][back]
    return Sample(images, rows.texts[texts[order]][back], rows.caption_keys[texts], unpaired)


def read_sample(
    features: FeatureSet, joined: Joined, most: int, seed: int, *, windows: bool = False
) -> Sample:
    """Read some pairs of a feature set, and some unpaired rows of each side.

    Args:
        features: an open feature set.
        joined: its rows, some of them paired.
        most: pairs.
        seed: of the choice.
        windows: whether to read pairs and rows from a few windows of the tables, much faster for
            large ones, not from all over.
    """
    rng = np.random.default_rng(seed)
    pairs = np.flatnonzero(joined.text_image >= 0)
    candidates = _windows(pairs, most) if windows else pairs
    chosen = one_per_image(joined.text_image[candidates], None, most, rng)
    texts = candidates[chosen]
    alone = {
        Modality.IMAGE: np.flatnonzero(joined.caption_counts == 0),
        Modality.TEXT: np.flatnonzero(joined.text_image < 0),
    }
    unpaired = {
        side: _read(
            *(features, joined, side),
            _windows(rows, COMPARED) if windows else rng.permutation(rows)[:COMPARED],
        )
        for side, rows in alone.items()
        if len(rows)
    }
    owners = joined.text_image[texts]
    values = _read(features, joined, Modality.TEXT, texts)
    order = np.argsort(texts)
    captions = features.texts.strings(schema.CAPTION, _table_rows(joined, Modality.TEXT, texts))
    keys = text_keys(captions, values[order])[np.argsort(order)]
    return Sample(_read(features, joined, Modality.IMAGE, owners), values, keys, unpaired)


def _windows(rows: Ints, most: int) -> Ints:
    """Take at most some rows in a few windows, spread evenly."""
    size = -(-most // WINDOWS)
    starts = np.linspace(0, max(0, len(rows) - size), WINDOWS).astype(np.int64)
    return rows[np.unique(starts[:, None] + np.arange(min(size, len(rows))))]


def _read(features: FeatureSet, joined: Joined, side: Modality, chosen: Ints) -> Array:
    """Read the embeddings of chosen rows, (k, d), in their order."""
    rows = features.table(side).take(_table_rows(joined, side, chosen))
    return rows[np.argsort(np.argsort(chosen))]


def _table_rows(joined: Joined, side: Modality, chosen: Ints) -> Ints:
    """Return the rows of the table that chosen ones of a side are, ascending."""
    rows = joined.side(side)[0]
    return np.sort(chosen if rows is None else rows[chosen])


def one_per_image(text_image: Ints, keys: Ints | None, most: int, rng: np.random.Generator) -> Ints:
    """Choose a text of each of at most `most` images at random, (k,) in random order.

    Args:
        text_image: (m,), the image of each text, -1 for none.
        keys: (m,), equal for equal captions, of which one is then chosen; None to allow them.
        most: pairs.
        rng: for the choice.
    """
    texts = rng.permutation(np.flatnonzero(text_image >= 0))
    for groups in (text_image, keys):
        if groups is not None:
            texts = texts[np.sort(np.unique(groups[texts], return_index=True)[1])]
    return texts[:most]


def measure_agreement(sample: Sample, *, seed: int = 0) -> Agreement | None:
    """Measure the agreement of at most 2,000 pairs; None if there are `NEIGHBOURS` or fewer."""
    some = sample.distinct[:COMPARED]
    given, n = {Modality.IMAGE: sample.images, Modality.TEXT: sample.texts}, len(some)
    if n <= NEIGHBOURS:
        return None
    units = {side: input_units(rows) for side, rows in given.items()}
    unit = {side: units[side](rows[some]) for side, rows in given.items()}
    plain = {side: UnitRows()(rows[some]) for side, rows in given.items()}
    centred = {side: own - own.mean(0) for side, own in unit.items()}
    near = {side: nearest(own) for side, own in centred.items()}
    shared = shared_neighbours(*near.values())
    top, rank, removal, gains = {}, {}, {}, {}
    for side, other in ((Modality.IMAGE, Modality.TEXT), (Modality.TEXT, Modality.IMAGE)):
        variances, first = principal(centred[side])
        shares = variances / variances.sum().clamp(min=1e-12)
        top[side] = float(shares.max())
        rank[side] = float(torch.exp(torch.special.entr(shares).sum()))
        left = centred[side] - torch.outer(centred[side] @ first, first)
        without = shared_neighbours(nearest(left), near[other])
        gains[side], removal[side] = _errors(without - shared), float(without.mean())
    with_means = shared_neighbours(*map(nearest, plain.values()))
    shifts = {
        side: measure_shift(plain[side], UnitRows()(own[:COMPARED]), seed)
        for side, own in sample.unpaired.items()
        if min(len(own), n // 2) >= LEAST_UNPAIRED
    }
    return Agreement(
        compared=n,
        cka=linear_cka(*centred.values()),
        mutual_knn=float(shared.mean()),
        mutual_knn_chance=NEIGHBOURS / (n - 1),
        mutual_knn_uncentred=float(with_means.mean()),
        centring_errors=_errors(shared - with_means),
        sliced_wasserstein=shifts,
        mean_energy={side: float(own.mean(0).square().sum()) for side, own in plain.items()},
        top_energy=top,
        removal=removal,
        removal_errors=gains,
        effective_rank=rank,
        repeated={side: 1 - len(np.unique(alike(own))) / len(own) for side, own in given.items()},
    )


def _errors(gains: Tensor) -> float:
    """Return the mean of gains (n,) in standard errors."""
    error = float(gains.std()) / len(gains) ** 0.5
    return float(gains.mean()) / error if error else 0.0


def neighbour_agreement(images: Array, texts: Array) -> float:
    """Return the share of each image's nearest neighbours whose texts are neighbours, in [0, 1].

    By the cosine of the centred inputs of adapters.

    Args:
        images: (n, d), row i paired with row i of `texts`; any float dtype.
        texts: (n, e), n > `NEIGHBOURS`.
    """
    sides = (input_units(rows)(rows) for rows in (images, texts))
    return float(shared_neighbours(*(nearest(own - own.mean(0)) for own in sides)).mean())


def input_units(values: Array) -> UnitRows:
    """Return the function that makes an adapter's unit inputs of rows (n, d), before centring."""
    root = bool(values.min() >= 0)
    return UnitRows(root, loud_scale(values, signed_sqrt=root))


def nearest(rows: Tensor) -> Tensor:
    """Find the nearest others of each row (n, d) by cosine, (n, `NEIGHBOURS`)."""
    unit = normalize(rows, dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(NEIGHBOURS, dim=1).indices


def shared_neighbours(near_x: Tensor, near_y: Tensor) -> Tensor:
    """Return per row the share of neighbours (n, k) that both sides have, (n,) in [0, 1]."""
    is_near = torch.zeros(len(near_x), len(near_x), dtype=torch.bool)
    return is_near.scatter_(1, near_x, True).gather(1, near_y).float().mean(1)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of paired rows, in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414).

    |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred X and Y in Frobenius norms. For fewer rows than
    dimensions it is high by chance.

    Args:
        x: (n, d), float.
        y: (n, e), float.
    """
    x, y = ((own - own.mean(0)).double() for own in (x, y))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).square().sum() / norms) if norms else 0.0


def principal(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variances of centred rows (n, d) along principal axes, and the first axis (d,)."""
    x = centred.double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return values.clamp(min=0), vectors[:, -1].float()


def measure_shift(paired: Tensor, unpaired: Tensor, seed: int) -> Shift:
    """Compare rows (n, d) and (m, d) by random samples of equal size, n // 2 or m."""
    rng = np.random.default_rng(seed)
    own, others = (torch.from_numpy(rng.permutation(len(rows))) for rows in (paired, unpaired))
    k = min(len(paired) // 2, len(unpaired))
    first, second = paired[own[:k]], paired[own[k : 2 * k]]
    spread = paired.var(0).sum() / paired.shape[1]  # mean variance along a direction
    return Shift(
        sliced_wasserstein(first, unpaired[others[:k]], seed=seed),
        sliced_wasserstein(first, second, seed=seed),
        math.sqrt(float(spread)),
    )


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, projections: int = PROJECTIONS, seed: int = 0
) -> float:
    """Return the mean Wasserstein-1 distance over random directions (Bonneel et al. 2015).

    Args:
        x: (n, d), float.
        y: (n, d), as many rows.
        projections: how many directions.
        seed: of the directions.
    """
    axes = random_axes(x.shape[1], projections, seed)
    first, second = ((rows @ axes).sort(0).values for rows in (x, y))
    return float((first - second).abs().mean())


def random_axes(width: int, count: int, seed: int) -> Tensor:
    """Draw unit directions, (width, count) float32."""
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(seed))
    return normalize(drawn, dim=0)
