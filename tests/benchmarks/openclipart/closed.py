"""Closed-form alignments as their papers have them, without csalign's weights and square roots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.canonical import ClosedForm, PairMoments
from csalign.adapters.side import to_tensor, unit_inputs
from csalign.core.enums import Modality
from csalign.evaluation.config import MeasureOptions
from csalign.evaluation.measure import Evaluation, measure_rows
from csalign.evaluation.protocols import AlignedRows
from csalign.features.join import PairedRows, load_rows
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import mean_recall, rank_both_ways
from csalign.training.network.sampler import PairSampler

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fitted:
    """A closed form, and how its inner products are weighted.

    Attributes:
        form: maps of both sides.
        weights: (k,) of each dimension in the similarity; None for the plain cosine.
    """

    form: ClosedForm
    weights: Tensor | None = None

    @property
    def parameters(self) -> int:
        """Numbers that were fitted."""
        form = self.form
        tensors = (form.image_mean, form.image_weight, form.text_mean, form.text_weight)
        return sum(tensor.numel() for tensor in tensors)

    def embed(self, rows: PairedRows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rows whose inner products are the similarities."""
        form = self.form
        images = (rows.images, form.image_mean, form.image_weight, form.image_bias)
        texts = (rows.texts, form.text_mean, form.text_weight, form.text_bias)
        return self._side(*images), self._side(*texts)

    def _side(
        self, values: Any, mean: Tensor, weight: Tensor, bias: Tensor | None
    ) -> NDArray[np.float32]:
        z = (unit_inputs(to_tensor(values, CPU), signed_sqrt=False) - mean) @ weight.T
        z = normalize(z if bias is None else z + bias, dim=1)
        if self.weights is not None:
            z = z * self.weights.sqrt()
        return z.numpy()

    def score(self, rows: PairedRows) -> dict[str, float]:
        """Mean recall and MRR on held-out rows."""
        ways = [way.summary() for way in rank_both_ways(*self.embed(rows), rows.text_image)]
        return {
            "mean_recall": mean_recall(*ways),
            "mrr": float(np.mean([way["mrr"] for way in ways])),
        }

    def measure(self, features: Path, split: str) -> Evaluation:
        """As `evaluate.measure`; the gap is that of the weighted rows made unit."""
        opened = FeatureSet.open(features)
        rows = load_rows(opened, split)
        images, texts = self.embed(rows)
        unit_images, unit_texts = (
            side / np.linalg.norm(side, axis=1, keepdims=True) for side in (images, texts)
        )
        aligned = AlignedRows(
            opened, split, rows, unit_images, unit_texts, parameters=self.parameters
        )
        measured = measure_rows(aligned, MeasureOptions())
        ranks = rank_both_ways(images, texts, rows.text_image)
        return replace(measured, fold_ranks=(ranks,))


Trial = Mapping[str, Any]
Fit = Callable[[PairMoments, Trial], Fitted]


def fit_cca(moments: PairMoments, trial: Trial) -> Fitted:
    """Cosine of the canonical variates."""
    (form,) = moments.cca(ridge=trial["ridge"], powers=(0.0,), width=trial["width"])
    return Fitted(form)


def fit_csa(moments: PairMoments, trial: Trial) -> Fitted:
    """Unit rows of canonical variates, their products weighted by the correlations."""
    plain, emphasised = moments.cca(ridge=trial["ridge"], powers=(0.0, 1.0), width=trial["width"])
    # Both are scaled as a whole, which no rank sees; direction by direction they differ by the
    # correlation alone.
    correlations = emphasised.image_weight.norm(dim=1) / plain.image_weight.norm(dim=1)
    return Fitted(plain, correlations / correlations.max())


def fit_procrustes(moments: PairMoments, trial: Trial) -> Fitted:
    """Cosine after principal components and the best rotation."""
    return Fitted(procrustes(moments, trial["width"]))


def procrustes(moments: PairMoments, width: int | None = None) -> ClosedForm:
    """Orthogonal Procrustes: the rotation or reflection that takes one side nearest the other.

    Both sides are centred. The narrower one (the texts, if they are alike) keeps its axes; the
    wider one is first reduced to its principal components.

    Args:
        moments: of the pairs.
        width: components of both sides to keep, at most min(d, e), which is the default.
    """
    _, vectors_x, _, vectors_y, _ = moments.eigen  # in ascending order of their eigenvalues
    d, e = len(moments.mean_x), len(moments.mean_y)
    k = min(d, e) if width is None else width
    eye = torch.eye(min(d, e), dtype=torch.float64)
    axes_x = eye if d == k else vectors_x[:, -k:].flip(1)
    axes_y = eye if e == k else vectors_y[:, -k:].flip(1)
    left, _, right = torch.linalg.svd(axes_x.T @ moments.cov_xy @ axes_y)
    if d < e:
        axes_y = axes_y @ right.T @ left.T
    else:
        axes_x = axes_x @ left @ right
    return ClosedForm(
        "orthogonal Procrustes",
        moments.mean_x.float(),
        axes_x.T.float().contiguous(),
        moments.mean_y.float(),
        axes_y.T.float().contiguous(),
    )


def fit_ridge(moments: PairMoments, trial: Trial) -> Fitted:
    """Cosine of a side and its prediction from the other."""
    return Fitted(moments.ridge(Modality(trial["to"]), trial["ridge"], centre=trial["centre"]))


@cache
def moments_of(features: Path, split: str, captions: Any) -> PairMoments:
    """Means and covariances of all pairs, each counting once."""
    rows = load_rows(FeatureSet.open(features), split)
    pairs, weights = PairSampler(rows, captions, other_weight=0.0, once=False).weighted_pairs()
    return PairMoments.of(rows.images, rows.texts, pairs, weights)
