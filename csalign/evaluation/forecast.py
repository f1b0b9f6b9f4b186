"""What can be foretold of an alignment: expected recall, and what more pairs would bring."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.canonical import PairMoments
from csalign.core.enums import Modality
from csalign.core.figures import percent
from csalign.core.progress import tick, track
from csalign.evaluation.agreement import (
    LEAST_TO_COMPARE,
    MANY_PAIRS,
    Agreement,
    Sample,
    input_units,
    measure_agreement,
    read_sample,
)
from csalign.features.join import join_pairs
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import RECALL_AT

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

GALLERY = 1_000  # images and texts that a recall refers to
CURVE_PAIRS = 10_000  # at most, to learn from
HELD_OUT = 2_000  # pairs at most: two galleries, of which each chooses the other's ridge
LEAST_TO_LEARN = 200  # pairs, of which a fifth is held out
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
RIDGES = (30.0, 3.0, 0.3, 0.03)
MOST_DIMENSIONS = 384  # principal ones of a side
WIDTH = 256
FEW_PAIRS, FEW_DRAWS, DRAWS = 3_000, 5, 3
# Of a closed form's curve in log-odds: a doubling gains this share of what the one before did, by
# which the corpora differ by a quarter; what galleries of a tenth exceed is 0.2, give or take 0.2.
DAMPING, SLOPE_ERROR = 0.8, 0.25
GALLERY_BIAS, GALLERY_ERROR = 0.1, 0.1  # per log of the ratio
LAST_DOUBLINGS = 2  # that the slope is taken from
DEVIATIONS = 2.0  # of a range
WELL, MODERATELY = 0.5, 0.2  # mean recall
WORTH = 0.02  # of mean recall, by twice the pairs
HELPFUL, LITTLE = 0.1, 0.05  # mutual k-NN above chance, with which unpaired rows help
REPEATED = 0.1


class Calibration(NamedTuple):
    """Log-odds of the mean recall, linear in logs of the excess of mutual k-NN and of the pairs."""

    constant: float
    excess: float
    pairs: float
    deviation: float  # of the residuals, log-odds


CALIBRATION = Calibration(constant=-0.17, excess=1.6, pairs=0.45, deviation=0.5)


class Band(NamedTuple):
    """A mean recall with its likely range, in [0, 1]."""

    mean_recall: float
    low: float
    high: float

    @classmethod
    def around(cls, odds: float, deviation: float) -> "Band":
        """Return the band of log-odds and their standard deviation."""
        ends = (odds + sign * DEVIATIONS * deviation for sign in (0, -1, 1))
        return cls(*(1 / (1 + math.exp(-end)) for end in ends))

    def __str__(self) -> str:
        """Word the recall and its range."""
        mean, low, high = (f"{100 * value:.0f}" for value in self)
        return f"{mean} % ({low} to {high} %)"


class Curve(NamedTuple):
    """Held-out mean recall of a closed form by the number of pairs that it is learnt from."""

    pairs: Ints  # (s,), ascending, twice as many each time
    odds: Doubles  # (draws, s), log-odds of the mean recall in a gallery of 1,000
    gallery: int  # that was measured

    @property
    def deviation(self) -> float:
        """Standard deviation of a point, from the draws and the size of the gallery."""
        drawn = float(self.odds.var(0, ddof=1).mean()) if len(self.odds) > 1 else 0.0
        return math.hypot(drawn**0.5, GALLERY_ERROR * math.log(GALLERY / self.gallery))

    def points(self) -> list[tuple[int, Band]]:
        """Return the measured points."""
        means = self.odds.mean(0).tolist()
        return [
            (n, Band.around(own, self.deviation))
            for n, own in zip(self.pairs.tolist(), means, strict=True)
        ]

    def extrapolated(self, pairs: int) -> Band:
        """Foretell the recall for more pairs by the slope of the last doublings."""
        slopes = (self.odds[:, -1] - self.odds[:, -1 - LAST_DOUBLINGS]) / LAST_DOUBLINGS
        slope, doublings = float(slopes.mean()), math.log2(pairs / self.pairs[-1])
        reach = DAMPING * (1 - DAMPING**doublings) / (1 - DAMPING)
        noise = float(slopes.std(ddof=1)) if len(slopes) > 1 else 0.0
        error = math.hypot(self.deviation, reach * math.hypot(SLOPE_ERROR * slope, noise))
        return Band.around(float(self.odds[:, -1].mean()) + reach * max(0.0, slope), error)


def forecast(features: FeatureSet, split: str, *, seed: int = 0) -> dict[str, Any]:
    """Foretell how well the sides of a feature set will align, of any widths.

    From a sample: at most 2,000 pairs and as many unpaired rows of a side for the agreement,
    12,000 pairs for the learning curve. A pair is an image with one of its texts.

    Returns:
        The block "forecast" of ``csalign diagnose``: plain values, recalls in [0, 1].

    Raises:
        DataError, SchemaError: the split has no pairs, or a shard is damaged.
    """
    tick("forecast")
    joined = join_pairs(features, split)
    captioned = int((joined.caption_counts > 0).sum())
    unpaired = {
        Modality.IMAGE: joined.n_images - captioned,
        Modality.TEXT: int((joined.text_image < 0).sum()),
    }
    sample = read_sample(features, joined, CURVE_PAIRS + HELD_OUT, seed)
    agreement = measure_agreement(sample, seed=seed)
    curve = learn_curve(sample, seed=seed)
    expected = None if agreement is None else expect(agreement.excess, captioned)
    points = [] if curve is None else curve.points()
    wanted = (captioned, 2 * captioned, 4 * captioned)
    later = [] if curve is None else [(n, curve.extrapolated(n)) for n in wanted]
    return {
        "split": split,
        "pairs": captioned,
        "unpaired": {side.value: count for side, count in unpaired.items()},
        **(asdict(agreement) if agreement else dict.fromkeys(Agreement.__dataclass_fields__)),
        "expected": expected and {**expected._asdict(), "gallery": GALLERY},
        "curve": [{"pairs": n, **band._asdict()} for n, band in points],
        "extrapolated": [{"pairs": n, **band._asdict()} for n, band in later],
        "words": list(word(captioned, unpaired, agreement, points, [band for _, band in later])),
    }


def expect(excess: float, pairs: int) -> Band:
    """Foretell the mean recall of a trained adapter in a gallery of 1,000.

    Args:
        excess: mutual k-NN above chance.
        pairs: to train on.
    """
    slopes = CALIBRATION.excess * math.log(max(excess, 1e-3)) + CALIBRATION.pairs * math.log(pairs)
    return Band.around(CALIBRATION.constant + slopes, CALIBRATION.deviation)


def word(
    pairs: int,
    unpaired: Mapping[Modality, int],
    agreement: Agreement | None,
    points: Sequence[tuple[int, Band]],
    later: Sequence[Band],
) -> Iterator[str]:
    """Word a forecast: how well, whether unpaired rows help, what to remove, how many pairs."""
    if agreement is None or agreement.compared < LEAST_TO_COMPARE:
        yield (
            f"{pairs:,} pairs are too few to foretell how well the encoders align; "
            f"{LEAST_TO_COMPARE} different ones say more."
        )
        return
    if agreement.is_random:
        yield f"{next(agreement.findings()).capitalize()}; nothing can be learnt from such pairs."
        return
    own = expect(agreement.excess, pairs)
    degree = "well" if own.mean_recall >= WELL else "moderately well"
    degree = degree if own.mean_recall >= MODERATELY else "poorly"
    yield (
        f"These encoders align {degree}: {agreement.agreed}, so {pairs:,} pairs should reach a "
        f"mean recall of {own} in a gallery of {GALLERY:,}."
    )
    if points:
        known, band = points[-1]
        yield f"Linear maps fitted on {known:,} pairs already reach {band} on held-out pairs."
    yield _unpaired_help(pairs, unpaired, agreement)
    directions = [*agreement.directions()] or ["no direction has to be removed"]
    for line in directions:
        yield f"{line[0].upper()}{line[1:]}."
    for side, share in agreement.repeated.items():
        if share > REPEATED:
            yield f"{percent(share, 0)} of the {side.plural} repeat another one."
    if later:
        now, twice, four = later
        gain = twice.mean_recall - now.mean_recall
        worth = "worth collecting" if gain >= WORTH else "hardly worth collecting"
        yield (
            f"More pairs are {worth}: linear maps should reach {twice} with twice as many, and "
            f"{four} with four times as many, from {now} with all {pairs:,}."
        )


def _unpaired_help(pairs: int, unpaired: Mapping[Modality, int], agreement: Agreement) -> str:
    """Word whether unpaired rows help, and how they are distributed."""
    far = [line for line in agreement.unpaired() if line]
    counts = " and ".join(f"{unpaired[side]:,} unpaired {side.plural}" for side in Modality)
    if pairs > MANY_PAIRS:
        return f"Unpaired rows bring nothing beside more than {MANY_PAIRS:,} pairs."
    if far:
        return f"{far[0][0].upper()}{far[0][1:]}."
    if agreement.excess < LITTLE:
        return "Unpaired rows will hardly help, since the encoders agree too little."
    degree = "should help" if agreement.excess >= HELPFUL else "may help a little"
    if not all(unpaired.values()):
        here = f"here are {counts}" if any(unpaired.values()) else "there are none here"
        return f"Unpaired rows of both sides {degree}; {here}."
    near = ", which lie where the paired ones do" if agreement.sliced_wasserstein else ""
    return f"The {counts}{near}, {degree}."


def learn_curve(sample: Sample, *, seed: int = 0) -> Curve | None:
    """Measure CCA on nested random subsets; None of fewer than 200 different pairs.

    Each draw holds out up to a fifth of the pairs, in two galleries: the ridge that does best on
    one is measured on the other. Sides wider than 384 are cut to that many principal axes.
    """
    held = min(HELD_OUT, len(sample.distinct) // 5) // 2 * 2
    if len(sample.distinct) < LEAST_TO_LEARN:
        return None
    draws = FEW_DRAWS if len(sample.images) < FEW_PAIRS else DRAWS
    sides = [_leading_axes(input_units(rows)(rows)) for rows in (sample.images, sample.texts)]
    rng, found = np.random.default_rng(seed), []
    orders = [rng.permutation(len(sample.images)) for _ in range(draws)]
    splits = [_hold_out(order, sample.keys, held, rng) for order in orders]
    most = min(CURVE_PAIRS, *(len(learned) for learned, _ in splits))
    pairs = np.array([round(share * most) for share in SHARES])
    for learned, measured in track(splits, "learning curve", draws):
        ridges: Sequence[float] = RIDGES
        for n in pairs:
            recalls = _recalls(sides, learned[:n], measured, ridges)  # (ridges, 2)
            best = recalls.argmax(0)
            found.append((recalls[best[0], 1] + recalls[best[1], 0]) / 2)
            ridges = ridges[int(best.min()) :]  # more pairs need no larger one
    odds = log_odds(np.array(found)).reshape(draws, len(pairs))
    return Curve(pairs, odds - GALLERY_BIAS * math.log(GALLERY / (held // 2)), held // 2)


def _leading_axes(rows: Tensor) -> Tensor:
    if rows.shape[1] <= MOST_DIMENSIONS:
        return rows
    centred = rows - rows.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -MOST_DIMENSIONS:]
    return normalize(rows @ axes, dim=1)


def _hold_out(order: Ints, keys: Ints, held: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Return pairs to learn from and different ones to measure, without a common caption."""
    # Each caption is as likely to be held out, so that frequent ones are not all lost.
    distinct = order[np.unique(keys[order], return_index=True)[1]]
    measured = rng.permutation(distinct)[:held]
    return order[~np.isin(keys[order], keys[measured])], measured


def _recalls(
    sides: Sequence[Tensor], learned: Ints, measured: Ints, ridges: Sequence[float]
) -> Doubles:
    """Fit CCA for some ridges, and measure the mean recall of each on both galleries, (r, 2)."""
    x, y = (side[learned].numpy() for side in sides)
    every = np.arange(len(learned))
    moments = PairMoments.of(x, y, (every, every), np.ones(len(learned)))
    width = min(WIDTH, x.shape[1], y.shape[1])
    found = []
    for ridge in ridges:
        (form,) = moments.cca(ridge=ridge, powers=(1.0,), width=width)
        outputs = form.outputs(*(side[measured] for side in sides))
        halves = zip(*(own.chunk(2) for own in outputs), strict=True)
        found.append([gallery_recall(wrong_ahead(*half), len(half[0])) for half in halves])
    return np.array(found)


def wrong_ahead(x: Tensor, y: Tensor) -> Ints:
    """Count the wrong items that score at least as high as a query's own, both ways, (2 n,)."""
    scores = x @ y.T
    own = scores.diag()
    ahead = torch.cat([(scores >= own[:, None]).sum(1), (scores >= own).sum(0)]) - 1
    return ahead.numpy()


def gallery_recall(wrong: Ints, size: int, gallery: int = GALLERY) -> float:
    """Return the mean of R@1, 5 and 10 that ranks in a small gallery foretell of a larger one.

    Each query has a probability p with which a further item is ahead. Over the queries p has a
    beta distribution (a, 1), a by maximum likelihood; a query's own items update it.

    Args:
        wrong: (q,), wrong items ahead in a gallery of `size`.
        size: items of the gallery, with the right one.
        gallery: items of the larger one, >= `size`.
    """
    counts, queries = np.unique(wrong, return_counts=True)
    ahead, further = torch.from_numpy(counts).double(), gallery - size
    weights = torch.from_numpy(queries / len(wrong)).double()
    shapes = torch.logspace(-2, 1, 31, dtype=torch.float64)[:, None]
    likelihood = shapes.log() + torch.lgamma(ahead + shapes) - torch.lgamma(size + shapes)
    likelihood = likelihood + torch.lgamma(size - ahead)
    a = ahead + shapes[int((likelihood * weights).sum(1).argmax())]
    b = size - ahead
    k = torch.arange(min(further, max(RECALL_AT) - 1) + 1, dtype=torch.float64)[:, None]
    chances = torch.exp(  # (k, c), that k of the further items are ahead
        (math.lgamma(further + 1) - torch.lgamma(k + 1) - torch.lgamma(further - k + 1))
        + (torch.lgamma(k + a) + torch.lgamma(further - k + b) - torch.lgamma(further + a + b))
        + (torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b))
    )
    recalled = [(chances * (k + ahead < most)).sum(0) for most in RECALL_AT]
    return float((torch.stack(recalled).mean(0) * weights).sum())


def log_odds(share: Doubles) -> Doubles:
    """Return the log-odds of shares, kept away from 0 and 1."""
    share = np.clip(share, 1e-4, 1 - 1e-4)
    found: Doubles = np.log(share / (1 - share))
    return found
