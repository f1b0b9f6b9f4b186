"""``csalign compare OLD NEW`` of one side each: what changes with the embedding model.

Both sets have embeddings of the same items, by id. Neighbours are compared on ids that no map has
learned from; the gallery is these ids, less the query itself.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from csalign.adapters.canonical import ClosedForm, PairMoments
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.figures import percent
from csalign.core.progress import tick
from csalign.core.results import CompareResult
from csalign.evaluation.config import CompareConfig
from csalign.features import schema
from csalign.features.checks import alike, unit_rows
from csalign.features.join import ALL, find_images, repeated_ids, split_names
from csalign.features.reader import FeatureSet, FeatureTable
from csalign.features.schema import MANIFEST, read_manifest
from csalign.metrics.bootstrap import percentiles

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

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
CHANCE = 3  # times the retention of a random order that no map of matching ids stays below
ENOUGH = 0.02  # retention that fewer pairs may cost


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
    found = [(path / MANIFEST).is_file() and _side(path) is not None for path in systems]
    if not any(found):
        return False
    one = systems[found.index(True)]
    if not all(found):
        raise ConfigError(
            f"{one}: contains {_side(one)}s only, and {systems[found.index(False)]} is not such a "
            "set; compare sets of one side with each other: csalign compare OLD NEW"
        )
    if len(systems) < 2:
        raise ConfigError(
            f"{one}: contains {_side(one)}s only; pass another model's embeddings of the same ids "
            f"too: csalign compare {one} NEW"
        )
    return True


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
    for name in ("features", "baseline"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"--{name} is for runs; sets of one side are compared with the first: omit it"
            )
    old, *others = [_Version.read(path) for path in systems]
    return VersionsResult({"versions": [_compare(old, new, config.split) for new in others]})


def _side(path: Path) -> Modality | None:
    """Return the only side of a feature set; None if it has both or no rows."""
    counts = read_manifest(path).counts
    if bool(counts.images) == bool(counts.texts):
        return None
    return Modality.IMAGE if counts.images else Modality.TEXT


class _Version(NamedTuple):
    """The only side of a feature set."""

    table: FeatureTable
    ids: pa.ChunkedArray  # (n,)
    values: npt.NDArray[Any]  # (n, d) as stored

    @classmethod
    def read(cls, path: Path) -> "_Version":
        table = FeatureSet.open(path).table(_side(path) or Modality.IMAGE)
        ids = pa.chunked_array([table.strings(schema.ID)])
        if len(repeated := repeated_ids(ids)):
            raise DataError(
                f"{path}: id {repeated[0].as_py()!r} appears more than once; ids must be unique, "
                "create the feature set again"
            )
        return cls(table, ids, table.embeddings())

    @property
    def path(self) -> Path:
        return self.table.folder

    def unit(self, rows: Ints) -> npt.NDArray[np.float32]:
        return unit_rows(self.values[rows], self.ids.take(pa.array(rows)), str(self.path))

    def column(self, name: str, rows: Ints) -> pa.Array:
        return self.table.strings(name).take(pa.array(rows))


class _Score(NamedTuple):
    """What a gallery gives the queries, (q,) each."""

    retention: Floats  # share of the 10 nearest re-embedded items that are the 10 nearest here
    hit: Floats  # 1 where the query's own item is nearer than any other
    cosine: Floats  # to its own item

    def figures(self) -> dict[str, Any]:
        kinds: dict[str, Any] = {
            "retention@10": np.mean,
            "hit@1": np.mean,
            "median_cosine": np.median,
        }
        named = list(zip(kinds.items(), self, strict=True))
        intervals = {name: _interval(own, of) for (name, of), own in named}
        return {name: float(of(own)) for (name, of), own in named} | {"intervals": intervals}


def _interval(values: Floats, of: Any = np.mean) -> list[float]:
    """Return the 95 % bootstrap interval over items of a mean or median of values (q,)."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return [*percentiles(of(values[drawn], axis=1))]


def _compare(old: _Version, new: _Version, split: str | None) -> dict[str, Any]:
    places, missing = find_images(new.ids, old.ids)  # of the new ids among the old ones
    rows_new = np.flatnonzero(places >= 0)
    rows_old = places[rows_new]
    counts = {"common": len(rows_old), "only_old": len(old.ids) - len(rows_old)}
    if not len(rows_old):
        raise DataError(
            f"{old.path} and {new.path} have no id in common (such as {old.ids[0].as_py()!r:.80} "
            f"and {new.ids[0].as_py()!r:.80}); give both the same ids, with --image-table or "
            "--text-table of csalign import"
        )
    splits = old.column(schema.SPLIT, rows_old)
    if split not in (None, ALL):
        names = split_names(split, ())
        is_in = pc.is_in(splits, value_set=pa.array([*names], pa.large_string())).to_numpy(False)
        if not is_in.any():
            raise DataError(f"{old.path}: has no split {split!r}; omit --split, or name another")
        rows_old, rows_new, splits = rows_old[is_in], rows_new[is_in], splits.filter(is_in)
        counts["common"] = len(rows_old)
    changed = _count_changed(old, new, rows_old, rows_new)
    if changed:
        log.warning(
            "%d of %d ids have another caption in %s than in %s; embed the same texts with both",
            *(changed, len(rows_old), new.path, old.path),
        )
    # A map that has learned a row knows its copies, such as a caption that many images share.
    distinct = np.unique(alike(old.values[rows_old]))
    found: dict[str, Any] = {
        "old": str(old.path),
        "new": str(new.path),
        "sides": {"old": old.table.modality.value, "new": new.table.modality.value},
        "widths": {"old": old.table.width, "new": new.table.width},
        "ids": {
            **counts,
            "only_new": len(missing),
            "changed": changed,
            "distinct": len(distinct),
        },
        "canary": None,
        "overlap": None,
        "held_out": None,
        "unmapped": None,
        "maps": [],
    }
    if old.table.width == new.table.width:
        found["canary"] = _canary(old, new, rows_old, rows_new)
    if len(distinct) >= FEWEST:
        chosen = rows_old[distinct], rows_new[distinct], splits.take(pa.array(distinct))
        found |= _neighbours(old, new, *chosen)
    elif found["canary"] is None:
        raise DataError(
            f"{old.path} and {new.path} have {len(distinct)} different vectors with equal ids "
            f"here; maps and neighbours need {FEWEST}, so embed more items with both models"
        )
    else:
        log.warning(
            "%d different vectors have equal ids; neighbours and maps need %d",
            *(len(distinct), FEWEST),
        )
    return found | _advise(found)


def _count_changed(old: _Version, new: _Version, rows_old: Ints, rows_new: Ints) -> int:
    """Count the ids whose captions are known in both sets and differ."""
    if {old.table.modality, new.table.modality} != {Modality.TEXT}:
        return 0
    both = old.column(schema.CAPTION, rows_old), new.column(schema.CAPTION, rows_new)
    return int(pc.sum(pc.not_equal(*both)).as_py() or 0)


def _canary(old: _Version, new: _Version, rows_old: Ints, rows_new: Ints) -> dict[str, Any]:
    """Compare the vectors of equal ids, and with those of other ids, in spaces of one width."""
    own, other = np.empty(len(rows_old)), np.empty(len(rows_old))
    for start in range(0, len(rows_old), CHUNK):
        some = slice(start, start + CHUNK)
        x, y = old.unit(rows_old[some]), new.unit(rows_new[some])
        own[some] = np.einsum("ij,ij->i", x, y)
        shift = np.random.default_rng(start).permutation(len(x))
        other[some] = np.einsum("ij,ij->i", x[shift], np.roll(y[shift], 1, axis=0))
    low = float(np.quantile(own, 0.05))
    verdict = "same space" if low > np.quantile(other, 0.95) else "another space"
    if own.min() > SAME_MODEL:
        verdict = "same model"
    mean, least = float(own.mean()), float(own.min())
    return {"mean": mean, "lowest_5_percent": low, "least": least, "verdict": verdict}


def _neighbours(
    old: _Version, new: _Version, rows_old: Ints, rows_new: Ints, splits: pa.Array
) -> dict[str, Any]:
    """Measure the overlap of neighbours, and what maps of 100, 300, ... pairs retain."""
    learned, held, source = _divide(splits)
    x, y = (
        torch.from_numpy(own.unit(rows[held])) for own, rows in ((old, rows_old), (new, rows_new))
    )
    queries = y[:QUERIES]
    nearest, _, _ = _look_up(queries, y)
    near_old, _, _ = _look_up(x[:QUERIES], x)
    shared = _share(near_old, nearest)
    found: dict[str, Any] = {
        "overlap": {
            "overlap@10": float(shared.mean()),
            "interval": _interval(shared),
            "chance": NEIGHBOURS / (len(held) - 1),
        },
        "held_out": {"queries": len(queries), "gallery": len(held), "learned": source},
        "maps": [],
    }
    if x.shape[1] == y.shape[1]:
        unmapped = {"pairs": 0, "map": "none"}
        found["unmapped"] = unmapped | _score(queries, x, nearest).figures()
    sizes = [size for size in STEPS if size < len(learned)] + [len(learned)]
    for number, size in enumerate(sizes):
        tick("maps", number, len(sizes))
        some = learned[:size]
        form = _learn(old.unit(rows_old[some]), new.unit(rows_new[some]))
        score = _score(queries, _mapped(form, x), nearest)
        name = form.name.removesuffix(" to the text side").replace(" to the text side (", " (")
        found["maps"].append({"pairs": size, "map": name, **score.figures()})
    tick("maps", len(sizes), len(sizes))
    return found


def _divide(splits: pa.Array) -> tuple[Ints, Ints, str]:
    """Choose the ids to learn from, those held out, both shuffled, and say how."""
    generator = np.random.default_rng(0)
    is_train = pc.fill_null(pc.equal(splits, "train"), False).to_numpy(False)
    order = generator.permutation(len(splits))
    learned, held, source = order[is_train[order]], order[~is_train[order]], "split train"
    if min(len(learned), len(held)) < FEWEST_HELD:
        half = len(order) // 2
        learned, held, source = order[:half], order[half:], "random ids"
    return learned[:LEARNED], held[:GALLERY], source


def _learn(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> ClosedForm:
    """Fit old rows (n, d) to new ones (n, e): the map of the best mean cosine on a held-out fifth.

    With few pairs the cosine is less noisy than the retention, and with many it chooses as well.
    """
    kept = max(len(x) // 5, min(FEWEST_HELD, len(x) // 2))
    own, rows = torch.from_numpy(x[:kept]), torch.from_numpy(y[:kept])
    cosines = [
        float((_mapped(form, own) * rows).sum(1).mean()) for form in _forms(x[kept:], y[kept:])
    ]
    return list(_forms(x, y))[int(np.argmax(cosines))]


def _forms(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> Iterator[ClosedForm]:
    """Yield the maps of x (n, d) onto y (n, e), in one order."""
    rows = np.arange(len(x))
    moments = PairMoments.of(x, y, (rows, rows), np.ones(len(x)))
    yield moments.procrustes(Modality.TEXT)
    for ridge in RIDGES:
        yield moments.ridge(Modality.TEXT, ridge)


def _mapped(form: ClosedForm, rows: Tensor) -> Tensor:
    return form.outputs(rows, torch.empty(0, len(form.text_mean)))[0]


def _score(queries: Tensor, gallery: Tensor, nearest: Tensor) -> _Score:
    """Score a gallery, (m, e), whose first rows are of the queries' items; all unit rows."""
    near, is_first, cosine = _look_up(queries, gallery)
    return _Score(_share(near, nearest), is_first.double().numpy(), cosine.double().numpy())


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
    near, first, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    return near, first, cosine


def _share(near: Tensor, others: Tensor) -> Floats:
    """Return the share of each row (q, k) that is in the same row of others, (q,)."""
    both = (near[:, :, None] == others[:, None, :]).any(2)
    shares: Floats = both.double().mean(1).numpy()
    return shares


def _advise(found: dict[str, Any]) -> dict[str, Any]:
    """Return the "advice", None if there is none, and "words", what was found and what to do."""
    canary, unmapped, maps = found["canary"], found["unmapped"], found["maps"]
    verdict = canary["verdict"] if canary else None
    said = {
        "same model": f"Same model: all cosines of equal ids exceed {SAME_MODEL}, so nothing needs "
        "embedding again.",
        "same space": "The same space, but not the same vectors: those of an id are closer than "
        "those of different ids.",
        "another space": "Another space: vectors of an id are as far apart as those of different "
        "ids.",
        None: "Another space: the widths differ, so the vectors cannot be mixed.",
    }[verdict]
    if verdict == "same model" or not maps:
        return {"advice": "keep" if verdict == "same model" else None, "words": [said]}
    best, chance = maps[-1], found["overlap"]["chance"]
    retained = best["retention@10"]
    few = next(row["pairs"] for row in maps if row["retention@10"] >= retained - ENOUGH)
    learned = f"a map of {best['pairs']:,} pairs retains {percent(retained, 0)} of the 10 nearest"
    if few < best["pairs"]:
        learned += f", one of {few:,} nearly as much"
    if unmapped and unmapped["retention@10"] >= max(CHANCE * chance, retained - ENOUGH):
        share = percent(unmapped["retention@10"], 0)
        advice, what = (
            "keep",
            f"Old vectors serve as they are: they retain {share} of the 10 nearest.",
        )
        if unmapped["retention@10"] < GOOD:
            advice = "re-embed"
            what = (
                f"Re-embed: old vectors retain {share} of the 10 nearest, and no map adds to that."
            )
    elif retained < CHANCE * chance:
        advice = "check ids"
        what = (
            f"No map is found (retention {percent(retained)}, by chance {percent(chance)}): check "
            "that ids name the same items in both sets, such as rows in one order; if they do, "
            "re-embed."
        )
    elif retained >= GOOD:
        advice, what = "map", f"Map now and re-embed later: {learned}."
    elif retained >= POOR:
        advice, what = "map", f"Re-embed; until then a map is a stopgap: {learned}."
    else:
        advice, what = "re-embed", f"Re-embed: {learned}."
    return {"advice": advice, "words": [said, what]}
