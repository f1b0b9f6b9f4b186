"""``csalign import``: embeddings computed elsewhere, into a feature set."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from csalign.core import atomic, outputs
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.results import FeaturesResult, Progress, silent
from csalign.features import schema
from csalign.features.checks import find_unusable
from csalign.features.schema import EncoderInfo, read_manifest
from csalign.features.splits import divide
from csalign.features.writer import FeatureWriter, Rows
from csalign.ingest.config import ImportConfig
from csalign.ingest.split import split_settings
from csalign.sources import pairing
from csalign.sources.arrays.base import Labels, Strings, Vectors
from csalign.sources.arrays.opening import read_both, read_side, split_spec

logger = logging.getLogger(__name__)

_FAINT = 1e-4  # a largest value below this is rounded by a thousandth or more in float16


def import_arrays(config: ImportConfig, progress: Progress = silent) -> FeaturesResult:
    """Write embeddings and the labels of their rows as a feature set.

    Embeddings are streamed; ids, captions and other labels are held in memory.

    Args:
        config: the files and tables.
        progress: called with the number of rows written.

    Raises:
        ConfigError: options conflict, or leave open which side is which.
        DataError: a file is missing or damaged, counts or ids do not match, or a row is not finite
            or has norm 0.
        ShapeError: an array is not (rows, width) of floats.
        OutputError: ``config.out`` exists and is not to be replaced.
    """
    _check_options(config)
    splits = split_settings(config)
    specs = [split_spec(spec)[0] for spec in (config.source, config.images, config.texts) if spec]
    tables = (config.image_table, config.text_table, config.pairs, config.text_counts)
    inputs = (*specs, *(table for table in tables if table is not None))
    outputs.check_output(config.out, schema.ENTRIES, overwrite=config.overwrite, inputs=inputs)
    sides = _open(config)
    columns = _columns(config, sides)
    is_half = all(vectors.is_half for vectors in sides.values())
    dtype = config.dtype or ("float16" if is_half else "float32")
    encoders = {
        side: EncoderInfo(spec=getattr(config, f"{side}_encoder"), width=vectors.width)
        for side, vectors in sides.items()
    }
    names = None if config.names is None else dict(zip(Modality, config.names, strict=True))
    with outputs.atomic_folder(config.out) as folder:
        atomic.write_text(folder / "config.toml", config.to_toml())
        root = schema.source_root(columns.get(Modality.IMAGE, {}).get(schema.SOURCE, ()))
        with FeatureWriter(folder, encoders, dtype, names, source_root=root) as writer:
            _write(sides, columns, writer, dtype, progress)
        if splits is not None:
            try:
                made = divide(folder, splits, progress=progress)
            except DataError as error:  # which names the unfinished folder
                raise DataError(str(error).replace(str(folder), str(config.out), 1)) from None
            if made.groups:
                logger.info("%s", made.kept_together)
    counts = read_manifest(config.out).counts
    return FeaturesResult(config.out, counts.images, counts.texts, counts.pairs, 0, names=names)


def _check_options(config: ImportConfig) -> None:
    if config.source is not None and (config.images or config.texts):
        raise ConfigError("pass either SOURCE or --images and --texts, not both")
    if not (config.source or config.images or config.texts):
        raise ConfigError(
            "pass embeddings: --images A.npy --texts B.npy, or one SOURCE that contains both"
        )
    if (config.captions_per_image is None) != (config.caption_order is None):
        raise ConfigError(
            "--captions-per-image and --caption-order go together: the count alone leaves open the "
            "order"
        )
    if config.names is not None and config.names[0] == config.names[1]:
        raise ConfigError(
            f"--names: both sides are named {config.names[0]!r}; give them different names"
        )
    options = ("pairs", "captions_per_image", "text_counts")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(config, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} define the pairs twice; pass one of them")


def _open(config: ImportConfig) -> dict[Modality, Vectors]:
    """Open each given side, images first."""
    columns = {Modality.IMAGE: config.image_column, Modality.TEXT: config.text_column}
    if config.source is not None:
        return read_both(config.source, columns)
    specs = {Modality.IMAGE: config.images, Modality.TEXT: config.texts}
    return {
        side: read_side(spec, side, columns[side])
        for side, spec in specs.items()
        if spec is not None
    }


def _columns(
    config: ImportConfig, sides: Mapping[Modality, Vectors]
) -> dict[Modality, dict[str, Strings]]:
    """Return the string columns of each side."""
    images = texts = None
    if (vectors := sides.get(Modality.IMAGE)) is not None:
        if vectors.captions_each is not None:
            raise DataError(
                f"{vectors.name}: is 3-D, but images need one embedding each: (images, width)"
            )
        images = pairing.describe_images(len(vectors), _labels(config.image_table, vectors))
    if (vectors := sides.get(Modality.TEXT)) is not None:
        labels = _labels(config.text_table, vectors)
        pairs = None if config.pairs is None else pairing.read_label_table(config.pairs)
        owners = None if images is None else _owners(config, len(images.ids), vectors)
        texts = pairing.describe_texts(len(vectors), images, labels, pairs, owners)
    if images is not None and texts is not None:
        images, texts = pairing.share_splits(images, texts)
    rows = {Modality.IMAGE: images, Modality.TEXT: texts}
    return {  # column "id" of the set is the field "ids" of the rows, and so on
        side: {name: getattr(rows[side], f"{name}s") for name in schema.STRING_COLUMNS[side]}
        for side in sides
    }


def _labels(table: Path | None, vectors: Vectors) -> Labels | None:
    return vectors.labels if table is None else pairing.read_label_table(table)


def _owners(config: ImportConfig, images: int, texts: Vectors) -> Sequence[int] | None:
    """Return the image row of each text row, if an option or the array's shape gives it."""
    if config.text_counts is not None:
        return pairing.owners_by_counts(config.text_counts, images, len(texts))
    each, order = config.captions_per_image, config.caption_order
    if each is None and config.pairs is None:
        each, order = texts.captions_each, "blocks"
    if each is None or order is None:
        return None
    return pairing.owners_by_layout(images, len(texts), each, order)


def _write(
    sides: Mapping[Modality, Vectors],
    columns: Mapping[Modality, Mapping[str, Strings]],
    writer: FeatureWriter,
    dtype: str,
    progress: Progress,
) -> None:
    total, done, faint = sum(map(len, sides.values())), 0, 0
    for side, vectors in sides.items():
        start = 0
        for chunk, where in vectors.chunks():
            for row, reason in find_unusable(chunk, dtype).items():
                raise DataError(f"{where(row)}: {reason}")
            stop = start + len(chunk)
            part = {name: values[start:stop] for name, values in columns[side].items()}
            writer.write(side, Rows(part, chunk))
            faint += int((np.abs(chunk).max(axis=1) < _FAINT).sum())
            done, start = done + len(chunk), stop
            progress("rows", done, total)
    if dtype == "float16" and faint:
        logger.warning(
            "%d embeddings are so small that float16 keeps few of their digits; scale them to "
            "norms about 1, or import the originals with --dtype float32",
            faint,
        )
