"""Rank rows, and describe what was measured as the document of ``csalign eval``."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from csalign.core import distributed
from csalign.core.arrays import Floats, Ints
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.evaluation import protocols
from csalign.evaluation.config import EvalConfig, MeasureOptions
from csalign.evaluation.extra_metrics import (
    Extras,
    GroupLabels,
    clustered_labels,
    prepare_extras,
)
from csalign.evaluation.loading import Loaded, align, embed, load, load_adapter, warn_of_trained
from csalign.evaluation.protocols import AlignedRows
from csalign.features import join
from csalign.features.checks import warn_of_queries
from csalign.features.reader import FeatureSet
from csalign.metrics.bootstrap import FoldMeans, Resampled, Resamples, resample
from csalign.metrics.gap import gap_suite
from csalign.metrics.groups import GroupTasks, group_tasks
from csalign.metrics.mixed import MixedRanks, rank_mixed
from csalign.metrics.neighbours import Both, Neighbours
from csalign.metrics.retrieval import DirectionRanks, hubness, hubness_of

COLLAPSED_RANK = 1.5  # effective dimensions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Ranked rows: the galleries that are searched separately, one without folds, and their ranks.

    `index` is a block of the document, and `extras` computes the extra metrics.
    """

    aligned: AlignedRows
    options: MeasureOptions
    folds: tuple[protocols.Gallery, ...]
    fold_ranks: tuple[protocols.Ranks, ...]
    index: dict[str, Any]
    extras: Extras | None
    device: str = "auto"
    labels: GroupLabels | None = None  # of the images, for the figures of groups
    neighbours: tuple[Both, ...] = ()  # per fold, found while ranking

    @cached_property
    def ranks(self) -> protocols.Ranks:
        """Image to text, and text to image, over all folds."""
        forth, back = zip(*self.fold_ranks, strict=True)
        return DirectionRanks.joined(forth), DirectionRanks.joined(back)

    @cached_property
    def first_ranks(self) -> list[list[Ints]]:
        """Rank of each query's best match, both ways per fold; where exact, twins are matches."""
        found = [[own.first for own in ranks] for ranks in self.fold_ranks]
        if self.options.index != "exact":
            return found
        return [
            fold.twins.first_ranks(fold.images, fold.texts, first) if fold.twins else first
            for fold, first in zip(self.folds, found, strict=True)
        ]

    @cached_property
    def twins(self) -> dict[str, Any]:
        """Block "twins" of the document, {} without twins; counts alone if ranks are not exact."""
        first = self.first_ranks if self.options.index == "exact" else ()
        return protocols.twins_block([fold.twins for fold in self.folds if fold.twins], first)

    @cached_property
    def gap(self) -> dict[str, Any]:
        """Block "gap" of the document."""
        rows = self.aligned.images, self.aligned.texts, self.aligned.rows.text_image
        return gap_suite(*rows, sigma=self.options.bandwidth, seed=self.options.seed)

    @cached_property
    def hubness(self) -> dict[str, Any]:
        """Block "hubness" of the document."""
        found = [hubness_of(own) for own in self.neighbours] or [
            hubness(fold.images, fold.texts) for fold in self.folds
        ]
        return protocols.mean_of(found)

    @cached_property
    def mixed(self) -> tuple[MixedRanks, ...]:
        """Retrieval from one gallery of both sides, per fold."""
        seed, known = self.options.seed, self.neighbours or [None] * len(self.folds)
        return tuple(
            rank_mixed(f.images, f.texts, f.text_image, seed=seed, neighbours=own)
            for f, own in zip(self.folds, known, strict=True)
        )

    @cached_property
    def groups(self) -> tuple[GroupTasks, ...]:
        """Clustering and k-NN by the labels, per fold; () without labels."""
        if self.labels is None:
            return ()
        values = np.split(np.array(self.labels.values, dtype=object), len(self.folds))
        return tuple(
            group_tasks(f.images, f.texts, f.text_image, own.tolist(), seed=self.options.seed)
            for f, own in zip(self.folds, values, strict=True)
        )

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """Blocks "mixed" and, with labels, "groups" of the document."""
        found: dict[str, Any] = {"mixed": protocols.mean_of([own.summary() for own in self.mixed])}
        if self.labels is not None:
            blocks = [own.summary() for own in self.groups]
            found["groups"] = {"column": self.labels.column, **protocols.mean_of(blocks)}
            if len(blocks) > 1:
                counts = {key: sum(own[key] for own in blocks) for key in ("images", "texts")}
                found["groups"] |= {"classes": len(set(self.labels.values) - {None}), **counts}
        return found

    @cached_property
    def resamples(self) -> Resamples:
        """The metrics on bootstrap resamples.

        Folds have one size, so that a mean over queries is the mean over folds; a median is not,
        and has no interval if there are several folds.
        """
        aligned, options = self.aligned, self.options
        rows = aligned.images, aligned.texts, aligned.rows.text_image
        of_fold = np.split(np.arange(len(aligned.images)), len(self.folds))
        tasks: list[Sequence[Resampled]] = [self.mixed, self.groups]
        further = [FoldMeans(list(zip(of_fold, own, strict=True))) for own in tasks if own]
        found = resample(
            self.ranks, *rows, resamples=options.resamples, seed=options.seed, further=further
        )
        if len(self.folds) == 1:
            return found
        kept = {place: f for place, f in found.figures.items() if place[-1] != "median_rank"}
        return replace(found, figures=kept)

    @cached_property
    def without_adapter(self) -> "Evaluation | None":
        """The rows as they are stored, ranked; None without an adapter, or if widths differ."""
        aligned, rows = self.aligned, self.aligned.rows
        if aligned.adapter is None or rows.images.shape[1] != rows.texts.shape[1]:
            return None
        images, texts = (embed(None, aligned.features, rows, side) for side in Modality)
        return self.of_rows(images, texts)

    def of_rows(self, images: Floats, texts: Floats) -> "Evaluation":
        """Rank other embeddings of the same rows: unit rows (n, d) and (m, d)."""
        plain = replace(self.aligned, images=images, texts=texts, adapter=None)
        return measure_rows(plain, self.options, labels=self.labels, device=self.device)


def measure(config: EvalConfig) -> Evaluation:
    """Embed and rank the rows of a split; arguments and errors are those of `evaluate`.

    In a process group all processes have to call it.
    """
    loaded = load(config, config.protocol)
    warn_of_queries(loaded.rows, loaded.rows.name)
    evaluation = measure_loaded(config, loaded)
    if twins := evaluation.twins.get("twins"):
        protocols.warn_of_twins(loaded.rows, twins)
    warn_of_trained([evaluation.aligned])
    return evaluation


def measure_loaded(config: EvalConfig, loaded: Loaded) -> Evaluation:
    """Embed and rank loaded rows; see `measure`."""
    aligned = align(config, loaded)
    divided = distributed.world().size > 1
    extras, device = extras_of(config, aligned), config.device
    labels = extras.labels and clustered_labels(config, extras.labels, aligned.rows.name)
    return measure_rows(aligned, config, extras, labels=labels, device=device, divided=divided)


def measure_rows(
    aligned: AlignedRows,
    options: MeasureOptions,
    extras: Extras | None = None,
    *,
    labels: GroupLabels | None = None,
    device: str = "auto",
    divided: bool = False,
) -> Evaluation:
    """Rank rows that are embedded already.

    Args:
        aligned: the rows, those of the protocol.
        options: of the measurement.
        extras: computes the extra metrics.
        labels: of the images, as `clustered_labels` returns them; None for no figures of groups.
        device: of the exact ranking, if it is CUDA.
        divided: whether all processes of the group call this, and share the ranking.
    """
    rows, twins = aligned.rows, protocols.find_twins(aligned.rows)
    whole = protocols.Gallery(aligned.images, aligned.texts, rows.text_image, twins)
    folds = protocols.split_folds(options.protocol, whole)
    neighbours: tuple[Both, ...] = ()
    if options.index == "exact":
        chosen = pick_device(device)
        chosen = chosen if chosen.type == "cuda" else torch.device("cpu")
        index: dict[str, Any] = {"kind": "exact", "device": chosen.type}
        neighbours = tuple(
            (Neighbours(len(f.images), chosen), Neighbours(len(f.texts), chosen)) for f in folds
        )
        ranks = tuple(
            fold.rank(chosen, divided=divided, neighbours=own)
            for fold, own in zip(folds, neighbours, strict=True)
        )
    else:
        # faiss is loaded where it is wanted.
        from csalign.metrics.approximate import JUDGED_BY, LISTED, rank_both_ways_by_index

        found = [
            rank_both_ways_by_index(fold.images, fold.texts, fold.text_image, options.index)
            for fold in folds
        ]
        ranks = tuple(own for own, _ in found)
        recalls = np.mean([recall for _, recall in found], axis=0).tolist()
        index = {
            "kind": options.index,
            "listed": LISTED,
            f"recall@{JUDGED_BY}": dict(zip(protocols.DIRECTIONS, recalls, strict=True)),
        }
    return Evaluation(aligned, options, folds, ranks, index, extras, device, labels, neighbours)


def describe(evaluation: Evaluation, *, with_before: bool = False) -> dict[str, Any]:
    """Compute all metrics, with their intervals if the options want them.

    With `with_before`, "before" has `figures_of` the rows without the adapter, if widths allow.
    """
    aligned, options = evaluation.aligned, evaluation.options
    images, texts, figures = aligned.images, aligned.texts, figures_of(evaluation)
    for side, rank in figures["gap"]["effective_rank"].items():
        if rank < COLLAPSED_RANK:
            log.warning(
                "all %s embeddings are nearly the same, so a small gap means nothing here", side
            )
    intervals = evaluation.resamples.intervals() if options.intervals else {}
    extras, folds = evaluation.extras, evaluation.folds
    extra: dict[str, Any] = {}
    if extras is not None:
        extra, extra_intervals = extras.compute(images, folds, evaluation.ranks, options)
        intervals |= extra_intervals
    before = evaluation.without_adapter if with_before else None
    return {
        **aligned.describe(),
        "fingerprints": aligned.fingerprints(),
        "parameters": aligned.parameters,
        "bandwidth": options.bandwidth,
        "counts": {"images": len(images), "texts": len(texts), "pairs": aligned.rows.pairs},
        "index": evaluation.index,
        "protocol": protocols.protocol_block(options.protocol, aligned.split, aligned.rows),
        **figures,
        **evaluation.twins,
        "hubness": evaluation.hubness,
        **extra,
        "intervals": intervals,
        **({} if before is None else {"before": figures_of(before)}),
    }


def figures_of(evaluation: Evaluation) -> dict[str, Any]:
    """Compute the blocks "retrieval", "gap", "mixed" and, with labels, "groups" of a document."""
    return {
        "retrieval": protocols.retrieval_block(evaluation.fold_ranks),
        "gap": evaluation.gap,
        **evaluation.tasks,
    }


def extras_of(config: EvalConfig, aligned: AlignedRows) -> Extras:
    """Read what the extra metrics of the options need; see `prepare_extras`."""

    def embed_texts(features: FeatureSet, rows: join.PairedRows) -> Floats:
        # Again, which checks these features' widths.
        loaded = load_adapter(config, features, aligned.features, aligned.split)
        return embed(loaded and loaded[0], features, rows, Modality.TEXT, config.adapter)

    ids, width = aligned.rows.image_ids.to_pylist(), aligned.images.shape[1]
    return prepare_extras(config, aligned.features, ids, width, embed_texts)
