"""Train, measure on the test split, remember, and print: what the tables here have in common."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from csalign.evaluation.config import EvalConfig
from csalign.evaluation.measure import Evaluation, describe, measure
from csalign.features.reader import FeatureSet
from csalign.metrics.bootstrap import Floats, Place, Resamples
from csalign.training.config import TrainConfig
from csalign.training.train import train

TRAIN_SPLIT = "train,val2"
PLACES = (("mean_recall",), ("centroid_distance",), ("rmg",))
"""Figures whose resamples are kept, to have intervals of differences."""

GAPS = ("centroid_distance", "rmg", "cs_divergence", "frechet")
DIGITS = 7  # of a resampled figure

Settings = Mapping[str, Any]
What = Mapping[str, Any]
Record = dict[str, Any]
NOTHING: Settings = MappingProxyType({})


class Ledger:
    """Results by what they are of, in a file of JSON lines, so that a rerun skips what is done.

    Args:
        path: the file; made if it is not there. A line that was cut short is not read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: list[tuple[What, Record]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            self._known.append((entry["what"], entry["record"]))

    def get(self, what: What, make: Callable[[], Record], defaults: Settings = NOTHING) -> Record:
        """The record of `what`, made and written down if it is not known.

        Args:
            what: everything that the record depends on, save the code; its "settings" by name.
            make: gives a record of plain JSON values.
            defaults: of settings that a record may be too old to know; those changed nothing.
        """
        what = json.loads(json.dumps(what, default=str))
        for known, record in self._known:
            if {**known, "settings": {**defaults, **known["settings"]}} == what:
                return record
        record = make()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "record": record}) + "\n")
        self._known.append((what, record))
        return record


@dataclass(frozen=True)
class Bench:
    """A feature set and what was found on it.

    Attributes:
        features: with the splits train, val, val2 and test.
        ledger: remembers.
        exact: whether training makes matrix products in float32. Otherwise it makes them in
            bfloat16, where the processor can, which takes about half the time.
    """

    features: Path
    ledger: Ledger
    exact: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """Of the features' content."""
        return FeatureSet.open(self.features).manifest.fingerprint()

    def validated(self, settings: Settings, seed: int) -> Record:
        """Train once and give the validation score of what was kept; the test split is not read."""
        return self._trained(settings, seed, self._validation)

    def tested(self, settings: Settings, seeds: int, name: str) -> Row:
        """Train with seeds 0, 1, ... and measure each on the test split."""
        runs = [self._trained(settings, seed, self._test) for seed in range(seeds)]
        return Row(name, runs)

    def known(self, name: str, settings: Settings, make: Callable[[], Evaluation]) -> Row:
        """A row that needs no training and has no seed.

        Args:
            name: of the row.
            settings: what it depends on, beside its name.
            make: measures it on the test split.
        """
        what = {"row": name, "features": self.fingerprint, "settings": settings}
        return Row(name, [self.ledger.get(what, lambda: as_record(make(), seconds=None))])

    def _trained(
        self, settings: Settings, seed: int, look: Callable[[TrainConfig, Record], Record]
    ) -> Record:
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig.model_validate(
                {
                    "features": self.features,
                    "out": Path(folder) / "run",
                    "train_split": TRAIN_SPLIT,
                    "seed": seed,
                    **settings,
                }
            )
            # The resolved settings: another default is another run.
            resolved = config.model_dump(mode="json", exclude={"out", "features", "overwrite"})
            what = {
                "look": look.__name__,
                "features": self.fingerprint,
                "exact": self.exact,
                "settings": resolved,
            }
            defaults = {name: TrainConfig.model_fields[name].default for name in resolved}

            def make() -> Record:
                print(f"{look.__name__[1:]} {seed} {dict(settings)}", flush=True)
                with products("highest" if self.exact else "medium"):
                    result = train(config)
                record = {
                    "seconds": result.seconds,
                    "steps": result.steps,
                    "best_step": result.best_step,
                    "parameters": sum(result.parameters.values()),
                    "validation": result.validation.get("kept"),
                }
                found = look(config, record)
                print(f"  {record['validation']} {record['seconds']:.0f} s", flush=True)
                return found

            return self.ledger.get(what, make, defaults)

    def _validation(self, config: TrainConfig, record: Record) -> Record:
        return record

    def _test(self, config: TrainConfig, record: Record) -> Record:
        own = {kind for kind in (config.adapter, config.image_adapter, config.text_adapter) if kind}
        outside = next((kind for kind in own if ":" in kind), None)
        measured = measure(
            EvalConfig(
                features=self.features, adapter=config.out, split="test", allow_adapter=outside
            )
        )
        return record | as_record(measured, seconds=record["seconds"])


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Set how torch makes matrix products of float32 numbers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def as_record(measured: Evaluation, seconds: float | None) -> Record:
    """What the tables need of a measurement, as plain JSON values."""
    document, resamples = describe(measured), measured.resamples
    return {
        "seconds": seconds,
        "parameters": measured.aligned.parameters,
        "retrieval": document["retrieval"],
        "gap": document["gap"],
        "images": resamples.images,
        "resamples": {
            "/".join(place): [round(float(v), DIGITS) for v in resamples.figures[place]]
            for place in PLACES
        },
    }


@dataclass(frozen=True)
class Row:
    """A row of a table: the runs of all seeds.

    Attributes:
        name: of the row.
        runs: a record a seed.
    """

    name: str
    runs: Sequence[Record]

    @cached_property
    def resamples(self) -> Resamples:
        """The mean over seeds of each figure on each resample of the test images."""
        figures: dict[Place, Floats] = {
            place: np.mean([run["resamples"]["/".join(place)] for run in self.runs], axis=0)
            for place in PLACES
        }
        return Resamples(figures, self.runs[0]["images"])

    def values(self, *place: str) -> list[float]:
        """A figure of each seed."""
        found = []
        for run in self.runs:
            value: Any = run
            for key in place:
                value = value[key]
            found.append(float(value))
        return found

    def mean(self, *place: str) -> float:
        """A figure's mean over seeds."""
        return float(np.mean(self.values(*place)))

    def against(self, other: Row) -> tuple[float, tuple[float, float], str]:
        """Mean recall less the other's, its 95 % interval, and the verdict."""
        place = ("mean_recall",)
        interval, verdict = self.resamples.minus(other.resamples, place)
        difference = self.mean("retrieval", *place) - other.mean("retrieval", *place)
        return difference, interval, verdict.value


def print_table(rows: Sequence[Row], baseline: Row) -> str:
    """The table as Markdown, differences being to `baseline`; it is printed too."""
    lines = [
        "| | mean recall, % | difference [95 %] | i2t R@1 | t2i R@1 | centroid | RMG | CS "
        "| Frechet | parameters | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        recalls = [100 * value for value in row.values("retrieval", "mean_recall")]
        error = 100 * float(np.std(row.resamples.figures["mean_recall",]))
        spread = f" ± {np.std(recalls):.2f}" if len(recalls) > 1 else ""
        firsts = [
            f"{100 * row.mean('retrieval', way, 'R@1'):.1f}"
            for way in ("image_to_text", "text_to_image")
        ]
        gaps = [f"{row.mean('gap', name):.3f}" for name in GAPS]
        cells = [
            row.name.strip(),
            f"{np.mean(recalls):.2f}{spread} ({error:.2f})",
            _difference(row, baseline),
            *firsts,
            *gaps,
            _millions(row.runs[0]["parameters"]),
            _seconds(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    print("\n" + table, flush=True)
    return table


def _difference(row: Row, baseline: Row) -> str:
    if row is baseline:
        return "0"
    difference, (low, high), verdict = row.against(baseline)
    mark = "" if verdict != "cannot tell" else ", null"
    return f"{100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]{mark}"


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}M"


def _seconds(row: Row) -> str:
    known = [run["seconds"] for run in row.runs if run["seconds"] is not None]
    return f"{np.median(known):.0f}" if known else "1"
