"""``csalign index``: an index on disk of one side of a feature set, for ``csalign search``."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import DESCRIPTION as ADAPTER_DESCRIPTION
from csalign.adapters.checkpoint import WEIGHTS, AdapterInfo
from csalign.adapters.model import Adapter
from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.core.memory import available_bytes
from csalign.core.progress import Progress, silent
from csalign.features import schema
from csalign.features.join import Joined, join_ids, told_of
from csalign.features.manifest import EncoderInfo
from csalign.features.reader import FeatureSet, batch_vectors
from csalign.runs.load import load_adapter_for, stream_aligned
from csalign.search.config import IndexConfig
from csalign.search.corrections import Corrected, mean_of
from csalign.search.items import Items, ItemWriter
from csalign.search.manifest import (
    ADAPTER,
    IndexManifest,
    Recall,
    Taken,
    describe_index,
    list_files,
    read_index_manifest,
    write_index_manifest,
)
from csalign.search.plan import Plan, plan_index, readable
from csalign.search.vectors import Effort, Nearest, VectorIndex, recall, threads

JUDGED_BY = 10  # nearest items by which an index is judged
QUERIES = 1_000  # that judge it, and half of which choose how far a search goes
REFERENCES = 50_000  # rows of the other side by which hubs are known, at most
PROBES = 4  # captions by which an encoder is known
PROBES_FILE = "probes.npy"
ITEMS_A_BATCH = 65_536

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def index(config: IndexConfig, progress: Progress = silent) -> dict[str, Any]:
    """Build an index, or add rows to one; streams them by row group.

    Args:
        config: what to index and how.
        progress: told how far it is.

    Returns:
        What the index holds, as plain JSON values.

    Raises:
        ConfigError: options do not go together, or the index would take too much memory.
        DataError: no such feature set, run or index; no rows; an id is in the index already; a row
            without a direction.
        ShapeError: widths do not fit.
        SchemaError: something that is read is damaged.
        OutputError: ``config.out`` exists and is not to be replaced.
    """
    if (config.out is None) == (config.add_to is None):
        raise ConfigError("give either --out INDEX, to build one, or --add-to INDEX")
    with threads(config.threads):
        if config.add_to is not None:
            return _add(config, config.add_to, progress)
        assert config.out is not None
        return _build(config, config.out, progress)


@dataclass(frozen=True)
class _Rows:
    """The rows to index, and those of the other side."""

    config: IndexConfig
    features: FeatureSet
    joined: Joined
    adapter: Adapter | None
    info: AdapterInfo | None
    side: Modality

    @property
    def other(self) -> Modality:
        return Modality.TEXT if self.side is Modality.IMAGE else Modality.IMAGE

    def chosen(self, side: Modality) -> Ints:
        """Their numbers in the table of a side."""
        is_image = side is Modality.IMAGE
        rows = self.joined.image_rows if is_image else self.joined.text_rows
        count = self.joined.images if is_image else self.joined.texts
        return np.arange(count) if rows is None else rows

    def stream(self, side: Modality, rows: Ints | None = None) -> Iterator[Floats]:
        """Unit rows of a side in the shared space, all that were chosen or some."""
        wanted = self.chosen(side) if rows is None else rows
        size = self.config.batch_size
        parts = stream_aligned(self.features, side, self.adapter, wanted, size)
        return (part.embeddings for part in parts)

    def some(self, side: Modality, most: int) -> Floats:
        """At most so many rows of a side, drawn evenly."""
        rows = self.chosen(side)
        return np.concatenate(list(self.stream(side, rows[:: -(-len(rows) // most) or 1])))

    @property
    def width(self) -> int:
        if self.info is not None:
            return self.info.adapters[self.side].width
        return self.features.table(self.side).width

    @property
    def has_other(self) -> bool:
        """Whether the other side has rows in the same space."""
        table = self.features.table(self.other)
        if table.made_by is None or not len(self.chosen(self.other)):
            return False
        return self.adapter is not None or table.width == self.width


def _rows(config: IndexConfig, side: Modality, run: Path | None, features: FeatureSet) -> _Rows:
    features.verify()
    adapter, info = None, None
    if run is not None:
        adapter, info = load_adapter_for(features, run, config.device, config.allow_adapter)
    _ = features.table(side).encoder  # raises where there is no such side
    rows = _Rows(config, features, join_ids(features, config.split), adapter, info, side)
    if not len(rows.chosen(side)):
        raise DataError(f"{rows.joined.name}: holds no {side.plural}; name another --split")
    return rows


def _build(config: IndexConfig, out: Path, progress: Progress) -> dict[str, Any]:
    inputs = tuple(path for path in (config.features, config.adapter) if path is not None)
    atomic.check_output(out, overwrite=config.overwrite, inputs=inputs)
    side = Modality(config.side)
    rows = _rows(config, side, config.adapter, FeatureSet.open(config.features))
    count = len(rows.chosen(side))
    extra = 0 if config.correct in (None, "centre") else 1
    plan = plan_index(config.kind, count, rows.width + extra, _memory(config))
    _tell(plan, config)
    correction = _correction(rows)
    with atomic.atomic_folder(out) as folder:
        atomic.write_text(folder / "config.toml", config.to_toml())
        built = VectorIndex.empty(plan, folder)
        nearest = _judges(rows, correction)
        if plan.training_rows:
            built.train(_training_rows(rows, correction, plan.training_rows))
        for done in _fill(rows, correction, built, nearest):
            progress("rows", done, count)
        with ItemWriter(folder) as items:
            _write_items(items, rows)
        if config.adapter is not None:
            _copy_adapter(config.adapter, folder / ADAPTER)
        if correction is not None:
            correction.save(folder)
        manifest = IndexManifest(
            side=side,
            names=rows.features.manifest.names,
            kind=plan.kind,
            rows=count,
            width=plan.width,
            effort={},
            recall=None,
            correct=config.correct,
            encoders={each: rows.features.table(each).made_by for each in Modality},
            adapter_sha256=None if rows.info is None else rows.info.weights_sha256,
            taken=[_taken(rows)],
            probes=_write_probes(folder, rows.features),
            files={},
        )
        manifest = _finish(folder, manifest, built, nearest, rows)
    return describe_index(out, manifest)


def _add(config: IndexConfig, out: Path, progress: Progress) -> dict[str, Any]:
    manifest = read_index_manifest(out, whole=True)
    _check_addition(config, out, manifest)
    atomic.check_output(out, overwrite=True, inputs=(config.features,))
    run = None if manifest.adapter_sha256 is None else out / ADAPTER
    rows = _rows(config, manifest.side, run, FeatureSet.open(config.features))
    _check_encoder(rows, out, manifest.encoders[manifest.side])
    old = Items(out, manifest.rows)
    _check_ids(rows, out, old)
    if rows.width != manifest.width:
        raise ShapeError(
            f"{config.features}: {rows.side} embeddings are {rows.width} wide, those of {out} "
            f"{manifest.width}; add features of the same encoder"
        )
    count = len(rows.chosen(rows.side))
    total = manifest.rows + count
    _tell(plan_index(manifest.kind, total, manifest.width, _memory(config)), config)
    built = VectorIndex.open(out, manifest.kind, manifest.search_effort(), mapped=False)
    with atomic.atomic_folder(out) as folder:
        for name in manifest.files:
            if name.startswith(f"{ADAPTER}/") or name in ("config.toml", PROBES_FILE):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(out / name, folder / name)
        nearest = _judges(rows, None)
        for part in built.rows():
            nearest.see(part)
        built.make_room(folder, count)
        for done in _fill(rows, None, built, nearest):
            progress("rows", done, count)
        with ItemWriter(folder) as items:
            items.copy(old)
            _write_items(items, rows)
        update = {"rows": total, "taken": [*manifest.taken, _taken(rows)]}
        manifest = manifest.model_copy(update=update)
        manifest = _finish(folder, manifest, built, nearest, rows)
    return describe_index(out, manifest)


def _check_addition(config: IndexConfig, out: Path, manifest: IndexManifest) -> None:
    if config.adapter is not None:
        raise ConfigError(f"--adapter: {out} has one of its own; leave it out")
    if manifest.correct is not None:
        raise ConfigError(
            f"{out}: corrects for hubs by the rows that it was built from, so none can be added; "
            "build it anew"
        )
    for name, has in (("side", manifest.side.value), ("kind", manifest.kind)):
        asked = getattr(config, name)
        if name in config.model_fields_set and asked not in (has, "auto"):
            raise ConfigError(f"--{name}: {out} has {has}, not {asked}; leave it out")


def _check_encoder(rows: _Rows, out: Path, known: EncoderInfo | None) -> None:
    found = rows.features.table(rows.side).encoder
    if known is None or found == known:
        return
    both = found.fingerprint is not None and known.fingerprint is not None
    if found.fingerprint != known.fingerprint if both else found.spec != known.spec:
        raise DataError(
            f"{rows.features.path}: its {rows.side.plural} are by {found.spec}, those of {out} by "
            f"{known.spec}; add features of the same encoder"
        )


def _check_ids(rows: _Rows, out: Path, old: Items) -> None:
    there = old.ids()
    table = rows.features.table(rows.side)
    for name in table.strings(schema.ID, rows.chosen(rows.side)).to_pylist():
        if name in there:
            raise DataError(
                f"{rows.features.path}: {rows.side} {name!r} is in {out} already; add new ones "
                "alone, by --split or from a set of their own"
            )


def _memory(config: IndexConfig) -> int:
    return available_bytes() // 2 if config.memory is None else config.memory << 20


def _tell(plan: Plan, config: IndexConfig) -> None:
    cells = f" in {plan.cells:,} cells" if plan.cells else ""
    log.info(
        "%s index of %s x %s%s: about %s of memory to build (of %s), %s on disk",
        plan.kind,
        f"{plan.rows:,}",
        plan.width,
        cells,
        readable(plan.memory_bytes),
        readable(_memory(config)),
        readable(plan.disk_bytes),
    )


def _correction(rows: _Rows) -> Corrected | None:
    name = rows.config.correct
    if name is None:
        return None
    if not rows.has_other:
        raise DataError(
            f"{rows.joined.name}: hubs are known by the {rows.other.plural}, but there are none in "
            "the same space; leave --correct out"
        )
    none = np.empty((0, 0), np.float32)
    if name == "centre":
        means = [mean_of(rows.stream(side)) for side in (rows.side, rows.other)]
        return Corrected(name, np.stack(means), none)
    if len(rows.chosen(rows.other)) > REFERENCES:
        log.info("%s: hubs are known by a sample of the %s", name, rows.other.plural)
    return Corrected(name, none.astype(np.float64), rows.some(rows.other, REFERENCES))


def _judges(rows: _Rows, correction: Corrected | None) -> Nearest:
    """What the index is measured by: queries of the other side, else of its own."""
    side = rows.other if rows.has_other else rows.side
    queries = rows.some(side, QUERIES)
    if correction is not None:
        queries = correction.queries(queries, of_items=side is rows.side)
    return Nearest(queries, JUDGED_BY)


def _training_rows(rows: _Rows, correction: Corrected | None, count: int) -> Floats:
    chosen = rows.chosen(rows.side)
    drawn = np.random.default_rng(0).choice(len(chosen), count, replace=False)
    parts = rows.stream(rows.side, chosen[np.sort(drawn)])
    return np.concatenate(
        [part if correction is None else correction.items(part) for part in parts]
    )


def _fill(
    rows: _Rows, correction: Corrected | None, built: VectorIndex, nearest: Nearest
) -> Iterator[int]:
    """Add all rows; yields how many are in."""
    done = 0
    for part in rows.stream(rows.side):
        vectors = part if correction is None else correction.items(part)
        nearest.see(vectors)
        built.add(vectors)
        done += len(part)
        yield done


def _write_items(items: ItemWriter, rows: _Rows) -> None:
    columns = told_of(rows.features, rows.joined, rows.side)
    for start in range(0, len(columns[schema.ID]), ITEMS_A_BATCH):
        items.write({n: column[start : start + ITEMS_A_BATCH] for n, column in columns.items()})


def _copy_adapter(run: Path, folder: Path) -> None:
    folder.mkdir()
    for name in (ADAPTER_DESCRIPTION, WEIGHTS):
        shutil.copy(run / name, folder / name)


def _write_probes(folder: Path, features: FeatureSet) -> list[str]:
    """Keep the embeddings of some captions, by which a later encoder is known to be the same."""
    table = features.texts
    if table.made_by is None or not len(table):
        return []
    rows = np.unique(np.linspace(0, len(table) - 1, 8 * PROBES).astype(np.int64))
    captions: list[str] = []
    vectors = []
    for _, local, batch in table.parts([schema.CAPTION, schema.EMBEDDING], rows):
        for row in local.tolist():
            caption = batch.column(schema.CAPTION)[row].as_py()
            if caption and len(captions) < PROBES:
                captions.append(caption)
                vectors.append(batch_vectors(batch, schema.EMBEDDING)[row].astype(np.float32))
    if captions:
        np.save(folder / PROBES_FILE, np.stack(vectors), allow_pickle=False)
    return captions


def _taken(rows: _Rows) -> Taken:
    return Taken(
        features=str(rows.features.path),
        fingerprint=rows.features.manifest.fingerprint(),
        split=rows.config.split,
        rows=len(rows.chosen(rows.side)),
    )


def _finish(
    folder: Path, manifest: IndexManifest, built: VectorIndex, nearest: Nearest, rows: _Rows
) -> IndexManifest:
    """Set how far a search goes, measure its recall, and write what is left."""
    effort, value = _tuned(built, nearest, rows.config.recall)
    of = (rows.other if rows.has_other else rows.side).plural
    found = Recall(value=value, queries=len(nearest.queries), of=of, target=rows.config.recall)
    log.info(
        "recall@%d %.4f on %d %s%s",
        JUDGED_BY,
        value,
        found.queries,
        of,
        "".join(f", {name} {number}" for name, number in effort.to_json().items()),
    )
    if value < rows.config.recall and manifest.kind != "exact":
        log.warning(
            "recall@%d is %.4f, below the %g asked for%s",
            JUDGED_BY,
            value,
            rows.config.recall,
            "; use --kind exact or ivf" if effort == built.ladder()[-1] else "",
        )
    built.save(folder)
    manifest = manifest.model_copy(
        update={"effort": effort.to_json(), "recall": found, "files": list_files(folder)}
    )
    write_index_manifest(folder, manifest)
    return manifest


def _tuned(built: VectorIndex, nearest: Nearest, target: float) -> tuple[Effort, float]:
    """The least effort that finds as much as asked for, by one half of the queries.

    Returns:
        The effort, and its recall on the other half.
    """
    chooses, judges = slice(0, None, 2), slice(1 if len(nearest.queries) > 1 else 0, None, 2)
    for effort in built.ladder():
        built.effort = replace(effort)
        if recall(built, nearest, chooses) >= target:
            break
    return built.effort, recall(built, nearest, judges)
