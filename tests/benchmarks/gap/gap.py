"""What a closed gap buys: mixed search, clustering and k-NN across sides, beside recall.

Usage::

    python tests/benchmarks/gap/corpora.py --work DIR --openclipart DIR --icons DIR --packages DIR
    python tests/benchmarks/gap/labels.py --work DIR --icons DIR
    python tests/benchmarks/gap/gap.py --work DIR [--corpora openclipart,icons] [--seeds 0,1,2]
        [--rows TEXT,...] [--ablation] [--csalign TREE] [--train-only | --print]

Runs are kept as DIR/runs/CORPUS/ROW-SEED, what they gave beside them as ROW-SEED.json (figures) and
.npz (the figures of 1,000 bootstrap resamples of test items). What is there is not made again, so
that several processes may share the work by corpus or seed; remove a file to have it made.

Every table is printed as Markdown and all figures are written to DIR/gap.csv. `±` is the standard
deviation over seeds; brackets hold the 95 % bootstrap interval over test items, of the mean over
seeds. Differences are paired: the same seeds and the same resamples. "null" marks an interval that
holds 0.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[3]
Settings = Mapping[str, Any]
Draws = NDArray[np.float64]

LABELS = {
    "openclipart": ("keyword", "narrow"),
    "clip": ("keyword", "narrow"),
    "icons": ("theme", "set"),
    "packages": ("section",),
    "icons-unpaired": ("theme", "set"),
    "packages-unpaired": ("section",),
}
# Nothing to train, and one seed: the features as they are, and what `eval --adapter NAME` fits.
FREE = {
    "raw": None,
    "mean shift": "mean-shift",
    "standardised": "standardised",
    "closed form": "closed-form",
}
CLOSE = {"recipe": "close-the-gap"}
TRAINED: dict[str, Settings] = {
    "default": {},
    "default without CS": {"cs_weight": 0},
    "close-the-gap": CLOSE,
    "close-the-gap without CS": {**CLOSE, "cs_weight": 0},
    "align-uniform": {"pairwise": "align-uniform"},
    "paper": {"recipe": "paper"},
    "paper without CS": {"recipe": "paper", "cs_weight": 0},
}
"""Settings of ``csalign train`` besides its defaults."""

ALONE = {"ensemble": "off", "refit": False}
# The closed form has more recall than what is trained at CLIP's scale, and would be kept.
SCALES: dict[int, Settings] = {7: {}, 100: {"logit_scale": 100, "init": "random"}}
# About alike in what they add to the loss: the Gaussian term is large, MMD small.
WEIGHTS = {
    "cs": (0.1, 1, 10),
    "mmd": (10,),
    "gaussian-kl": (0.01,),
    "sinkhorn": (1,),
    "pairs-mse": (1,),
}
UNIFORMITIES = (0.3, 1, 3)


def ablation() -> Iterator[tuple[str, Settings]]:
    """Each divergence beside InfoNCE at both scales, and align-uniform, by the network alone."""
    for scale, own in SCALES.items():
        settings = {**ALONE, **own}
        yield f"scale {scale}, none", {**settings, "cs_weight": 0}
        for name, weights in WEIGHTS.items():
            for weight in weights:
                term = {"divergence": name, "cs_weight": weight}
                yield f"scale {scale}, {name} {weight:g}", {**settings, **term}
    for start in ("canonical", "random"):
        for weight in UNIFORMITIES:
            term = {"pairwise": "align-uniform", "uniformity": weight, "cs_weight": 0}
            yield f"align-uniform {weight:g}, {start}", {**ALONE, **term, "init": start}


ABLATION = dict(ablation())


class Column(NamedTuple):
    """A figure of the tables: its place in the document of ``csalign eval``."""

    title: str
    place: tuple[str, ...]
    percent: bool = False
    label: int | None = None  # which column of labels

    @property
    def key(self) -> str:
        """Its name in the CSV file."""
        tail = "" if self.label is None else f"_{self.label + 1}"
        return ".".join(self.place) + tail

    def read(self, document: Mapping[str, Any]) -> float | None:
        """The figure, None where there is none."""
        found: Any = document if self.label is None else document["labels"].get(str(self.label))
        for name in self.place:
            found = None if found is None else found.get(name)
        return None if found is None else float(found) * (100 if self.percent else 1)


COLUMNS = (
    Column("recall, %", ("retrieval", "mean_recall"), percent=True),
    Column("mixed NDCG@10, %", ("mixed", "ndcg@10"), percent=True),
    Column("same side, %", ("mixed", "same_side@10"), percent=True),
    *(
        Column(f"{title} ({{{number}}}), %", ("groups", *place), percent=True, label=number)
        for number in (0, 1)
        for title, place in (("V", ("v_measure",)), ("k-NN", ("knn", "mean")))
    ),
    Column("centroid", ("gap", "centroid_distance")),
    Column("Frechet", ("gap", "frechet")),
    Column("of it distribution", ("gap", "frechet_parts", "distribution")),
)
KEPT = (*COLUMNS, *(Column("", ("groups", name), True, n) for n in (0, 1) for name in ("ami",)))


def beside(run: Path, ending: str) -> Path:
    """File next to a run, whose name may have dots."""
    return run.with_name(run.name + ending)


def slug(row: str) -> str:
    """A row's name in file names."""
    return row.replace(",", "").replace(" ", "-")


@dataclass(frozen=True)
class Bench:
    """Runs and figures in a folder.

    Attributes:
        work: the folder.
        tree: checkout of csalign to train and to measure with.
    """

    work: Path
    tree: Path

    def features(self, corpus: str) -> Path:
        """Feature set of a corpus."""
        return self.work / "corpora" / corpus / "features"

    def run(self, corpus: str, row: str, seed: int) -> Path:
        """Folder of a run."""
        return self.work / "runs" / corpus / f"{slug(row)}-{seed}"

    def results(self, corpus: str, row: str, seed: int) -> Path:
        """Figures of a row."""
        return beside(self.run(corpus, row, seed), ".json")

    def train(self, corpus: str, row: str, settings: Settings, seed: int) -> bool:
        """Train unless it was done; False if the command failed, which is printed."""
        out = self.run(corpus, row, seed)
        log = beside(out, ".train.json")
        if log.exists():
            return True
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "csalign", "train", str(self.features(corpus))]
        command += ["--out", str(out), "--seed", str(seed), "--json", *arguments_of(settings)]
        environment = {**os.environ, "PYTHONPATH": str(self.tree)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{corpus}, {row}, seed {seed}: {done.stderr[-500:]}", file=sys.stderr)
            return False
        log.write_text(done.stdout, encoding="utf-8")
        document = json.loads(done.stdout)
        print(f"{corpus}, {row}, seed {seed}: trained in {document['seconds']:.0f} s", flush=True)
        return True

    def measure(self, corpus: str, row: str, seed: int) -> None:
        """Write the figures and resamples of a row unless they are there."""
        path = self.results(corpus, row, seed)
        if path.exists():
            return
        from csalign.core.errors import CsalignError
        from csalign.evaluation.config import EvalConfig
        from csalign.evaluation.measure import describe, measure

        adapter = FREE[row] if row in FREE else str(self.run(corpus, row, seed))
        table = self.work / f"labels-{corpus.removesuffix('-unpaired')}.csv"
        # Resampling raises V-measure, since few distinct items agree by chance: draws are shifted.
        document: dict[str, Any] = {"row": row, "seed": seed, "labels": {}}
        draws: dict[str, Draws] = {}
        for number, name in enumerate(LABELS[corpus]):
            config = EvalConfig(
                features=self.features(corpus),
                adapter=adapter,
                split="test",
                labels=f"{table}:{name}",
            )
            try:
                evaluation = measure(config)
                found = describe(evaluation)
            except CsalignError as error:
                print(f"{corpus}, {row}: {error}", file=sys.stderr)
                return
            document["labels"][str(number)] = {"groups": found.pop("groups")}
            document |= found if not number else {}
            figures = evaluation.resamples.figures
            for column in KEPT:
                if column.label == number or (column.label is None and not number):
                    # Retrieval and gap are at the top level of resamples.
                    places = (column.place, column.place[1:])
                    values = next((figures[at] for at in places if at in figures), None)
                    if values is not None:
                        draws[column.key] = np.asarray(values) * (100 if column.percent else 1)
                        if column.place[-1] == "v_measure":
                            measured = column.read(document)
                            draws[column.key] += (measured or 0.0) - draws[column.key].mean()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".npz").open("wb") as stream:
            np.savez_compressed(stream, **draws)
        path.write_text(json.dumps(document, default=str), encoding="utf-8")
        print(f"{corpus}, {row}, seed {seed}: {summary(document)}", flush=True)

    def found(self, corpus: str, row: str) -> dict[int, Measured]:
        """What was measured of a row, by seed."""
        rows = {}
        for path in sorted(self.results(corpus, row, 0).parent.glob(f"{slug(row)}-*.json")):
            tail = path.stem.removeprefix(f"{slug(row)}-")
            if tail.isdigit() and path.with_suffix(".npz").exists():
                with np.load(path.with_suffix(".npz")) as stored:
                    draws = dict(stored)
                rows[int(tail)] = Measured(json.loads(path.read_text(encoding="utf-8")), draws)
        return rows


class Measured(NamedTuple):
    """Figures of one seed, and those of its resamples by the column's key."""

    document: Mapping[str, Any]
    draws: Mapping[str, Draws]


def arguments_of(settings: Settings) -> Iterator[str]:
    """Write settings as options."""
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{'' if value else 'no-'}{flag}"
        else:
            yield from (f"--{flag}", str(value))


def summary(document: Mapping[str, Any]) -> str:
    """The figures on one line."""
    values = ((column, column.read(document)) for column in COLUMNS)
    return "  ".join(f"{column.key} {value:.3f}" for column, value in values if value is not None)


def interval(values: Draws) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def cell(rows: Sequence[Measured], column: Column) -> str:
    """Mean over seeds, with the spread and the interval that there are."""
    values = [value for row in rows if (value := column.read(row.document)) is not None]
    if not values:
        return ""
    digits = 1 if column.percent else 3
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    if all(column.key in row.draws for row in rows):
        low, high = interval(np.mean([row.draws[column.key] for row in rows], axis=0))
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def difference(rows: Mapping[int, Measured], base: Mapping[int, Measured], column: Column) -> str:
    """Mean difference over the seeds of both, with its interval."""
    pairs = [(rows[seed], base[seed]) for seed in rows if seed in base]
    if not pairs or any(column.key not in own.draws for pair in pairs for own in pair):
        return ""
    points = [
        (value or 0.0) - (other or 0.0)
        for own, before in pairs
        for value, other in [(column.read(own.document), column.read(before.document))]
    ]
    low, high = interval(
        np.mean([own.draws[column.key] - before.draws[column.key] for own, before in pairs], 0)
    )
    digits = 1 if column.percent else 3
    null = ", null" if low <= 0 <= high else ""
    return f"{np.mean(points):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{null}"


def columns_of(corpus: str) -> list[Column]:
    """The columns that a corpus has."""
    return [own for own in COLUMNS if own.label is None or own.label < len(LABELS[corpus])]


def bases(row: str) -> tuple[str, ...]:
    """Rows that a row is compared with."""
    if row in ABLATION:
        scale = 100 if row.startswith("scale 100") or row.endswith("random") else 7
        return (f"scale {scale}, none",)
    return () if row == "default without CS" else ("default", f"{row} without CS")


def print_tables(bench: Bench, corpus: str, rows: Sequence[str]) -> None:
    """Print the figures of a corpus, and the differences to other rows."""
    found = {row: own for row in rows if (own := bench.found(corpus, row))}
    free = {row: found[row][0] for row in FREE if row in found}
    columns = columns_of(corpus)
    titles = [column.title.format(*LABELS[corpus], "", "") for column in columns]
    print(f"\n| {corpus} | {' | '.join(titles)} | seeds |\n|{'---|' * (len(columns) + 2)}")
    for row in rows:
        own = found.get(row, {})
        cells = [cell(list(own.values()), column) for column in columns]
        print(f"| {row} | {' | '.join(cells) if own else 'not measured'} | {len(own)} |")
    named = [(row, base) for row in found for base in bases(row) if base in {*found} - {row}]
    if not named:
        return
    drawn = found[named[0][1]][min(found[named[0][1]])].draws
    columns = [column for column in columns if column.key in drawn]
    titles = [column.title.format(*LABELS[corpus], "", "") for column in columns]
    print(f"\n| {corpus}, difference | {' | '.join(titles)} |\n|{'---|' * (len(columns) + 1)}")
    for row, base in named:
        own = dict.fromkeys(found[base], free[row]) if row in free else found[row]
        cells = [difference(own, found[base], column) for column in columns]
        print(f"| {row} less {base} | {' | '.join(cells)} |")


def write_csv(bench: Bench, corpora: Sequence[str]) -> None:
    """Write all figures, a row per seed."""
    lines = []
    for corpus in corpora:
        for row in (*FREE, *TRAINED, *ABLATION):
            for seed, own in bench.found(corpus, row).items():
                line: dict[str, Any] = {"corpus": corpus, "row": row, "seed": seed}
                for column in KEPT:
                    line[column.key] = column.read(own.document)
                    if column.key in own.draws:
                        low, high = interval(own.draws[column.key])
                        line |= {f"{column.key} low": low, f"{column.key} high": high}
                lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with (bench.work / "gap.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def chosen(text: str | None) -> Callable[[str], bool]:
    """Whether a row's name is, or begins with a comma-separated part in, the text."""
    parts = text.split(",") if text else [""]
    return lambda row: any(row.startswith(part.strip()) for part in parts)


def main() -> None:
    """Train and measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder of corpora and runs")
    parser.add_argument("--csalign", type=Path, default=ROOT, help="tree (default: this one)")
    parser.add_argument("--corpora", default=",".join(LABELS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", help="what names of rows begin with (default: all)")
    parser.add_argument("--ablation", action="store_true", help="rows of the ablation instead")
    parser.add_argument("--train-only", action="store_true", help="measure later")
    parser.add_argument("--print", action="store_true", help="only print what there is")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.csalign.resolve()))
    bench = Bench(arguments.work.resolve(), arguments.csalign.resolve())
    corpora = arguments.corpora.split(",")
    wanted = chosen(arguments.rows)
    trained = ABLATION if arguments.ablation else TRAINED
    free = [] if arguments.ablation else list(FREE)
    if not arguments.print:
        for seed in map(int, arguments.seeds.split(",")):
            for corpus in corpora:
                for row in filter(wanted, [*free, *trained]):
                    ready = row in FREE or bench.train(corpus, row, trained[row], seed)
                    if ready and not arguments.train_only and (row in trained or not seed):
                        bench.measure(corpus, row, seed)
    for corpus in corpora:
        print_tables(bench, corpus, [row for row in (*free, *trained) if wanted(row)])
    write_csv(bench, list(LABELS))


if __name__ == "__main__":
    main()
