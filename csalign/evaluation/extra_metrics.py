"""Metrics of ``csalign eval`` beside retrieval and the gap, and the columns they need."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from csalign.core.arrays import Floats, Ints
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.core.figures import counted
from csalign.core.paths import parse_location
from csalign.evaluation.config import ExtraOptions, MeasureOptions
from csalign.evaluation.protocols import DIRECTIONS, Gallery, Ranks, mean_of, retrieval_block
from csalign.features import schema
from csalign.features.checks import alike
from csalign.features.join import ALL, PairedRows, load_side
from csalign.features.reader import FeatureSet
from csalign.metrics.groups import MOST_IMAGES
from csalign.metrics.labels import class_vectors, classify, graded_both_ways
from csalign.metrics.retrieval import corrected
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.labels import Labels
from csalign.sources.records.tables import SUFFIXES

log = logging.getLogger(__name__)

Values = list[str | None]
Embed = Callable[[FeatureSet, PairedRows], Floats]
Blocks = tuple[dict[str, Any], dict[str, Any]]

IMAGE_KEYS = ("image_id", "id")
CLASS_COLUMNS = ("class", "label")
NO_VALUE = "(none)"
MOST_GROUPS = 1_000  # for a readable table
FEWEST_CLASSES = 2


class GroupLabels(NamedTuple):
    """A column with the class of each image, None where there is none."""

    column: str
    values: Values


class Extras(NamedTuple):
    """The extra metrics, as `prepare_extras` prepares them, and the labels of the images."""

    compute: Callable[[Floats, Sequence[Gallery], Ranks | None, MeasureOptions], Blocks]
    labels: GroupLabels | None


def prepare_extras(
    options: ExtraOptions, features: FeatureSet, image_ids: Sequence[str], width: int, embed: Embed
) -> Extras:
    """Read the tables and prompts of the extra metrics, before anything is computed.

    `embed` returns unit rows of the texts of a feature set, in the space of the images.

    Returns:
        The labels of --labels, and a function of the images, (n, d) unit rows, the galleries and
        their ranks (none without texts), and the options; it returns blocks of the document, and
        their intervals.

    Raises:
        DataError: a table, a column or the classes do not fit the images.
        ShapeError: the prompts have another width.
    """
    table = None if options.groups is None else read_label_table(options.groups)
    wanted = {
        name: _column(name, features, image_ids, table)
        for name in filter(None, {options.relevance, options.by, options.labels})
    }
    if options.by is not None and (count := len(set(wanted[options.by]))) > MOST_GROUPS:
        raise DataError(
            f"{features.path}: the column {options.by!r} has {count:,} values, --by takes at most "
            f"{MOST_GROUPS:,}; name another column"
        )
    labels = options.labels and GroupLabels(options.labels, wanted[options.labels])
    zero_shot = None
    if options.labels is not None and options.zero_shot is not None:
        zero_shot = _load_classes(options, features, wanted[options.labels], width, embed)

    def compute(
        images: Floats, folds: Sequence[Gallery], ranks: Ranks | None, measured: MeasureOptions
    ) -> Blocks:
        found: dict[str, Any] = {}
        intervals: dict[str, Any] = {}
        if (column := options.relevance) is not None:
            found["graded"] = {"column": column, **_graded(folds, wanted[column])}
        if (column := options.by) is not None and ranks is not None:
            found["by"] = {"column": column, "values": _by(folds, ranks, wanted[column])}
        if options.correct:
            found["corrected"] = {name: _corrected(folds, name) for name in options.correct}
        if zero_shot is not None:
            classes, prompts, right = zero_shot
            labelled = np.flatnonzero(right >= 0)
            classified = classify(images[labelled], classes, right[labelled])
            counts = {"classes": len(classes), "prompts": prompts, "images": len(labelled)}
            found["zero_shot"] = counts | classified.summary()
            if measured.intervals:
                intervals["zero_shot"] = classified.intervals(
                    resamples=measured.resamples, seed=measured.seed
                )
        return found, intervals

    return Extras(compute, labels or None)


def clustered_labels(options: ExtraOptions, labels: GroupLabels, name: str) -> GroupLabels | None:
    """Return labels that name groups; None, with a warning, if they only serve --zero-shot.

    Raises:
        DataError: they name no groups: fewer than two classes, or hardly fewer than images.
    """
    count = sum(value is not None for value in labels.values)
    classes = len(set(labels.values) - {None})
    if classes < FEWEST_CLASSES or 2 * classes > count:
        message = (
            f"{name}: the column {labels.column!r} has {counted(classes, 'distinct value')} in "
            f"{counted(count, 'image')}; clustering needs at least {FEWEST_CLASSES} classes, and "
            "at most half as many as images; name another column by --labels"
        )
        if options.zero_shot is None:
            raise DataError(message)
        log.warning("%s", message)
        return None
    if missing := len(labels.values) - count:
        log.info("%s: %d images without %r are left out", name, missing, labels.column)
    if count > MOST_IMAGES:
        drawn = name, MOST_IMAGES, count
        log.info("%s: %d of %d images with a class are drawn for clustering and k-NN", *drawn)
    return labels


def _graded(folds: Sequence[Gallery], values: Values) -> dict[str, Any]:
    """Grade retrieval by images with the same value; without one, an image is its own group."""
    numbers: dict[Any, int] = {}
    keys = ((row, None) if value is None else value for row, value in enumerate(values))
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    starts = np.cumsum([len(fold.images) for fold in folds])[:-1]
    blocks = []
    for fold, own in zip(folds, np.split(groups, starts), strict=True):
        both = graded_both_ways(fold.images, fold.texts, fold.text_image, own)
        blocks.append({n: side.summary() for n, side in zip(DIRECTIONS, both, strict=True)})
    return mean_of(blocks)


def _corrected(folds: Sequence[Gallery], name: str) -> dict[str, Any]:
    ranks = []
    for fold in folds:
        images, texts = corrected(fold.images, fold.texts, name)
        ranks.append(Gallery(images, texts, fold.text_image).rank())
    return retrieval_block(ranks)


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
) -> tuple[Floats, int, Ints]:
    """Return the vector of each class, the number of prompts, and the class of each image or -1.

    Classes are in the order of their first prompts.
    """
    assert options.zero_shot is not None
    prompts = FeatureSet.open(options.zero_shot)
    if prompts.texts.info is None or not len(prompts.texts):
        raise DataError(f"{prompts.path}: contains no texts; extract it from class prompts")
    rows = load_side(prompts, ALL, Modality.TEXT)
    classes = _prompt_classes(rows, options.class_of)
    counts = Counter(classes)  # in the order of their prompts
    names = list(counts)
    spell = _plain if len(set(map(_plain, names))) == len(names) else str
    numbers = {spell(name): number for number, name in enumerate(names)}
    seen = sorted({label for label in labels if label is not None} - counts.keys())
    if unknown := [label for label in seen if spell(label) not in numbers]:
        raise DataError(
            f"{options.labels}: names {unknown[0]!r} and {len(unknown) - 1} other labels that are "
            f"not classes of {prompts.path}, such as {names[0]!r}; use the same names"
        )
    if seen:
        shown = len(seen), seen[0], names[numbers[spell(seen[0])]]
        log.info("%d labels are read as classes spelt otherwise, such as %r as %r", *shown)
    usual = Counter(counts.values()).most_common(1)[0][0]
    if several := [name for name in names if counts[name] > usual and not counts[name] % usual]:
        log.warning(
            "%s: class %r has %d prompts, most have %d; if it is several classes of one name (%d "
            "such), give each a name of its own",
            *(prompts.path, several[0], counts[several[0]], usual, len(several)),
        )
    if not any(labels):
        raise DataError(f"{features.path}: no image has a class in {options.labels}; fill it in")
    own, other = features.texts.info, prompts.texts.info
    if own is not None and (own.spec, own.fingerprint) != (other.spec, other.fingerprint):
        log.warning(
            "%s: its texts were encoded by %s, not by %s as those of %s; the results mean nothing "
            "unless that is the same encoder",
            *(prompts.path, other.spec, own.spec, features.path),
        )
    embeddings = embed(prompts, rows)
    if embeddings.shape[1] != width:
        raise ShapeError(
            f"{prompts.path}: prompts are {embeddings.shape[1]} wide and images {width}; use the "
            "text encoder that belongs to the image encoder, or an --adapter"
        )
    vectors = class_vectors(embeddings, np.array([numbers[spell(name)] for name in classes]))
    pairs = enumerate(alike(vectors).tolist())
    if twins := [(names[first], names[own]) for own, first in pairs if own != first]:
        log.warning(
            "%s: classes %s have equal prompts%s; the first of them wins, as in CLIP's code",
            *(prompts.path, " and ".join(map(repr, twins[0])), f" ({len(twins)} such pairs)"),
        )
    rights = [-1 if label is None else numbers[spell(label)] for label in labels]
    return vectors, len(rows.texts), np.array(rights, np.int64)


def _plain(name: str) -> str:
    """Fold case, space, underscores, leading zeros and the .0 of numbers."""
    plain = " ".join(re.split(r"[\s_]+", name.strip().casefold()))
    return re.sub(r"^0+(?=\d+$)|(?<=\d)\.0+$", "", plain)


def _prompt_classes(prompts: PairedRows, class_of: str | None) -> list[str]:
    """Return the class of each prompt, by --class-of or from its id."""
    ids = prompts.text_ids.to_pylist()
    if class_of is None:
        if unclear := [key for key in ids if "/" not in key]:
            raise DataError(
                f"{prompts.name}: text {unclear[0]!r} names no class; use ids such as cat/0, or "
                "pass a table with the columns caption and class by --class-of"
            )
        return [key.rpartition("/")[0] for key in ids]
    table, column = _parse_column(class_of, None)
    if table is None:
        table = read_label_table(parse_location(class_of))
        column = next((name for name in CLASS_COLUMNS if name in table.names), "class")
    captions = prompts.captions.to_pylist()
    if schema.CAPTION in table.names and table.column(schema.CAPTION).to_pylist() == captions:
        classes: Values = table.require(column).to_pylist()  # row by row: prompts may be equal
        if None not in classes:
            return [str(name) for name in classes]
    key_column = schema.ID if schema.ID in table.names else schema.CAPTION
    keys = ids if key_column == schema.ID else captions
    remedy = "pass the table that the prompts were extracted from, in which each has its row"
    known = _values_by_key(table, (key_column,), column, remedy)
    for key, text in zip(keys, ids, strict=True):
        if key not in known:
            raise DataError(
                f"{table.name}: has no {column!r} of the text {text!r} ({key!r}) of "
                f"{prompts.name}; add it"
            )
    return [known[key] for key in keys]


def _column(name: str, features: FeatureSet, ids: Sequence[str], groups: Labels | None) -> Values:
    """Return the values of images in COLUMN of a table or the features, or TABLE.csv:COLUMN."""
    table, column = _parse_column(name, groups)
    images = features.images
    stored = [n for n in schema.string_columns(images.modality) if n != schema.ID]
    if table is not None and column in table.names:
        known = _values_by_key(table, IMAGE_KEYS, column)
        if not (count := sum(key in known for key in ids)):
            if same := len({*table.require(*IMAGE_KEYS).to_pylist()} & {*ids}):
                raise DataError(
                    f"{table.name}: the column {column!r} is empty for all {same:,} images of "
                    f"{features.path} that it has; name another column"
                )
            raise DataError(
                f"{table.name}: has {column!r} of none of the images of {features.path}, whose "
                f"ids are such as {ids[0]!r}; put their ids into its column {IMAGE_KEYS[0]!r}"
            )
        if count < len(ids):
            log.warning("%s: has %r of %d of %d images", table.name, column, count, len(ids))
        return [known.get(key) for key in ids]
    if table is groups and column in stored:
        keys = images.column(schema.ID).to_pylist()
        values = dict(zip(keys, images.column(column).to_pylist(), strict=True))
        return [values[key] for key in ids]
    if table is groups and name.lower().endswith(SUFFIXES):
        found = read_label_table(parse_location(name)).names
        listed = " or ".join(f"{name}:{own}" for own in found if own not in IMAGE_KEYS)
        raise DataError(f"{name}: is a table; name the column too: {listed}")
    there = "" if table is None else f"{table.name} has {', '.join(table.names)}; "
    raise DataError(
        f"{features.path}: images have no column {column!r}; {there}the features have "
        f"{', '.join(stored)}; name one of them, or a table too: TABLE.csv:{column}"
    )


def _parse_column(name: str, table: Labels | None) -> tuple[Labels | None, str]:
    """Return the table and column of TABLE.csv:COLUMN, or the given table and COLUMN."""
    path, colon, column = name.rpartition(":")
    if colon and path.lower().endswith(SUFFIXES):
        return read_label_table(parse_location(path)), column
    return table, name


def _values_by_key(
    table: Labels, keys: Sequence[str], column: str, remedy: str = "keep one of them"
) -> Mapping[str, str]:
    """Return a column by key; rows with the same key must agree."""
    known: dict[str, str] = {}
    pairs = zip(table.require(*keys).to_pylist(), table.require(column).to_pylist(), strict=True)
    for row, (key, value) in enumerate(pairs):
        if key is not None and value is not None and known.setdefault(key, value) != value:
            raise DataError(
                f"{table.where(row)}: has {value!r} of {key!r}, an earlier row has "
                f"{known[key]!r}; {remedy}"
            )
    return known
