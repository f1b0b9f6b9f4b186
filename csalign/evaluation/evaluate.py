"""``csalign eval``: retrieval and the modality gap of a feature set, raw or adapted.

Two sets of images are compared in `csalign.evaluation.image_sets`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.core import distributed
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.progress import Progress, silent
from csalign.core.side_names import Names
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.extra_metrics import (
    NOTHING_ASKED,
    Asked,
    check_options,
    further_blocks,
    hubness_block,
    look_up,
)
from csalign.evaluation.image_sets import compare_images
from csalign.evaluation.page import Evaluated, write_report
from csalign.evaluation.protocols import (
    DIRECTIONS,
    Gallery,
    folds_of,
    protocol_block,
    retrieval_block,
    select,
)
from csalign.features.checks import check_directions, unit_rows, warn_of_queries
from csalign.features.join import (
    ALL,
    PairedRows,
    check_same_width,
    load_rows,
    load_side,
    split_names,
)
from csalign.features.reader import FeatureSet
from csalign.metrics.approximate import JUDGED_BY, LISTED, rank_both_ways_by_index
from csalign.metrics.bootstrap import Resamples, resample
from csalign.metrics.explain import explain
from csalign.metrics.gap import gap_suite
from csalign.metrics.retrieval import DirectionRanks
from csalign.report.page import check_page
from csalign.runs.load import embed_rows, load_adapter_for

COLLAPSED_RANK = 1.5  # effective dimensions

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """Embeddings of a split in the shared space, and where each query found its matches.

    Attributes:
        config: what was asked for.
        split: which split(s) were taken.
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) int64, image row of each text, -1 for none.
        folds: what is searched by itself, in order; all of it, but for a protocol with folds.
        fold_ranks: of each fold, image to text, and text to image.
        index: what ranked, as the document has it.
        protocol: what decides a score beside the model.
        asked: what further figures are made from.
        fingerprints: of the features' content and of the adapter's weights, None without one.
        parameters: of the adapter, None without one.
        names: what the sides are called, None where that is image and text.
    """

    config: EvalConfig
    split: str
    images: Floats
    texts: Floats
    text_image: npt.NDArray[np.int64]
    folds: tuple[Gallery, ...]
    fold_ranks: tuple[tuple[DirectionRanks, DirectionRanks], ...]
    index: dict[str, Any]
    protocol: dict[str, Any]
    asked: Asked
    fingerprints: dict[str, str | None]
    parameters: int | None
    names: Names | None = None

    @property
    def ranks(self) -> tuple[DirectionRanks, DirectionRanks]:
        """Image to text, and text to image, over all folds."""
        if len(self.fold_ranks) == 1:
            return self.fold_ranks[0]
        forth, back = (DirectionRanks.joined(ranks) for ranks in zip(*self.fold_ranks, strict=True))
        return forth, back

    def resample(self) -> Resamples:
        """The figures on bootstrap resamples, as many and by the seed that the config says.

        Folds are of one size, so that a mean over queries is the mean of the folds' means; a
        median is not, and has no interval where there are several.
        """
        found = resample(
            self.ranks,
            self.images,
            self.texts,
            self.text_image,
            resamples=self.config.resamples,
            seed=self.config.seed,
        )
        if len(self.folds) == 1:
            return found
        kept = {place: f for place, f in found.figures.items() if place[-1] != "median_rank"}
        return replace(found, figures=kept)


def evaluate(config: EvalConfig, progress: Progress = silent) -> dict[str, Any]:
    """Measure retrieval and gap.

    Under torchrun the processes share the search for exact ranks, and each returns the document.

    Args:
        config: what to measure.
        progress: told how far it is.

    Returns:
        The document that ``csalign eval --json`` prints: plain numbers, recalls in [0, 1];
        "intervals" are nested as "retrieval" is, with those of the gap beside them. "graded",
        "by", "corrected", "zero_shot" and "explanations" are there if they are asked for. Images
        without any texts are classified and no more: what is about texts is then absent.

    Raises:
        ConfigError: options that say nothing without others.
        DataError: no such feature set or split, no pairs in it, rows that the protocol does not
            fit, a row without a direction, or a table that does not fit the rows.
        ShapeError: widths do not fit: each other's without an adapter, or the adapter's.
        SchemaError: the features or the adapter are damaged.
        OutputError: the page cannot be written where it is wanted.
    """
    if config.images is not None or config.generated is not None:
        return compare_images(config, progress)
    with distributed.process_group():
        if not distributed.is_main_process():
            if config.index == "exact" and not _has_images_alone(config):
                measure(config)
            document: dict[str, Any] = distributed.broadcast(dict)
            return document
        document = _evaluate(config, progress)
        distributed.broadcast(lambda: document)
        return document


def _evaluate(config: EvalConfig, progress: Progress) -> dict[str, Any]:
    check_options(config)
    if config.report is not None:
        check_page(config.report)
    progress("evaluation stages", 0, 3)
    if _has_images_alone(config):
        document = _classify_alone(config)
        progress("evaluation stages", 3, 3)
        return document
    measured = measure(config)
    progress("evaluation stages", 1, 3)
    resamples = measured.resample() if config.intervals else None
    progress("evaluation stages", 2, 3)
    described = describe(measured, resamples)
    if config.report is not None:
        _write_page(measured, described, config.report)
    progress("evaluation stages", 3, 3)
    return described


def _write_page(measured: Measured, document: dict[str, Any], path: Path) -> None:
    """Write the page of an evaluation; reads its rows again, for what was before the adapter."""
    config = measured.config
    features = FeatureSet.open(config.feature_set)
    shown = Evaluated(
        features=features,
        rows=select(config.protocol, load_rows(features, measured.split)),
        images=measured.images,
        texts=measured.texts,
        adapted=config.adapter is not None,
        ranks=measured.ranks,
        document=document,
    )
    title = f"{config.feature_set}, {config.adapter or 'no adapter'}, split {measured.split}"
    write_report(path, title, shown, config.adapter, config.seed)


def _has_images_alone(config: EvalConfig) -> bool:
    if config.zero_shot is None:
        return False
    return FeatureSet.open(config.feature_set).texts.info is None


def measure(config: EvalConfig) -> Measured:
    """Embed the rows and rank them; arguments and errors are those of `evaluate`.

    Where processes have joined, all of them have to call it.
    """
    features = FeatureSet.open(config.feature_set)
    split = _split(config, features)
    rows = select(config.protocol, load_rows(features, split))
    images, texts, loaded = _aligned(features, rows, split, config)
    warn_of_queries(rows, rows.name)
    asked = look_up(config, features, rows.image_ids.to_pylist(), images.shape[1], loaded)
    fingerprints = {
        "features": features.manifest.fingerprint(),
        "adapter": loaded[1].weights_sha256 if loaded else None,
    }
    parameters = sum(loaded[0].parameter_counts().values()) if loaded else None
    divided = distributed.world().size > 1
    measured = measure_rows(config, split, rows, images, texts, divided=divided)
    return replace(
        measured,
        asked=asked,
        fingerprints=fingerprints,
        parameters=parameters,
        names=features.manifest.names,
    )


def measure_rows(
    config: EvalConfig,
    split: str,
    rows: PairedRows,
    images: Floats,
    texts: Floats,
    *,
    divided: bool = False,
) -> Measured:
    """Rank embeddings that are there already.

    Args:
        config: which index and protocol.
        split: what they are of.
        rows: that they were made from, those of the protocol.
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        divided: whether all processes of the job call this, and share the search.
    """
    folds = folds_of(config.protocol, Gallery(images, texts, rows.text_image))
    ranks, index = _ranked(folds, config, divided=divided)
    return Measured(
        config=config,
        split=split,
        images=images,
        texts=texts,
        text_image=rows.text_image,
        folds=folds,
        fold_ranks=ranks,
        index=index,
        protocol=protocol_block(config.protocol, split, rows),
        asked=NOTHING_ASKED,
        fingerprints={},
        parameters=None,
    )


def _split(config: EvalConfig, features: FeatureSet) -> str:
    return config.split or ("test" if "test" in features.splits() else ALL)


def _classify_alone(config: EvalConfig) -> dict[str, Any]:
    """Zero-shot classification of a feature set without texts."""
    if config.relevance or config.by or config.correct or config.report or config.protocol != "all":
        raise DataError(
            f"{config.feature_set}: has no texts, so there is no retrieval; leave out --relevance, "
            "--by, --correct, --report and --protocol"
        )
    features = FeatureSet.open(config.feature_set)
    split = _split(config, features)
    rows = load_side(features, split, Modality.IMAGE)
    name, loaded = f"{rows.name}: images", None
    if not len(rows.images):
        raise DataError(f"{rows.name}: holds no images; name another --split")
    if config.adapter is None:
        images = unit_rows(rows.images, rows.image_ids, name)
    else:
        check_directions(rows.images, rows.image_ids, name)
        loaded = load_adapter_for(features, config.adapter, config.device, config.allow_adapter)
        images = embed_rows(loaded[0], Modality.IMAGE, rows, features)
    asked = look_up(config, features, rows.image_ids.to_pylist(), images.shape[1], loaded)
    further, around = further_blocks(config, (), None, asked, images)
    document = {
        "features": str(config.feature_set),
        "adapter": None if config.adapter is None else str(config.adapter),
        "split": split,
        "fingerprints": {
            "features": features.manifest.fingerprint(),
            "adapter": loaded[1].weights_sha256 if loaded else None,
        },
        "counts": {"images": len(images), "texts": 0, "pairs": 0},
        **further,
        "intervals": around,
    }
    return document | ({"explanations": explain(document)} if config.explain else {})


def describe(measured: Measured, resamples: Resamples | None) -> dict[str, Any]:
    """Compute all figures and write the document of `evaluate`.

    Args:
        measured: embeddings and ranks.
        resamples: for the intervals; without them there are none.
    """
    config, images, texts = measured.config, measured.images, measured.texts
    gap = gap_suite(images, texts, measured.text_image, sigma=config.bandwidth, seed=config.seed)
    for side, rank in gap["effective_rank"].items():
        if rank < COLLAPSED_RANK:
            log.warning(
                "all %s embeddings are nearly the same, so a small gap means nothing here", side
            )
    pairs = int((measured.text_image >= 0).sum())
    further, around = further_blocks(config, measured.folds, measured.ranks, measured.asked, images)
    document = {
        "features": str(config.feature_set),
        "adapter": None if config.adapter is None else str(config.adapter),
        "split": measured.split,
        **({} if measured.names is None else {"names": dict(measured.names)}),
        "fingerprints": measured.fingerprints,
        "parameters": measured.parameters,
        "bandwidth": config.bandwidth,
        "counts": {"images": len(images), "texts": len(texts), "pairs": pairs},
        "index": measured.index,
        "protocol": measured.protocol,
        "retrieval": retrieval_block(measured.fold_ranks),
        "gap": gap,
        "hubness": hubness_block(measured.folds),
        **further,
        "intervals": resamples.intervals() | around if resamples else {},
    }
    return document | ({"explanations": explain(document)} if config.explain else {})


def _ranked(
    folds: Sequence[Gallery], config: EvalConfig, *, divided: bool
) -> tuple[tuple[tuple[DirectionRanks, DirectionRanks], ...], dict[str, Any]]:
    """Ranks, exact or by an index, and what the document says of how they were found."""
    if config.index == "exact":
        asked = pick_device(config.device)
        device = asked if asked.type == "cuda" else torch.device("cpu")
        told: dict[str, Any] = {"kind": config.index, "device": device.type}
        return tuple(fold.rank(device, divided=divided) for fold in folds), told
    found = [
        rank_both_ways_by_index(fold.images, fold.texts, fold.text_image, config.index)
        for fold in folds
    ]
    recalls = np.mean([own for _, own in found], axis=0).tolist()
    told = {
        "kind": config.index,
        "listed": LISTED,
        f"recall@{JUDGED_BY}": dict(zip(DIRECTIONS, recalls, strict=True)),
    }
    return tuple(ranks for ranks, _ in found), told


def _aligned(
    features: FeatureSet, rows: PairedRows, split: str, config: EvalConfig
) -> tuple[Floats, Floats, tuple[Adapter, AdapterInfo] | None]:
    """Unit rows of both sides: through the adapter, which is given too, or as they are."""
    sides = (
        (Modality.IMAGE, rows.images, rows.image_ids, f"{rows.name}: images"),
        (Modality.TEXT, rows.texts, rows.text_ids, f"{rows.name}: texts"),
    )
    if config.adapter is None:
        check_same_width(rows)
        images, texts = (unit_rows(values, ids, name) for _, values, ids, name in sides)
        return images, texts, None
    adapter, info = load_adapter_for(features, config.adapter, config.device, config.allow_adapter)
    _warn_of_trained_rows(features, info, split)
    for _, values, ids, name in sides:
        check_directions(values, ids, name)
    images, texts = (embed_rows(adapter, side, rows, features) for side in Modality)
    return images, texts, (adapter, info)


def _warn_of_trained_rows(features: FeatureSet, info: AdapterInfo, split: str) -> None:
    if info.data_fingerprint != features.manifest.fingerprint():
        return
    there = features.splits()
    if split_names(split, there) & split_names(info.train_split, there):
        log.warning(
            "%s: the adapter was trained on rows of this split, so the figures say little about "
            "new data; hold some out, as a split 'test', before training",
            features.path,
        )
