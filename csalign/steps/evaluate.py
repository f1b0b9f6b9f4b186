"""``csalign eval``: retrieval and the modality gap of a feature set, raw or adapted."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import AdapterInfo
from csalign.config import EvalConfig
from csalign.enums import Modality
from csalign.metrics.gap import gap_suite
from csalign.metrics.retrieval import mean_recall, rank_both_ways
from csalign.progress import Progress, silent
from csalign.steps.adapted import load_adapter_for
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

COLLAPSED_RANK = 1.5  # effective dimensions

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


def evaluate(config: EvalConfig, progress: Progress = silent) -> dict[str, Any]:
    """Measure retrieval and gap.

    Args:
        config: what to measure.
        progress: told how far it is.

    Returns:
        The document that ``csalign eval --json`` prints: plain numbers, recalls in [0, 1].

    Raises:
        DataError: no such feature set or split, no pairs in it, or a row without a direction.
        ShapeError: widths do not fit: each other's without an adapter, or the adapter's.
        SchemaError: the features or the adapter are damaged.
    """
    features = FeatureSet.open(config.features)
    split = config.split or ("test" if "test" in features.splits() else ALL)
    rows = load_rows(features, split)
    progress("evaluation stages", 0, 3)
    images, texts = _aligned(features, rows, split, config)
    progress("evaluation stages", 1, 3)
    ranks = rank_both_ways(images, texts, rows.text_image)
    image_to_text, text_to_image = (direction.summary() for direction in ranks)
    progress("evaluation stages", 2, 3)
    gap = gap_suite(images, texts, rows.text_image, sigma=config.bandwidth, seed=config.seed)
    progress("evaluation stages", 3, 3)
    for side, rank in gap["effective_rank"].items():
        if rank < COLLAPSED_RANK:
            log.warning(
                "all %s embeddings are nearly the same, so a small gap means nothing here", side
            )
    return {
        "features": str(config.features),
        "adapter": None if config.adapter is None else str(config.adapter),
        "split": split,
        "counts": {"images": len(images), "texts": len(texts), "pairs": rows.pairs},
        "retrieval": {
            "image_to_text": image_to_text,
            "text_to_image": text_to_image,
            "mean_recall": mean_recall(image_to_text, text_to_image),
        },
        "gap": gap,
    }


def _aligned(
    features: FeatureSet, rows: PairedRows, split: str, config: EvalConfig
) -> tuple[Floats, Floats]:
    """Unit rows of both sides: through the adapter, or as they are."""
    sides = (
        (Modality.IMAGE, rows.images, rows.image_ids, f"{rows.name}: images"),
        (Modality.TEXT, rows.texts, rows.text_ids, f"{rows.name}: texts"),
    )
    if config.adapter is None:
        check_same_width(rows)
        images, texts = (unit_rows(values, ids, name) for _, values, ids, name in sides)
        return images, texts
    adapter, info = load_adapter_for(features, config.adapter, config.device, config.allow_adapter)
    _warn_of_trained_rows(features, info, split)
    for _, values, ids, name in sides:
        check_directions(values, ids, name)
    images, texts = (adapter.embed(side, values) for side, values, _, _ in sides)
    return images, texts


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
