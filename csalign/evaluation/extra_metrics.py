"""Metrics of ``csalign eval`` beside retrieval and the gap, and the columns they need.

They are graded retrieval, retrieval by group, hubness, corrected retrieval, and zero-shot
classification.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.core.paths import parse_location
from csalign.evaluation.config import ExtraOptions, MeasureOptions
from csalign.evaluation.protocols import DIRECTIONS, Gallery, Ranks, mean_of, retrieval_block
from csalign.features import schema
from csalign.features.join import ALL, PairedRows, load_side
from csalign.features.reader import FeatureSet
from csalign.metrics.graded import graded_both_ways
from csalign.metrics.hubness import corrected, hubness
from csalign.metrics.zero_shot import class_vectors, classify
from csalign.sources.records.tables import SUFFIXES, Table, read_table

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Values = list[str | None]
Embed = Callable[[FeatureSet, PairedRows], Floats]

IMAGE_KEYS = ("image_id", "id")
CLASS_COLUMNS = ("class", "label")
NO_VALUE = "(none)"
MOST_GROUPS = 1_000  # for a readable table


@dataclass(frozen=True)
class Classes:
    """Classes for zero-shot classification.

    Attributes:
        prompts: their number.
        vectors: (c, d) float32, one per class.
        labels: (n,) int64, the class of each image, -1 if unknown.
    """

    prompts: int
    vectors: Floats
    labels: Ints


@dataclass(frozen=True)
class Extras:
    """What the extra metrics are computed from; None for those that are not wanted.

    Attributes:
        relevance: a column, and (n,) the group of each image, its own if it has no value.
        by: a column, and its n values.
        corrections: of hubness, by name.
        classes: to classify the images by.
    """

    relevance: tuple[str, Ints] | None = None
    by: tuple[str, Values] | None = None
    corrections: tuple[str, ...] = ()
    classes: Classes | None = None


def look_up(
    options: ExtraOptions, features: FeatureSet, image_ids: Sequence[str], width: int, embed: Embed
) -> Extras:
    """Read the tables and prompts of the extra metrics.

    Args:
        options: that name them.
        features: with the n images.
        image_ids: of the n images.
        width: of their embeddings.
        embed: returns unit rows of the texts of a feature set, in the space of the images.

    Raises:
        DataError: a table, a column or the classes do not fit the images.
        ShapeError: the prompts have another width.
    """
    table = None if options.groups is None else read_table(options.groups)
    relevance = by = classes = None
    if options.relevance is not None:
        numbers: dict[Any, int] = {}
        values = _column(options.relevance, features, image_ids, table)
        keys = ((row, None) if value is None else value for row, value in enumerate(values))
        groups = [numbers.setdefault(key, len(numbers)) for key in keys]
        relevance = options.relevance, np.array(groups, np.int64)
    if options.by is not None:
        values = _column(options.by, features, image_ids, table)
        if (count := len(set(values))) > MOST_GROUPS:
            raise DataError(
                f"{features.path}: the column {options.by!r} has {count:,} values, --by takes at "
                f"most {MOST_GROUPS:,}; name another column"
            )
        by = options.by, values
    if options.labels is not None:
        labels = _column(options.labels, features, image_ids, table)
        classes = _load_classes(options, features, labels, width, embed)
    return Extras(relevance, by, options.correct or (), classes)


def extra_blocks(
    extras: Extras,
    options: MeasureOptions,
    images: Floats,
    folds: Sequence[Gallery] = (),
    ranks: Ranks | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the blocks of the document that are wanted, and their intervals.

    Args:
        extras: from `look_up`.
        options: of the intervals.
        images: (n, d) float32, unit rows.
        folds: galleries; none if there are no texts.
        ranks: over all folds; None if there are no texts.
    """
    found: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    if extras.relevance is not None:
        column, groups = extras.relevance
        found["graded"] = {"column": column, **_graded(folds, groups)}
    if extras.by is not None and ranks is not None:
        column, values = extras.by
        found["by"] = {"column": column, "values": _by(folds, ranks, values)}
    if extras.corrections:
        found["corrected"] = {
            name: retrieval_block(
                [
                    Gallery(*corrected(fold.images, fold.texts, name), fold.text_image).rank()
                    for fold in folds
                ]
            )
            for name in extras.corrections
        }
    if (classes := extras.classes) is not None:
        labelled = np.flatnonzero(classes.labels >= 0)
        classified = classify(images[labelled], classes.vectors, classes.labels[labelled])
        found["zero_shot"] = {
            "classes": len(classes.vectors),
            "prompts": classes.prompts,
            "images": len(labelled),
            **classified.summary(),
        }
        if options.intervals:
            intervals["zero_shot"] = classified.intervals(
                resamples=options.resamples, seed=options.seed
            )
    return found, intervals


def hubness_block(folds: Sequence[Gallery]) -> dict[str, Any]:
    """Compute the skewness of the 10-NN counts in both directions, averaged over the folds."""
    return mean_of([hubness(fold.images, fold.texts) for fold in folds])


def _graded(folds: Sequence[Gallery], groups: Ints) -> dict[str, Any]:
    starts = np.cumsum([len(fold.images) for fold in folds])[:-1]
    blocks = []
    for fold, own in zip(folds, np.split(groups, starts), strict=True):
        both = graded_both_ways(fold.images, fold.texts, fold.text_image, own)
        blocks.append({n: side.summary() for n, side in zip(DIRECTIONS, both, strict=True)})
    return mean_of(blocks)


def _by(folds: Sequence[Gallery], ranks: Ranks, values: Values) -> dict[str, Any]:
    """Break retrieval down by the value of the query's image; the gallery stays whole."""
    starts = np.cumsum([0, *(len(fold.images) for fold in folds)])
    owners = [
        start + fold.text_image[fold.text_image >= 0]
        for start, fold in zip(starts[:-1], folds, strict=True)
    ]
    of_text = np.concatenate(owners)
    of_image = np.unique(of_text)
    groups = np.array([NO_VALUE if value is None else value for value in values], dtype=object)
    found = {}
    for value in sorted(set(groups[of_image])):
        chosen = (groups[of_image] == value, groups[of_text] == value)
        found[value] = {"images": int(chosen[0].sum()), "texts": int(chosen[1].sum())} | {
            name: side.take(queries).summary()
            for name, side, queries in zip(DIRECTIONS, ranks, chosen, strict=True)
        }
    return found


def _load_classes(
    options: ExtraOptions, features: FeatureSet, labels: Values, width: int, embed: Embed
) -> Classes:
    assert options.zero_shot is not None
    prompts = FeatureSet.open(options.zero_shot)
    if prompts.texts.made_by is None or not len(prompts.texts):
        raise DataError(f"{prompts.path}: contains no texts; extract it from class prompts")
    rows = load_side(prompts, ALL, Modality.TEXT)
    classes = _prompt_classes(rows, options.class_of)
    numbers = {name: number for number, name in enumerate(sorted(set(classes)))}
    unknown = sorted({label for label in labels if label is not None} - numbers.keys())
    if unknown:
        raise DataError(
            f"{options.labels}: names {unknown[0]!r} and {len(unknown) - 1} other labels that are "
            f"not classes of {options.zero_shot}, such as {next(iter(numbers))!r}; use the same "
            "names"
        )
    if not any(labels):
        raise DataError(
            f"{features.path}: {options.labels} is empty for all images; fill in their classes"
        )
    own, other = features.texts.made_by, prompts.texts.made_by
    if own is not None and (own.spec, own.fingerprint) != (other.spec, other.fingerprint):
        log.warning(
            "%s: its texts were encoded by %s, those of %s by %s; the results are meaningless "
            "unless that is the same encoder",
            prompts.path,
            other.spec,
            features.path,
            own.spec,
        )
    embeddings = embed(prompts, rows)
    if embeddings.shape[1] != width:
        raise ShapeError(
            f"{prompts.path}: prompts are {embeddings.shape[1]} wide and images {width}; use the "
            "text encoder that belongs to the image encoder, or an --adapter"
        )
    vectors = class_vectors(embeddings, np.array([numbers[name] for name in classes]))
    known = [-1 if label is None else numbers[label] for label in labels]
    return Classes(len(rows.texts), vectors, np.array(known, np.int64))


def _prompt_classes(prompts: PairedRows, class_of: str | None) -> list[str]:
    """Return the class of each prompt, by --class-of or from its id."""
    ids = prompts.text_ids.to_pylist()
    if class_of is None:
        for key in ids:
            if "/" not in key:
                raise DataError(
                    f"{prompts.name}: text {key!r} names no class; use ids such as cat/0, or "
                    "pass a table with the columns caption and class by --class-of"
                )
        return [key.rpartition("/")[0] for key in ids]
    table, column = _parse_column(class_of, None)
    if table is None:
        table = read_table(parse_location(class_of))
        column = next((name for name in CLASS_COLUMNS if name in table.columns), "class")
    by_id = schema.ID in table.columns
    keys = ids if by_id else [text or "" for text in prompts.captions.to_pylist()]
    known = _values_by_key(table, (schema.ID,) if by_id else (schema.CAPTION,), column)
    for key, text in zip(keys, ids, strict=True):
        if key not in known:
            raise DataError(
                f"{table.path}: has no {column!r} of the text {text!r} ({key!r}) of "
                f"{prompts.name}; add it"
            )
    return [known[key] for key in keys]


def _column(name: str, features: FeatureSet, ids: Sequence[str], groups: Table | None) -> Values:
    """Return the values of images in COLUMN of a table or the features, or TABLE.csv:COLUMN."""
    table, column = _parse_column(name, groups)
    if table is not None and column in table.columns:
        known = _values_by_key(table, IMAGE_KEYS, column)
        found = [known.get(key) for key in ids]
        count = sum(value is not None for value in found)
        if not count:
            raise DataError(
                f"{table.path}: has {column!r} of none of the images of {features.path}, whose "
                f"ids are such as {ids[0]!r}; put their ids into its column {IMAGE_KEYS[0]!r}"
            )
        if count < len(found):
            log.warning("%s: has %r of %d of %d images", table.path, column, count, len(found))
        return found
    images = features.images
    stored = [n for n in schema.STRING_COLUMNS[images.modality] if n != schema.ID]
    if table is groups and column in stored:
        keys = images.column(schema.ID).to_pylist()
        values = dict(zip(keys, images.column(column).to_pylist(), strict=True))
        return [values[key] for key in ids]
    there = "" if table is None else f"{table.path} has {', '.join(table.columns)}; "
    raise DataError(
        f"{features.path}: images have no column {column!r}; {there}the features have "
        f"{', '.join(stored)}; name one of them, or pass a table"
    )


def _parse_column(name: str, table: Table | None) -> tuple[Table | None, str]:
    """Return the table and column of TABLE.csv:COLUMN, or the given table and COLUMN."""
    path, colon, column = name.rpartition(":")
    if colon and path.lower().endswith(SUFFIXES):
        return read_table(parse_location(path)), column
    return table, name


def _values_by_key(table: Table, keys: Sequence[str], column: str) -> Mapping[str, str]:
    """Return a column by key; rows with the same key must agree."""
    known: dict[str, str] = {}
    pairs = zip(table.require(keys), table.require([column]), strict=True)
    for row, (key, value) in enumerate(pairs):
        if key is None or value is None:
            continue
        if known.setdefault(key, value) != value:
            raise DataError(
                f"{table.where(row)}: has {value!r} of {key!r}, an earlier row has "
                f"{known[key]!r}; keep one of them"
            )
    return known
