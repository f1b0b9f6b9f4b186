"""Compare ways to align several sides, with some of the memberships missing.

Usage::

    python tests/benchmarks/sides/run.py DIR/art DIR/icons --out OUT
    python tests/benchmarks/sides/run.py DIR/art DIR/icons --out OUT --print

The folders are those of corpus.py. Each run is a JSON file of figures and an .npz of ranks below
OUT, and is made once; remove its file to make it again. All methods are measured by matrix.py on
the test items, which keep all their memberships.

Methods: ``gcca`` is generalised CCA alone; ``hub-no-cs`` and ``hub`` train on pairs with the text
side, without and with the divergence; ``all`` on all pairs; ``holder`` with the divergence of all
sides at once; ``pairwise`` trains a two-sided run for each pair of sides, with defaults; ``volume``
is GRAM's loss (volume.py) at its best validation, ``volume-last`` at its end. ``add-NAME`` fits
NAME into a space of the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
from matrix import (
    Embed,
    Pair,
    Sides,
    all_ranks,
    hits,
    interval,
    load_sides,
    mean_recall,
    pair_ranks,
    recall,
    spread,
)
from volume import embedding, train_volume

import csalign

TREE = Path(__file__).parents[3]
HUBS = ("title", "name", "english")  # whichever of them the corpus has
METHODS = ("gcca", "hub-no-cs", "hub", "all", "holder", "pairwise", "volume")
SHOWN = (*METHODS, "volume-last")
Ranks = dict[Pair, Any]


def command(*words: object) -> tuple[Any, float]:
    """Run csalign with ``--json`` on one thread: its document and its CPU seconds."""
    environment = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    call = [sys.executable, "-m", "csalign", *map(str, words), "--json"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(call, stdout=out, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"csalign {' '.join(map(str, words))}\n{errors.read()[-2000:]}")
        return json.loads(out.read()), usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Problem:
    """A corpus with a share of its memberships missing, and where its results are."""

    corpus: Path
    missing: int  # percent
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """Where its results are."""
        return self.out / self.corpus.name / f"{self.missing}-{self.seed}"

    @property
    def table(self) -> str:
        """Its table of items."""
        return f"items-{self.missing}-{self.seed}.csv" if self.missing else "items.csv"

    def sides(self) -> Sides:
        """Read it."""
        return load_sides(self.corpus, self.table)

    def file(self, method: str, kind: str = "json") -> Path:
        """Where a result is."""
        return self.folder / f"{method}.{kind}"

    def result(self, method: str) -> dict[str, Any] | None:
        """The figures of a finished run."""
        path = self.file(method)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def ranks(self, method: str) -> Ranks:
        """The ranks of a finished run."""
        with np.load(self.file(method, "npz")) as stored:
            return {tuple(name.split(">")): stored[name] for name in stored.files}

    def keep(self, method: str, found: Ranks, cpu_s: float, **figures: Any) -> None:
        """Write the result of a run."""
        matrix: dict[str, dict[str, Any]] = {}
        for (a, b), own in found.items():
            cell = {f"R@{k}": float((own <= k).mean()) for k in (1, 5, 10)}
            matrix.setdefault(a, {})[b] = {**cell, "queries": len(own)}
        document = {
            "corpus": self.corpus.name,
            "missing": self.missing,
            "seed": self.seed,
            "method": method,
            "mean_recall": mean_recall(found),
            "cpu_s": cpu_s,
            **figures,
            "matrix": matrix,
        }
        np.savez(self.file(method, "npz"), **{f"{a}>{b}": own for (a, b), own in found.items()})
        self.file(method).write_text(json.dumps(document, indent=1), encoding="utf-8")
        print(f"{self.folder} {method}: {document['mean_recall']:.2f} %, {cpu_s:.0f} s", flush=True)


def write_set(sides: Sides, folder: Path, names: Sequence[str]) -> list[object]:
    """Write the rows that have a membership, and the table; return the words for an import."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = []
    for name in names:
        own = sides.of_items[name]
        np.save(folder / f"{name}.npy", sides.rows[name][own[own >= 0]])
        columns.append(
            [str(n) if h else "" for n, h in zip(np.cumsum(own >= 0) - 1, own >= 0, strict=True)]
        )
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("item", "split", *names))
        numbers = (f"item-{row}" for row in range(len(sides.splits)))
        writer.writerows(zip(numbers, sides.splits, *columns, strict=True))
    files = [word for name in names for word in ("--side", f"{name}={folder / name}.npy")]
    return [*files, "--pairs", folder / "items.csv"]


def write_pair(sides: Sides, pair: Pair, folder: Path) -> list[object]:
    """Write all rows of two sides that train and validate; return the words for an import."""
    folder.mkdir(parents=True, exist_ok=True)
    learned = np.isin(sides.splits, ("train", "val"))
    tables: dict[str, list[tuple[str, ...]]] = {
        "images": [("id", "split")],
        "texts": [("id", "image_id", "split")],
    }
    own = [np.where(learned, sides.of_items[name], -1) for name in pair]
    for side, rows, name in zip(tables, own, pair, strict=True):
        np.save(folder / f"{side}.npy", sides.rows[name][rows[rows >= 0]])
    for item in np.flatnonzero(own[0] >= 0):
        tables["images"].append((f"item-{item}", sides.splits[item]))
    for item in np.flatnonzero(own[1] >= 0):
        image = f"item-{item}" if own[0][item] >= 0 else ""
        tables["texts"].append((f"text-{item}", image, sides.splits[item]))
    for side, lines in tables.items():
        with (folder / f"{side}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(lines)
    return [
        *("--images", folder / "images.npy", "--texts", folder / "texts.npy"),
        *("--image-table", folder / "images.csv", "--text-table", folder / "texts.csv"),
    ]


def pairwise(problem: Problem, sides: Sides) -> None:
    """Train a two-sided run for each pair of sides; each is kept, so that this resumes."""
    found: Ranks = {}
    cpu_s = 0.0
    pairs: dict[str, Any] = {}
    for a, b in combinations(sides.names, 2):
        own = f"pair-{a}-{b}"
        if (done := problem.result(own)) is None:
            with tempfile.TemporaryDirectory(prefix="sides-") as work:
                folder = Path(work)
                command(
                    "import", *write_pair(sides, (a, b), folder / "rows"), "--out", folder / "set"
                )
                train = ("train", folder / "set", "--out", folder / "run", "--seed", problem.seed)
                document, spent = command(*train)
                ranks = pair_ranks(sides, (a, b), two_sided(folder / "run", (a, b)))
            problem.keep(
                own, ranks, spent, start=document.get("start"), pairs=document.get("pairs")
            )
            done = problem.result(own)
            assert done is not None
        found |= problem.ranks(own)
        cpu_s += done["cpu_s"]
        pairs[f"{a}-{b}"] = done["pairs"]
    problem.keep("pairwise", found, cpu_s, models=len(pairs), pairs=pairs)


def two_sided(run: Path, pair: Pair) -> Embed:
    """Return a function that embeds the sides of a pair, which the run calls image and text."""
    adapter, modality = csalign.load_adapter(run), dict(zip(pair, ("image", "text"), strict=True))
    return lambda name, rows: adapter.embed(modality[name], rows)


def sided_set(problem: Problem, sides: Sides) -> Path:
    """Import the corpus, once."""
    path = problem.folder / "set"
    if not path.exists():
        words = write_set(sides, problem.folder / "rows", sides.names)
        command("import", *words, "--out", path)
        shutil.rmtree(problem.folder / "rows")
    return path


def measure_run(
    problem: Problem, sides: Sides, method: str, run: Path, cpu_s: float, **figures: Any
) -> None:
    """Measure a run of all sides."""
    problem.keep(method, all_ranks(sides, csalign.load_adapter(run).embed), cpu_s, **figures)


def joint(problem: Problem, sides: Sides, method: str) -> None:
    """Train one run of all sides."""
    hub = hub_of(sides)
    options: dict[str, tuple[object, ...]] = {
        "gcca": ("--steps", 0, "--ensemble", "off"),
        "hub-no-cs": ("--hub", hub, "--cs-weight", 0),
        "hub": ("--hub", hub),
        "all": (),
        "holder": ("--divergence", "holder"),
    }
    features, run = sided_set(problem, sides), problem.folder / f"{method}-run"
    train = ("train", features, "--out", run, "--overwrite", "--seed", problem.seed)
    document, cpu_s = command(*train, *options[method])
    evaluation = command("eval", features, "--adapter", run, "--split", "test")[0]
    figures = {"start": document.get("start"), "eval_mean_recall": evaluation.get("mean_recall")}
    measure_run(problem, sides, method, run, cpu_s, models=1, **figures)
    if method != "gcca":  # where the volume loss starts
        shutil.rmtree(run)


def add_side(problem: Problem, sides: Sides, name: str) -> None:
    """Train on the other sides, then fit one into their space."""
    features = sided_set(problem, sides)
    others = ",".join(own for own in sides.names if own != name)
    with tempfile.TemporaryDirectory(prefix="sides-") as work:
        base, run = Path(work) / "base", Path(work) / "run"
        seed = ("--seed", problem.seed)
        _, first = command("train", features, "--sides", others, "--out", base, *seed)
        _, second = command(
            "train", features, "--add-side", name, "--into", base, "--out", run, *seed
        )
        measure_run(problem, sides, f"add-{name}", run, first + second, added_cpu_s=second)


def volume(problem: Problem, sides: Sides) -> None:
    """Train by a volume loss from the same start, and again on the items that validated."""
    if not (full := problem.folder / "gcca-run").exists():
        raise RuntimeError("volume starts from the run of gcca: run that first")
    hub, start = hub_of(sides), problem.folder / "gcca-held-run"
    options = ("--steps", 0, "--ensemble", "off", "--no-refit", "--overwrite")
    _, spent = command("train", problem.folder / "set", "--out", start, *options)
    began = time.process_time()
    _, last, step = train_volume(sides, csalign.load_adapter(start), hub, problem.seed)
    again = train_volume(sides, csalign.load_adapter(full), hub, problem.seed, stop=step)[1]
    spent += time.process_time() - began
    problem.keep("volume-last", all_ranks(sides, embedding(last)), spent, models=1)
    ranks = all_ranks(sides, embedding(again))
    problem.keep("volume", ranks, spent, models=1, best_step=step)
    shutil.rmtree(start)


def hub_of(sides: Sides) -> str:
    """The side of texts."""
    return next(name for name in HUBS if name in sides.names)


def run_one(problem: Problem, method: str) -> None:
    """Make one result, unless it is there; a failure is printed and left out."""
    if problem.file(method).exists():
        return
    problem.folder.mkdir(parents=True, exist_ok=True)
    sides = problem.sides()
    try:
        if method == "pairwise":
            pairwise(problem, sides)
        elif method == "volume":
            volume(problem, sides)
        elif method.startswith("add-"):
            add_side(problem, sides, method.removeprefix("add-"))
        else:
            joint(problem, sides, method)
    except RuntimeError as error:
        print(f"{problem.folder} {method} failed: {error}", file=sys.stderr, flush=True)


def table(problems: Sequence[Problem], methods: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown for a corpus and share: a line per method, over seeds."""
    sides = problems[0].sides()
    yield (
        "| method | models | mean recall, % | 95 % | less pairwise [95 %] | CPU s | of pairwise |"
    )
    yield "|---" * 7 + "|"
    bars = {own.seed: own for own in problems if own.file("pairwise").exists()}
    for method in methods:
        done = [own for own in problems if own.file(method).exists()]
        if not done:
            continue
        results = [own.result(method) or {} for own in done]
        values = [hits(sides, own.ranks(method)) for own in done]
        _, low, high = interval(np.mean([v for v, _ in values], axis=0), values[0][1])
        shared = [own for own in done if own.seed in bars]
        apart, ratio = "", ""
        if shared and method != "pairwise":
            differences = [
                hits(sides, own.ranks(method))[0] - hits(sides, own.ranks("pairwise"))[0]
                for own in shared
            ]
            mean, *ends = interval(np.mean(differences, axis=0), values[0][1])
            apart = f"{mean:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]"
            spent = [
                sum((own.result(name) or {})["cpu_s"] for own in shared)
                for name in (method, "pairwise")
            ]
            ratio = f"{spent[0] / spent[1]:.2f}"
        cells = (
            str(results[0].get("models", 1)),
            spread([own["mean_recall"] for own in results]) + f" ({len(done)})",
            f"[{low:.2f}, {high:.2f}]",
            apart,
            f"{np.mean([own['cpu_s'] for own in results]):.0f}",
            ratio,
        )
        yield f"| {method} | {' | '.join(cells)} |"


def matrix_table(problems: Sequence[Problem], method: str) -> Iterator[str]:
    """Lines of Markdown: recall from the side of the line to that of the column, over seeds."""
    done = [own.ranks(method) for own in problems if own.file(method).exists()]
    names = problems[0].sides().names
    yield f"| {method} | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for a in names:
        cells = [
            "" if a == b else f"{np.mean([recall(own[a, b]) for own in done]):.1f}" for b in names
        ]
        yield f"| {a} | {' | '.join(cells)} |"


def added_table(problems: Sequence[Problem]) -> Iterator[str]:
    """Lines of Markdown: a side added later against the joint run, on its own lines and columns."""
    yield "| side | pairs with it: added, % | joint | difference [95 %] | CPU s of adding |"
    yield "|---" * 5 + "|"
    sides = problems[0].sides()
    pairs = list(permutations(sides.names, 2))
    for name in sides.names:
        method = f"add-{name}"
        done = [own for own in problems if own.file(method).exists() and own.file("all").exists()]
        if not done:
            continue
        of_it = [row for row, pair in enumerate(pairs) if name in pair]
        both = [
            [hits(sides, own.ranks(kind))[0][of_it] for own in done] for kind in (method, "all")
        ]
        has = hits(sides, done[0].ranks(method))[1][of_it]
        means = [
            np.mean([100 * (v.sum(axis=1) / has.sum(axis=1)).mean() for v in own]) for own in both
        ]
        mean, low, high = interval(np.mean(both[0], axis=0) - np.mean(both[1], axis=0), has)
        spent = np.mean([(own.result(method) or {})["added_cpu_s"] for own in done])
        yield (
            f"| {name} | {means[0]:.2f} | {means[1]:.2f} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] "
            f"| {spent:.0f} |"
        )


def report(groups: Mapping[tuple[str, int], Sequence[Problem]]) -> Iterator[str]:
    """All tables, as Markdown."""
    for (corpus, missing), problems in groups.items():
        yield f"\n### {corpus}, {missing} % missing\n"
        yield from table(problems, SHOWN)
        for method in SHOWN:
            if any(own.file(method).exists() for own in problems):
                yield ""
                yield from matrix_table(problems, method)
        if any(problems[0].folder.glob("add-*.json")):
            yield ""
            yield from added_table(problems)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpora", type=Path, nargs="+", help="folders of corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, old and new")
    parser.add_argument("--missing", default="20,60", help="percent of the memberships")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(METHODS), help="methods; add is each add-NAME")
    parser.add_argument("--print", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    groups = {
        (corpus.name, missing): [
            Problem(corpus, missing, seed, arguments.out)
            for seed in map(int, arguments.seeds.split(","))
        ]
        for corpus in arguments.corpora
        for missing in map(int, arguments.missing.split(","))
    }
    if not arguments.print:
        every = [own for problems in groups.values() for own in problems]
        for problem in sorted(every, key=lambda own: own.seed):
            for method in arguments.only.split(","):
                names = problem.sides().names if method == "add" else ()
                for own in [f"add-{name}" for name in names] or [method]:
                    run_one(problem, own)
    print("\n".join(report(groups)))


if __name__ == "__main__":
    main()
