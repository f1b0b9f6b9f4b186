"""How well two encoders agree on pairs before anything is trained, and what stands in the way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.side import UnitRows, loud_scale
from csalign.core.arrays import Array, Ints
from csalign.core.enums import Modality
from csalign.core.figures import percent
from csalign.features import schema
from csalign.features.checks import LEAST_PAIRS, WINDOWS, check_directions
from csalign.features.join import Joined, Pairs, first_alike, text_keys
from csalign.features.reader import FeatureSet

NEIGHBOURS = 10
COMPARED = 2_000  # pairs, and unpaired rows of a side
HARDLY = 0.02  # above chance; encoders that reach a recall of some 10 % agree by 0.04
CHANCE_DEVIATIONS = 4
LEAST_UNPAIRED = 100  # rows, and half of the paired ones, to compare distributions
PROJECTIONS = 128
FAR, FAR_DEVIATIONS = 2.0, 0.25  # beyond this times the noise, and so many standard deviations
TOP_ENERGY = 0.25  # much for one direction
GAIN = 0.02  # of mutual k-NN by removing a direction: three standard errors of 200 pairs


class Sample(NamedTuple):
    """Rows that a forecast is made from."""

    images: Array  # (n, d), of different images in random order
    texts: Array  # (n, e), one of each image, with different captions
    unpaired: Mapping[Modality, Array]  # rows (k, d) and (l, e) without a partner, k, l >= 0
    repeated: float = 0.0  # share of pairs left out, as another one has their caption


@dataclass(frozen=True)
class Shift:
    """Sliced Wasserstein distance of a side's unpaired rows to its paired ones.

    In standard deviations of the paired rows along a direction.
    """

    value: float
    noise: float  # between two halves of the paired rows, of as many rows each

    @property
    def is_far(self) -> bool:
        """Return whether the distance is beyond the noise, and large beside the deviation."""
        return self.value > max(FAR * self.noise, FAR_DEVIATIONS)


@dataclass(frozen=True)
class Agreement:
    """Figures of a `Sample`, named as in the block "forecast"."""

    compared: int  # pairs
    cka: float
    mutual_knn: float
    mutual_knn_chance: float
    sliced_wasserstein: Mapping[Modality, Shift]  # of sides with enough unpaired rows
    mean_energy: Mapping[Modality, float]  # squared norm of the mean unit row, in [0, 1]
    top_energy: Mapping[Modality, float]  # share of the first principal direction, in [0, 1]
    removal: Mapping[Modality, float]  # `mutual_knn` without the first direction
    effective_rank: Mapping[Modality, float]  # exp of the entropy of the variances

    @property
    def is_random(self) -> bool:
        """Return whether the neighbours agree by chance; of fewer than 200 pairs it is unknown."""
        # Of random pairs some NEIGHBOURS**2 neighbours agree, about as a Poisson number.
        is_chance = self.excess < CHANCE_DEVIATIONS / self.compared
        return is_chance and self.compared >= LEAST_PAIRS

    @property
    def excess(self) -> float:
        """`mutual_knn` above chance."""
        return self.mutual_knn - self.mutual_knn_chance

    def findings(self) -> Iterator[str]:
        """Word what stands in the way of an alignment; nothing of fewer than 200 pairs."""
        if self.compared < LEAST_PAIRS:
            return
        agreed = (
            f"mutual {NEIGHBOURS}-NN {self.mutual_knn:.3f}, chance {self.mutual_knn_chance:.3f}"
        )
        if self.is_random:
            yield f"the pairs look random ({agreed}); check the keys that join them"
        elif self.excess < HARDLY:
            yield f"the encoders hardly agree ({agreed}): expect low recall"
        yield from self.directions()
        yield from self.shifts()

    def shifts(self) -> Iterator[str]:
        """Word which unpaired rows differ from the paired ones."""
        for side, shift in self.sliced_wasserstein.items():
            if shift.is_far:
                yield (
                    f"the unpaired {side.plural} lie far from the paired ones (by "
                    f"{shift.value:.2f} standard deviations, noise {shift.noise:.2f}) and may "
                    "mislead; use rows of the same source, or leave them out"
                )

    def directions(self) -> Iterator[str]:
        """Word which directions to remove."""
        for side in Modality:
            gain = self.removal[side] - self.mutual_knn
            if self.top_energy[side] > TOP_ENERGY and gain > GAIN:
                yield (
                    f"one direction has {percent(self.top_energy[side], 0)} of the variance of "
                    f"{side.plural}, and neighbours agree better without it (mutual "
                    f"{NEIGHBOURS}-NN {self.removal[side]:.3f} instead of {self.mutual_knn:.3f}); "
                    "a closed form scales it down, other adapters profit from removing it first"
                )


def sample_rows(rows: Pairs, unpaired: Mapping[Modality, Array]) -> Sample:
    """Sample pairs of rows in memory, or mapped."""
    texts = one_per_image(rows.text_image, rows.caption_keys, COMPARED, np.random.default_rng(0))
    texts = np.sort(texts)  # mapped rows are read in order
    return Sample(rows.images[rows.text_image[texts]], rows.texts[texts], unpaired)


def read_sample(
    features: FeatureSet, joined: Joined, most: int, seed: int, *, windows: bool = False
) -> Sample:
    """Read at most so many pairs of a feature set, and some unpaired rows of each side.

    From all over the tables, or from a few `windows`, which is much faster for large ones.
    """
    rng = np.random.default_rng(seed)

    def some(rows: Ints, most: int) -> Ints:
        return _windows(rows, most) if windows else rng.permutation(rows)[:most]

    paired = np.flatnonzero(joined.text_image >= 0)
    paired = _windows(paired, most) if windows else paired
    texts = np.sort(paired[one_per_image(joined.text_image[paired], None, most, rng)])
    values = _read(features, joined, Modality.TEXT, texts)
    captions = features.texts.strings(schema.CAPTION, _table_rows(joined, Modality.TEXT, texts))
    kept = one_per_image(np.arange(len(texts)), text_keys(captions, values), most, rng)
    images = _read(features, joined, Modality.IMAGE, joined.text_image[texts[kept]])
    alone = {
        Modality.IMAGE: np.flatnonzero(joined.caption_counts == 0),
        Modality.TEXT: np.flatnonzero(joined.text_image < 0),
    }
    unpaired = {
        side: _read(features, joined, side, some(rows, COMPARED))
        for side, rows in alone.items()
        if len(rows)
    }
    return Sample(images, values[kept], unpaired, 1 - len(kept) / len(texts))


def _windows(rows: Ints, most: int) -> Ints:
    """Take at most some rows in a few windows, spread evenly."""
    size = -(-most // WINDOWS)
    starts = np.linspace(0, max(0, len(rows) - size), WINDOWS).astype(np.int64)
    return rows[np.unique(starts[:, None] + np.arange(min(size, len(rows))))]


def _read(features: FeatureSet, joined: Joined, side: Modality, chosen: Ints) -> Array:
    """Read the embeddings of chosen rows, (k, d), in their order, after `check_directions`."""
    table, rows = features.table(side), _table_rows(joined, side, chosen)
    values = table.take(rows)
    check_directions(values, table.strings(schema.ID, rows), f"{features.path}: {side.plural}")
    return values[np.argsort(np.argsort(chosen))]


def _table_rows(joined: Joined, side: Modality, chosen: Ints) -> Ints:
    """Return the rows of the table that chosen ones of a side are, ascending."""
    rows = joined.side(side)[0]
    return np.sort(chosen if rows is None else rows[chosen])


def one_per_image(text_image: Ints, keys: Ints | None, most: int, rng: np.random.Generator) -> Ints:
    """Choose a text of each of at most `most` images at random, (k,) in random order.

    Texts (m,) without an image have -1; of those with equal keys (m,) one is chosen.
    """
    texts = rng.permutation(np.flatnonzero(text_image >= 0))
    for groups in (text_image, keys):
        if groups is not None:
            texts = texts[np.unique(first_alike(groups[texts]))]
    return texts[:most]


def measure_agreement(sample: Sample, *, seed: int = 0) -> Agreement | None:
    """Measure the agreement of at most 2,000 pairs; None if there are `NEIGHBOURS` or fewer."""
    given = {Modality.IMAGE: sample.images[:COMPARED], Modality.TEXT: sample.texts[:COMPARED]}
    n = len(given[Modality.IMAGE])
    if n <= NEIGHBOURS:
        return None
    plain = {side: UnitRows()(own) for side, own in given.items()}
    centred = {side: input_units(own)(own) for side, own in given.items()}
    centred = {side: own - own.mean(0) for side, own in centred.items()}
    near = {side: nearest(own) for side, own in centred.items()}
    top, rank, removal = {}, {}, {}
    for side, other in ((Modality.IMAGE, Modality.TEXT), (Modality.TEXT, Modality.IMAGE)):
        own = centred[side]
        variances, axes = torch.linalg.eigh(own.T @ own)
        shares = variances.clamp(min=0) / variances.sum().clamp(min=1e-12)
        top[side], first = float(shares.max()), axes[:, -1]
        rank[side] = float(torch.exp(torch.special.entr(shares).sum()))
        without = nearest(own - torch.outer(own @ first, first))
        removal[side] = shared_neighbours(without, near[other])
    return Agreement(
        compared=n,
        cka=linear_cka(*centred.values()),
        mutual_knn=shared_neighbours(*near.values()),
        mutual_knn_chance=NEIGHBOURS / (n - 1),
        sliced_wasserstein={
            side: measure_shift(plain[side], UnitRows()(own[:COMPARED]), seed)
            for side, own in sample.unpaired.items()
            if min(len(own), n // 2) >= LEAST_UNPAIRED
        },
        mean_energy={side: float(own.mean(0).square().sum()) for side, own in plain.items()},
        top_energy=top,
        removal=removal,
        effective_rank=rank,
    )


def input_units(values: Array) -> UnitRows:
    """Return the function that makes an adapter's unit inputs of rows (n, d), before centring."""
    root = bool(values.min() >= 0)
    return UnitRows(root, loud_scale(values, signed_sqrt=root))


def nearest(rows: Tensor) -> Tensor:
    """Find the nearest others of each row (n, d) by cosine, (n, `NEIGHBOURS`)."""
    unit = normalize(rows, dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(NEIGHBOURS, dim=1).indices


def shared_neighbours(near_x: Tensor, near_y: Tensor) -> float:
    """Return the share of neighbours (n, k) that both sides have, in [0, 1]."""
    is_near = torch.zeros(len(near_x), len(near_x), dtype=torch.bool)
    return float(is_near.scatter_(1, near_x, True).gather(1, near_y).float().mean())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of paired centred rows, in [0, 1] (Kornblith et al. 2019).

    |X^T Y|^2 / (|X^T X| |Y^T Y|) in Frobenius norms (arXiv 1905.00414), for X (n, d) and Y (n, e);
    high by chance for fewer rows than dimensions.
    """
    x, y = x.double(), y.double()
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).square().sum() / norms) if norms else 0.0


def measure_shift(paired: Tensor, unpaired: Tensor, seed: int) -> Shift:
    """Compare rows (n, d) and (m, d) by random samples of equal size, n // 2 or m."""
    rng = np.random.default_rng(seed)
    own, other = (torch.from_numpy(rng.permutation(len(rows))) for rows in (paired, unpaired))
    k = min(len(paired) // 2, len(unpaired))
    first, second, strange = paired[own[:k]], paired[own[k : 2 * k]], unpaired[other[:k]]
    axes = random_axes(paired.shape[1], seed)
    deviation = max(float(paired.var(0).mean()) ** 0.5, 1e-12)
    return Shift(*(sliced_wasserstein(first, y, axes) / deviation for y in (strange, second)))


def sliced_wasserstein(x: Tensor, y: Tensor, axes: Tensor) -> float:
    """Return the mean Wasserstein-1 distance of (n, d) and (n, d) along unit `axes` (d, k)."""
    return float(((x @ axes).sort(0).values - (y @ axes).sort(0).values).abs().mean())


def random_axes(width: int, seed: int) -> Tensor:
    """Draw unit directions, (width, `PROJECTIONS`) float32 (Bonneel et al. 2015)."""
    drawn = torch.randn(width, PROJECTIONS, generator=torch.Generator().manual_seed(seed))
    return normalize(drawn, dim=0)
