"""The cost of the adapters in training on a CPU, and the recall of cheaper ones.

    python tests/benchmarks/train/adapter.py steps FEATURES [--against TREE] [--set KEY=VALUE,...]
    python tests/benchmarks/train/adapter.py recall FEATURES [--seeds 4] --set KEY=VALUE,...

``steps`` measures the CPU time (user and system, one thread) per step, and the pairs per second of
it, of the default, of each ``--set`` of options and of the default of another checkout
(``--against``), in processes that take turns, `BLOCK` steps each; it prints medians over the
rounds, and the range of the ratios within a round. ``recall`` trains each of them with the same
seeds, and prints the mean validation recall, and the mean and standard error over seeds of the
difference from the default; with ``--test`` also those of the split "test". ``--common`` options
hold for all; by default the network is trained alone, without the kernel and without refitting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BLOCK = 20
WARM_UP = 10
ALONE = "ensemble=off,refit=false,unpaired_matches=false"


def parse(text: str) -> dict[str, Any]:
    """Parse ``key=value,...``; a comma of a value is written ``+``."""
    found = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        value = value.replace("+", ",")
        found[key] = {"true": True, "false": False}.get(value, value)
    return found


class Process:
    """A training run in another process, which takes `BLOCK` steps when asked."""

    def __init__(self, tree: Path, features: Path, options: dict[str, Any], steps: int) -> None:
        given = json.dumps([str(features), {**options, "steps": steps, "validations": 1}])
        self._child = subprocess.Popen(
            [sys.executable, __file__, "worker", given],
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, float]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"the worker ended with {self._child.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def measure(self) -> dict[str, float]:
        """Take `BLOCK` steps; seconds of CPU and pairs per step."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        return self._read()

    def end(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()


def work(features: str, options: dict[str, Any]) -> None:
    """Train; before each block of steps print the figures of the last, and wait for a line."""
    import csalign
    from csalign.training.network.loop import Trainer

    take, done, start = Trainer._train_step, 0, 0.0
    pairs = 0

    def step(self: Trainer, batch: Any, *others: Any) -> None:
        nonlocal done, start, pairs
        if done >= WARM_UP and (done - WARM_UP) % BLOCK == 0:
            found = {"seconds": (time.process_time() - start) / BLOCK, "pairs": pairs / BLOCK}
            print(json.dumps(found), flush=True)
            sys.stdin.readline()
            start, pairs = time.process_time(), 0
        done += 1
        pairs += batch.images.counts[0]
        take(self, batch, *others)

    Trainer._train_step = step
    with tempfile.TemporaryDirectory() as out:
        csalign.train(features, f"{out}/run", **options)


def measure_steps(args: argparse.Namespace, variants: dict[str, dict[str, Any]]) -> None:
    """Print CPU time per step and pairs per second, of all in turn."""
    steps = WARM_UP + BLOCK * (args.rounds + 1) + 1
    trees = dict.fromkeys(variants, ROOT)
    if args.against:
        trees["before"] = args.against.resolve()
        variants = {"before": variants["default"], **variants}
    all_of_it = {n: Process(trees[n], args.features, o, steps) for n, o in variants.items()}
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: process.measure() for name, process in all_of_it.items()})
    for process in all_of_it.values():
        process.end()
    first = next(iter(variants))
    print("| | CPU per step | pairs/s | times the first |\n| --- | --- | --- | --- |")
    for name in variants:
        seconds = [r[name]["seconds"] for r in rounds]
        rates = [r[name]["pairs"] / r[name]["seconds"] for r in rounds]
        bases = [r[first]["pairs"] / r[first]["seconds"] for r in rounds]
        ratios = [rate / base for rate, base in zip(rates, bases, strict=True)]
        low, high = min(ratios), max(ratios)
        print(
            f"| {name} | {1e3 * statistics.median(seconds):.0f} ms | "
            f"{statistics.median(rates):,.0f} | {statistics.median(ratios):.2f} "
            f"({low:.2f} to {high:.2f}) |"
        )


def measure_recall(args: argparse.Namespace, variants: dict[str, dict[str, Any]]) -> None:
    """Train every variant with every seed, and print recalls and differences."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, options in variants.items():
            with tempfile.TemporaryDirectory() as out:
                found[name].append(_train(args.features, {**options, "seed": seed}, out, args.test))
            print(f"seed {seed} {name}: {json.dumps(found[name][-1])}", file=sys.stderr, flush=True)
        _print_recalls(found)


def _train(features: Path, options: dict[str, Any], out: str, test: bool) -> dict[str, float]:
    import csalign

    start = time.process_time()
    result = csalign.train(features, f"{out}/run", **options)
    score = [*result.validation.values()][-1]
    found = {"val": 100 * score["mean_recall"], "gap": score["centroid_distance"]}
    found |= {"seconds": time.process_time() - start}
    if test:
        measured = csalign.evaluate(features, adapter=f"{out}/run", split="test")
        found["test"] = 100 * measured["retrieval"]["mean_recall"]
    return found


def _print_recalls(found: dict[str, list[dict[str, float]]]) -> None:
    first = next(iter(found))
    figures = [key for key in found[first][0] if key not in ("seconds", "gap")]
    heads = "".join(f" {key} recall | difference |" for key in figures)
    print(f"| |{heads} gap | CPU s |\n| --- |{' --- | --- |' * len(figures)} --- | --- |")
    for name, runs in found.items():
        cells = []
        for key in figures:
            gains = [run[key] - own[key] for run, own in zip(runs, found[first], strict=True)]
            cells.append(f"{statistics.mean(run[key] for run in runs):.2f}")
            cells.append(_with_error(gains) if name != first else "")
        cells.append(f"{statistics.mean(run['gap'] for run in runs):.3f}")
        cells.append(f"{statistics.mean(run['seconds'] for run in runs):.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _with_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+.2f} ± {error:.2f}"


def _variants(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    common = parse(args.common)
    yield "default", common
    for text in args.set:
        yield text, {**common, **parse(text)}


def main() -> None:
    """Run what the command line asks for."""
    if sys.argv[1:2] == ["worker"]:
        work(*json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["steps", "recall"])
    parser.add_argument("features", type=Path)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--set", action="append", default=[], help="options of a variant")
    parser.add_argument("--common", default=ALONE, help="options of all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="evaluate the split test too")
    args = parser.parse_args()
    (measure_steps if args.what == "steps" else measure_recall)(args, dict(_variants(args)))


if __name__ == "__main__":
    main()
