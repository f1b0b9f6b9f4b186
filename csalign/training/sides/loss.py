"""The loss of a batch of any sides: that of two, over the pairs of sides."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.model import Adapter
from csalign.core.enums import DivergenceName, PairwiseName
from csalign.objective.divergences import divergence, holder
from csalign.objective.loss import LossParts
from csalign.training.config import ObjectiveOptions
from csalign.training.network.batch_loss import MAX_LOGIT_SCALE, BatchLoss, initial_scale
from csalign.training.sides.loader import SidesBatch

LEAST_PAIRS = 2  # of two sides in a batch, since the pairwise loss needs a negative


class SidesLoss(BatchLoss):
    """Objective of a batch of any sides; for two complete ones it is that of `BatchLoss`.

    The pairwise term is the mean over all pairs of rows of two sides, each pair of sides a
    `Objective` with its own negatives. The distribution term is the mean over the pairs of sides,
    each compared with all of its rows in the batch; the Hoelder divergence compares all sides at
    once, and is scaled alike.

    Args:
        options: the terms.
        hub: the side that all pairs of rows have in common; None for all pairs of sides.
        values: as of `BatchLoss`.
    """

    def __init__(self, options: ObjectiveOptions, *, hub: str | None = None, **values: Any) -> None:
        super().__init__(options, **values)
        self._hub = hub

    def forward(self, adapter: Adapter, batch: SidesBatch, step: int) -> LossParts:  # type: ignore[override]
        """Compute the objective of a batch; `step` is counted from 1."""
        sides = {
            side: self._embed(adapter.side(side), own, own.rows)[0]
            for side, own in batch.sides.items()
        }
        of_items = [sides[side][: own.counts[0]] for side, own in batch.sides.items()]
        sigma = self._bandwidth([own for own in of_items if len(own)], step)
        measure, weight = divergence(self.options.divergence), self.weight
        at_once = bool(weight) and measure.name is DivergenceName.HOLDER
        scale = self._scale or self.log_scale.exp()
        pairwise: list[tuple[Tensor, int]] = []  # terms, and how many pairs they are of
        apart: list[Tensor] = []
        for (one, other), own in batch.pairs.items():
            x, y = sides[one], sides[other]
            counts = len(own.first), len(own.first_rest), len(own.second_rest)
            is_paired = counts[0] >= LEAST_PAIRS and self._hub in (None, one, other)
            is_paired = is_paired and self._objective.pairwise is not PairwiseName.NONE
            compares = bool(weight) and not at_once
            least = counts[0] if measure.matched else counts[0] + min(counts[1:])
            compares = compares and least >= measure.minimum
            if not (is_paired or compares):
                continue
            objective = replace(
                self._objective,
                pairwise=self._objective.pairwise if is_paired else PairwiseName.NONE,
                label_smoothing=self._objective.label_smoothing if is_paired else 0.0,
                weight=weight if compares else 0.0,
            )
            extra = x[own.first_rest], y[own.second_rest]
            takes_negatives = is_paired and self.options.unpaired_negatives
            parts = objective(
                x[own.first],
                y[own.second],
                logit_scale=scale,
                max_scale=self._scale or max(MAX_LOGIT_SCALE, initial_scale(self.options)),
                logit_bias=self.logit_bias,
                sigma=sigma,
                x_extra=extra[0],
                y_extra=extra[1],
                negatives=counts[1:] if takes_negatives else (0, 0),
            )
            if is_paired:
                pairwise.append((parts.pairwise, counts[0]))
            if compares:
                apart.append(parts.divergence)
        none = torch.stack([own[:0].sum() for own in sides.values()]).sum()  # keeps the graph
        if at_once:
            rows = [normalize(own, dim=1) for own in sides.values() if len(own)]
            if len(rows) > 1:  # of M sides it is about the sum over the pairs of sides
                apart = [holder(rows, sigma) * (2 / (len(rows) * (len(rows) - 1)))]
        total = sum(count for _, count in pairwise)
        found = torch.stack([none, *(own * (count / total) for own, count in pairwise)]).sum()
        distance = torch.stack(apart).mean() if apart else none
        return LossParts(found + weight * distance, found, distance, torch.zeros_like(found))
