"""``csalign apply``: write the aligned embeddings of a feature set, as features or other forms."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.core import atomic, distributed, outputs
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import ConfigError
from csalign.core.progress import Progress, silent, tick
from csalign.core.results import FeaturesResult
from csalign.features import schema
from csalign.features.export import (
    ClipRetrievalExport,
    NpyExport,
    RowWriter,
    export_entries,
)
from csalign.features.reader import FeatureSet
from csalign.features.schema import ALIGNED, EncoderInfo
from csalign.features.sides import describe_sides
from csalign.features.writer import FeatureWriter, Rows
from csalign.runs.config import ApplyConfig
from csalign.runs.load import check_features, load_adapter_for, named_sides, stream_aligned

logger = logging.getLogger(__name__)


def apply(config: ApplyConfig, progress: Progress = silent) -> FeaturesResult:
    """Map every row, paired or not, into the shared space, one row group at a time.

    Ids, captions, pairs and splits are kept; embeddings and tokens become unit rows. The format
    "clip-retrieval" stores only pairs, and a warning counts the rows without a partner. Under
    torchrun the processes embed row groups in turn, and the main process writes them, to the same
    bytes.

    Raises:
        ConfigError: the format or the adapter does not support tokens or these sides.
        DataError: no such feature set or run; or there are no pairs and the format needs them.
        ShapeError: the widths of the features differ from those of training.
        OutputError: ``config.out`` exists and is not to be replaced.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> run = csalign.train((images, texts), "run", steps=2, hidden=8).run
    >>> csalign.apply((images, texts), run, "aligned")["pairs"]
    60
    """
    with distributed.process_group():
        if distributed.is_main_process():
            inputs = (config.features, config.adapter)
            there = schema.read_manifest(config.features).side_names
            entries = schema.ENTRIES | export_entries((*Modality, *there))
            outputs.check_output(config.out, entries, overwrite=config.overwrite, inputs=inputs)
        features = FeatureSet.open(config.features)
        sides = features.sides if config.sides is None else named_sides(features, config.sides)
        further = [side for side in sides if side not in [*Modality]]
        if further and config.format == "clip-retrieval":
            raise ConfigError(
                f"--format clip-retrieval: stores images and texts, not {', '.join(further)}; pass "
                "--sides image,text or --format npy"
            )
        adapter, info = load_adapter_for(features, config.adapter, config, sides=sides)
        token_sides = _token_sides(config, features, adapter)
        rows = _aligned(config, features, adapter, token_sides, sides)
        if not distributed.is_main_process():
            for _ in rows:
                pass  # the main process writes them
            received: dict[str, Any] = distributed.broadcast(dict)
            return FeaturesResult(**{**received, "features": config.out})
        result = _write(config, features, info, token_sides, rows, sides)
        distributed.broadcast(result.to_dict)
        return result


def _write(
    config: ApplyConfig,
    features: FeatureSet,
    info: AdapterInfo,
    token_sides: Sequence[AnySide],
    aligned: Iterator[tuple[AnySide, Rows]],
    sides: Sequence[AnySide],
) -> FeaturesResult:
    for side in sides:
        features.table(side).verify()
    rows_of = {side: len(features.table(side)) for side in sides}
    done, omitted = 0, dict[AnySide, int]()
    with outputs.atomic_folder(config.out) as folder:
        atomic.write_text(folder / "config.toml", config.to_toml())
        with _writer(folder, config, features, info, token_sides, sides) as writer:
            for side, rows in aligned:
                writer.write(side, rows)
                done += len(rows.embeddings)
                tick("aligning: rows", done, sum(rows_of.values()))
    if isinstance(writer, ClipRetrievalExport):
        omitted = writer.omitted
    if any(omitted.values()):
        listed = " and ".join(f"{count} {side.plural}" for side, count in omitted.items())
        message = "%s have no partner, which clip-retrieval cannot store; --format npy keeps them"
        logger.warning(message, listed)
    images, texts = (rows_of.get(side, 0) - omitted.get(side, 0) for side in Modality)
    pairs = features.manifest.counts.pairs if {*Modality} <= {*sides} else 0
    counted, names = (config.out, images, texts, pairs, 0), features.manifest.names
    if {*sides} <= {*Modality}:
        return FeaturesResult(*counted, names=names)
    described, counts = describe_sides(features, sides)
    for name, own in described.items():
        own["width"] = info.adapters[side_of(name)].width
    return FeaturesResult(*counted, names=names, sides=described, counts=counts)


def _aligned(
    config: ApplyConfig,
    features: FeatureSet,
    adapter: Adapter,
    token_sides: Sequence[AnySide],
    sides: Sequence[AnySide],
) -> Iterator[tuple[AnySide, Rows]]:
    """Align all rows in order; of several processes the main one gets them all.

    Each process embeds every n-th row group as a single process would, so all bits are the same.
    """
    world = distributed.world()
    by_item = Modality.IMAGE in {*features.sides} - {*sides}
    for side in sides:
        ends = list(accumulate(g.rows for g in features.table(side).row_groups()))
        for first in range(0, len(ends), world.size):
            group = first + world.rank
            own: Iterator[Rows] = iter(())
            if group < len(ends):
                rows = np.arange(ends[group - 1] if group else 0, ends[group])
                own = stream_aligned(
                    *(features, side, adapter, rows, config.batch_size),
                    strings=schema.string_columns(side, items=features.manifest.items),
                    keep_tokens=side in token_sides,
                )
            parts = [own] if world.size == 1 else distributed.gather(list(own))
            for batch in (batch for part in parts for batch in part):
                yield side, _by_item(batch) if by_item and side is Modality.TEXT else batch


def _by_item(texts: Rows) -> Rows:
    """Keep the images of texts as their items, since texts may name no image that is missing."""
    columns = dict(texts.columns)
    image_ids = columns.pop(schema.IMAGE_ID)
    return replace(texts, columns={schema.ITEM: image_ids, **columns})


def _writer(
    folder: Path,
    config: ApplyConfig,
    features: FeatureSet,
    info: AdapterInfo,
    token_sides: Sequence[AnySide],
    sides: Sequence[AnySide],
) -> RowWriter:
    widths = {side: info.adapters[side].width for side in sides}
    items = features.manifest.items or Modality.IMAGE in {*features.sides} - {*sides}
    if config.format == "parquet":
        encoders = {
            side: EncoderInfo(
                spec=f"{features.table(side).encoder.spec}{ALIGNED}{config.adapter.name}",
                width=width,
                token_width=width if side in token_sides else None,
                token_space="projected" if side in token_sides else None,
                preprocessing={
                    "adapter_sha256": info.weights_sha256,
                    "adapter_trained_on": info.data_fingerprint,
                    "normalized": True,
                },
            )
            for side, width in widths.items()
        }
        names, root = features.manifest.names, features.manifest.source_root
        return FeatureWriter(folder, encoders, config.dtype, names, source_root=root, items=items)
    shapes = {side: (len(features.table(side)), width) for side, width in widths.items()}
    note = {
        "adapter": str(config.adapter),
        "adapter_sha256": info.weights_sha256,
        "encoders": {side: features.table(side).encoder.spec for side in sides},
        "features": str(config.features),
        "features_fingerprint": features.manifest.fingerprint(),
        "normalized": True,
    }
    if config.format == "npy":
        return NpyExport(folder, shapes, config.dtype, note, items=items)
    return ClipRetrievalExport(folder, shapes, config.dtype, note, features.manifest.counts.pairs)


def _token_sides(config: ApplyConfig, features: FeatureSet, adapter: Adapter) -> list[AnySide]:
    """Find the sides whose tokens are to be aligned."""
    if not config.tokens:
        return []
    if config.format != "parquet":
        raise ConfigError(f"--tokens: {config.format} stores no tokens; use --format parquet")
    trained = [side for side in adapter.names if adapter.side(side).shape.token_width is not None]
    if not trained:
        raise ConfigError(
            f"--tokens: {config.adapter} was trained without tokens; train it with --token-weight"
        )
    found = [side for side in trained if side in features.sides and features.table(side).has_tokens]
    check_features(features, config.adapter, adapter, found or trained, sides=found or trained)
    return found
