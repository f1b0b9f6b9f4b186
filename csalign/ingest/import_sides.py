"""``csalign import --side``: embeddings of any number of sides, into a feature set."""

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core import atomic, outputs
from csalign.core.arrays import Array
from csalign.core.enums import Modality, side_of
from csalign.core.errors import ConfigError, DataError
from csalign.core.paths import is_remote
from csalign.core.progress import Progress, silent
from csalign.core.results import FeaturesResult
from csalign.features import schema
from csalign.features.checks import warn_of_rows
from csalign.features.export import recorded_encoder
from csalign.features.reader import FeatureSet
from csalign.features.schema import EncoderInfo, SplitSettings
from csalign.features.sides import describe_sides, item_column
from csalign.features.splits import TRAIN, divide, usual_splits, write_splits
from csalign.features.writer import FeatureWriter, Rows
from csalign.ingest.config import ImportConfig
from csalign.ingest.split import split_settings
from csalign.sources.arrays.base import Vectors
from csalign.sources.arrays.opening import labels_beside, read_side, split_spec
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.image_rows import fill_splits
from csalign.sources.items import Items, SideKeys, describe_side, join_items
from csalign.sources.labels import Labels
from csalign.sources.records.tables import CAPTION_NAMES, IMAGE_NAMES

logger = logging.getLogger(__name__)

_FAINT = 1e-4  # a largest value below this is rounded by a thousandth or more in float16


def import_sides(config: ImportConfig, progress: Progress = silent) -> FeaturesResult:
    """Write the embeddings of named sides as a feature set, or add them to one.

    The files of a set that sides are added to are linked, not written again; what is at
    ``config.out`` stays as it is until the new one is complete.

    Raises:
        ConfigError: options conflict, or the set has such a side already.
        DataError: a file is missing or damaged, a row is not finite or has norm 0, or items do not
            fit; see `join_items`.
        OutputError: ``config.out`` exists and is not to be replaced.
    """
    splits, specs = split_settings(config), config.side or {}
    old = _opened(config) if config.add else None
    inputs = [split_spec(spec)[0] for spec in specs.values()]
    inputs += [] if config.pairs is None else [config.pairs]
    may_replace = config.overwrite or config.add
    outputs.check_output(config.out, schema.ENTRIES, overwrite=may_replace, inputs=tuple(inputs))
    vectors = _open(specs, config.pairs)
    table = None if config.pairs is None else read_label_table(config.pairs)
    kept = [] if old is None else [_stored(old, side) for side in old.sides if side not in specs]
    new = [describe_side(name, own.labels) for name, own in vectors.items()]
    items = join_items([*kept, *new], table, config.pair_by)
    filled = _fill_splits([*kept, *new], items)
    stored = filled
    if old is not None and old.manifest.splits is not None:  # which stand for those in the rows
        plain = FeatureSet.open(config.out, stored_splits=True)
        stored = _fill_splits([*(_with_splits(side, plain) for side in kept), *new], items)
    columns = {side.name: _columns(side, items, stored[side.name]) for side in new}
    if {"image", "text"} <= columns.keys():
        image, text = columns["image"], columns["text"]
        places = pc.index_in(text[schema.ITEM], value_set=image[schema.ITEM], skip_nulls=True)
        text[schema.IMAGE_ID] = image[schema.ID].take(places)
    given = dict.fromkeys(vectors, schema.UNKNOWN) | (config.encoder or {})
    encoders = {name: encoder_of(given[name], own) for name, own in vectors.items()}
    dtype = config.dtype or dtype_of(vectors.values())
    if old is not None and dtype != (dtype := old.manifest.dtype):
        logger.info("stored as %s, as the other sides of %s", dtype, config.out)
    with outputs.atomic_folder(config.out) as folder:
        atomic.write_text(folder / "config.toml", config.to_toml())
        with FeatureWriter(folder, encoders, dtype, pairing=items.how, items=True) as writer:
            write_vectors(vectors, columns, writer, dtype, progress)
        if old is not None:
            if schema.read_manifest(config.out) != old.manifest:
                raise DataError(f"{config.out}: was changed meanwhile; run the same command again")
            _link(old, folder, {side.name: side for side in new}, filled)
        divide_unfinished(folder, splits, config.out)
    features = FeatureSet.open(config.out)
    warn_of_rows(features)
    described, counted = describe_sides(features, items=items.keys)
    for name, own in described.items():
        if own["unpaired"] == own["rows"]:
            logger.warning(
                "%s: no row of %s shares an item with another side, by %s; check the keys, or give "
                "the items with --pairs",
                *(config.out, name, items.how),
            )
    counts = features.manifest.counts
    shared = counted["pairs"].get("image", {}).get("text", 0)
    if not features.is_sided and counts.pairs < shared:
        logger.warning(
            "%s: texts of items with several images are paired with the first of these, %d of %d "
            "pairs; to keep all, make each image an item, with a row of its text",
            *(config.out, counts.pairs, shared),
        )
    return FeaturesResult(
        *(config.out, counts.images, counts.texts, counts.pairs, 0),
        pairing=features.manifest.pairing,
        sides=described,
        counts=counted,
    )


def _opened(config: ImportConfig) -> FeatureSet:
    """Open the set to add to, and refuse what cannot be added."""
    old, names = FeatureSet.open(config.out), [*(config.side or ())]
    if is_remote(config.out):
        raise ConfigError(f"{config.out}: --add needs a local set; copy it, add, and upload it")
    if both := [name for name in names if name in (*Modality,)]:
        raise ConfigError(
            f"--add: {both[0]} cannot be added, since texts refer to images; import all sides "
            f"again: --side {both[0]}=FILE, and --side NAME={config.out}/sides/NAME for the others"
        )
    if not config.overwrite and (there := [name for name in names if name in old.sides]):
        raise ConfigError(
            f"{config.out}: has a side {there[0]} already; replace it with --overwrite, or choose "
            "another name"
        )
    if config.dtype not in (None, old.manifest.dtype):
        raise ConfigError(
            f"--dtype {config.dtype}: all sides of {config.out} are {old.manifest.dtype}; omit it, "
            "or import all sides again"
        )
    return old


def _open(specs: Mapping[str, Path], pairs: Path | None) -> dict[str, Vectors]:
    """Open each side, with the labels beside it; warn of vectors that are not used."""
    found = {name: with_splits(read_side(spec, name)) for name, spec in specs.items()}
    for name, own in found.items():
        if own.captions_each is not None:
            raise DataError(
                f"{own.name}: is 3-D; save the rows of {name} as (rows, width), with a column item"
            )
    beside = labels_beside(found, of_all=False, given=[] if pairs is None else [pairs])
    found = {name: replace(own, labels=beside.get(name, own.labels)) for name, own in found.items()}
    used = {part.name for own in found.values() for part in own.parts}
    for unused in sorted({name for own in found.values() for name in own.unused} - used):
        logger.warning("%s is not imported; give it a --side, or ignore this", unused)
    gaps = [own for own in found.values() if own.gap and not own.labels]
    if gaps and pairs is None and len({own.gap for own in found.values()}) > 1:
        raise DataError(f"{gaps[0].name}: {gaps[0].gap} Add it, or give the items with --pairs")
    return found


def _stored(features: FeatureSet, name: str) -> SideKeys:
    """Describe a side that is on disk."""
    folder, side = features.path / schema.folder_of(side_of(name)), side_of(name)
    ids = features.table(name).strings(schema.ID)
    labels = Labels(str(folder), len(ids), f"{folder}, row {{}}".format)
    keys = SideKeys(name, labels, ids, schema.ID, item_column(features, side))
    return _with_splits(keys, features)


def _with_splits(side: SideKeys, features: FeatureSet) -> SideKeys:
    splits = features.table(side.name).strings(schema.SPLIT)
    return replace(side, labels=side.labels.with_columns({schema.SPLIT: splits}))


def _fill_splits(sides: Sequence[SideKeys], items: Items) -> dict[str, pa.Array]:
    """Return the splits of all rows: those of their items, which any row or line may state.

    Raises:
        DataError: two rows or lines of one item are in different splits.
    """
    stated = [(side.name, side.labels, items.keys[side.name]) for side in sides]
    stated += [] if items.lines is None else [("", *items.lines)]
    keys = pa.chunked_array([own for _, _, own in stated]).combine_chunks().dictionary_encode()
    none = pa.nulls(max(labels.rows for _, labels, _ in stated), pa.large_string())
    columns = [labels.find((schema.SPLIT,), none[: labels.rows]) for _, labels, _ in stated]
    splits = usual_splits(pa.chunked_array(columns).combine_chunks())
    codes = keys.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    _, filled, bad = fill_splits(pa.nulls(len(keys.dictionary), pa.large_string()), splits, codes)
    found, start = {}, 0
    for name, labels, own in stated:
        if bad is not None and start <= bad < start + len(own):
            raise DataError(
                f"{labels.where(bad - start)}: is in split {splits[bad].as_py()!r}, and another "
                f"row or line of item {keys[bad].as_py()!r:.200} in {filled[bad].as_py()!r}; give "
                "an item one split"
            )
        found[name] = filled.slice(start, len(own))
        start += len(own)
    return found


def _columns(side: SideKeys, items: Items, splits: pa.Array) -> dict[str, pa.Array]:
    """Return the string columns of a new side."""
    none = pa.nulls(len(side), pa.large_string())
    captions = side.labels.find(CAPTION_NAMES, none)
    return {
        schema.ID: side.ids,
        schema.ITEM: items.keys[side.name],
        schema.SPLIT: splits,
        schema.CAPTION: pc.coalesce(items.captions.get(side.name, none), captions),
        schema.SOURCE: side.labels.find((schema.SOURCE, *IMAGE_NAMES), none),
    }


def _link(
    old: FeatureSet, folder: Path, new: Mapping[str, SideKeys], filled: Mapping[str, pa.Array]
) -> None:
    """Complete a folder of new sides with the files of a set, and write the manifest of all."""
    written, manifest = schema.read_manifest(folder), old.manifest
    replaced = {schema.folder_of(side_of(name)) for name in new}
    replaced |= {f"{schema.SPLITS}/{name}.parquet" for name in new}
    for path in sorted(old.path.rglob("*")):
        name = path.relative_to(old.path)
        is_kept = not replaced & {name.as_posix(), name.parent.as_posix()}
        if path.is_file() and is_kept and path.name != schema.MANIFEST:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:  # of a file system without links
                shutil.copy2(path, target)
    hows = [
        own for own in (manifest.pairing or "").split("; ") if own.partition(": ")[0] not in new
    ]
    how = "; ".join(filter(None, [*hows, *(f"{name}: {written.pairing}" for name in new)]))
    changes: dict[str, Any] = {"sides": {**manifest.sides, **written.sides}, "pairing": how}
    if (made := manifest.splits) is not None:  # which stand for the stored columns of all sides
        files = {
            name: write_splits(folder, side_of(name), side.ids, pc.fill_null(filled[name], TRAIN))
            for name, side in new.items()
        }
        changes["splits"] = made.model_copy(update={"sides": {**made.sides, **files}})
    schema.write_manifest(folder, manifest.model_copy(update=changes))


def dtype_of(vectors: Iterable[Vectors]) -> str:
    """Return the number format that keeps all digits of float16, else float32."""
    return "float16" if all(own.is_half for own in vectors) else "float32"


def encoder_of(spec: str, vectors: Vectors) -> EncoderInfo:
    """Return the encoder that csalign recorded if it wrote the files, else as named."""
    own = EncoderInfo(spec=spec, width=vectors.width)
    found = recorded_encoder(split_spec(Path(vectors.parts[0].name))[0])
    if found is None or found.width != own.width:
        return own
    logger.info("%s: written by csalign, with the encoder %s", vectors.name, found.spec)
    return found.model_copy(update={"token_width": None, "token_space": None})


def with_splits(vectors: Vectors) -> Vectors:
    """Replace the stored splits of a side of a feature set by those that were made of it since."""
    path = Path(vectors.name)
    for folder in list(path.parents)[:2]:
        if not is_remote(path) and (folder / schema.MANIFEST).is_file():
            with suppress(DataError):  # another program's file of that name
                features = FeatureSet.open(folder)
                own = [s for s in features.sides if folder / schema.folder_of(s) == path]
                if own and features.manifest.splits is not None:
                    table, labels = features.table(own[0]), vectors.labels
                    if labels.column(schema.ID).equals(table.strings(schema.ID)):
                        made = {schema.SPLIT: table.strings(schema.SPLIT)}
                        return replace(vectors, labels=labels.with_columns(made))
    return vectors


def divide_unfinished(folder: Path, settings: SplitSettings | None, out: Path) -> None:
    """Make the splits of a set before it gets its name, if any; raises DataError as `divide`."""
    if settings is None:
        return
    try:
        made = divide(folder, settings)
    except DataError as error:  # which names the unfinished folder
        raise DataError(str(error).replace(str(folder), str(out))) from None
    if made.groups:
        logger.info("%s", made.kept_together)


def write_vectors(
    sides: Mapping[Any, Vectors],
    columns: Mapping[Any, Mapping[str, pa.Array]],
    writer: FeatureWriter,
    dtype: str,
    progress: Progress,
) -> None:
    """Write the rows of all sides with their columns."""
    total, done, faint = sum(map(len, sides.values())), 0, 0
    for side, vectors in sides.items():
        start = 0
        for chunk, where in vectors.chunks():
            stop = start + len(chunk)
            part = {
                name: values[start:stop].cast(pa.string()) for name, values in columns[side].items()
            }
            writer.write(side, Rows(part, chunk, where=where))
            if dtype == "float16":
                faint += _count_faint(chunk)
            done, start = done + len(chunk), stop
            progress("writing: rows", done, total)
    if faint:
        logger.warning(
            "%d embeddings are so small that float16 keeps few of their digits; scale them to "
            "norms about 1, or import the originals with --dtype float32",
            faint,
        )


def _count_faint(rows: Array) -> int:
    """Count rows whose largest value is below `_FAINT`."""
    few = np.abs(rows[:, :4]).max(axis=1) < _FAINT  # most rows are clear from a few values
    return int((np.abs(rows[few]).max(axis=1) < _FAINT).sum()) if few.any() else 0
