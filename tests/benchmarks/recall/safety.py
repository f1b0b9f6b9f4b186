"""Whether csalign's default loses to simpler things where the data are bad, and how it warns.

Usage::

    python tests/benchmarks/recall/safety.py FEATURES --name NAME --csv FILE [--train-split train]
        [--shared FILE.npy] [--pairs 1000] [--seeds 0,1,2] [--cases TEXT,...] [--csalign TREE]
        [--label NAME] [--print]

FEATURES has the split test; so many of its training pairs are drawn by the seed and made bad, and
there is no validation split. FILE.npy holds two sides (2, n, d) that share a space already, row i
of one with row i of the other; 200 rows are for test. Beside csalign stand the raw and the centred
features, where both sides have the same width, and a plain CCA as ``unpaired.py`` chooses it. A
case fails if the 95 % interval of csalign less the best of the others (chosen on test, in their
favour) is below 0. Warnings are those of ``csalign train --json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import Floats, Outcome, Paired, Problem, Results, Side
from unpaired import plain_cca

WRONG, JUNK = 0.2, 0.5
LOUD, TIMES = 3, 300.0
NARROW = 48
FEW = 60
SHARED_TEST = 200
OTHERS = ("raw features", "centred features", "plain CCA")
Change = Callable[[Problem, np.random.Generator], Problem]


def wrong_pairs(problem: Problem, rng: np.random.Generator) -> Problem:
    """Exchange the texts of a fifth of the pairs among them."""
    order = np.arange(len(problem.train))
    which = rng.permutation(order)[: round(WRONG * len(order))]
    order[which] = np.roll(which, 1)
    train = problem.train
    texts, captions = train.texts[order], [train.captions[row] for row in order]
    return replace(problem, train=Paired(train.images, texts, captions))


def junk_captions(problem: Problem, rng: np.random.Generator) -> Problem:
    """Give half of the images one text."""
    order = np.arange(len(problem.train))
    which = rng.permutation(order)[: round(JUNK * len(order))]
    order[which] = which[0]
    train = problem.train
    texts, captions = train.texts[order], [train.captions[row] for row in order]
    return replace(problem, train=Paired(train.images, texts, captions))


def loud_dimensions(problem: Problem, rng: np.random.Generator) -> Problem:
    """Fill three dimensions of each side with large values that say nothing."""

    def loud(rows: Floats) -> Floats:
        rows = rows.copy()
        values = 1 + 0.3 * rng.standard_normal((len(rows), LOUD))
        rows[:, :LOUD] = TIMES * np.abs(rows).mean() * values
        return rows

    train, test = (
        replace(part, images=loud(part.images), texts=loud(part.texts))
        for part in (problem.train, problem.test)
    )
    return replace(problem, train=train, test=test)


def unequal_widths(problem: Problem, rng: np.random.Generator) -> Problem:
    """Project the texts at random to 48 dimensions."""
    width = problem.train.texts.shape[1]
    by = (rng.standard_normal((width, NARROW)) / width**0.5).astype(np.float32)
    train, test = (replace(part, texts=part.texts @ by) for part in (problem.train, problem.test))
    return replace(problem, train=train, test=test, texts=Side(train.texts[:0], []))


def few_pairs(problem: Problem, rng: np.random.Generator) -> Problem:
    """Keep 60 pairs."""
    which = rng.permutation(len(problem.train))[:FEW]
    return replace(problem, train=problem.train.take(which))


def nothing(problem: Problem, rng: np.random.Generator) -> Problem:
    """Leave the pairs as they are."""
    return problem


CASES: dict[str, Change] = {
    "good pairs": nothing,
    "20 % wrong pairs": wrong_pairs,
    "half junk captions": junk_captions,
    "3 loud dimensions": loud_dimensions,
    "48 dimensions beside more": unequal_widths,
    "60 pairs": few_pairs,
}
SHARED: dict[str, Change] = {
    "shared space": nothing,
    "shared space, 60 pairs": few_pairs,
    "shared space, 20 % wrong pairs": wrong_pairs,
    "shared space, 3 loud dimensions": loud_dimensions,
}


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("--name", required=True, help="of the corpus in the results")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--shared", type=Path, help="two sides that share a space, (2, n, d)")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--cases", help="parts of names of cases to measure (default: all)")
    common.add_arguments(parser)
    arguments = parser.parse_args()
    results = Results(arguments.csv, "safety")
    tree = common.tree_of(arguments)
    if not arguments.print:
        corpus = common.load_corpus(arguments.name, arguments.features, arguments.train_split)
        parts = arguments.cases.split(",") if arguments.cases else [""]
        for seed in common.numbers(arguments.seeds):
            good = common.subset(corpus, arguments.pairs, seed, validation=False)
            problems = [(arguments.name, good, CASES)]
            if arguments.shared:
                problems.append(("shared", shared(np.load(arguments.shared), seed), SHARED))
            for name, problem, cases in problems:
                for case, change in cases.items():
                    if any(part in case for part in parts):
                        made = change(problem, np.random.default_rng(seed))
                        keys = {"corpus": f"{name}: {case}", "pairs": len(made.train)}
                        keys |= {"pool": "0", "validation": "none", "seed": seed}
                        measure(results, made, tree, keys)
    sys.exit(print_table(results, tree.label))


def shared(sides: Floats, seed: int) -> Problem:
    """Pairs of a space that both sides share: some for test, the others to learn from."""
    images, texts = np.asarray(sides, np.float32)
    pairs = Paired(images, texts, [f"caption {row}" for row in range(len(images))])
    order = np.random.default_rng(seed).permutation(len(pairs))
    train, test = pairs.take(order[SHARED_TEST:]), pairs.take(order[:SHARED_TEST])
    return Problem(train, None, test, images[:0], Side(texts[:0], []))


def measure(results: Results, problem: Problem, tree: common.Tree, keys: dict[str, Any]) -> None:
    """Measure all methods on one case."""
    train, test = problem.train, problem.test
    if train.images.shape[1] == train.texts.shape[1]:
        means = [side.mean(0) for side in (_unit(train.images), _unit(train.texts))]
        raw = Outcome(test.images, test.texts, 0.0)
        centred = (_unit(side) - mean for side, mean in zip(raw[:2], means, strict=True))
        made = Outcome(*centred, 0.0)
        for name, outcome in zip(OTHERS, (raw, made), strict=False):
            results.measure(lambda outcome=outcome: outcome, **keys, row=name, tree="peer")
    results.measure(lambda: plain_cca(problem, keys["seed"]), **keys, row=OTHERS[-1], tree="peer")
    if results.find(**keys, row="csalign", tree=tree.label):
        return
    with tempfile.TemporaryDirectory(prefix="recall-") as folder:
        sets = common.write_sets(problem, Path(folder))
        results.measure(
            lambda: tree.outcome(sets, {"seed": keys["seed"]}),
            **keys,
            row="csalign",
            tree=tree.label,
        )


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def print_table(results: Results, label: str) -> int:
    """Print a line per case; return how many fail."""
    print(f"| | {' | '.join(OTHERS)} | csalign ({label}) | less the best of them | | warnings |")
    print("|---" * (len(OTHERS) + 5) + "|")
    failures = 0
    for case in dict.fromkeys(row["corpus"] for row in results.rows):
        here = [row for row in results.rows if row["corpus"] == case]
        own = [row for row in here if (row["row"], row["tree"]) == ("csalign", label)]
        others = {name: [row for row in here if row["row"] == name] for name in OTHERS}
        cells = [
            f"{common.mean_of(rows, 'recall'):.1f}" if rows else "" for rows in others.values()
        ]
        known = [rows for rows in others.values() if rows]
        if not own or not known:
            continue
        best = max(known, key=lambda rows: common.mean_of(rows, "recall"))
        apart = common.difference(own, best)
        is_lost = apart is not None and apart.high < 0
        failures += is_lost
        cells += [f"{common.mean_of(own, 'recall'):.1f}", str(apart), "FAILS" if is_lost else "ok"]
        print(f"| {case} | {' | '.join(cells)} | {'; '.join(warnings_of(own))} |")
    return failures


def warnings_of(rows: list[dict[str, str]]) -> Iterator[str]:
    """Each warning of the runs once."""
    notes = (row["note"].partition(" | ")[2] for row in rows)
    yield from dict.fromkeys(note for note in notes if note)


if __name__ == "__main__":
    main()
