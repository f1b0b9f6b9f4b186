"""What a schedule costs in recall: epochs and batch sizes by the number of pairs.

    python tests/benchmarks/train/schedule.py recall FEATURES --name NAME --csv FILE [--pairs 1000]
        [--train-split train] [--seeds 0] [--rows 15x512,40x512] [--csalign TREE] [--label NAME]
        [--trained "hidden=256"] [--default]
    python tests/benchmarks/train/schedule.py recall made --name made --csv FILE --pairs 1000000
    python tests/benchmarks/train/schedule.py minutes FEATURES --minutes 2 [--minutes 0 ...]
    python tests/benchmarks/train/schedule.py --print --csv FILE

``recall`` draws so many training pairs by the seed and trains the network alone by
``csalign train``: a row 15x512 is 15 epochs of 512 pairs per step, 200s512 is 200 steps, and
``default`` the schedule of the tree. FEATURES has the splits val and test; ``made`` is a made-up
corpus: clusters in 24 dimensions, seen through two random nonlinear maps with noise. Results are
added to the CSV file and not measured twice. Differences are to the last row of a size, of the most
epochs, with the standard error of the paired differences over test pairs.

``minutes`` runs ``csalign train --minutes``, for 0 the default, and prints how long it took beside
the estimate; in CPU seconds of one thread, as machines that measure are busy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "recall"))
import common
from common import Corpus, Outcome, Paired, Results, Tree

from csalign.adapters.checkpoint import load_adapter
from csalign.core.enums import Modality

ALONE: dict[str, Any] = {"ensemble": "off", "refit": False, "unpaired_matches": False}
ROWS = "5x512,10x512,15x512,20x512,40x512"
LATENT, CLUSTERS, VIEW, HELD_OUT = 24, 2_000, 64, 1_000


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("recall", "minutes"))
    parser.add_argument("features", nargs="?")
    parser.add_argument("--name", help="of the corpus in the results")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--pairs", default="1000")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--trained", default="", help="further options, as in 'hidden=256'")
    parser.add_argument("--minutes", type=float, action="append", default=[])
    common.add_arguments(parser)
    parser.set_defaults(csv=Path("results.csv"))
    arguments = parser.parse_args()
    if arguments.what == "minutes":
        more = dict(word.split("=") for word in arguments.trained.split())
        for minutes in arguments.minutes:
            own = {"minutes": minutes, **more} if minutes else more
            print(timed(Path(arguments.features), arguments.train_split, own), flush=True)
        return
    results = Results(arguments.csv, "schedule")
    if not arguments.print:
        measure(arguments, results)
    for corpus, pairs in sorted({(row["corpus"], int(row["pairs"])) for row in results.rows}):
        print_table(results, corpus, pairs)


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Measure all rows of the sizes and seeds."""
    tree, counts = common.tree_of(arguments), common.numbers(arguments.pairs)
    if arguments.features == "made":
        corpus = make_corpus(max(counts))
    else:
        corpus = common.load_corpus(arguments.name, Path(arguments.features), arguments.train_split)
    counts = list(dict.fromkeys(min(pairs, len(corpus.train)) for pairs in counts))
    more = dict(word.split("=") for word in arguments.trained.split())
    for pairs in counts:
        for seed in common.numbers(arguments.seeds):
            with tempfile.TemporaryDirectory(prefix="schedule-") as folder:
                sets = None
                for name in arguments.rows.split(","):
                    keys = {"corpus": corpus.name, "pairs": pairs, "pool": "0", "seed": seed}
                    keys |= {"validation": "val", "row": name, "tree": tree.label}
                    if results.find(**keys):
                        continue
                    problem = common.subset(corpus, pairs, seed)
                    sets = sets or common.write_sets(problem, Path(folder))
                    settings = {**ALONE, **length(name), **more, "seed": seed}
                    results.measure(
                        lambda s=settings, f=sets[0]: train(tree, f, s, corpus.test), **keys
                    )


def length(row: str) -> dict[str, Any]:
    """Settings of a row."""
    if row == "default":
        return {}
    many, kind, batch = re.fullmatch(r"([\d.]+)([xs])(\d+)", row).groups()  # type: ignore[union-attr]
    return {"epochs" if kind == "x" else "steps": many, "batch_size": batch, "patience": 20}


def train(tree: Tree, features: Path, settings: dict[str, Any], test: Paired) -> Outcome:
    """Train, and embed the test pairs."""
    with tempfile.TemporaryDirectory(prefix="schedule-") as folder:
        run = Path(folder) / "run"
        document, cpu_s, memory_mb = tree.train(features, run, settings)
        adapter = load_adapter(run).eval()
        sides = (
            adapter.side(side)(torch.from_numpy(rows)).detach().numpy()
            for side, rows in ((Modality.IMAGE, test.images), (Modality.TEXT, test.texts))
        )
        kept = document["validation"]["kept"]["mean_recall"]
        steps = f"val {100 * kept:.2f} made {document['steps']} best {document['best_step']}"
        return Outcome(*sides, cpu_s, memory_mb, steps)


def make_corpus(pairs: int) -> Corpus:
    """Clusters in a latent space, seen through two random nonlinear maps with noise."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, LATENT)).astype(np.float32)
    total = pairs + 2 * HELD_OUT
    latent = centres[rng.integers(0, CLUSTERS, total)]
    latent = latent + 0.5 * rng.normal(size=latent.shape).astype(np.float32)
    views = []
    for _ in range(2):
        first = rng.normal(size=(LATENT, 4 * VIEW)).astype(np.float32) / 2
        second = rng.normal(size=(4 * VIEW, VIEW)).astype(np.float32) / (4 * VIEW) ** 0.5
        view = np.tanh(latent @ first) @ second
        views.append(view + 0.3 * rng.normal(size=view.shape).astype(np.float32))
    order = np.split(np.arange(total), [pairs, pairs + HELD_OUT])
    words = [f"made {row}" for row in range(total)]
    return Corpus("made", *(Paired(*views, words).take(rows) for rows in order))


def print_table(results: Results, corpus: str, pairs: int) -> None:
    """Print recall by row, and the difference to the longest."""
    rows = [r for r in results.rows if (r["corpus"], r["pairs"]) == (corpus, str(pairs))]
    names = dict.fromkeys(row["row"] for row in rows)
    base = [row for row in rows if row["row"] == "40x512"] or rows
    print(f"\n| {corpus}, {pairs:,} pairs | val | test | to 40x512 | CPU s | steps, best |")
    print("|---" * 6 + "|")
    for name in names:
        own = [row for row in rows if row["row"] == name]
        by_seed = {row["seed"]: row for row in base}
        apart = [
            common._hits(row) - common._hits(by_seed[row["seed"]])
            for row in own
            if row["seed"] in by_seed
        ]
        gain = np.mean(apart, axis=0) * 100 / common.LOOKS if apart else np.zeros(1)
        notes = [row["note"].split() for row in own]
        print(
            f"| {name} | {np.mean([float(note[1]) for note in notes]):.2f} "
            f"| {common.mean_of(own, 'recall'):.2f} "
            f"| {gain.mean():+.2f} ± {gain.std() / len(gain) ** 0.5:.2f} "
            f"| {common.mean_of(own, 'cpu_s'):.0f} "
            f"| {', '.join(f'{note[3]} {note[5]}' for note in notes)} |"
        )


def timed(features: Path, split: str, settings: Mapping[str, Any]) -> str:
    """Run ``csalign train`` with the CPU time of its process as its clock."""
    script = "import runpy, time; time.monotonic = time.process_time; "
    script += "runpy.run_module('csalign', run_name='__main__', alter_sys=True)"
    with tempfile.TemporaryDirectory(prefix="schedule-") as folder:
        command = [sys.executable, "-c", script, "train", str(features), "--json"]
        command += ["--out", f"{folder}/run", "--train-split", split]
        command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    document = json.loads(done.stdout)
    words = ("in all", "minutes", "parts:", "refitted")
    said = [line for line in done.stderr.splitlines() if any(word in line for word in words)]
    head = f"{dict(settings)}: {document['seconds']:.0f} s, best step {document['best_step']}"
    return "\n".join([head, *said])


if __name__ == "__main__":
    main()
