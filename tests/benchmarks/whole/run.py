"""Whole commands as one runs them, beside what one would write without csalign.

    python tests/benchmarks/whole/run.py --work DIR [--rows 10000,100000,1000000] [--rounds 3]
        [--only import,train,eval,index,search] [--steps 100] [--test ROWS] [--threads 1]
        [--csalign TREE] [--peers PYTHON] [--json FILE]

    python tests/benchmarks/whole/run.py --work DIR --rows 10000 --rounds 1    # two minutes

Pairs of float16 rows, images 512 and texts 384 wide: two nonlinear views, with noise, of points
around 500 centres in 32 dimensions; every text has a caption of its own. They are drawn by a fixed
seed into DIR/ROWS, which takes up to 14 KB a row and may be removed afterwards. A tenth, 1,000 to
25,000, is the test split. Every command is a process of its own, start and imports included; in a
round all take turns. Wall time, CPU time (user and system) and the peak of resident memory are
those of the process, medians with the least and the most; a ratio is of CPU time within a round.
A peak below this script's own 70 MB is not seen.

``peers.py`` has the other scripts. PYTHON runs them; CLIP_benchmark and autofaiss are used if they
are installed there, in an environment such as

    python -m venv --system-site-packages ENV
    ENV/bin/pip install --no-deps clip_benchmark autofaiss embedding_reader "fire<0.7" termcolor

Training takes the same --steps of 512 pairs on both sides. CLIP_benchmark's function holds a table
of all pairs of test rows, so it is left out above 10,000.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {"images": 512, "texts": 384}
CENTRES, LATENT, CHUNK = 500, 32, 50_000
QUERIES = 1_000
BATCH = 512
MOST_OF_CLIP_BENCHMARK = 10_000
PEERS = Path(__file__).with_name("peers.py")


@dataclass
class Run:
    """What a process took, and what it printed."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    printed: dict[str, Any]


@dataclass
class Case:
    """A command.

    Attributes:
        group: of `--only`; its first case is what the others are compared with.
        name: in the table.
        command: of csalign, or of ``peers.py``.
        is_peer: which of the two.
        note: of what it printed, or left in the folder.
        runs: one per round.
    """

    group: str
    name: str
    command: list[str]
    is_peer: bool = False
    note: Callable[[Run], str] = lambda run: ""
    runs: list[Run] = field(default_factory=list)


def make_arrays(work: Path, rows: int) -> None:
    """Write both sides, the table of pairs, and noisy copies of some images as queries."""
    if (work / "queries.npy").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, LATENT), np.float32)
    views = {
        name: [
            rng.standard_normal(shape, np.float32) / shape[0] ** 0.5
            for shape in ((LATENT, 256), (256, width))
        ]
        for name, width in WIDTHS.items()
    }
    files = {name: (work / f"{name}.npy").open("wb") for name in WIDTHS}
    for name, file in files.items():
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, WIDTHS[name])}
        np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        latent = centres[rng.integers(0, CENTRES, count)]
        latent = latent + 0.7 * rng.standard_normal(latent.shape, np.float32)
        for name, (first, second) in views.items():
            noise = 0.3 * rng.standard_normal((count, WIDTHS[name]), np.float32)
            seen = latent + rng.standard_normal(latent.shape, np.float32)
            values = np.tanh(1.5 * seen @ first) @ second + noise
            if name == "images" and not start:
                near = values[:QUERIES]
                near = near + 0.3 * rng.standard_normal(near.shape, np.float32)
            files[name].write(values.astype(np.float16).data)
    for file in files.values():
        file.close()
    with (work / "pairs.csv").open("w") as table:
        table.write("text_id,image_id,caption\n")
        table.writelines(f'{row},{row},"picture {row} of many"\n' for row in range(rows))
    np.save(work / "queries.npy", near)


def recall_of(path: Path, work: Path) -> str:
    """Recall@10 of what a search found, against numpy's exact search, by row numbers as ids."""
    truth = work / "nearest.npy"
    if not truth.exists():
        images = np.load(work / "images.npy", mmap_mode="r")
        queries = np.load(work / "queries.npy")
        best = np.full((len(queries), 10), -np.inf, np.float32)
        items = np.zeros(best.shape, np.int64)
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK].astype(np.float32)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
            scores = np.concatenate([best, queries @ part.T], 1)
            numbers = np.broadcast_to(np.arange(start, start + len(part)), scores[:, 10:].shape)
            top = np.argpartition(-scores, 10, axis=1)[:, :10]
            best = np.take_along_axis(scores, top, 1)
            items = np.take_along_axis(np.concatenate([items, numbers], 1), top, 1)
        np.save(truth, items)
    exact = np.load(truth)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    hits = [
        len({int(hit["id"]) for hit in line["hits"]} & set(own.tolist()))
        for line, own in zip(lines, exact, strict=True)
    ]
    return f"recall@10 {np.mean(hits) / 10:.3f}"


def percent(found: dict[str, Any]) -> str:
    """Mean recall of a document of `csalign eval --json`, or of a peer."""
    if "mean_recall" in found:
        return f"mean recall {100 * found['mean_recall']:.1f} %"
    ways = [found["retrieval"][way] for way in ("image_to_text", "text_to_image")]
    recall = sum(way[f"R@{k}"] for way in ways for k in (1, 5, 10)) / 6
    return f"mean recall {100 * recall:.1f} %"


def cases_of(work: Path, rows: int, options: argparse.Namespace) -> list[Case]:
    """All commands, in an order in which each finds what it reads."""
    test = options.test or min(25_000, max(1_000, rows // 10))
    arrays = [str(work / f"{name}.npy") for name in WIDTHS]
    features, run, index = (str(work / name) for name in ("features", "run", "index"))
    own = [str(work), "--test", str(test), "--steps", str(options.steps)]
    steps = ["--steps", str(options.steps), "--batch-size", str(BATCH), "--device", "cpu"]
    train = ["train", features, "--out", run, "--overwrite", *steps]
    evaluate = ["eval", features, "--adapter", run, "--split", "test", "--json"]
    search = ["search", index, "--embedding", str(work / "queries.npy"), "--query-side", "image"]

    def recall(done: Run) -> str:
        return percent(done.printed)

    def rate(done: Run) -> str:
        return f"{BATCH * options.steps / done.cpu_s:,.0f} samples/s of CPU"

    def found(name: str) -> Callable[[Run], str]:
        return lambda done: recall_of(work / f"found-{name}.jsonl", work)

    packages = {
        name
        for name in ("clip_benchmark", "autofaiss")
        if not subprocess.run(
            [options.peers, "-c", f"import {name}"], capture_output=True, check=False
        ).returncode
    }
    table = ["--pairs", str(work / "pairs.csv"), "--test", str(test)]
    plain = ["import", *arrays, "--out", str(work / "plain"), "--overwrite"]
    found_cases = [
        Case("import", "np.load, a check, np.save", ["copy", *own], True),
        Case("import", "`csalign import IMAGES TEXTS`", plain),
        Case(
            "import",
            "`csalign import --pairs TABLE --test N`",
            ["import", *arrays, *table, "--out", features, "--overwrite"],
        ),
        Case("train", "open_clip loop, two MLPs", ["loop", *own], True, rate),
        Case(
            "train",
            "`csalign train --ensemble off --no-refit`",
            [*train, "--ensemble", "off", "--no-refit"],
            note=rate,
        ),
        Case("train", "`csalign train`", train, note=rate),
        Case("eval", "numpy + faiss, R@1/5/10", ["exact", *own], True, recall),
        Case(
            "eval",
            "`csalign eval --no-intervals`",
            [*evaluate, "--no-intervals"],
            note=recall,
        ),
        Case("eval", "`csalign eval`", evaluate, note=recall),
        Case(
            "eval",
            "`csalign eval --report PAGE`",
            [*evaluate, "--report", str(work / "page.html")],
            note=recall,
        ),
        Case("index", "faiss by hand", ["build", *own], True, lambda r: r.printed["factory"]),
        Case(
            "index",
            "`csalign index`",
            ["index", features, "--out", index, "--overwrite", "--json"],
            note=lambda r: str(r.printed.get("factory", "")),
        ),
        Case(
            "search", f"faiss by hand, {QUERIES:,} queries", ["find", *own], True, found("by-hand")
        ),
        Case(
            "search",
            "`csalign search --jsonl`",
            [*search, "--jsonl"],
            note=found("csalign"),
        ),
    ]
    if "clip_benchmark" in packages and test <= MOST_OF_CLIP_BENCHMARK:
        name = "CLIP_benchmark's `evaluate`"
        peer = Case("eval", name, ["benchmark", *own], True, recall)
        found_cases.insert(7, peer)
    if "autofaiss" in packages:
        place = next(i for i, case in enumerate(found_cases) if case.name == "`csalign index`")
        peer = Case("index", "autofaiss", ["auto", *own], True, lambda r: factory_of(r.printed))
        found_cases.insert(place, peer)
        query = ["find", *own, "--index", "auto"]
        name = "autofaiss's index"
        found_cases.insert(-1, Case("search", name, query, True, found("auto")))
    wanted = options.only.split(",")
    return [case for case in found_cases if case.group in wanted]


def factory_of(printed: dict[str, Any]) -> str:
    """The kind of index that autofaiss chose."""
    return str(printed.get("index_key", "")).replace("|", "/")


def measure(case: Case, work: Path, options: argparse.Namespace) -> Run:
    """Run a command once."""
    if case.is_peer:
        command = [options.peers, str(PEERS), *case.command]
    else:
        command = [sys.executable, "-m", "csalign", *case.command]
    environment = {
        **os.environ,
        "PYTHONPATH": str(options.csalign),
        "OMP_NUM_THREADS": str(options.threads),
        "OPENBLAS_NUM_THREADS": str(options.threads),
    }
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=environment, cwd=tempfile.gettempdir()
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        text = out.read()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{errors.read()[-3000:]}")
    if "--jsonl" in case.command:
        (work / "found-csalign.jsonl").write_text(text)
    printed = {}
    if case.is_peer or "--json" in case.command:
        printed = json.loads(text[text.index("{") :])
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(wall_s, cpu_s, usage.ru_maxrss / 1024, printed)


def print_table(cases: list[Case], rows: int, options: argparse.Namespace) -> None:
    """Print a row per command."""
    print(f"\n## {rows:,} pairs\n")
    print("| command | wall s | CPU s | peak MB | CPU, times the first of its group | |")
    print("|---" * 6 + "|")
    for case in cases:
        first = next(own for own in cases if own.group == case.group)
        ratios = [a.cpu_s / b.cpu_s for a, b in zip(case.runs, first.runs, strict=False)]
        cells = [
            f"{case.group}: {case.name}",
            spread([run.wall_s for run in case.runs]),
            spread([run.cpu_s for run in case.runs]),
            f"{max(run.peak_mb for run in case.runs):,.0f}",
            "1" if case is first else spread(ratios, 2),
            case.note(case.runs[-1]),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def spread(values: list[float], digits: int = 1) -> str:
    """Median, with the least and the most."""
    middle = f"{statistics.median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def main() -> None:
    """Measure all sizes, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="import,train,eval,index,search")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--test", type=int, help="rows (default: a tenth, 1,000 to 25,000)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csalign", type=Path, default=Path(__file__).resolve().parents[3])
    parser.add_argument("--peers", default=sys.executable, help="Python that runs the peers")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args()
    document = {}
    for rows in map(int, options.rows.split(",")):
        work = (options.work / str(rows)).resolve()
        make_arrays(work, rows)
        cases = cases_of(work, rows, options)
        try:
            for number in range(options.rounds):
                for case in cases:
                    case.runs.append(measure(case, work, options))
                    took = f"{case.runs[-1].wall_s:.1f} s"
                    print(f"round {number + 1}: {case.name}: {took}", file=sys.stderr, flush=True)
        finally:  # what there is, if a command fails or it takes too long
            print_table([case for case in cases if case.runs], rows, options)
            document[rows] = {case.name: [asdict(run) for run in case.runs] for case in cases}
            if options.json:
                options.json.write_text(json.dumps(document, indent=1))
        shutil.rmtree(work / "autofaiss", ignore_errors=True)


if __name__ == "__main__":
    main()
