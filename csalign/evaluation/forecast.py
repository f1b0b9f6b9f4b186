"""What can be foretold of an alignment: expected recall, and what more pairs would bring."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.canonical import PairMoments
from csalign.core.arrays import Doubles, Ints
from csalign.core.enums import Modality
from csalign.core.figures import percent, recall_range
from csalign.core.progress import tick, track
from csalign.evaluation.agreement import (
    NEIGHBOURS,
    Agreement,
    Sample,
    input_units,
    measure_agreement,
    read_sample,
)
from csalign.features.checks import LEAST_PAIRS, alike
from csalign.features.join import join_pairs
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import RECALL_AT

GALLERY = 1_000  # images and texts that a recall refers to
CURVE_PAIRS = 10_000  # at most, to learn from
HELD_OUT = 2_000  # pairs at most: two galleries, of which each chooses the other's ridge
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
RIDGES: tuple[float, ...] = (30.0, 3.0, 0.3, 0.03)
MOST_DIMENSIONS = 384  # principal ones of a side
WIDTH = 256
FEW_PAIRS, FEW_DRAWS, DRAWS = 3_000, 5, 3

# Measured in tests/benchmarks/forecast/RESULTS.md, in log-odds of the mean recall.
DAMPING = 0.7  # share of the curve's slope in log pairs that continues
DEVIATION, MANY_DEVIATION = 0.19, 0.4  # for four times the pairs; beyond the many
MANY = 5_000  # pairs
TRAINING, TRAINING_DEVIATION = 0.25, 0.24  # what training gains beyond the closed form
GALLERY_DEVIATION = 0.12  # per log of the ratio to a smaller gallery
GALLERY_DRAWS = 20
QUANTILE = 1.64  # of a range that has nine of ten

WELL, MODERATELY = 0.5, 0.2  # mean recall
WORTH = 0.02  # of mean recall, by twice the pairs
HELPFUL, LITTLE = 0.1, 0.05  # mutual k-NN above chance, with which unpaired rows help
MANY_PAIRS = 10_000  # beyond which unpaired rows bring nothing
REPEATED, MEAN_ENERGY = 0.1, 0.8  # much


class Band(NamedTuple):
    """A mean recall with its likely range, in [0, 1]."""

    mean_recall: float
    low: float
    high: float

    @classmethod
    def around(cls, odds: float, deviation: float) -> "Band":
        """Return the band of log-odds and their standard deviation."""
        ends = (odds + sign * QUANTILE * deviation for sign in (0, -1, 1))
        return cls(*(1 / (1 + math.exp(-end)) for end in ends))


class Curve(NamedTuple):
    """Held-out mean recall of a closed form by the number of pairs that it is learnt from."""

    pairs: Ints  # (s,), ascending, twice as many each time
    odds: Doubles  # (draws, s), log-odds of the mean recall in a gallery of 1,000
    gallery: int  # that was measured

    @property
    def deviation(self) -> float:
        """Standard deviation of a point, from the draws and the size of the gallery."""
        drawn = float(self.odds.var(0, ddof=1).mean()) ** 0.5 if len(self.odds) > 1 else 0.0
        return math.hypot(drawn, GALLERY_DEVIATION * math.log(GALLERY / self.gallery))

    def extrapolated(self, pairs: int, *, trained: bool = False) -> Band:
        """Foretell the recall of different pairs, linear in log pairs with a damped slope."""
        logs, means = np.log(self.pairs), self.odds.mean(0)
        slope, level = np.polyfit(logs, means, 1).tolist()
        last = (slope * float(logs[-1]) + level + float(means[-1])) / 2
        further = max(0.0, math.log(pairs) - float(logs[-1]))
        error = (MANY_DEVIATION if pairs > MANY else DEVIATION) * further / math.log(4)
        gain, own = (TRAINING, TRAINING_DEVIATION) if trained else (0.0, 0.0)
        odds = last + DAMPING * max(0.0, slope) * further + gain
        return Band.around(odds, math.hypot(self.deviation, error, own))


def forecast(features: FeatureSet, split: str, *, seed: int = 0) -> dict[str, Any]:
    """Foretell how well the sides of a feature set will align, of any widths.

    From a sample: at most 2,000 pairs and as many unpaired rows of a side for the agreement,
    12,000 pairs for the learning curve. A pair is an image with one of its texts; of those with the
    same caption one is used.

    Returns:
        The block "forecast" of ``csalign diagnose``: plain values, recalls in [0, 1].

    Raises:
        DataError, SchemaError: the split has no pairs, or a shard is damaged.
    """
    tick("forecast")
    joined = join_pairs(features, split)
    pairs, texts = int((joined.caption_counts > 0).sum()), int((joined.text_image < 0).sum())
    sample = read_sample(features, joined, CURVE_PAIRS + HELD_OUT, seed)
    agreement = measure_agreement(sample, seed=seed)
    is_random = agreement is not None and agreement.is_random
    curve = None if is_random else learn_curve(sample, seed=seed)
    different = round(pairs * (1 - sample.repeated))
    images = 1 - len(np.unique(alike(sample.images))) / len(sample.images)
    found: dict[str, Any] = {
        **{"split": split, "pairs": pairs, "different": different},
        "unpaired": {Modality.IMAGE.value: joined.n_images - pairs, Modality.TEXT.value: texts},
        **(asdict(agreement) if agreement else dict.fromkeys(Agreement.__dataclass_fields__)),
        "repeated": {Modality.IMAGE.value: images, Modality.TEXT.value: sample.repeated},
        **{"looks_random": is_random, "expected": None, "curve": [], "extrapolated": []},
    }
    if curve is not None:
        expected = curve.extrapolated(different, trained=True)
        found["expected"] = expected._asdict() | {"gallery": GALLERY}
        points = zip(curve.pairs.tolist(), curve.odds.mean(0).tolist(), strict=True)
        bands = {n: Band.around(own, curve.deviation) for n, own in points}
        later = {n: curve.extrapolated(n) for n in (different, 2 * different, 4 * different)}
        for key, named in (("curve", bands), ("extrapolated", later)):
            found[key] = [{"pairs": n, **band._asdict()} for n, band in named.items()]
    return found | {"words": list(word(found, agreement))}


def word(found: Mapping[str, Any], agreement: Agreement | None) -> Iterator[str]:
    """Word a forecast: how well, whether unpaired rows help, what to remove, how many pairs."""
    pairs, expected = found["different"], found["expected"]
    counted = f"{pairs:,} {'different ' if pairs < found['pairs'] else ''}pairs"
    if agreement is not None and agreement.is_random:
        yield f"{_sentence(next(agreement.findings()))} Nothing can be learnt from such pairs."
        return
    if agreement is None or expected is None:
        yield (
            f"{counted} are too few to foretell how well the encoders align; pass {LEAST_PAIRS} "
            "different ones or more."
        )
        return
    degrees = {WELL: "well", MODERATELY: "moderately well", 0.0: "poorly"}
    degree = next(word for least, word in degrees.items() if expected["mean_recall"] >= least)
    known, (now, twice, four) = found["curve"][-1], found["extrapolated"]
    yield (
        f"These encoders align {degree}: trained on all {counted}, they should reach a mean recall "
        f"of {recall_range(expected)} in a gallery of {GALLERY:,}. Linear maps fitted on "
        f"{known['pairs']:,} reach {recall_range(known)} on held-out pairs."
    )
    yield (
        f"Mutual {NEIGHBOURS}-NN ({agreement.mutual_knn:.3f}, chance "
        f"{agreement.mutual_knn_chance:.3f}) and linear CKA ({agreement.cka:.2f}) rank encoders; "
        "they do not say which recall to expect."
    )
    yield _unpaired_help(pairs, found["unpaired"], agreement)
    yield from map(_sentence, [*agreement.directions()] or ["no direction has to be removed"])
    for side in Modality:
        mean, share = agreement.mean_energy[side], found["repeated"][side.value]
        if mean > MEAN_ENERGY:
            yield (
                f"The mean has {percent(mean, 0)} of the energy of {side.plural}; adapters remove "
                "it, a raw search must."
            )
        if share > REPEATED:
            yield f"{percent(share, 0)} of the {side.plural} repeat another one."
    worth = twice["mean_recall"] >= now["mean_recall"] + WORTH
    yield (
        f"More pairs are {'' if worth else 'hardly '}worth collecting: linear maps should reach "
        f"{recall_range(twice)} with twice as many, and {recall_range(four)} with four times as "
        f"many, from {recall_range(now)} now."
    )


def _sentence(finding: str) -> str:
    return f"{finding[0].upper()}{finding[1:]}."


def _unpaired_help(pairs: int, unpaired: Mapping[str, int], agreement: Agreement) -> str:
    """Word whether unpaired rows help, and how they are distributed."""
    if pairs > MANY_PAIRS:
        return f"Unpaired rows bring nothing beside more than {MANY_PAIRS:,} pairs."
    if far := next(agreement.shifts(), ""):
        return _sentence(far)
    if agreement.excess < LITTLE:
        return "Unpaired rows will hardly help, since the encoders agree too little."
    degree = "should help" if agreement.excess >= HELPFUL else "may help a little"
    counts = " and ".join(f"{unpaired[side.value]:,} {side.plural}" for side in Modality)
    here = (
        f"here are {counts} without a partner" if any(unpaired.values()) else "there are none here"
    )
    return f"Unpaired rows of both sides {degree}; {here}."


def learn_curve(sample: Sample, *, seed: int = 0) -> Curve | None:
    """Measure CCA on nested random subsets; None of fewer than 200 different pairs.

    Each draw holds out up to a fifth of the pairs, in two galleries: the ridge that does best on
    one is measured on the other. Sides wider than 384 are cut to that many principal axes.
    """
    count = len(sample.images)
    if count < LEAST_PAIRS:
        return None
    held, draws = min(HELD_OUT, count // 5) // 2 * 2, FEW_DRAWS if count < FEW_PAIRS else DRAWS
    sides = [_leading_axes(input_units(rows)(rows)) for rows in (sample.images, sample.texts)]
    pairs = np.array([round(share * min(CURVE_PAIRS, count - held)) for share in SHARES])
    rng, odds = np.random.default_rng(seed), np.empty((draws, len(pairs)))
    for draw in track(range(draws), "learning curve", draws):
        measured, learned = np.split(rng.permutation(count), [held])
        ridges = RIDGES
        for column, n in enumerate(pairs):
            recalls = _recalls(sides, learned[:n], measured, ridges)  # (ridges, 2)
            best = recalls.argmax(0)
            odds[draw, column] = (recalls[best[0], 1] + recalls[best[1], 0]) / 2
            ridges = ridges[int(best.min()) :]  # more pairs need no larger one
    return Curve(pairs, log_odds(odds), held // 2)


def _leading_axes(rows: Tensor) -> Tensor:
    if rows.shape[1] <= MOST_DIMENSIONS:
        return rows
    centred = rows - rows.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -MOST_DIMENSIONS:]
    return normalize(rows @ axes, dim=1)


def _recalls(
    sides: list[Tensor], learned: Ints, measured: Ints, ridges: tuple[float, ...]
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
        found.append(
            [gallery_recall(*own) for own in zip(*(y.chunk(2) for y in outputs), strict=True)]
        )
    return np.array(found)


def gallery_recall(x: Tensor, y: Tensor) -> float:
    """Return the mean of R@1, 5 and 10, both ways, that a gallery foretells of one of 1,000.

    Each further item is ahead of a query's own with a probability of a beta distribution: (0.3, 1)
    updated by the wrong items that are. Ties count against the query.

    Args:
        x: (n, d) unit rows, row i paired with row i of `y`.
        y: (n, d).
    """
    scores, size = x @ y.T, len(x)
    own = scores.diag()
    ahead = torch.cat([(scores >= own[:, None]).sum(1), (scores >= own).sum(0)]).numpy() - 1
    if size < GALLERY:
        rng = np.random.default_rng(0)
        chance = rng.beta(ahead + 0.3, size - ahead, size=(GALLERY_DRAWS, len(ahead)))
        ahead = ahead + rng.binomial(GALLERY - size, chance)
    return float(np.mean([(ahead < most).mean() for most in RECALL_AT]))


def log_odds(share: Doubles) -> Doubles:
    """Return the log-odds of shares, kept away from 0 and 1."""
    share = np.clip(share, 1e-4, 1 - 1e-4)
    found: Doubles = np.log(share / (1 - share))
    return found
