"""``csalign index``: build an index of one side of a feature set."""

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.filesize import decimal

from csalign.adapters.checkpoint import DESCRIPTION as ADAPTER_DESCRIPTION
from csalign.adapters.checkpoint import WEIGHTS, read_info
from csalign.adapters.kinds import is_baseline
from csalign.adapters.model import Adapter
from csalign.core import atomic, outputs
from csalign.core.arrays import Floats, Ints
from csalign.core.devices import available_bytes
from csalign.core.enums import AnySide, Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.core.progress import Progress, silent, tick
from csalign.core.results import Result
from csalign.features import schema
from csalign.features.join import ALL, Joined, item_columns, join_ids, select_rows, split_names
from csalign.features.reader import FeatureSet
from csalign.features.sides import item_column
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
from csalign.runs.load import (
    index_again,
    load_adapter_for,
    named_sides,
    stream_aligned,
)

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
    sides = named_sides(features, items.side.split(","))
    adapter, info = None, None
    if items.adapter is not None:
        known = Modality if is_baseline(items.adapter) else read_info(items.adapter).adapters
        used = [side for side in features.sides if side in sides or side in [*known]]
        adapter, info = load_adapter_for(features, items.adapter, items, sides=used)
    joined = join_ids(features, items.split)
    rows = _Rows(features, joined, items.split, sides, adapter, batch_size)
    count = rows.count(sides)
    if not count:
        listed = " or ".join(side.plural for side in sides)
        raise DataError(f"{joined.name}: has no {listed}; name another --split")
    if len({rows.width(side) for side in sides}) > 1:
        listed = ", ".join(f"{side} {rows.width(side)}" for side in sides)
        raise ShapeError(f"{features.path}: sides of several widths ({listed}); pass --adapter RUN")
    correction = _correction(rows, options)
    factory = choose_factory(count) if options.factory == "auto" else options.factory
    width = correction.items(rows.sample(sides, 1)).shape[1]
    vectors = VectorIndex.create(factory, width)
    _check_memory(vectors, count, options)
    if sampled := vectors.training_rows(count):
        tick("training the index")
        vectors.train(correction.items(rows.sample(sides, sampled)))
    for part in rows.stream(sides):
        vectors.add(correction.items(part))
        tick("indexing: rows", len(vectors), count)
    tick("measuring recall")
    recall = None if vectors.is_exact else _measure(vectors, rows, correction, options)
    manifest = IndexManifest(
        side=",".join(sides),
        names=features.manifest.names,
        factory=factory,
        rows=count,
        width=width,
        effort=vectors.effort,
        recall=recall,
        correct=options.correct,
        encoders={
            each: features.table(each).info
            for each in (features.sides if features.is_sided else Modality)
        },
        adapter_sha256=None if info is None else info.weights_sha256,
        features=str(features.path),
        source_root=features.manifest.source_root,
        fingerprint=features.manifest.fingerprint(),
        split=items.split,
        files={},
    )
    table = pa.concat_tables([items_table(rows.columns(side)) for side in sides])
    return SearchIndex(manifest, vectors, table, correction, adapter)


@dataclass(frozen=True)
class _Rows:
    """Rows to index, and those of the other sides, in the shared space."""

    features: FeatureSet
    joined: Joined
    split: str
    sides: tuple[AnySide, ...]  # that are indexed
    adapter: Adapter | None
    batch_size: int

    @cached_property
    def others(self) -> tuple[AnySide, ...]:
        """The sides that are not indexed and have rows in the same space."""
        width = self.width(self.sides[0])
        there = [side for side in self.features.sides if side not in self.sides]
        if self.adapter is not None:
            there = [side for side in there if side in self.adapter.names]
        return tuple(own for own in there if self.count([own]) and self.width(own) == width)

    def width(self, side: AnySide) -> int:
        """Return the width of the rows of a side."""
        if self.adapter is not None:
            return self.adapter.side(side).shape.width
        return self.features.table(side).width

    @cached_property
    def numbers(self) -> dict[AnySide, Ints]:
        """Row numbers in the table of each side."""
        names = None if self.split == ALL else sorted(map(str, split_names(self.split, ())))
        found = {}
        for side in self.features.sides:
            table = self.features.table(side)
            if isinstance(side, Modality):
                rows = self.joined.side(side)[0]
            else:
                rows = select_rows(table, names)
            found[side] = np.arange(len(table)) if rows is None else rows
        return found

    def count(self, sides: Iterable[AnySide]) -> int:
        """Count the rows of some sides."""
        return sum(len(self.numbers[side]) for side in sides)

    def stream(self, sides: Iterable[AnySide], step: int = 1) -> Iterator[Floats]:
        """Stream every step-th unit row of each of some sides."""
        for side in sides:
            numbers = self.numbers[side][::step]
            parts = stream_aligned(self.features, side, self.adapter, numbers, self.batch_size)
            yield from (part.embeddings for part in parts)

    def sample(self, sides: Sequence[AnySide], most: int) -> Floats:
        """Take about so many rows of some sides, evenly spaced; of one side at most so many."""
        return np.concatenate(list(self.stream(sides, -(-self.count(sides) // most))))

    def columns(self, side: AnySide) -> dict[str, pa.Array]:
        """Read what is shown of each row of a side; see `item_columns`.

        Of features with further sides also the side and the item, and as a caption or source that
        is unknown that of the first text or image of the item.
        """
        features = self.features
        if not features.is_sided:
            return item_columns(features, self.joined, Modality.of(side))
        rows, table = self.numbers[side], features.table(side)
        stored = schema.string_columns(side)
        found = {
            name: table.strings(name, rows)
            if name in stored
            else pa.nulls(len(rows), pa.large_string())
            for name in (schema.ID, schema.IMAGE_ID, schema.CAPTION, schema.SOURCE)
        }
        items = item_column(features, side, rows)
        for name, home in ((schema.CAPTION, Modality.TEXT), (schema.SOURCE, Modality.IMAGE)):
            if home in self.numbers and home != side:
                keys = item_column(features, home, self.numbers[home])
                places = pc.index_in(items, value_set=keys, skip_nulls=True)
                others = features.table(home).strings(name, self.numbers[home])
                found[name] = pc.coalesce(found[name], others.take(places))
        return {**found, "side": pa.repeat(str(side), len(rows)), "item": items}


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
    others = rows.others
    if not others:
        missing = " and ".join(each.plural for each in Modality if each not in rows.sides)
        raise DataError(
            f"{rows.joined.name}: hubs are estimated from the {missing or 'other sides'}, but "
            "there are none in the same space; omit --correct"
        )
    if name == "centre":
        if len(rows.sides) + len(others) > len(Modality):
            raise ConfigError(
                f"--correct centre: has a mean for the items and one for the queries, but "
                f"{rows.features.path} has sides {', '.join((*rows.sides, *others))}; use csls"
            )
        means = []
        for sides in (rows.sides, others):
            total = sum(part.sum(axis=0, dtype=np.float64) for part in rows.stream(sides))
            means.append(total / rows.count(sides))
        return HubCorrection(name, means=np.stack(means))
    return HubCorrection(name, references=rows.sample(others, REFERENCES))


def _measure(
    vectors: VectorIndex, rows: _Rows, correction: HubCorrection, options: VectorOptions
) -> Recall:
    """Set the search effort, and measure the recall with queries of the other side, if any."""
    sides = rows.others or rows.sides
    queries = correction.queries(rows.sample(sides, QUERIES), of_items_side=not rows.others)
    parts = (correction.items(part) for part in rows.stream(rows.sides))
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
    of = ", ".join(side.plural for side in sides)
    return Recall(value=value, queries=len(queries), of=of, target=options.recall)
