"""``csalign import``: embeddings somebody already has, into a feature set."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from csalign import files
from csalign.config import ImportConfig
from csalign.enums import Modality
from csalign.errors import ConfigError, DataError
from csalign.progress import Progress, silent
from csalign.results import FeaturesResult
from csalign.sources.arrays import (
    IMAGE_ARRAYS,
    TEXT_ARRAYS,
    Array,
    Strings,
    describe_images,
    describe_texts,
    read_array,
    share_splits,
)
from csalign.sources.tables import Table, read_table
from csalign.store import schema
from csalign.store.manifest import EncoderInfo
from csalign.store.shard import Rows, first_unusable
from csalign.store.writer import FeatureWriter

CHUNK_ROWS = 8_192


def import_arrays(config: ImportConfig, progress: Progress = silent) -> FeaturesResult:
    """Write arrays of embeddings, with what tables say of their rows, as a feature set.

    Args:
        config: the arrays and tables.
        progress: told how far it is.

    Raises:
        ConfigError: the arrays are not both named.
        DataError: a file is missing or damaged, counts or ids do not agree, a row is not finite
            or has norm 0.
        ShapeError: an array is not (rows, width) of floats.
        OutputError: ``config.out`` exists and is not to be replaced.
    """
    specs = _specs(config)
    tables = (config.image_table, config.text_table, config.pairs)
    inputs = tuple(path for path in (*specs.values(), *tables) if path is not None)
    files.check_output(config.out, overwrite=config.overwrite, inputs=inputs)
    arrays = {
        Modality.IMAGE: read_array(specs[Modality.IMAGE], IMAGE_ARRAYS),
        Modality.TEXT: read_array(specs[Modality.TEXT], TEXT_ARRAYS),
    }
    columns = _columns(config, {side: len(array) for side, array in arrays.items()})
    dtype = config.dtype or _dtype(arrays)
    specs_by_side = {Modality.IMAGE: config.image_encoder, Modality.TEXT: config.text_encoder}
    encoders = {
        side: EncoderInfo(spec=specs_by_side[side], width=array.shape[1])
        for side, array in arrays.items()
    }
    total, done = sum(map(len, arrays.values())), 0
    with files.staged_folder(config.out) as folder:
        files.write_text(folder / "config.toml", config.to_toml())
        with FeatureWriter(folder, encoders, dtype) as writer:
            for side, array in arrays.items():
                for start in range(0, len(array), CHUNK_ROWS):
                    chunk = _checked(array, start, dtype, specs[side])
                    part = {
                        name: values[start : start + len(chunk)]
                        for name, values in columns[side].items()
                    }
                    writer.write(side, Rows(part, chunk))
                    done += len(chunk)
                    progress("rows", done, total)
    pairs = sum(owner is not None for owner in columns[Modality.TEXT][schema.IMAGE_ID])
    images, texts = (len(array) for array in arrays.values())
    return FeaturesResult(config.out, images, texts, pairs, 0)


def _specs(config: ImportConfig) -> dict[Modality, Path]:
    """Where each side's array is."""
    if config.source is not None:
        if config.images or config.texts:
            raise ConfigError("give either SOURCE or --images and --texts, not both")
        if not zipfile.is_zipfile(config.source):
            raise ConfigError(
                f"{config.source}: is no .npz with both arrays; name two files with --images and "
                "--texts"
            )
        return {Modality.IMAGE: config.source, Modality.TEXT: config.source}
    if config.images is None or config.texts is None:
        raise ConfigError("name both arrays: --images A.npy --texts B.npy, or one .npz as SOURCE")
    return {Modality.IMAGE: config.images, Modality.TEXT: config.texts}


def _columns(
    config: ImportConfig, counts: Mapping[Modality, int]
) -> dict[Modality, dict[str, Strings]]:
    def table(path: Path | None) -> Table | None:
        return None if path is None else read_table(path)

    images = describe_images(counts[Modality.IMAGE], table(config.image_table))
    texts = describe_texts(
        counts[Modality.TEXT], images, table(config.text_table), table(config.pairs)
    )
    images, texts = share_splits(images, texts)
    return {
        Modality.IMAGE: {
            schema.ID: images.ids,
            schema.SOURCE: images.sources,
            schema.SPLIT: images.splits,
        },
        Modality.TEXT: {
            schema.ID: texts.ids,
            schema.IMAGE_ID: texts.image_ids,
            schema.CAPTION: texts.captions,
            schema.SPLIT: texts.splits,
        },
    }


def _dtype(arrays: Mapping[Modality, Array]) -> str:
    halves = all(array.dtype == np.float16 for array in arrays.values())
    return "float16" if halves else "float32"


def _checked(array: Array, start: int, dtype: str, spec: Path) -> Array:
    """One chunk of the array, read into memory; a bad row is named by its number in the file."""
    chunk = np.array(array[start : start + CHUNK_ROWS])
    bad = first_unusable(chunk, dtype)
    if bad is not None:
        row, reason = bad
        raise DataError(
            f"{spec}, row {start + row}: {reason}; leave the row out or encode it again"
        )
    return chunk
