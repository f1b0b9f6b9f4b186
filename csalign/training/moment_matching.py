"""Matching of the means and covariances of both sides' outputs over all rows, after training."""

import copy
import logging
from typing import NamedTuple

import numpy as np
import torch

from csalign.adapters.canonical import Outputs, match_moments, nearest_mean
from csalign.adapters.model import Adapter
from csalign.adapters.side import to_tensor
from csalign.core.arrays import Array, Doubles, Ints
from csalign.core.enums import Modality
from csalign.core.progress import tick
from csalign.features.join import Pairs
from csalign.training.data import TrainingData
from csalign.training.network.sampler import PairSampler
from csalign.training.network.validation import Score, validate

log = logging.getLogger(__name__)

MAX_ROWS = 20_000  # per side, paired and unpaired each; a covariance needs no more
TOLERANCE = 0.0025  # of mean recall on validation


class Matched(NamedTuple):
    """A match that was applied: the score after it, and whether covariances were matched too."""

    score: Score
    covariances: bool


def match_outputs(
    adapter: Adapter,
    data: TrainingData,
    sampler: PairSampler,
    before: Score | None,
    *,
    once: bool,
    seed: int,
) -> Matched | None:
    """Match both sides' outputs over all rows, in place, if that narrows the gap on validation.

    It is applied if it costs at most 0.25 points of recall, less than a few hundred pairs can
    resolve. Else the means alone are matched, on the same terms.

    The fit is optimistic on its own training pairs: new rows are mapped elsewhere, and spread
    less. Unpaired rows are new rows. The weight of each is taken from the paired rows most
    similar to it, since a caption shared by a thousand images counts once among pairs and must
    not count a thousand times here. Returns what was applied; None if nothing was.
    """
    unpaired = data.unpaired
    if data.val is None or before is None or not any(unpaired.count(side) for side in Modality):
        return None
    trained = _trained_sides(adapter)
    if not all(adapter.side(side).accepts_output_map for side in trained):
        log.info("unpaired rows: the outputs of these adapters cannot be matched")
        return None
    outputs = _all_outputs(adapter, data, sampler, once=once, seed=seed)
    for covariances in (True, False):
        matched = copy.deepcopy(adapter)
        _apply_match(matched, outputs, covariances=covariances)
        score = validate(matched, data.val)
        what = "means and covariances" if covariances else "means"
        log.info(
            "matching %s over all rows: validation recall %.2f %% (was %.2f %%), centroid distance "
            "%.4f (was %.4f)",
            what,
            100 * score.mean_recall,
            100 * before.mean_recall,
            score.centroid_distance,
            before.centroid_distance,
        )
        is_closer = score.centroid_distance < before.centroid_distance
        if is_closer and score.mean_recall >= before.mean_recall - TOLERANCE:
            adapter.load_state_dict(matched.state_dict())
            return Matched(score, covariances)
    log.info("no matching is applied: it would cost recall or widen the gap")
    return None


def match_again(
    adapter: Adapter,
    data: TrainingData,
    sampler: PairSampler,
    *,
    covariances: bool,
    once: bool,
    seed: int,
) -> None:
    """Match the outputs of an adapter fitted on all pairs as those of the one before it were."""
    outputs = _all_outputs(adapter, data, sampler, once=once, seed=seed)
    _apply_match(adapter, outputs, covariances=covariances)


def _trained_sides(adapter: Adapter) -> list[Modality]:
    counts = adapter.parameter_counts()
    return [side for side in Modality if counts[side.value]]


@torch.inference_mode()
def _all_outputs(
    adapter: Adapter, data: TrainingData, sampler: PairSampler, *, once: bool, seed: int
) -> list[Outputs]:
    """Map the paired and unpaired rows of both sides, and weigh the unpaired ones."""
    tick("matching")
    rng, unpaired, trained = np.random.default_rng(seed), data.unpaired, _trained_sides(adapter)
    outputs = []
    for name in Modality:
        side = adapter.side(name).eval()
        known, weights = _paired_rows(name, data.rows, sampler, once=once, rng=rng)
        others = unpaired.take(name, _at_most(MAX_ROWS, unpaired.count(name), rng))
        if name is Modality.TEXT and once:
            others = np.unique(others, axis=0)
        paired, further = (to_tensor(own, side.mean.device) for own in (known, others))
        values = torch.from_numpy(weights).to(paired)
        estimated = nearest_mean(side.unit(paired), values, side.unit(further))
        rows, counts = torch.cat([side(paired), side(further)]), torch.cat([values, estimated])
        outputs.append(Outputs(rows, counts, name not in trained))
    return outputs


def _apply_match(adapter: Adapter, outputs: list[Outputs], *, covariances: bool) -> None:
    changes = match_moments(*outputs, covariances=covariances)
    for side, change in zip(Modality, changes, strict=True):
        if side in _trained_sides(adapter):
            device = adapter.side(side).mean.device
            adapter.side(side).then(change.weight.to(device), change.bias.to(device))


def _at_most(most: int, total: int, rng: np.random.Generator) -> Ints:
    """Draw different numbers below `total`, ascending: all of them, or `most`."""
    return np.sort(rng.choice(total, most, replace=False)) if total > most else np.arange(total)


def _paired_rows(
    side: Modality, rows: Pairs, sampler: PairSampler, *, once: bool, rng: np.random.Generator
) -> tuple[Array, Doubles]:
    """Return the paired rows of a side and their weights among pairs, 1 on average."""
    (images, texts), weights = sampler.weighted_pairs()
    own = images if side is Modality.IMAGE else texts
    groups = rows.caption_keys[texts] if side is Modality.TEXT and once else own
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    sums = np.bincount(group, weights)
    chosen = _at_most(MAX_ROWS, len(first), rng)
    return rows.embeddings(side)[own[first[chosen]]], sums[chosen] / sums.mean()
