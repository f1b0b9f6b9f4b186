"""``csalign compare OLD NEW`` of one side each: what changes with the embedding model.

Both sets have embeddings of the same items, by id. Neighbours are compared on ids that no map has
learned from; the gallery is these ids, less the query itself.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from csalign.adapters.canonical import ClosedForm, PairMoments
from csalign.core.arrays import Array, Floats, Ints
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.figures import percent
from csalign.core.progress import track
from csalign.core.results import CompareResult
from csalign.evaluation.config import CompareConfig
from csalign.features import schema
from csalign.features.checks import alike, unit_rows
from csalign.features.join import ALL, find_images, repeated_ids, select_rows, split_names
from csalign.features.reader import FeatureSet, FeatureTable
from csalign.features.schema import MANIFEST, read_manifest
from csalign.metrics.bootstrap import percentiles

log = logging.getLogger(__name__)


NEIGHBOURS = 10
FEWEST = 60  # common ids for neighbours and maps
FEWEST_HELD = 30
QUERIES, GALLERY, LEARNED = 1_000, 50_000, 20_000  # at most
STEPS = (100, 300, 1_000, 3_000, 10_000)  # pairs that maps learn from, besides all
RIDGES = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
RESAMPLES = 1_000
SAME_MODEL = 0.999  # a cosine that rounding to float16 leaves
CELLS = 1 << 24  # scores at a time
CHUNK = 65_536
GOOD, POOR = 0.8, 0.5  # retention for a map to serve, and to serve as a stopgap
ENOUGH = 0.02  # retention that fewer pairs may cost
VERDICTS = {
    "same model": f"Same model: all cosines of equal ids exceed {SAME_MODEL}, so nothing needs "
    "embedding again.",
    "same space": "The same space, but not the same vectors: those of an id are closer than those "
    "of different ids.",
    "another space": "Another space: vectors of an id are as far apart as those of different ids.",
    None: "Another space: the widths differ, so the vectors cannot be mixed.",
}


class VersionsResult(CompareResult):
    """Each set against the first, from `compare`; `to_frame` has a row per map."""

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"old": one["old"], "new": one["new"]}
            | {name: value for name, value in row.items() if name != "intervals"}
            for one in self["versions"]
            for row in one["maps"]
        ]

    def _lines(self) -> list[tuple[str, str]]:
        return [(Path(one["new"]).name, " ".join(one["words"])) for one in self["versions"]]


def have_one_side(systems: Sequence[Path]) -> bool:
    """Return whether all are feature sets with one side.

    Raises:
        ConfigError: only some are, or there is only one.
    """
    sides = [_side(path) if (path / MANIFEST).is_file() else None for path in systems]
    for path, side in zip(systems, sides, strict=True):
        if side is not None and (None in sides or len(systems) < 2):
            raise ConfigError(
                f"{path}: contains {side}s only; compare it with another model's embeddings of the "
                f"same ids, and with nothing else: csalign compare {path} NEW"
            )
    return None not in sides


def compare_versions(config: CompareConfig, systems: Sequence[Path]) -> VersionsResult:
    """Compare embeddings of the same ids by several models, each with the first.

    Returns:
        ``{"versions": [{"old", "new", "sides", "widths", "ids": {"common", "only_old", "only_new",
        "changed", "distinct"}, "canary", "overlap", "held_out", "unmapped", "maps", "advice",
        "words"}, ...]}``. "canary" is ``{"mean", "lowest_5_percent", "least", "verdict"}`` of the
        cosines of equal ids, None if the widths differ; "overlap" ``{"overlap@10", "interval",
        "chance"}``; "unmapped" and each of "maps" ``{"pairs", "map", "retention@10", "hit@1",
        "median_cosine", "intervals"}``, the maps by the pairs learned from; "advice" is "keep",
        "map", "re-embed" or "check ids". With fewer than `FEWEST` different old vectors "overlap",
        "held_out", "unmapped" and maybe "advice" are None, and "maps" is [].

    Raises:
        ConfigError: an option does not apply.
        DataError: sets have no id in common, or too few for anything to be measured.
        SchemaError: a set is damaged, or an id repeats.
    """
    for name in ("features", "baseline", "labels"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"--{name} is for runs; sets of one side are compared with the first: omit it"
            )
    old, *others = map(_Version.read, systems)
    return VersionsResult({"versions": [_compare(old, new, config.split) for new in others]})


def _side(path: Path) -> Modality | None:
    """Return the only side of a feature set, images or texts; None if it has others or no rows."""
    manifest = read_manifest(path)
    counts = manifest.counts
    if manifest.sides or bool(counts.images) == bool(counts.texts):
        return None
    return Modality.IMAGE if counts.images else Modality.TEXT


@dataclass(frozen=True)
class _Version:
    """Rows of the only side of a feature set."""

    table: FeatureTable
    ids: pa.ChunkedArray  # of all rows of the set, (n,)
    values: Array  # (n, d) as stored
    rows: Ints  # those that are compared, (m,)

    @classmethod
    def read(cls, path: Path) -> "_Version":
        table = FeatureSet.open(path).table(_side(path) or Modality.IMAGE)
        ids = pa.chunked_array([table.strings(schema.ID)])
        if len(repeated := repeated_ids(ids)):
            raise DataError(
                f"{path}: id {repeated[0].as_py()!r} appears more than once; ids must be unique, "
                "create the feature set again"
            )
        return cls(table, ids, table.embeddings(), np.arange(len(ids)))

    def take(self, places: Ints) -> "_Version":
        return replace(self, rows=self.rows[places])

    def unit(self, places: Any) -> Floats:
        rows = self.rows[places]
        return unit_rows(self.values[rows], self.ids.take(pa.array(rows)), str(self.table.folder))

    def column(self, name: str) -> pa.Array:
        return self.table.strings(name).take(pa.array(self.rows))


def _compare(old: _Version, new: _Version, split: str | None) -> dict[str, Any]:
    paths = old.table.folder, new.table.folder
    places, missing = find_images(new.ids, old.ids)  # of the new ids among the old ones
    common = np.flatnonzero(places >= 0)
    ids = {"only_old": len(old.ids) - len(common), "only_new": len(missing)}
    if not len(common):
        raise DataError(
            f"{paths[0]} and {paths[1]} have no id in common (such as {old.ids[0].as_py()!r:.80} "
            f"and {new.ids[0].as_py()!r:.80}); give both the same ids, with --image-table or "
            "--text-table of csalign import"
        )
    names = split_names(split, ()) if split and split != ALL else None
    if (chosen := select_rows(old.table, names)) is not None:
        common = common[np.isin(places[common], chosen)]
    if not len(common):
        raise DataError(
            f"{paths[0]}: has no common id in split {split!r}; omit --split, or name another"
        )
    old, new, changed = old.take(places[common]), new.take(common), 0
    if {old.table.modality, new.table.modality} == {Modality.TEXT}:
        differ = pc.not_equal(old.column(schema.CAPTION), new.column(schema.CAPTION))
        changed = int(pc.sum(differ).as_py() or 0)  # null where a caption is unknown
    if old.table.modality is not new.table.modality:
        log.warning(
            "%s contains %s and %s %s, compared here as two models of the same items; to align "
            "them join both with csalign import --pair-by id, then csalign train",
            *(paths[0], old.table.modality.plural, paths[1], new.table.modality.plural),
        )
    if changed:
        log.warning(
            "%d of %d ids have another caption in %s than in %s; embed the same texts with both",
            *(changed, len(common), *paths[::-1]),
        )
    # A map that has learned a row knows its copies, such as a caption that many images share.
    distinct = np.unique(alike(old.values[old.rows]))
    both = {"old": old.table, "new": new.table}
    widths = {name: own.width for name, own in both.items()}
    found: dict[str, Any] = {
        **{name: str(own.folder) for name, own in both.items()},
        "sides": {name: own.modality.value for name, own in both.items()},
        "widths": widths,
        "ids": {"common": len(common), **ids, "changed": changed, "distinct": len(distinct)},
        "canary": _canary(old, new) if widths["old"] == widths["new"] else None,
        **dict.fromkeys(("overlap", "held_out", "unmapped")),
        "maps": [],
    }
    few = (
        f"{paths[0]} and {paths[1]} have {len(distinct)} different vectors with equal ids here; "
        f"maps and neighbours need {FEWEST}, so embed more items with both models"
    )
    if len(distinct) >= FEWEST:
        found |= _neighbours(old.take(distinct), new.take(distinct))
    elif found["canary"] is None:
        raise DataError(few)
    else:
        log.warning("%s", few)
    return found | _advise(found)


def _canary(old: _Version, new: _Version) -> dict[str, Any]:
    """Compare the vectors of equal ids, and with those of other ids, in spaces of one width."""
    own, other = np.empty((2, len(old.rows)))
    for start in range(0, len(own), CHUNK):
        some = slice(start, start + CHUNK)
        x, y = old.unit(some), new.unit(some)
        own[some] = np.einsum("ij,ij->i", x, y)
        order = np.random.default_rng(start).permutation(len(x))
        other[some] = np.einsum("ij,ij->i", x[order], np.roll(y[order], 1, axis=0))
    mean, low, least = map(float, (own.mean(), np.quantile(own, 0.05), own.min()))
    verdict = "same space" if low > np.quantile(other, 0.95) else "another space"
    verdict = "same model" if least > SAME_MODEL else verdict
    return {"mean": mean, "lowest_5_percent": low, "least": least, "verdict": verdict}


def _neighbours(old: _Version, new: _Version) -> dict[str, Any]:
    """Measure the overlap of neighbours, and what maps of 100, 300, ... pairs retain."""
    order = np.random.default_rng(0).permutation(len(old.rows))
    is_train = pc.equal(old.column(schema.SPLIT), "train").fill_null(False).to_numpy(False)[order]
    learned, held, source = order[is_train], order[~is_train], "split train"
    if min(len(learned), len(held)) < FEWEST_HELD:
        learned, held = np.split(order, [len(order) // 2])
        source = "random ids"
    learned, held = learned[:LEARNED], held[:GALLERY]
    x, y = (torch.from_numpy(own.unit(held)) for own in (old, new))
    queries = y[:QUERIES]
    nearest = _look_up(queries, y)[0]
    old_queries = _retention(x[:QUERIES], x, nearest)
    found: dict[str, Any] = {
        "overlap": {
            "overlap@10": old_queries["retention@10"],
            "interval": old_queries["intervals"]["retention@10"],
            "chance": NEIGHBOURS / (len(held) - 1),
        },
        "held_out": {"queries": len(queries), "gallery": len(held), "learned": source},
        "maps": [],
    }
    if x.shape[1] == y.shape[1]:
        found["unmapped"] = {"pairs": 0, "map": "none", **_retention(queries, x, nearest)}
    sizes = [size for size in STEPS if size < len(learned)] + [len(learned)]
    for size in track(sizes, "maps", len(sizes)):
        form = _learn(old.unit(learned[:size]), new.unit(learned[:size]))
        name = form.name.replace(" to the text side", "")
        figures = _retention(queries, _mapped(form, x), nearest)
        found["maps"].append({"pairs": size, "map": name, **figures})
    return found


def _learn(x: Floats, y: Floats) -> ClosedForm:
    """Fit old rows (n, d) to new ones (n, e): the map of the best mean cosine on a held-out fifth.

    With few pairs the cosine is less noisy than the retention, and with many it chooses as well.
    """
    kept = max(len(x) // 5, min(FEWEST_HELD, len(x) // 2))
    own, targets = torch.from_numpy(x[:kept]), torch.from_numpy(y[:kept])
    few, every = _forms(x[kept:], y[kept:]), _forms(x, y)
    cosines = [float((_mapped(form, own) * targets).sum()) for form in few]
    return every[int(np.argmax(cosines))]


def _forms(x: Floats, y: Floats) -> list[ClosedForm]:
    rows = np.arange(len(x))
    moments = PairMoments.of(x, y, (rows, rows), np.ones(len(x)))
    ridges = (moments.ridge(Modality.TEXT, ridge) for ridge in RIDGES)
    return [moments.procrustes(Modality.TEXT), *ridges]


def _mapped(form: ClosedForm, rows: Tensor) -> Tensor:
    return form.outputs(rows, torch.empty(0, len(form.text_mean)))[0]


def _retention(queries: Tensor, gallery: Tensor, nearest: Tensor) -> dict[str, Any]:
    """Score a gallery, (m, e), whose first rows are of the queries' items; all unit rows.

    "retention@10" is the share of the 10 nearest re-embedded items, `nearest`, that are the 10
    nearest here; "hit@1" that of queries whose own item is nearer than any other.
    """
    near, is_first, cosine = _look_up(queries, gallery)
    shared = (near[:, :, None] == nearest[:, None, :]).any(2).double().mean(1)
    drawn = np.random.default_rng(0).integers(len(queries), size=(RESAMPLES, len(queries)))
    found: dict[str, Any] = {"intervals": {}}
    for name, own, of in (
        ("retention@10", shared, np.mean),
        ("hit@1", is_first.double(), np.mean),
        ("median_cosine", cosine.double(), np.median),
    ):
        found[name] = float(of(own.numpy()))
        found["intervals"][name] = [*percentiles(of(own.numpy()[drawn], axis=1))]
    return found


def _look_up(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the nearest other items of unit rows (q, e), row i of which is of item i of the gallery.

    Returns:
        Their positions, (q, k); whether the own item is nearer than all others, (q,); and the
        cosine to it, (q,).
    """
    found = []
    k = min(NEIGHBOURS, len(gallery) - 1)
    for rows in torch.split(torch.arange(len(queries)), max(1, CELLS // len(gallery))):
        scores = queries[rows] @ gallery.T
        places = (torch.arange(len(rows)), rows)
        own = scores[places]
        scores[places] = -torch.inf
        values, near = scores.topk(k, dim=1)
        found.append((near, own > values[:, 0], own))
    near, is_first, cosine = map(torch.cat, zip(*found, strict=True))
    return near, is_first, cosine


def _advise(found: dict[str, Any]) -> dict[str, Any]:
    """Return the "advice", None if there is none, and "words", what was found and what to do."""
    verdict, maps = found["canary"] and found["canary"]["verdict"], found["maps"]
    said = VERDICTS[verdict]
    if verdict == "same model" or not maps:
        return {"advice": "keep" if verdict == "same model" else None, "words": [said]}
    best, chance = maps[-1]["retention@10"], found["overlap"]["chance"]
    plain = found["unmapped"]["retention@10"] if found["unmapped"] else 0.0
    # Of matching ids, no map retains as little as this, in a small gallery either.
    least = min(3 * chance, (1 + chance) / 2)
    few = next(row for row in maps if row["retention@10"] >= best - ENOUGH)
    old = f"old vectors retain {percent(plain, 0)} of the 10 nearest"
    mapped = f"a map of {maps[-1]['pairs']:,} pairs retains {percent(best, 0)} of the 10 nearest"
    if few is not maps[-1]:
        nearly = "nearly " * (round(few["retention@10"], 2) < round(best, 2))
        mapped += f", one of {few['pairs']:,} {nearly}as much"
    if plain >= max(least, best - ENOUGH):
        advice, what = "re-embed", f"Re-embed: {old}, and no map adds to that."
        if plain >= GOOD:
            advice, what = "keep", f"Keep them: {old}."
    elif best < least:
        advice = "check ids"
        what = (
            f"No map is found (retention {percent(best)}, by chance {percent(chance)}): check that "
            "ids name the same items in both sets; if they do, re-embed."
        )
    elif best >= POOR:
        now = "Map now and re-embed later" if best >= GOOD else "Re-embed; until then, map"
        advice, what = "map", f"{now}: {mapped}."
    else:
        advice, what = "re-embed", f"Re-embed: {mapped}."
    return {"advice": advice, "words": [said, what]}
