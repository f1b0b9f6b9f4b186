"""``csalign eval``: retrieval and the modality gap of a feature set, raw or adapted."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.config import EvalConfig
from csalign.enums import Modality
from csalign.metrics.approximate import JUDGED_BY, LISTED, rank_both_ways_by_index
from csalign.metrics.bootstrap import Resamples, resample
from csalign.metrics.gap import gap_suite
from csalign.metrics.retrieval import DirectionRanks, mean_recall, rank_both_ways
from csalign.progress import Progress, silent
from csalign.report.page import check_page
from csalign.steps.adapted import embed_rows, load_adapter_for
from csalign.steps.report import Evaluated, write_report
from csalign.store.join import (
    ALL,
    PairedRows,
    check_directions,
    check_same_width,
    load_rows,
    split_names,
    unit_rows,
)
from csalign.store.reader import FeatureSet

DIRECTIONS = ("image_to_text", "text_to_image")
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
        ranks: image to text, and text to image.
        index: what ranked, as the document has it.
        fingerprints: of the features' content and of the adapter's weights, None without one.
        parameters: of the adapter, None without one.
    """

    config: EvalConfig
    split: str
    images: Floats
    texts: Floats
    text_image: npt.NDArray[np.int64]
    ranks: tuple[DirectionRanks, DirectionRanks]
    index: dict[str, Any]
    fingerprints: dict[str, str | None]
    parameters: int | None

    def resample(self) -> Resamples:
        """The figures on bootstrap resamples, as many and by the seed that the config says."""
        return resample(
            self.ranks,
            self.images,
            self.texts,
            self.text_image,
            resamples=self.config.resamples,
            seed=self.config.seed,
        )


def evaluate(config: EvalConfig, progress: Progress = silent) -> dict[str, Any]:
    """Measure retrieval and gap.

    Args:
        config: what to measure.
        progress: told how far it is.

    Returns:
        The document that ``csalign eval --json`` prints: plain numbers, recalls in [0, 1];
        "intervals" are nested as "retrieval" is, with those of the gap beside them.

    Raises:
        DataError: no such feature set or split, no pairs in it, or a row without a direction.
        ShapeError: widths do not fit: each other's without an adapter, or the adapter's.
        SchemaError: the features or the adapter are damaged.
        OutputError: the page cannot be written where it is wanted.
    """
    if config.report is not None:
        check_page(config.report)
    progress("evaluation stages", 0, 3)
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
    features = FeatureSet.open(config.features)
    shown = Evaluated(
        features=features,
        rows=load_rows(features, measured.split),
        images=measured.images,
        texts=measured.texts,
        adapted=config.adapter is not None,
        ranks=measured.ranks,
        document=document,
    )
    title = f"{config.features}, {config.adapter or 'no adapter'}, split {measured.split}"
    write_report(path, title, shown, config.adapter, config.seed)


def measure(config: EvalConfig) -> Measured:
    """Embed the rows and rank them; arguments and errors are those of `evaluate`."""
    features = FeatureSet.open(config.features)
    split = config.split or ("test" if "test" in features.splits() else ALL)
    rows = load_rows(features, split)
    images, texts, loaded = _aligned(features, rows, split, config)
    ranks, index = _ranked(images, texts, rows, config)
    return Measured(
        config=config,
        split=split,
        images=images,
        texts=texts,
        text_image=rows.text_image,
        ranks=ranks,
        index=index,
        fingerprints={
            "features": features.manifest.fingerprint(),
            "adapter": loaded[1].weights_sha256 if loaded else None,
        },
        parameters=sum(loaded[0].parameter_counts().values()) if loaded else None,
    )


def describe(measured: Measured, resamples: Resamples | None) -> dict[str, Any]:
    """Compute all figures and write the document of `evaluate`.

    Args:
        measured: embeddings and ranks.
        resamples: for the intervals; without them there are none.
    """
    config, images, texts = measured.config, measured.images, measured.texts
    image_to_text, text_to_image = (direction.summary() for direction in measured.ranks)
    gap = gap_suite(images, texts, measured.text_image, sigma=config.bandwidth, seed=config.seed)
    for side, rank in gap["effective_rank"].items():
        if rank < COLLAPSED_RANK:
            log.warning(
                "all %s embeddings are nearly the same, so a small gap means nothing here", side
            )
    pairs = int((measured.text_image >= 0).sum())
    return {
        "features": str(config.features),
        "adapter": None if config.adapter is None else str(config.adapter),
        "split": measured.split,
        "fingerprints": measured.fingerprints,
        "parameters": measured.parameters,
        "bandwidth": config.bandwidth,
        "counts": {"images": len(images), "texts": len(texts), "pairs": pairs},
        "index": measured.index,
        "retrieval": {
            "image_to_text": image_to_text,
            "text_to_image": text_to_image,
            "mean_recall": mean_recall(image_to_text, text_to_image),
        },
        "gap": gap,
        "intervals": resamples.intervals() if resamples else {},
    }


def _ranked(
    images: Floats, texts: Floats, rows: PairedRows, config: EvalConfig
) -> tuple[tuple[DirectionRanks, DirectionRanks], dict[str, Any]]:
    """Ranks, exact or by an index, and what the document says of how they were found."""
    if config.index == "exact":
        return rank_both_ways(images, texts, rows.text_image), {"kind": config.index}
    ranks, recalls = rank_both_ways_by_index(images, texts, rows.text_image, config.index)
    told = {
        "kind": config.index,
        "listed": LISTED,
        f"recall@{JUDGED_BY}": dict(zip(DIRECTIONS, recalls, strict=True)),
    }
    return ranks, told


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
