"""``csalign import``: embeddings computed elsewhere, into a feature set."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core import atomic, outputs
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.progress import Progress, silent
from csalign.core.results import FeaturesResult
from csalign.features import schema
from csalign.features.checks import warn_of_rows
from csalign.features.reader import FeatureSet
from csalign.features.splits import usual_splits
from csalign.features.writer import FeatureWriter
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_sides import (
    divide_unfinished,
    dtype_of,
    encoder_of,
    import_sides,
    with_splits,
    write_vectors,
)
from csalign.ingest.split import split_settings
from csalign.sources.arrays.base import Vectors
from csalign.sources.arrays.naming import label_side
from csalign.sources.arrays.opening import labels_beside, read_both, read_side, split_spec
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.image_rows import ImageRows, describe_images
from csalign.sources.labels import Labels
from csalign.sources.layouts import owners_by_counts, owners_by_layout
from csalign.sources.pairing import ORDER, Rules, describe_texts, share_splits

logger = logging.getLogger(__name__)

_FAINT = 1e-4  # a largest value below this is rounded by a thousandth or more in float16


def import_arrays(config: ImportConfig, progress: Progress = silent) -> FeaturesResult:
    """Write embeddings and the labels of their rows as a feature set.

    Embeddings are streamed; ids, captions and other labels are held in memory.

    Raises:
        ConfigError: options conflict, or leave open which side is which.
        DataError: a file is missing or damaged, counts or ids do not match, or a row is not finite
            or has norm 0.
        ShapeError: an array is not (rows, width) of floats.
        OutputError: ``config.out`` exists and is not to be replaced.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.import_arrays(images, texts, out="features")
    FeaturesResult
      features  features
      images    60
      texts     60
      pairs     60
      failures  0
      complete  True
      pairing   row order
    """
    config.check()
    if config.side is not None:
        return import_sides(config, progress)
    splits = split_settings(config)
    specs = _specs(config)
    tables = (config.image_table, config.text_table, config.pairs, config.text_counts)
    inputs = (*(split_spec(spec)[0] for spec in specs.values()), *filter(None, tables))
    outputs.check_output(config.out, schema.ENTRIES, overwrite=config.overwrite, inputs=inputs)
    sides = _open(config, specs)
    sides, columns, pairing = _pair(config, sides)
    dtype = config.dtype or dtype_of(sides.values())
    encoders = {
        side: encoder_of(getattr(config, f"{side}_encoder"), vectors)
        for side, vectors in sides.items()
    }
    names = None if config.names is None else dict(zip(Modality, config.names, strict=True))
    with outputs.atomic_folder(config.out) as folder:
        atomic.write_text(folder / "config.toml", config.to_toml())
        images = columns.get(Modality.IMAGE, {}).get(schema.SOURCE)
        root = schema.source_root([] if images is None else images.drop_null()[:1])
        with FeatureWriter(folder, encoders, dtype, names, root, pairing) as writer:
            write_vectors(sides, columns, writer, dtype, progress)
        divide_unfinished(folder, splits, config.out)
    features = FeatureSet.open(config.out)
    warn_of_rows(features)
    counts = features.manifest.counts
    if counts.images and counts.texts and not counts.pairs:
        logger.warning(
            "%s: %d images and %d texts, but no pairs by %s; name a column that identifies both "
            "with --pair-by, such as --pair-by id",
            *(config.out, counts.images, counts.texts, pairing),
        )
    return FeaturesResult(
        config.out, counts.images, counts.texts, counts.pairs, 0, names=names, pairing=pairing
    )


def _specs(config: ImportConfig) -> dict[Modality | None, Path]:
    """Return what to read by side, None for a source of both, after a check of the options."""
    source = config.source
    both = {"images": config.images, "texts": config.texts}
    named = {name: spec for name, spec in both.items() if spec is not None}
    if len(source) > 2 or (source and len(source) + len(named) > 2):
        raise ConfigError(
            f"{len(source) + len(named)} arrays are given; pass the images and the texts: "
            + config.command(source=source[:2], images=None, texts=None)
        )
    if source and named:
        ((name, spec),) = named.items()
        paths = (spec, *source) if name == "images" else (*source, spec)
        raise ConfigError(
            f"{source[0]} and --{name} {spec} are mixed; pass both in order: "
            + config.command(source=paths, images=None, texts=None)
        )
    if not source and not named:
        raise ConfigError(
            "pass embeddings of images and texts: csalign import image.npy text.npy --out features"
        )
    each, order = config.captions_per_image, config.caption_order
    if (each is None) != (order is None):
        raise ConfigError(
            "--captions-per-image and --caption-order go together; "
            + _layout_advice(config, each or 5, order)
        )
    if config.names is not None and config.names[0] == config.names[1]:
        raise ConfigError(
            f"--names: both sides are named {config.names[0]!r}; give them different names"
        )
    options = ("pairs", "captions_per_image", "text_counts", "pair_by")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(config, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} define the pairs twice; pass one of them")
    if len(source) == 1:
        return {None: source[0]}
    if source:
        return dict(zip(Modality, source, strict=True))
    return {Modality(name.removesuffix("s")): spec for name, spec in named.items()}


def _open(config: ImportConfig, specs: Mapping[Modality | None, Path]) -> dict[Modality, Vectors]:
    """Open each given side, images first, and warn of vectors that are not used."""
    columns = {Modality.IMAGE: config.image_column, Modality.TEXT: config.text_column}
    sides = (
        read_both(specs[None], columns)
        if None in specs
        else {side: read_side(spec, side, columns[side]) for side, spec in specs.items() if side}
    )
    both = [{part.name for part in vectors.parts} for vectors in sides.values()]
    if len(both) > 1 and both[0] & both[1] and sides[Modality.IMAGE].is_in_one_file:
        raise DataError(
            f"{min(both[0] & both[1])} and {len(both[0]) - 1} more are read as one array, of "
            "images and of texts; name that of each side with --image-column and --text-column"
        )
    sides = {side: with_splits(vectors) for side, vectors in sides.items()}
    used = {part.name for vectors in sides.values() for part in vectors.parts}
    unused = set[str]().union(*(vectors.unused for vectors in sides.values())) - used
    for name in sorted(unused):
        logger.warning(
            "%s is not imported; choose it with --image-column or --text-column, or ignore this",
            name,
        )
    return sides


def _pair(
    config: ImportConfig, sides: Mapping[Modality, Vectors]
) -> tuple[dict[Modality, Vectors], dict[Modality, dict[str, pa.Array]], str | None]:
    """Pair the rows; return the sides without repeated images, their columns, and how."""
    found = dict(sides)
    given = (config.image_table, config.text_table, config.pairs, config.text_counts)
    if config.captions_per_image is None and config.pair_by != ORDER and not any(given):
        beside = labels_beside(sides)
        sides = {
            side: replace(own, labels=beside.get(side, own.labels)) for side, own in sides.items()
        }
    tables = {Modality.IMAGE: config.image_table, Modality.TEXT: config.text_table}
    labels = {side: _labels(tables[side], sides, side) for side in sides}
    columns: dict[Modality, dict[str, pa.Array]] = {}
    images = texts = pairing = None
    image, text = sides.get(Modality.IMAGE), sides.get(Modality.TEXT)
    if image is not None:
        if image.captions_each is not None:
            raise DataError(
                f"{image.name}: is 3-D, but images need one embedding each: (images, width)"
            )
        # Rows of equal embeddings are one image where row i belongs to row i of the texts.
        are_by_row = not any((config.pairs, config.captions_per_image, config.text_counts)) and (
            [own.captions_each for own in sides.values()] == [None, None]
            and len({len(own) for own in sides.values()}) == 1
        )
        images = describe_images(
            len(image),
            labels[Modality.IMAGE],
            lambda: image.sketch,
            config.id_column,
            (lambda: _digests(image, labels)) if are_by_row else None,
        )
        columns[Modality.IMAGE] = images.columns
        found[Modality.IMAGE] = replace(image, kept=images.kept)
    if text is not None:
        rules = _rules(config, images, sides)
        texts, pairing = describe_texts(len(text), images, labels[Modality.TEXT], rules)
        columns[Modality.TEXT] = texts.columns
    for own in columns.values():
        own[schema.SPLIT] = usual_splits(own[schema.SPLIT])
    if images is not None and texts is not None:
        share_splits(images, texts)
        owners = pa.array(texts.owners, mask=texts.owners < 0)
        columns[Modality.TEXT][schema.IMAGE_ID] = images.ids.take(owners)
    return found, columns, pairing


def _digests(images: Vectors, labels: Mapping[Modality, Labels]) -> Any:
    """Return numbers that are equal where embeddings of images, and the splits of rows, are."""
    found = images.digests
    for own in labels.values():
        splits = own.find((schema.SPLIT,))
        if splits is not None and len(splits) == len(found):
            codes = pc.fill_null(splits.dictionary_encode().indices, -1).to_numpy()
            found = found + (codes + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return found


def _labels(table: Path | None, sides: Mapping[Modality, Vectors], side: Modality) -> Labels:
    if table is not None:
        return read_label_table(table)
    labels, others = sides[side].labels, [own for key, own in sides.items() if key != side]
    if not others or labels.name != others[0].name or others[0].in_table:
        return labels
    # Lists in a file of both sides are of each side of their length, unless named like the other.
    names = [name for name in labels.names if label_side(name) in (None, side)]
    return replace(labels, names=names) if len(sides[side]) == len(others[0]) else labels


def _rules(
    config: ImportConfig, images: ImageRows | None, sides: Mapping[Modality, Vectors]
) -> Rules:
    """Return what decides the pairs: options, the array's shape, or one table of both sides."""
    pairs = None if config.pairs is None else read_label_table(config.pairs)
    if images is None:
        return Rules(pairs=pairs)
    image, text = sides[Modality.IMAGE], sides[Modality.TEXT]
    rows, texts = len(image), len(text)
    each, owners, layout = config.captions_per_image or text.captions_each, None, ""
    is_shape = each is not None and not any(
        (config.pairs, config.captions_per_image, config.text_counts)
    )
    if config.text_counts is not None:
        owners = owners_by_counts(
            config.text_counts, rows, texts, None if images.key is None else images.ids
        )
        layout = str(config.text_counts)
    elif each is not None and pairs is None:
        if is_shape and config.pair_by not in (None, ORDER) and not text.labels:
            raise DataError(
                f"{text.name}: is 3-D, whose texts are those of each image in order, so --pair-by "
                f"{config.pair_by} cannot be used; omit it, or save the texts as (texts, width)"
            )
        order = config.caption_order or "blocks"
        owners = owners_by_layout(rows, texts, each, order)
        layout = f"{each} captions per image, in {order}"
        if is_shape:
            layout = f"the {each} captions of each image in a 3-D array"
    is_one_table = image.in_table and text.in_table and image.name == text.name
    return Rules(
        pairs=pairs,
        owners=owners,
        layout=layout,
        is_shape=is_shape,
        by=config.pair_by,
        same_rows=is_one_table and config.image_table is None and config.text_table is None,
        doubt=_doubt(image, text),
        remedy=_advice(config, rows, texts),
    )


def _doubt(image: Vectors, text: Vectors) -> str:
    """Say why row i of the images may not belong to row i of the texts, "" if nothing speaks so."""
    for own, other in ((image, text), (text, image)):
        if own.gap and own.gap != other.gap:
            return f"{own.name}: {own.gap} Add it"
        if own.is_in_one_file and len(own) != len(other):
            return (
                f"{own.parts[0].name} and {len(own.parts) - 1} more arrays are read as one of "
                f"{len(own)} rows, and {other.name} has {len(other)}; name one of them with "
                "--image-column or --text-column"
            )
    if len(image.parts) == len(text.parts) and len(image) == len(text):
        for one, two in zip(image.parts, text.parts, strict=True):
            if len(one) != len(two):
                return (
                    f"{one.name}: has {len(one)} rows and {two.name} has {len(two)}, so parts do "
                    "not belong together; give both sides keys"
                )
    return ""


def _advice(config: ImportConfig, images: int, texts: int) -> str:
    """Say what to do where there are not as many texts as images."""
    if images and texts > images and texts % images == 0:
        return _layout_advice(config, texts // images, None)
    general = "give the image of each text with --pairs TABLE, a column image_id, or --text-counts"
    if texts and images > texts and images % texts == 0:
        specs = _specs(config)
        if None not in specs:
            swapped = {"source": [*specs.values()][::-1], "images": None, "texts": None}
            advice = _layout_advice(config, images // texts, None, **swapped)
            return f"are images and texts swapped? Then, {advice}\nor {general}"
    return general


def _layout_advice(config: ImportConfig, each: int, order: str | None, **values: Any) -> str:
    """Return the commands for `each` captions per image, in both orders or one."""
    meanings = {
        "blocks": "all captions of the first image, then of the second",
        "copies": "one caption of every image, then the next of every image",
    }
    lines = [
        f"  {config.command(**values, captions_per_image=each, caption_order=name)}\n"
        f"    ({name}: {text})"
        for name, text in meanings.items()
        if order in (None, name)
    ]
    return f"with {each} captions per image, run\n" + "\nor\n".join(lines)
