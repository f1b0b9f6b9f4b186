"""``csalign bind``: two runs that share a side as one run, without further pairs."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from csalign.adapters.builtin import Mapped
from csalign.adapters.canonical import PairMoments
from csalign.adapters.checkpoint import AdapterInfo, save_adapter
from csalign.adapters.model import Adapter
from csalign.core import __version__, atomic, outputs
from csalign.core.arrays import Array, Indices
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import ConfigError, DataError, SchemaError
from csalign.core.paths import is_remote
from csalign.core.progress import Progress, reported_to, silent, tick
from csalign.core.results import Result
from csalign.features import schema
from csalign.features.join import ALL, hash_rows, select_rows, split_names
from csalign.features.reader import FeatureSet, FeatureTable
from csalign.features.schema import EncoderInfo
from csalign.runs.baselines import choose_split
from csalign.runs.load import check_encoder, load_run
from csalign.runs.metadata import (
    CONFIG,
    ENTRIES,
    FEATURES,
    LINES,
    find_features,
    write_environment,
)
from csalign.training.bind_config import BindConfig
from csalign.training.network.validation import measure

MOST_ROWS = 100_000  # of the shared side per set; more change no direction
HELD_OUT, MOST_HELD_OUT = 5, 1_000  # a fifth of the rows, at most so many, measure the map

log = logging.getLogger(__name__)


def bind(config: BindConfig, progress: Progress = silent) -> Result:
    """Join two runs that share a side into one run of all their sides.

    The adapters of the first run stay as they are. The other sides of the second get a rotation
    after their adapters, the orthogonal Procrustes map between the two embeddings of each row of
    the shared side (Schönemann 1966), with the means moved onto each other; it is measured on a
    fifth of the rows, and then fitted on all.

    Raises:
        ConfigError: no side is shared, several are, two others have one name, or a side embeds
            with tokens.
        DataError: there are no rows of the shared side that both runs embed, or too few.
        OutputError: ``config.out`` exists and is not to be replaced.

    >>> import csalign, numpy
    >>> images, texts, sounds = numpy.random.default_rng(0).normal(size=(3, 60, 8))
    >>> def train(out, a, b, names):
    ...     csalign.import_arrays(a, b, names=names, out=f"{out}-set")
    ...     return csalign.train(f"{out}-set", out, steps=2, hidden=8).run
    >>> seen, heard = train("a", images, texts, None), train("b", sounds, texts, "audio,text")
    >>> csalign.bind(seen, heard, "bound")["sides"]
    ['image', 'text', 'audio']
    """
    runs = (config.first, config.second)
    outputs.check_output(config.out, ENTRIES, overwrite=config.overwrite, inputs=runs)
    with reported_to(progress):
        first = _Run.load(config.first, config, {})
        second = _Run.load(config.second, config, config.renamed_sides)
        share = _shared_side(config, first, second)
        x, y = _shared_rows(config, first, second, share)
        least = min(x.shape[1], y.shape[1])
        if len(x) < least:
            raise DataError(
                f"{config.second}: {len(x):,} different rows of the side {share} are too few to "
                f"rotate a space {x.shape[1]} wide into one {y.shape[1]} wide; {least:,} are needed"
                "; pass --features with more rows of that side"
            )
        tick("fitting")
        held_out = _measure(x, y)
        weight, bias = _rotation(x, y)
        sides = {name: first.adapter.side(own) for name, own in first.sides.items()}
        others = {name: own for name, own in second.sides.items() if name != share}
        for name, own in others.items():
            sides[name] = Mapped.of(second.adapter.side(own), weight, bias)
        adapter = Adapter.of_sides(sides)
        result = Result(
            run=str(config.out),
            sides=[*map(str, sides)],
            shared=str(share),
            mapped=[*map(str, others)],
            rows=len(x),
            widths={"from": x.shape[1], "to": y.shape[1]},
            held_out=held_out,
        )
        _write(config, adapter, first, second, result)
    return result


@dataclass(frozen=True)
class _Run:
    """A run, and its sides by the names that they have in the bound one."""

    path: Path
    adapter: Adapter
    info: AdapterInfo
    sides: dict[AnySide, AnySide]  # to those of the adapter
    labels: dict[AnySide, str]  # of its sides, in its features
    features: FeatureSet | None  # that it was trained on; None if they are not found

    @classmethod
    def load(cls, path: Path, config: BindConfig, renames: Mapping[str, str]) -> "_Run":
        """Load a run; its sides have the names of its features, which `renames` replace."""
        adapter, info = load_run(path, config.allow_adapter)
        features, names = None, dict[AnySide, str]()
        try:
            features = FeatureSet.open(find_features(path, info.data_fingerprint))
            if {*adapter.names} == {*Modality}:  # others are stored under their names
                names = _names(features)
        except (DataError, SchemaError) as error:
            log.log(logging.INFO if config.features else logging.WARNING, "%s", error)
        labels = {side: names.get(side, str(side)) for side in adapter.names}
        if unknown := [old for old in renames if old not in labels.values()]:
            its = ", ".join(labels.values())
            raise ConfigError(f"--rename: {path} has no side {unknown[0]}; its sides are {its}")
        sides = {side_of(renames.get(name, name)): side for side, name in labels.items()}
        if len(sides) < len(adapter.names):
            raise ConfigError(f"--rename: two sides of {path} would be {', '.join(sides)}")
        return cls(path, adapter, info, sides, labels, features)

    def rows(self, features: FeatureSet, share: AnySide, *, any_encoder: bool) -> "_Rows":
        """Find the rows of a set that this run embeds as the shared side.

        Raises:
            DataError: the set has no such side, or it comes from another encoder.
        """
        own = self.sides[share]
        known = _names(features)
        side = next(
            (side for side, name in known.items() if name in (share, self.labels[own])), None
        )
        if side is None:
            its = ", ".join(known.values())
            raise DataError(f"{features.path}: has no side {share}; its sides are {its}")
        table, needed = features.table(side), self.info.encoder(own)
        remedy = f"pass --features with {share} embeddings of {{spec}}"
        is_own = self.features is not None and features.path == self.features.path
        if not is_own:
            pair: dict[Any, tuple[EncoderInfo, EncoderInfo]] = {side: (table.encoder, needed)}
            reference = f"{self.path} was trained on"
            check_encoder(pair, str(features.path), reference, remedy, any_encoder=any_encoder)
        if table.width != needed.width:
            raise DataError(
                f"{features.path}: the {share} embeddings are {table.width} wide, {self.path} "
                f"takes {needed.width}; {remedy.format(spec=needed.spec)}"
            )
        split = choose_split("bind", features, None, self.info.train_split if is_own else None)
        names = None if split == ALL else split_names(split, ())
        rows = select_rows(table, names)
        places = np.arange(len(table)) if rows is None else rows
        return _Rows(self.adapter, own, table, places)


def _names(features: FeatureSet) -> dict[AnySide, str]:
    """Return the sides of a set, and the names that they are known by."""
    names = features.manifest.names or {}
    return {
        side: names.get(side, side.value) if isinstance(side, Modality) else side.value
        for side in features.sides
    }


class _Rows(NamedTuple):
    """Rows of a table, and the side of an adapter that embeds them."""

    adapter: Adapter
    side: AnySide
    table: FeatureTable
    places: Indices  # ascending

    def common(self, other: "_Rows") -> tuple[Indices, Indices]:
        """Match rows with those of another table, by id; those of one table by number."""
        mine = theirs = np.intersect1d(self.places, other.places)
        if self.table.folder != other.table.folder:
            ids = [own.table.column(schema.ID, own.places) for own in (self, other)]
            names = [own.to_numpy().astype(str) for own in ids]
            _, one, two = np.intersect1d(*names, return_indices=True)
            mine, theirs = self.places[one], other.places[two]
        some = np.random.default_rng(0).permutation(len(mine))[:MOST_ROWS]
        return mine[some], theirs[some]

    def take(self, rows: Indices) -> Array:
        """Read rows in any order, (n, d)."""
        order = np.argsort(rows)
        return self.table.take(rows[order])[np.argsort(order)]

    def embed(self, values: Array) -> Array:
        """Align rows: unit rows (n, width) float32."""
        return self.adapter.embed(self.side, values)


def _shared_side(config: BindConfig, first: _Run, second: _Run) -> AnySide:
    """Find the side that both runs have.

    Raises:
        ConfigError: there is none, or another has one name in both, or a side embeds with tokens.
    """
    both = [side for side in first.sides if side in second.sides]
    share = side_of(config.share) if config.share else next(iter(both), None)
    if share is None or share not in both:
        listed = "; ".join(f"{run.path} has {', '.join(run.sides)}" for run in (first, second))
        raise ConfigError(
            f"the runs have no side {f'{share} ' if share else ''}in common: {listed}; rename that "
            "of the second run, as --rename caption=text"
        )
    if others := [side for side in both if side != share]:
        if not config.share:
            share, others = both[-1], both[:-1]
        raise ConfigError(
            f"both runs have a side {others[0]} besides {share}; name the one to join them by as "
            f"--share {share}, and rename the others of the second run, as "
            f"--rename {others[0]}=other-{others[0]}"
        )
    used = [(first, first.sides[share]), *((second, side) for side in second.adapter.names)]
    for run, side in used:
        if run.adapter.side(side).embeds_with_tokens:
            raise ConfigError(
                f"{run.path}: its {side} side embeds with tokens, which bind does not; train it "
                "with another --adapter than transformer"
            )
    return share


def _shared_rows(
    config: BindConfig, first: _Run, second: _Run, share: AnySide
) -> tuple[Array, Array]:
    """Embed the different rows of the shared side: (n, k) by the second run, (n, l) by the first.

    They come from the sets that both runs can embed, or else from pairs of given sets by equal ids.
    """
    runs = (second, first)
    sets = [FeatureSet.open(path) for path in config.features]
    sets = sets or [run.features for run in runs if run.features is not None]
    found: list[list[_Rows]] = [[], []]
    reasons = []
    for features in {features.path: features for features in sets}.values():
        for run, own in zip(runs, found, strict=True):
            try:
                own.append(run.rows(features, share, any_encoder=config.any_encoder))
            except DataError as error:
                reasons.append(f"; {error}")
    pairs = [*product(*found)]
    same = [both for both in pairs if both[0].table.folder == both[1].table.folder]
    # Sets that were not named may number different rows alike.
    pairs = same or pairs[: len(pairs) * bool(config.features)]
    keys, x, y = [], [], []
    for one, other in pairs:
        rows, matched = one.common(other)
        if not len(rows):
            continue
        tick(f"embedding: {share}")
        values = one.take(rows)
        keys.append(hash_rows(values))
        x.append(one.embed(values))
        y.append(other.embed(other.take(matched)))
    if not x:
        raise DataError(
            f"both runs embed no common row of the side {share}; pass --features with sets of both "
            f"encoders and equal ids{''.join(dict.fromkeys(reasons))}"
        )
    distinct = np.unique(np.concatenate(keys), return_index=True)[1]  # captions are repeated
    return np.concatenate(x)[distinct], np.concatenate(y)[distinct]


def _rotation(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    """Fit the weight (l, k) and the bias (l,) from unit rows x (n, k) to unit rows y (n, l)."""
    rows = np.arange(len(x))
    form = PairMoments.of(x, y, (rows, rows), np.ones(len(x))).procrustes(Modality.TEXT)
    assert form.image_bias is not None
    return form.image_weight, form.image_bias - form.image_weight @ form.image_mean


def _measure(x: Array, y: Array) -> dict[str, Any]:
    """Measure on rows that the map was not fitted on how far it leads to the same rows' y."""
    order = np.random.default_rng(0).permutation(len(x))
    held, fitted = np.split(order, [min(len(x) // HELD_OUT, MOST_HELD_OUT)])
    if len(held) < 1:
        return {"rows": 0}
    weight, bias = (own.numpy() for own in _rotation(x[fitted], y[fitted]))
    mapped = x[held] @ weight.T + bias
    mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
    score = measure(mapped, y[held], np.arange(len(held))).score
    cosine = float((mapped * y[held]).sum(1).mean())
    return {"rows": len(held), "cosine": cosine, "mean_recall": score.mean_recall}


def _write(config: BindConfig, adapter: Adapter, first: _Run, second: _Run, result: Result) -> None:
    """Write the run, with the description of the first run and the encoders of both."""
    homes = {name: (run, own) for run in (second, first) for name, own in run.sides.items()}
    known = {name: homes[name][0].info.encoder(homes[name][1]) for name in adapter.names}
    info = first.info.model_copy(
        update={
            "csalign_version": __version__,
            "adapters": adapter.shapes,
            "encoders": {name: own.spec for name, own in known.items()},
            "encoder_fingerprints": {name: own.fingerprint for name, own in known.items()},
            "encoder_settings": {name: own.preprocessing for name, own in known.items()},
            "validation": None,
            "start": f"{first.info.start}, bound to {second.path.name}",
        }
    )
    environment: dict[str, Any] = {"csalign": __version__, "command_line": sys.argv}
    if first.features is not None:
        path = first.features.path
        environment[FEATURES] = str(path if is_remote(path) else path.absolute())
    with outputs.atomic_folder(config.out) as folder:
        save_adapter(folder, adapter, info)
        atomic.write_text(folder / CONFIG, config.to_toml())
        atomic.write_text(folder / LINES, json.dumps({"bound": result["held_out"]}) + "\n")
        write_environment(folder, environment)
