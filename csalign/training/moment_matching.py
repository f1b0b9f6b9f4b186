"""After training: both sides' outputs brought to like means and covariances over all rows."""

import copy
import logging

import numpy as np
import numpy.typing as npt
import torch

from csalign.adapters.matching import Outputs, match_moments, nearest_mean
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideAdapter, to_tensor, unit_inputs
from csalign.core.enums import Modality
from csalign.features.join import PairedRows, Pairs
from csalign.training.config import TrainConfig
from csalign.training.sampler import PairSampler
from csalign.training.unpaired import Array, Unpaired
from csalign.training.validation import Score, validate

log = logging.getLogger(__name__)

MAX_ROWS = 20_000  # a side, paired and unpaired each; a covariance needs no more
TOLERANCE = 0.0025  # of mean recall on validation


def match_outputs(
    adapter: Adapter,
    rows: Pairs,
    sampler: PairSampler,
    unpaired: Unpaired,
    val: PairedRows,
    before: Score,
    config: TrainConfig,
) -> Score | None:
    """Match both sides' outputs over all rows, if that narrows the gap on validation.

    And if recall holds there, which may fall by a quarter of a point, less than a few hundred
    pairs can tell. Otherwise the means alone are matched, on the same terms.

    A fit sees its own pairs too well: new rows come out elsewhere, and narrower. Unpaired rows
    are new rows. What each counts is taken from the paired rows most like it, since a caption that
    a thousand images share counts once among pairs and must not count a thousand times here.

    Args:
        adapter: both sides, on any device; changed in place if the match is taken.
        rows: training rows.
        sampler: their pairs and weights.
        unpaired: the other rows.
        val: held-out rows.
        before: the adapter's score on them.
        config: for the seed, and whether captions count once.

    Returns:
        The score after the match; None where nothing was changed.
    """
    if not any(unpaired.count(side) for side in Modality):
        return None
    frozen = {side: not adapter.parameter_counts()[side.value] for side in Modality}
    if not all(frozen[side] or adapter.side(side).accepts_output_map for side in Modality):
        log.info("unpaired rows: the outputs of these kinds of adapters cannot be matched")
        return None
    rng = np.random.default_rng(config.seed)
    outputs = {}
    for side in Modality:
        known, weights = _paired(side, rows, sampler, once=config.caption_weights, rng=rng)
        others = unpaired.sample(side, MAX_ROWS, rng)
        if side is Modality.TEXT and config.caption_weights:
            others = others[distinct(others)]
        outputs[side] = _outputs(adapter.side(side), known, weights, others, frozen[side])
    for covariances in (True, False):
        changes = match_moments(
            outputs[Modality.IMAGE], outputs[Modality.TEXT], covariances=covariances
        )
        matched = copy.deepcopy(adapter)
        for side, change in zip(Modality, changes, strict=True):
            if not frozen[side]:
                device = adapter.side(side).mean.device
                matched.side(side).then(change.weight.to(device), change.bias.to(device))
        score = validate(matched, val)
        log.info(
            "%s matched over all rows: validation mean recall %.4f from %.4f, centroid distance "
            "%.4f from %.4f",
            "means and covariances" if covariances else "means",
            score.mean_recall,
            before.mean_recall,
            score.centroid_distance,
            before.centroid_distance,
        )
        is_closer = score.centroid_distance < before.centroid_distance
        if is_closer and score.mean_recall >= before.mean_recall - TOLERANCE:
            adapter.load_state_dict(matched.state_dict())
            return score
    log.info("the outputs are left as they were")
    return None


def _paired(
    side: Modality,
    rows: Pairs,
    sampler: PairSampler,
    *,
    once: bool,
    rng: np.random.Generator,
) -> tuple[Array, npt.NDArray[np.float64]]:
    """The paired rows of a side, and what each counts among pairs, 1 on average."""
    (images, texts), weights = sampler.weighted_pairs()
    own, values = (images, rows.images) if side is Modality.IMAGE else (texts, rows.texts)
    groups = rows.caption_keys[texts] if side is Modality.TEXT and once else own
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    sums = np.bincount(group, weights)
    chosen = np.arange(len(first))
    if len(chosen) > MAX_ROWS:
        chosen = np.sort(rng.choice(chosen, MAX_ROWS, replace=False))
    return values[own[first[chosen]]], sums[chosen] / sums.mean()


@torch.inference_mode()
def _outputs(
    side: SideAdapter,
    known: Array,
    weights: npt.NDArray[np.float64],
    others: Array,
    is_frozen: bool,
) -> Outputs:
    """What a side makes of its paired and unpaired rows, and what each counts."""
    side.eval()
    device = side.mean.device
    paired, further = to_tensor(known, device), to_tensor(others, device)
    values = torch.from_numpy(weights).to(device, torch.float32)
    seen, new = (unit_inputs(x, signed_sqrt=side.shape.signed_sqrt) for x in (paired, further))
    guessed = nearest_mean(seen, values, new)
    return Outputs(
        torch.cat([side(paired), side(further)]), torch.cat([values, guessed]), is_frozen
    )


def distinct(rows: Array) -> npt.NDArray[np.int64]:
    """Positions, ascending, of the first of each group of equal rows (n, d)."""
    size = rows.dtype.itemsize * rows.shape[1]
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, size)))
    return np.sort(np.unique(whole[:, 0], return_index=True)[1])
