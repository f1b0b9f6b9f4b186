"""Figures of ``csalign eval`` that options ask for, and what has to be looked up for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.core.errors import ConfigError, DataError
from csalign.evaluation.columns import ImageColumns, Values
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.protocols import DIRECTIONS, Gallery, mean_of, retrieval_block
from csalign.evaluation.zero_shot import Classes, class_block, load_classes
from csalign.features.reader import FeatureSet
from csalign.metrics.labels import GradedRanks, graded_both_ways
from csalign.metrics.retrieval import DirectionRanks, corrected, hubness
from csalign.sources.records.tables import read_table

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Ranks = tuple[DirectionRanks, DirectionRanks]

NO_VALUE = "(none)"
MOST_GROUPS = 1_000  # tables of figures, not of images


@dataclass(frozen=True)
class Asked:
    """What the figures that options ask for are made from; None where they are not asked for.

    Attributes:
        groups: (n,) number of each image's group, one of its own where nothing is told of it.
        by: n values of the column that retrieval is told by.
        classes: what images are classified by.
    """

    groups: Ints | None
    by: Values | None
    classes: Classes | None


NOTHING_ASKED = Asked(None, None, None)


def check_options(config: EvalConfig) -> None:
    """Raise ConfigError if an option says nothing without another."""
    if (config.zero_shot is None) != (config.labels is None):
        raise ConfigError("--zero-shot CLASSES and --labels COLUMN go together")
    if config.class_of is not None and config.zero_shot is None:
        raise ConfigError("--class-of tells of the prompts of --zero-shot; give both")
    if config.groups is not None and not (config.relevance or config.by or config.labels):
        raise ConfigError("--groups names a table; say which column by --relevance or --by")


def look_up(
    config: EvalConfig,
    features: FeatureSet,
    image_ids: Sequence[str],
    width: int,
    loaded: tuple[Adapter, AdapterInfo] | None,
) -> Asked:
    """Read what the options name, before anything is computed.

    Args:
        config: the options.
        features: whose images are measured.
        image_ids: of the n images.
        width: of the space that they are measured in.
        loaded: the adapter that led there.

    Raises:
        DataError: a table, a column or the classes do not fit the images.
        ShapeError: the prompts are of another width.
    """
    table = None if config.groups is None else read_table(config.groups)
    columns = ImageColumns(features, image_ids, table)
    groups, by, classes = None, None, None
    if config.relevance is not None:
        groups = _numbered(columns.values(config.relevance))
    if config.by is not None:
        by = columns.values(config.by)
        if len(set(by)) > MOST_GROUPS:
            raise DataError(
                f"{features.path}: the column {config.by!r} has {len(set(by)):,} values, at most "
                f"{MOST_GROUPS:,} make sense to tell retrieval by; name another"
            )
    if config.zero_shot is not None and config.labels is not None:
        labels = columns.values(config.labels)
        classes = load_classes(config, features, labels, width, loaded)
    return Asked(groups, by, classes)


def further_blocks(
    config: EvalConfig, folds: Sequence[Gallery], ranks: Ranks | None, asked: Asked, images: Floats
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The blocks that were asked for, and their intervals.

    Args:
        config: the options.
        folds: what is searched by itself.
        ranks: of all folds, plain; None where there are no texts.
        asked: what `look_up` gave.
        images: (n, d) float32, unit rows.
    """
    found: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    if asked.groups is not None:
        found["graded"] = {"column": config.relevance, **_graded(folds, asked.groups)}
    if asked.by is not None and ranks is not None:
        found["by"] = {"column": config.by, "values": _by(folds, ranks, asked.by)}
    if config.correct:
        found["corrected"] = {name: _corrected(folds, name) for name in config.correct}
    if asked.classes is not None:
        found["zero_shot"], intervals["zero_shot"] = class_block(config, asked.classes, images)
    return found, intervals


def hubness_block(folds: Sequence[Gallery]) -> dict[str, Any]:
    """Skewness of the 10-occurrence both ways, averaged over the folds."""
    return mean_of([hubness(fold.images, fold.texts) for fold in folds])


def _numbered(values: Values) -> Ints:
    """A number for each value, and one of its own for each None."""
    numbers: dict[Any, int] = {}
    keys = ((row, None) if value is None else value for row, value in enumerate(values))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _graded(folds: Sequence[Gallery], groups: Ints) -> dict[str, Any]:
    blocks, start = [], 0
    for fold in folds:
        some = groups[start : start + len(fold.images)]
        start += len(fold.images)
        both: tuple[GradedRanks, GradedRanks] = graded_both_ways(
            fold.images, fold.texts, fold.text_image, some
        )
        blocks.append({n: side.summary() for n, side in zip(DIRECTIONS, both, strict=True)})
    return mean_of(blocks)


def _corrected(folds: Sequence[Gallery], name: str) -> dict[str, Any]:
    ranks = []
    for fold in folds:
        images, texts = corrected(fold.images, fold.texts, name)
        ranks.append(Gallery(images, texts, fold.text_image).rank())
    return retrieval_block(ranks)


def _by(folds: Sequence[Gallery], ranks: Ranks, values: Values) -> dict[str, Any]:
    """Retrieval of the queries whose image has each value, in the gallery of all."""
    starts = np.cumsum([0, *(len(fold.images) for fold in folds)])
    owners = [
        start + fold.text_image[fold.text_image >= 0]
        for start, fold in zip(starts[:-1], folds, strict=True)
    ]
    of_text = np.concatenate(owners)
    of_image = np.unique(of_text)
    told = np.array([NO_VALUE if value is None else value for value in values], dtype=object)
    found = {}
    for value in sorted(set(told[of_image])):
        chosen = (told[of_image] == value, told[of_text] == value)
        found[value] = {"images": int(chosen[0].sum()), "texts": int(chosen[1].sum())} | {
            name: side.take(queries).summary()
            for name, side, queries in zip(DIRECTIONS, ranks, chosen, strict=True)
        }
    return found
