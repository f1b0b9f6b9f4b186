"""``csalign index``: build an index of one side of a feature set."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from rich.filesize import decimal

from csalign.adapters.checkpoint import DESCRIPTION as ADAPTER_DESCRIPTION
from csalign.adapters.checkpoint import WEIGHTS
from csalign.adapters.kinds import is_baseline
from csalign.adapters.model import Adapter
from csalign.core import atomic, outputs
from csalign.core.arrays import Floats, Ints
from csalign.core.devices import available_bytes
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.progress import Progress, silent, tick
from csalign.core.results import Result
from csalign.features import schema
from csalign.features.join import Joined, item_columns, join_ids
from csalign.features.reader import FeatureSet
from csalign.indexing.config import IndexConfig, ItemOptions, VectorOptions
from csalign.indexing.manifest import (
    ADAPTER,
    ENTRIES,
    VECTORS,
    IndexManifest,
    Recall,
    describe_index,
    items_table,
    write_index_manifest,
    write_items,
)
from csalign.indexing.vectors import HubCorrection, VectorIndex, choose_factory, exact_neighbours
from csalign.runs.load import index_again, load_adapter_for, stream_aligned

RECALL_AT = 10
QUERIES = 1_000  # that recall is measured on, at most
REFERENCES = 50_000  # rows of the other side that hubs are estimated from, at most
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchIndex:
    """An index that is ready to be searched; `items` has a row per vector."""

    manifest: IndexManifest
    vectors: VectorIndex
    items: pa.Table
    correction: HubCorrection
    adapter: Adapter | None


def index(config: IndexConfig, progress: Progress = silent) -> Result:
    """Build an index on disk, and describe it as plain JSON values.

    Raises:
        ConfigError: options do not go together, or the build needs too much memory.
        DataError: no such feature set or run; no rows, or too few for the index; a row without a
            direction; widths that do not fit; or an input is damaged.
        OutputError: ``config.out`` exists and is not to be replaced.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.index((images, texts), "index")["rows"]
    60
    """
    inputs = tuple(path for path in (config.features, config.adapter) if path is not None)
    outputs.check_output(config.out, ENTRIES, overwrite=config.overwrite, inputs=inputs)
    features = FeatureSet.open(config.features)
    features.verify()
    built = build_index(features, config, config, batch_size=config.batch_size)
    specs = [own.spec for own in built.manifest.encoders.values() if own is not None]
    if aligned := [spec for spec in specs if schema.ALIGNED in spec]:
        again = index_again(aligned[0])
        log.warning("%s: is aligned; query with --embedding, or %s", features.path, again)
    tick("writing the index")
    with outputs.atomic_folder(config.out) as folder:
        atomic.write_text(folder / "config.toml", config.to_toml())
        built.vectors.save(folder / VECTORS)
        built.correction.save(folder)
        write_items(folder, built.items)
        if built.adapter is not None and is_baseline(config.adapter):
            built.adapter.save(folder / ADAPTER)
        elif config.adapter is not None:
            (folder / ADAPTER).mkdir()
            for name in (ADAPTER_DESCRIPTION, WEIGHTS):
                shutil.copy(config.adapter / name, folder / ADAPTER / name)
        manifest = write_index_manifest(folder, built.manifest)
    return Result(describe_index(config.out, manifest))


def build_index(
    features: FeatureSet, items: ItemOptions, options: VectorOptions, *, batch_size: int = 8_192
) -> SearchIndex:
    """Build an index in memory; embeddings are streamed by row group. Raises as `index` does."""
    side = Modality(items.side)
    adapter, info = None, None
    if items.adapter is not None:
        adapter, info = load_adapter_for(features, items.adapter, items)
    _ = features.table(side).encoder  # raises if the side is missing
    rows = _Rows(features, join_ids(features, items.split), side, adapter, batch_size)
    count = len(rows.numbers(side))
    if not count:
        raise DataError(f"{rows.joined.name}: has no {side.plural}; name another --split")
    correction = _correction(rows, options)
    factory = choose_factory(count) if options.factory == "auto" else options.factory
    width = correction.items(rows.sample(side, 1)).shape[1]
    vectors = VectorIndex.create(factory, width)
    _check_memory(vectors, count, options)
    if sampled := vectors.training_rows(count):
        tick("training the index")
        vectors.train(correction.items(rows.sample(side, sampled)))
    for part in rows.stream(side):
        vectors.add(correction.items(part))
        tick("indexing: rows", len(vectors), count)
    tick("measuring recall")
    recall = None if vectors.is_exact else _measure(vectors, rows, correction, options)
    manifest = IndexManifest(
        side=side,
        names=features.manifest.names,
        factory=factory,
        rows=count,
        width=width,
        effort=vectors.effort,
        recall=recall,
        correct=options.correct,
        encoders={each: features.table(each).info for each in Modality},
        adapter_sha256=None if info is None else info.weights_sha256,
        features=str(features.path),
        source_root=features.manifest.source_root,
        fingerprint=features.manifest.fingerprint(),
        split=items.split,
        files={},
    )
    table = items_table(item_columns(features, rows.joined, side))
    return SearchIndex(manifest, vectors, table, correction, adapter)


@dataclass(frozen=True)
class _Rows:
    """Rows to index, and those of the other side, in the shared space."""

    features: FeatureSet
    joined: Joined
    side: Modality
    adapter: Adapter | None
    batch_size: int

    @property
    def has_other(self) -> bool:
        """True if the other side has rows in the same space."""
        own, other = self.features.table(self.side), self.features.table(self.side.other)
        if other.info is None or not len(self.numbers(self.side.other)):
            return False
        return self.adapter is not None or other.width == own.width

    def numbers(self, side: Modality) -> Ints:
        """Return row numbers in the table of a side."""
        is_image = side is Modality.IMAGE
        rows = self.joined.image_rows if is_image else self.joined.text_rows
        count = self.joined.n_images if is_image else self.joined.n_texts
        return np.arange(count) if rows is None else rows

    def stream(self, side: Modality, step: int = 1) -> Iterator[Floats]:
        """Stream every step-th unit row of a side."""
        numbers = self.numbers(side)[::step]
        parts = stream_aligned(self.features, side, self.adapter, numbers, self.batch_size)
        return (part.embeddings for part in parts)

    def sample(self, side: Modality, most: int) -> Floats:
        """Take at most so many rows of a side, evenly spaced."""
        return np.concatenate(list(self.stream(side, -(-len(self.numbers(side)) // most))))


def _check_memory(vectors: VectorIndex, rows: int, options: VectorOptions) -> None:
    limit = available_bytes() // 2 if options.memory is None else options.memory << 20
    needed = vectors.build_bytes(rows)
    needs = f"{rows:,} x {vectors.width} need about {decimal(needed)} of memory"
    log.info("%s: %s to build", vectors.factory, needs)
    if needed > limit:
        raise ConfigError(
            f"{vectors.factory}: {needs}, but {decimal(limit)} may be used; allow more with "
            "--memory, or compress the vectors with a --factory such as IVF4096,SQ8"
        )


def _correction(rows: _Rows, options: VectorOptions) -> HubCorrection:
    name = options.correct
    if name is None:
        return HubCorrection(None)
    if not rows.has_other:
        raise DataError(
            f"{rows.joined.name}: hubs are estimated from the {rows.side.other.plural}, but there "
            "are none in the same space; omit --correct"
        )
    if name == "centre":
        means = []
        for side in (rows.side, rows.side.other):
            total = sum(part.sum(axis=0, dtype=np.float64) for part in rows.stream(side))
            means.append(total / len(rows.numbers(side)))
        return HubCorrection(name, means=np.stack(means))
    return HubCorrection(name, references=rows.sample(rows.side.other, REFERENCES))


def _measure(
    vectors: VectorIndex, rows: _Rows, correction: HubCorrection, options: VectorOptions
) -> Recall:
    """Set the search effort, and measure the recall with queries of the other side, if any."""
    side = rows.side.other if rows.has_other else rows.side
    queries = correction.queries(rows.sample(side, QUERIES), of_items_side=side is rows.side)
    parts = (correction.items(part) for part in rows.stream(rows.side))
    nearest = exact_neighbours(queries, parts, min(RECALL_AT, len(vectors)))
    if options.effort is None:
        value = vectors.tune(queries, *nearest, target=options.recall)
    else:
        vectors.set_effort(options.effort)
        value = vectors.recall(queries, *nearest)
    if value < options.recall:
        log.warning(
            "recall@%d is %.4f, below the target of %g; raise --effort, or use another --factory",
            *(RECALL_AT, value, options.recall),
        )
    return Recall(value=value, queries=len(queries), of=side.plural, target=options.recall)
