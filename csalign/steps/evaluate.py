"""``csalign eval``: retrieval and the modality gap of a feature set, raw or adapted."""

from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.config import EvalConfig
from csalign.enums import Modality
from csalign.metrics.gap import gap_suite
from csalign.metrics.retrieval import mean_recall, rank_both_ways
from csalign.progress import Progress, silent
from csalign.steps.adapted import load_adapter_for
from csalign.store.join import ALL, PairedRows, check_same_width, load_rows, unit_rows
from csalign.store.reader import FeatureSet

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
    images, texts = _aligned(features, rows, config)
    progress("evaluation stages", 1, 3)
    ranks = rank_both_ways(images, texts, rows.text_image)
    image_to_text, text_to_image = (direction.summary() for direction in ranks)
    progress("evaluation stages", 2, 3)
    gap = gap_suite(images, texts, rows.text_image, sigma=config.bandwidth, seed=config.seed)
    progress("evaluation stages", 3, 3)
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


def _aligned(features: FeatureSet, rows: PairedRows, config: EvalConfig) -> tuple[Floats, Floats]:
    """Unit rows of both sides: through the adapter, or as they are."""
    images = unit_rows(rows.images, rows.image_ids, f"{rows.name}: images")
    texts = unit_rows(rows.texts, rows.text_ids, f"{rows.name}: texts")
    if config.adapter is None:
        check_same_width(rows)
        return images, texts
    adapter, _ = load_adapter_for(features, config.adapter, config.device)
    return (
        adapter.embed(Modality.IMAGE, rows.images),
        adapter.embed(Modality.TEXT, rows.texts),
    )
