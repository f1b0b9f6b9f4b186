"""csalign's default, each part of it alone, and other methods, by the number of pairs.

Usage::

    python tests/benchmarks/recall/recall.py FEATURES --name NAME --csv FILE [--pairs 300,1000,7000]
        [--train-split train] [--seeds 0,1,2] [--rows TEXT,...] [--csalign TREE] [--label NAME]
        [--trials 4] [--no-validation] [--print]

FEATURES has the splits val and test. So many training pairs are drawn by the seed, each image with
its first caption; the split val is kept, or left out by --no-validation. Every csalign run is a
process of its own, whose CPU time (of all its threads, choice of settings included) and peak of
memory are in the table. Other methods (``peers.py`` of openclipart has their recipes) are tuned on
validation: closed forms in 12 trials, trained ones in --trials of 120 steps, of which the published
setting is the first. Their CPU time is that of the fit, with the choice of settings for closed
forms and without it for trained ones.

Results are added to the CSV file and not measured twice; the key has the tree's commit or --label.
A row whose settings the tree does not know is skipped with a note. `±` is the standard deviation
over seeds; brackets hold the 95 % bootstrap interval over test pairs of the mean over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import FORMER, Outcome, Paired, Problem, Results, Tree

sys.path.insert(0, str(common.PEER_MODULES))
from peers import PEERS, SEARCH_SEED, TRIAL, Peer

from csalign.adapters.canonical import PairMoments

EPOCHS = {"epochs": 40}
LEAST_STEPS, BATCH = 200, 512
SHORTER = "15 epochs alone"
ROWS: dict[str, dict[str, Any]] = {
    "former default": {**FORMER, **EPOCHS},
    "former closed form": {**FORMER, "steps": 0},
    SHORTER: {**FORMER, "epochs": 15},
    "kernel beside it alone": {"ensemble": "auto", "refit": False, **EPOCHS},
    "every pair alone": {"ensemble": "off", "refit": True, **EPOCHS},
    "closed forms alone": {"ensemble": "auto", "refit": True, "steps": 0},
    "default": {"ensemble": "auto", "refit": True},
    "3 networks": {"ensemble": "auto", "refit": True, "networks": 3},
}
"""Settings of ``csalign train``; where a row needs an option that a tree lacks, it has no row."""

CLOSED_TRIALS = 12
REFITTED = " of every pair"


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("--name", required=True, help="of the corpus in the results")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--pairs", default="300,1000,7000")
    parser.add_argument("--rows", help="parts of names of the rows to measure (default: all)")
    parser.add_argument("--trials", type=int, default=4, help="of other trained methods")
    parser.add_argument("--no-validation", action="store_true", help="leave out the split val")
    common.add_arguments(parser)
    arguments = parser.parse_args()
    results = Results(arguments.csv, "recall")
    validation = "none" if arguments.no_validation else "val"
    counts = common.numbers(arguments.pairs)
    if not arguments.print:
        corpus = common.load_corpus(arguments.name, arguments.features, arguments.train_split)
        counts = list(dict.fromkeys(min(pairs, len(corpus.train)) for pairs in counts))
        for seed in common.numbers(arguments.seeds):
            for pairs in counts:
                problem = common.subset(corpus, pairs, seed, validation=not arguments.no_validation)
                keys = {"corpus": corpus.name, "pairs": pairs, "pool": "0"}
                keys |= {"validation": validation, "seed": seed}
                measure(results, problem, common.tree_of(arguments), keys, arguments)
    for pairs in sorted({int(row["pairs"]) for row in results.rows}):
        print_table(results, arguments.name, pairs, validation)


def measure(
    results: Results,
    problem: Problem,
    tree: Tree,
    keys: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """Measure all rows of one subset."""
    parts = arguments.rows.split(",") if arguments.rows else [""]

    def wanted(name: str, label: str) -> bool:
        known = results.find(**keys, row=name, tree=label)
        return known is None and any(name.startswith(part) for part in parts)

    with tempfile.TemporaryDirectory(prefix="recall-") as folder:
        sets: list[tuple[Path, Path]] = []

        def written() -> tuple[Path, Path]:
            if not sets:
                sets.append(common.write_sets(problem, Path(folder)))
            return sets[0]

        for name, settings in ROWS.items():
            if not wanted(name, tree.label):
                continue
            if name == SHORTER and at_least(settings, keys["pairs"]).get("steps"):
                continue  # both take the least number of steps
            if missing := tree.missing(settings):
                print(f"{name}: {tree.label} has no {', '.join(missing)}", file=sys.stderr)
                continue
            own = {**at_least(settings, keys["pairs"]), "seed": keys["seed"]}
            results.measure(
                lambda own=own: tree.outcome(written(), own), **keys, row=name, tree=tree.label
            )
        for name, peer in PEERS.items():
            if peer.fit is None and wanted(name, "peer"):
                results.measure(
                    lambda peer=peer: trained(
                        tree, written(), peer, keys["pairs"], keys["seed"], arguments.trials
                    ),
                    **keys,
                    row=name,
                    tree="peer",
                )
        for name, peer in PEERS.items():
            for again in (False, True) if peer.fit else ():
                if wanted(full := name + REFITTED * again, "peer"):
                    results.measure(
                        lambda peer=peer, again=again: fitted(problem, peer, keys["seed"], again),
                        **keys,
                        row=full,
                        tree="peer",
                    )


def at_least(settings: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Replace few epochs by 200 steps, the least that csalign takes by default."""
    own = dict(settings)
    if own.get("epochs", math.inf) * pairs < LEAST_STEPS * BATCH:
        del own["epochs"]
        own["steps"] = LEAST_STEPS
    return own


def trained(
    tree: Tree, sets: tuple[Path, Path], peer: Peer, pairs: int, seed: int, count: int
) -> Outcome:
    """A trained method with the settings of its best trial."""
    settings = [{**FORMER, **peer.fixed, **trial} for trial in peer.trials(count)]
    long = at_least(EPOCHS, pairs)
    scores = []
    for trial in settings if count > 1 else ():
        with tempfile.TemporaryDirectory(prefix="recall-") as folder:
            own = {**trial, **TRIAL, "seed": SEARCH_SEED}
            document, _, _ = tree.train(sets[0], Path(folder) / "run", own)
            kept = document["validation"]["kept"]
            scores.append((kept["mean_recall"], kept["mrr"]))
    best = settings[max(range(len(scores)), key=scores.__getitem__) if scores else 0]
    kinds = (
        str(best[name]) for name in ("adapter", "image_adapter", "text_adapter") if name in best
    )
    kind = next((kind for kind in kinds if ":" in kind), None)
    outcome = tree.outcome(sets, {**best, **long, "seed": seed}, kind=kind)
    return outcome._replace(note=f"{outcome.note} | trial {settings.index(best)} of {count}")


def fitted(problem: Problem, peer: Peer, seed: int, again: bool) -> Outcome:
    """A closed form with the settings that do best on validation.

    Args:
        problem: pairs.
        peer: the method.
        seed: of the pairs to choose by, where there is no validation split.
        again: whether to fit on every pair in the end.
    """
    assert peer.fit is not None
    with common.counted() as seconds:
        pairs, held = problem.carved(seed)
        limit = min(pairs.images.shape[1], pairs.texts.shape[1], len(pairs) - 1)
        trials = [
            {**trial, "width": min(trial.get("width", limit), limit)}
            for trial in peer.trials(CLOSED_TRIALS)
        ]
        moments = moments_of(pairs)
        forms = [peer.fit(moments, trial) for trial in trials]
        scores = [common.mean_recall(*form.embed(held)) for form in forms]
        best = int(np.argmax(scores))
        form = peer.fit(moments_of(problem.everything), trials[best]) if again else forms[best]
        return Outcome(*form.embed(problem.test), seconds(), note=str(trials[best]))


def moments_of(pairs: Paired) -> PairMoments:
    """Plain moments, each pair counting once."""
    rows = np.arange(len(pairs))
    weights = np.ones(len(pairs))
    return PairMoments.of(pairs.images, pairs.texts, (rows, rows), weights)


def print_table(results: Results, corpus: str, pairs: int, validation: str) -> None:
    """Print the rows of one number of pairs, trees in the order of the file."""
    here = [
        row
        for row in results.rows
        if (row["corpus"], row["pairs"], row["validation"]) == (corpus, str(pairs), validation)
    ]
    names = [*ROWS, *(name + end for name in PEERS for end in ("", REFITTED))]
    groups: dict[str, list[dict[str, str]]] = {}
    for tree in dict.fromkeys(row["tree"] for row in here if row["tree"] != "peer"):
        for name in ROWS:
            if found := [row for row in here if (row["row"], row["tree"]) == (name, tree)]:
                groups[f"{name} ({tree})"] = found
    for name in names:
        if found := [row for row in here if (row["row"], row["tree"]) == (name, "peer")]:
            groups[name] = found
    if groups:
        title = f"{corpus}, {pairs:,} pairs" + " (no val)" * (validation == "none")
        print("\n" + "\n".join(common.table_lines(groups, title)), flush=True)


if __name__ == "__main__":
    main()
