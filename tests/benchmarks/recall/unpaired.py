"""What rows without partners bring, by the number of pairs: CCA, KLOT and csalign.

Usage::

    python tests/benchmarks/recall/unpaired.py FEATURES --name NAME --csv FILE
        [--pairs 0,20,50,100,300,1000,3000,10000] [--pools 0,5000,40000] [--pool partners|halves]
        [--train-split train] [--seeds 0,1,2] [--rows CCA,KLOT,csalign] [--csalign TREE]
        [--label NAME] [--keep-validation] [--gaps] [--print]

FEATURES has the splits val and test. So many training pairs are drawn by the seed, and so many
other rows of each side lose their partners: with "partners" the unpaired texts belong to the
unpaired images, with "halves" no item has both sides among them, and the pool is at most half of
the rest. The split val is left out, as somebody with few pairs has no other pairs to choose
settings by; --keep-validation keeps it. Each method chooses with the pairs alone:

* CCA: plain (Hotelling 1936), from centred unit rows, with one ridge and one power of the
  correlations for both sides, chosen by mean reciprocal rank over 5 hold-outs of a fifth of the
  pairs, then fitted on all of them.
* KLOT: the unpaired term of SOTAlign (2026, arXiv 2602.23353) in code of our own. The CCA above is
  the teacher and the start of linear students f, g; the loss is InfoNCE of the pairs + alpha
  KL(OT_e*(K*) || OT_e(K)) of unpaired batches, K and K* the cosines of students and teacher, OT
  the entropic plan with uniform marginals, of mass 1. Its gradient is (OT_e(K) - OT_e*(K*)) / e.
  alpha 10, e 0.05, e* 0.01, 1,024 rows a batch, AdamW; its rate (of three) and the step (of 0,
  20, 40, 60, 80) are chosen on one hold-out; below 50 pairs they are 0.03 and 40.
* csalign: ``csalign train``, and with ``--steps 0``; with ``--rows train`` two of its options too.

Results are added to the CSV file and not measured twice. Intervals are 95 % bootstrap intervals
over test pairs of the mean over seeds, of the difference to CCA on the same pairs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from common import Outcome, Paired, Problem, Results
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from csalign.metrics.retrieval import rank_both_ways

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
POWERS = (0.0, 0.5, 1.0)
WIDTH = 256
HOLD_OUTS = 5
ALPHA, SCALE = 10.0, 10.0
STUDENT, TEACHER = 0.05, 0.01
BATCH, STEPS, CHECK = 1024, 80, 20
RATES = (0.03, 0.01, 0.1)  # relative to the root mean square of each side's weights
FEW, FEW_STEPS = 50, 40
ITERATIONS = 60
COMMANDS: dict[str, dict[str, Any]] = {
    "csalign": {},
    "csalign, none trained": {"steps": 0},
    "train --no-match-moments": {"match_moments": False},
    "train --unpaired-negatives": {"unpaired_negatives": True},
}
METHODS = ("CCA", "KLOT", *COMMANDS)


class Maps(NamedTuple):
    """Linear maps of centred unit rows."""

    mean_x: Tensor  # (d,)
    weight_x: Tensor  # (d, k)
    mean_y: Tensor  # (e,)
    weight_y: Tensor  # (e, k)

    def embed(self, rows: Paired) -> tuple[common.Floats, common.Floats]:
        """Unit outputs of both sides."""
        x = _unit(rows.images, self.mean_x) @ self.weight_x
        y = _unit(rows.texts, self.mean_y) @ self.weight_y
        return normalize(x, dim=1).numpy(), normalize(y, dim=1).numpy()


class Choice(NamedTuple):
    """Settings of CCA."""

    ridge: float
    power: float


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("--name", required=True, help="of the corpus in the results")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--pairs", default="0,20,50,100,300,1000,3000,10000")
    parser.add_argument("--pools", default="0,5000,40000", help="unpaired rows per side")
    parser.add_argument("--pool", choices=("partners", "halves"), default="partners")
    parser.add_argument("--rows", default="CCA,KLOT,csalign", help="parts of names of methods")
    parser.add_argument("--keep-validation", action="store_true", help="keep the split val")
    parser.add_argument("--gaps", action="store_true", help="print a table per number of pairs too")
    common.add_arguments(parser)
    arguments = parser.parse_args()
    results = Results(arguments.csv, "unpaired")
    validation = "val" if arguments.keep_validation else "none"
    if not arguments.print:
        corpus = common.load_corpus(arguments.name, arguments.features, arguments.train_split)
        tree = common.tree_of(arguments)
        for seed, pairs, pool in itertools.product(
            *map(common.numbers, (arguments.seeds, arguments.pairs, arguments.pools))
        ):
            if pairs > len(corpus.train):
                continue
            problem = common.subset(
                corpus,
                pairs,
                seed,
                pool=pool,
                partners=arguments.pool == "partners",
                validation=arguments.keep_validation,
            )
            named = f"{pool} {arguments.pool}" if pool else "0"
            keys = {"corpus": corpus.name, "pairs": pairs, "pool": named}
            keys |= {"validation": validation, "seed": seed}
            measure(results, problem, tree, keys, arguments.rows.split(","))
    for pool in ("partners", "halves"):
        print_table(results, arguments.name, pool, validation, gaps=arguments.gaps)


def measure(
    results: Results, problem: Problem, tree: common.Tree, keys: dict[str, Any], wanted: list[str]
) -> None:
    """Measure all methods on one subset."""
    makes: dict[str, Callable[[], Outcome]] = {}
    if len(problem.train) > 1:
        if not len(problem.images):
            makes["CCA"] = lambda: plain_cca(problem, keys["seed"])
        else:
            makes["KLOT"] = lambda: klot(problem, keys["seed"])
    for name, make in makes.items():
        if any(part in name for part in wanted):
            results.measure(make, **keys, row=name, tree="peer")
    for name, settings in COMMANDS.items():
        if not any(part in name for part in wanted) or results.find(
            **keys, row=name, tree=tree.label
        ):
            continue
        with tempfile.TemporaryDirectory(prefix="recall-") as folder:
            try:
                sets = common.write_sets(problem, Path(folder))
            except Exception as error:
                print(f"{keys}: {error}", file=sys.stderr)
                continue
            own = {**settings, "seed": keys["seed"]}
            results.measure(
                lambda sets=sets, own=own: tree.outcome(sets, own),
                **keys,
                row=name,
                tree=tree.label,
            )


def plain_cca(problem: Problem, seed: int) -> Outcome:
    """Linear CCA on the pairs."""
    with common.counted() as seconds:
        choice = choose(problem, seed)
        maps = cca(problem.everything, choice)
        return Outcome(*maps.embed(problem.test), seconds(), note=str(choice))


def choose(problem: Problem, seed: int) -> Choice:
    """The settings of the best mean reciprocal rank on held-out pairs."""
    grid = [Choice(*pair) for pair in itertools.product(RIDGES, POWERS)]
    scores = np.zeros(len(grid))
    for number in range(1 if problem.val is not None else HOLD_OUTS):
        pairs, held = problem.carved(1_000 * seed + number)
        moments = Moments(pairs)
        scores += [score(moments.cca(choice), held) for choice in grid]
    return grid[int(scores.argmax())]


def score(maps: Maps, held: Paired) -> float:
    """Mean reciprocal rank, both directions."""
    ranks = rank_both_ways(*maps.embed(held), held.text_image)
    return float(np.mean([way.summary()["mrr"] for way in ranks]))


class Moments:
    """Means, covariances and their eigenvectors of the centred unit rows of pairs, float64."""

    def __init__(self, pairs: Paired) -> None:
        self.means, self.rows, self.eigen = [], [], []
        for rows in (pairs.images, pairs.texts):
            mean = normalize(torch.from_numpy(rows), dim=1).mean(0)
            u = _unit(rows, mean)
            values, vectors = torch.linalg.eigh((u.T @ u).double() / len(u))
            self.means.append(mean)
            self.rows.append(u)
            self.eigen.append((values.clamp(min=0), vectors))
        x, y = self.rows
        self.cross = self.eigen[0][1].T @ (x.T @ y).double() @ self.eigen[1][1] / len(x)

    def cca(self, choice: Choice) -> Maps:
        """Regularised CCA, directions scaled by a power of their correlation."""
        scales = [(v + choice.ridge * v.mean() + 1e-12).rsqrt() for v, _ in self.eigen]
        product = scales[0][:, None] * self.cross * scales[1]
        left, correlations, right = torch.linalg.svd(product, full_matrices=False)
        width = min(WIDTH, len(self.rows[0]) - 1, len(correlations))
        emphasis = correlations[:width] ** choice.power
        weights = [
            (vectors * scale @ sides[:, :width]).float()
            for (_, vectors), scale, sides in zip(self.eigen, scales, (left, right.T), strict=True)
        ]
        # With a ridge the variances of a direction differ between the sides; this makes them equal
        # and leaves inner products as they are.
        spread = [(rows @ weight).std(0) for rows, weight in zip(self.rows, weights, strict=True)]
        balance = (spread[1] / spread[0]).clamp(1e-6, 1e6).sqrt()
        first, second = (weight * emphasis.float() for weight in weights)
        return Maps(self.means[0], first * balance, self.means[1], second / balance)


def cca(pairs: Paired, choice: Choice) -> Maps:
    """Regularised CCA of pairs."""
    return Moments(pairs).cca(choice)


def _unit(rows: common.Floats, mean: Tensor) -> Tensor:
    unit = normalize(torch.from_numpy(np.asarray(rows, np.float32)), dim=1)
    return normalize(unit - mean, dim=1)


def klot(problem: Problem, seed: int) -> Outcome:
    """CCA, then linear maps trained to keep its transport plan on unpaired rows."""
    with common.counted() as seconds:
        choice = choose(problem, seed)
        rate, steps = RATES[0], FEW_STEPS
        if len(problem.train) >= FEW:
            pairs, held = problem.carved(1_000 * seed)
            found = {
                (trial, step): score(maps, held)
                for trial in RATES
                for step, maps in students(pairs, problem, choice, trial, seed, STEPS)
            }
            rate, steps = max(found, key=found.__getitem__)
        *_, (_, maps) = students(problem.everything, problem, choice, rate, seed, steps)
        note = f"{choice}, rate {rate}, {steps} steps"
        return Outcome(*maps.embed(problem.test), seconds(), note=note)


def students(
    pairs: Paired, problem: Problem, choice: Choice, rate: float, seed: int, steps: int
) -> Iterator[tuple[int, Maps]]:
    """Yield the maps at the start and every `CHECK` steps.

    Args:
        pairs: to fit on.
        problem: with the unpaired rows.
        choice: of the teacher.
        rate: of learning.
        seed: of the batches.
        steps: to take.
    """
    start = cca(pairs, choice)
    yield 0, start
    x, y = _unit(pairs.images, start.mean_x), _unit(pairs.texts, start.mean_y)
    other_x = _unit(problem.images, start.mean_x)
    other_y = _unit(problem.texts.rows, start.mean_y)
    # Outputs are made unit, so that the size of a map is free.
    weights = [
        (weight / weight.square().mean().sqrt()).requires_grad_()
        for weight in (start.weight_x, start.weight_y)
    ]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + np.cos(np.pi * (step - 1) / steps)) / 2
        drawn = rng.permutation(len(x))[:512]
        batch = [
            rows[rng.permutation(len(rows))[: min(BATCH, len(other_x), len(other_y))]]
            for rows in (other_x, other_y)
        ]
        f, g = (normalize(rows[drawn] @ w, dim=1) for rows, w in zip((x, y), weights, strict=True))
        logits = SCALE * f @ g.T
        target = torch.arange(len(drawn))
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        f, g = (normalize(rows @ w, dim=1) for rows, w in zip(batch, weights, strict=True))
        cosines = f @ g.T
        with torch.no_grad():
            f, g = (
                normalize(rows @ w, dim=1)
                for rows, w in zip(batch, (start.weight_x, start.weight_y), strict=True)
            )
            gradient = (plan(cosines, STUDENT) - plan(f @ g.T, TEACHER)) / STUDENT
        optimizer.zero_grad()
        (loss + ALPHA * (gradient * cosines).sum()).backward()
        optimizer.step()
        if step % CHECK == 0 or step == steps:
            x_now, y_now = (weight.detach().clone() for weight in weights)
            yield step, start._replace(weight_x=x_now, weight_y=y_now)


def plan(cosines: Tensor, epsilon: float) -> Tensor:
    """Entropic transport plan of mass 1 with uniform marginals, (n, n), by Sinkhorn's iteration."""
    scores = cosines.double() / epsilon
    kernel = (scores - scores.max()).exp()  # e^-200 at the least
    v = torch.ones(len(kernel), dtype=torch.float64)
    for _ in range(ITERATIONS):
        u = 1 / (kernel @ v)
        v = 1 / (kernel.T @ u)
    # A last half step, averaged, so that neither side's marginal is the only exact one.
    u = (u * (1 / (kernel @ v))).sqrt()
    found = u[:, None] * kernel * v
    return (found / found.sum()).float()


def print_table(
    results: Results, corpus: str, pool: str, validation: str, *, gaps: bool = False
) -> None:
    """Print a curve over pairs, with one column per method and pool, and a table each if asked."""
    here = [
        row
        for row in results.rows
        if (row["corpus"], row["validation"]) == (corpus, validation)
        and (row["pool"] == "0" or row["pool"].endswith(pool))
    ]
    if not any(row["pool"].endswith(pool) for row in here):
        return
    columns: dict[tuple[str, str, str], None] = dict.fromkeys(
        sorted(
            {(row["row"], row["tree"], row["pool"]) for row in here},
            key=lambda key: (METHODS.index(key[0]), key[1], int(key[2].split()[0])),
        )
    )
    titles = []
    for name, tree, size in columns:
        label = name if tree == "peer" else f"{name} ({tree})"
        titles.append(label if name == "CCA" else f"{label}, {int(size.split()[0]):,}")
    print(f"\n| {corpus}, {pool}: pairs | {' | '.join(titles)} |")
    print("|---" * (len(titles) + 1) + "|")
    for pairs in sorted({int(row["pairs"]) for row in here}):
        own = [row for row in here if row["pairs"] == str(pairs)]
        base = [row for row in own if row["row"] == "CCA"]
        cells = [f"{pairs:,}"]
        for name, tree, size in columns:
            found = [
                row for row in own if (row["row"], row["tree"], row["pool"]) == (name, tree, size)
            ]
            cell = f"{common.mean_of(found, 'recall'):.1f}" if found else ""
            if found and base and name != "CCA" and (apart := common.difference(found, base)):
                cell += f" ({apart.low:+.1f} to {apart.high:+.1f})"
            cells.append(cell)
        print(f"| {' | '.join(cells)} |", flush=True)
    for pairs in sorted({int(row["pairs"]) for row in here}) if gaps else ():
        groups = {}
        for key, title in zip(columns, titles, strict=True):
            own = [row for row in here if row["pairs"] == str(pairs)]
            if found := [row for row in own if (row["row"], row["tree"], row["pool"]) == key]:
                groups[title] = found
        print("\n" + "\n".join(common.table_lines(groups, f"{corpus}, {pool}, {pairs:,} pairs")))


if __name__ == "__main__":
    main()
