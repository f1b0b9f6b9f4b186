"""Class prompts as embeddings in the space of the images: ``csalign eval --zero-shot``."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.evaluation.columns import Values, prompt_classes
from csalign.evaluation.config import EvalConfig
from csalign.features.join import ALL, PairedRows, check_directions, load_side, unit_rows
from csalign.features.reader import FeatureSet
from csalign.metrics.labels import class_vectors, classify
from csalign.runs.load import embed_rows, load_adapter_for

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """What images are classified by.

    Attributes:
        names: of the c classes.
        prompts: how many there are.
        vectors: (c, d) float32, one a class.
        labels: (n,) int64, the class of each image, -1 where none is told.
    """

    names: Sequence[str]
    prompts: int
    vectors: Floats
    labels: Ints


def load_classes(
    config: EvalConfig,
    features: FeatureSet,
    labels: Values,
    width: int,
    loaded: tuple[Adapter, AdapterInfo] | None,
) -> Classes:
    """Read the prompts of ``--zero-shot`` and take them where the images are.

    Args:
        config: the options.
        features: whose images are classified.
        labels: what is told of each image.
        width: of the images' space.
        loaded: the adapter that led there, or None.

    Raises:
        DataError: no such feature set, no prompts or classes in it, or a label is no class.
        ShapeError: the prompts are of another width than the images, or than the adapter takes.
    """
    assert config.zero_shot is not None
    there = FeatureSet.open(config.zero_shot)
    if there.texts.made_by is None or not len(there.texts):
        raise DataError(f"{there.path}: holds no texts; make it of class prompts")
    rows = load_side(there, ALL, Modality.TEXT)
    classes = prompt_classes(rows, config.class_of)
    names = sorted(set(classes))
    numbers = {name: number for number, name in enumerate(names)}
    known = _labels(labels, numbers, config, features)
    _warn_of_another_encoder(features, there)
    prompts = _embed(config, there, rows, width, loaded)
    vectors = class_vectors(prompts, np.array([numbers[name] for name in classes]))
    return Classes(names, len(prompts), vectors, known)


def class_block(
    config: EvalConfig, classes: Classes, images: Floats
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The "zero_shot" block, and its intervals if they are wanted.

    Args:
        config: the options.
        classes: what `load_classes` gave.
        images: (n, d) float32, unit rows; those without a label are left out.
    """
    labelled = np.flatnonzero(classes.labels >= 0)
    found = classify(images[labelled], classes.vectors, classes.labels[labelled])
    intervals = {}
    if config.intervals:
        intervals = found.intervals(resamples=config.resamples, seed=config.seed)
    return {
        "classes": len(classes.names),
        "prompts": classes.prompts,
        "images": len(labelled),
        **found.summary(),
    }, intervals


def _labels(
    labels: Values, numbers: dict[str, int], config: EvalConfig, features: FeatureSet
) -> Ints:
    unknown = sorted({label for label in labels if label is not None} - numbers.keys())
    if unknown:
        raise DataError(
            f"{config.labels}: names {unknown[0]!r} and {len(unknown) - 1} other labels that are "
            f"no classes of {config.zero_shot}, whose classes are such as {next(iter(numbers))!r}; "
            "let them agree"
        )
    if not any(labels):
        raise DataError(f"{features.path}: {config.labels} tells no image's class; fill it in")
    return np.array([-1 if label is None else numbers[label] for label in labels], np.int64)


def _embed(
    config: EvalConfig,
    there: FeatureSet,
    rows: PairedRows,
    width: int,
    loaded: tuple[Adapter, AdapterInfo] | None,
) -> Floats:
    """Unit rows of the prompts, (p, d), through the adapter if there is one."""
    name, values, ids = f"{there.path}: texts", rows.texts, rows.text_ids
    if loaded is None or config.adapter is None:
        if values.shape[1] != width:
            raise ShapeError(
                f"{there.path}: prompts are {values.shape[1]} wide and images {width}; use the "
                "text encoder that belongs to the images', or an --adapter"
            )
        return unit_rows(values, ids, name)
    # Opened anew, since that compares the prompts with what it takes.
    adapter, _ = load_adapter_for(there, config.adapter, config.device, config.allow_adapter)
    check_directions(values, ids, name)
    return embed_rows(adapter, Modality.TEXT, rows, there)


def _warn_of_another_encoder(features: FeatureSet, there: FeatureSet) -> None:
    own, others = features.texts.made_by, there.texts.made_by
    if own is None or others is None:
        return
    if (own.spec, own.fingerprint) != (others.spec, others.fingerprint):
        log.warning(
            "%s: its texts were made by %s, those of %s by %s; figures mean something only if "
            "that is the same encoder",
            there.path,
            others.spec,
            features.path,
            own.spec,
        )
