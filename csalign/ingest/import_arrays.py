"""``csalign import``: embeddings computed elsewhere, into a feature set."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.progress import Progress, silent
from csalign.core.results import FeaturesResult
from csalign.features import schema
from csalign.features.manifest import EncoderInfo
from csalign.features.shard import Rows, first_unusable
from csalign.features.writer import FeatureWriter
from csalign.ingest.config import ImportConfig
from csalign.sources.arrays.base import Labels, Strings, Vectors
from csalign.sources.arrays.opening import read_both, read_side, split_spec
from csalign.sources.pairing import (
    ImageRows,
    TextRows,
    describe_images,
    describe_texts,
    owners_by_counts,
    owners_by_layout,
    read_label_table,
    share_splits,
)

log = logging.getLogger(__name__)

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
    atomic.check_output(config.out, overwrite=config.overwrite, inputs=_inputs(config))
    sides = _open(config)
    columns = _columns(config, sides)
    dtype = config.dtype or _dtype(sides)
    specs = {Modality.IMAGE: config.image_encoder, Modality.TEXT: config.text_encoder}
    encoders = {
        side: EncoderInfo(spec=specs[side], width=vectors.width) for side, vectors in sides.items()
    }
    names = None if config.names is None else dict(zip(Modality, config.names, strict=True))
    total, done, faint = sum(map(len, sides.values())), 0, 0
    with atomic.atomic_folder(config.out) as folder:
        atomic.write_text(folder / "config.toml", config.to_toml())
        with FeatureWriter(folder, encoders, dtype, names) as writer:
            for side, vectors in sides.items():
                start = 0
                for chunk, where in vectors.chunks():
                    bad = first_unusable(chunk, dtype)
                    if bad is not None:
                        raise DataError(
                            f"{where(bad[0])}: {bad[1]}; remove the row or encode it again"
                        )
                    part = {
                        name: values[start : start + len(chunk)]
                        for name, values in columns[side].items()
                    }
                    writer.write(side, Rows(part, chunk))
                    start += len(chunk)
                    faint += int((np.abs(chunk).max(axis=1) < _FAINT).sum())
                    progress("rows", done + start, total)
                done += start
    if dtype == "float16" and faint:
        log.warning(
            "%d embeddings are so small that float16 keeps few of their digits; %s, or import the "
            "originals with --dtype float32",
            faint,
            schema.RESCALE.partition(",")[0],
        )
    images, texts = (len(sides[side]) if side in sides else 0 for side in Modality)
    owners: Sequence[str | None] = columns.get(Modality.TEXT, {}).get(schema.IMAGE_ID, ())
    pairs = sum(owner is not None for owner in owners)
    return FeaturesResult(config.out, images, texts, pairs, 0, names=names)


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
    given = {
        "--pairs": config.pairs,
        "--captions-per-image": config.captions_per_image,
        "--text-counts": config.text_counts,
    }
    names = [name for name, value in given.items() if value is not None]
    if config.names is not None and config.names[0] == config.names[1]:
        raise ConfigError(
            f"--names: both sides are named {config.names[0]!r}; give them different names"
        )
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} define the pairs twice; pass one of them")


def _inputs(config: ImportConfig) -> tuple[Path, ...]:
    arrays = [split_spec(spec)[0] for spec in (config.source, config.images, config.texts) if spec]
    tables = (config.image_table, config.text_table, config.pairs, config.text_counts)
    return (*arrays, *(path for path in tables if path is not None))


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
    if Modality.IMAGE in sides:
        vectors = sides[Modality.IMAGE]
        if vectors.captions_each is not None:
            raise DataError(
                f"{vectors.name}: is 3-D, but images need one embedding each: (images, width)"
            )
        images = describe_images(len(vectors), _labels(config.image_table, vectors))
    if Modality.TEXT in sides:
        vectors = sides[Modality.TEXT]
        pairs = None if config.pairs is None else read_label_table(config.pairs)
        owners = None if images is None else _owners(config, len(images.ids), vectors)
        labels = _labels(config.text_table, vectors)
        texts = describe_texts(len(vectors), images, labels, pairs, owners)
    if images is not None and texts is not None:
        images, texts = share_splits(images, texts)
    return _by_side(images, texts)


def _labels(table: Path | None, vectors: Vectors) -> Labels | None:
    return vectors.labels if table is None else read_label_table(table)


def _owners(config: ImportConfig, images: int, texts: Vectors) -> Sequence[int] | None:
    """Return the image row of each text row, if an option or the array's shape gives it."""
    if config.text_counts is not None:
        return owners_by_counts(config.text_counts, images, len(texts))
    if config.captions_per_image is not None and config.caption_order is not None:
        return owners_by_layout(images, len(texts), config.captions_per_image, config.caption_order)
    if texts.captions_each is not None and config.pairs is None:
        return owners_by_layout(images, len(texts), texts.captions_each, "blocks")
    return None


def _by_side(
    images: ImageRows | None, texts: TextRows | None
) -> dict[Modality, dict[str, Strings]]:
    found: dict[Modality, dict[str, Strings]] = {}
    if images is not None:
        found[Modality.IMAGE] = {
            schema.ID: images.ids,
            schema.SOURCE: images.sources,
            schema.SPLIT: images.splits,
        }
    if texts is not None:
        found[Modality.TEXT] = {
            schema.ID: texts.ids,
            schema.IMAGE_ID: texts.image_ids,
            schema.CAPTION: texts.captions,
            schema.SPLIT: texts.splits,
        }
    return found


def _dtype(sides: Mapping[Modality, Vectors]) -> str:
    return "float16" if all(vectors.is_half for vectors in sides.values()) else "float32"
