"""The pipeline over and over on growing data, with random kills: ``python soak.py --work DIR``.

Each round makes larger arrays, then imports, trains, applies and evaluates them: once in processes
that are killed at random moments and run again, and once in this process, which lives on. A line a
round tells what is left afterwards::

    rows         of the round
    rss          MiB of this process, with what malloc holds given back
    files        open files of this process
    threads      of this process
    processes    below this process, but for the server of the killed ones
    temporary    files and folders beside the outputs, here, in TMPDIR and in /dev/shm

The exit code is 1 if open files, threads, processes or temporary files grow, or if memory does by
more than its noise.
"""

import argparse
import ctypes
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np

import csalign
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig
from csalign.training.config import TrainConfig
from csalign.training.train import train
from tests.faults.disk import Machine

FEWEST, STEP, FIXED = 200, 40, 200  # rows


def main() -> int:
    """Run until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for all files")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    work = (given.work / f"soak-{time.time_ns()}").resolve()
    root = work / "root"
    root.mkdir(parents=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(root)
    until = time.monotonic() + 60 * given.minutes
    figures: list[list[float]] = []
    kills = 0
    shared = set(Path("/dev/shm").iterdir())
    print(f"csalign {csalign.__version__}, {given.minutes:g} minutes")
    print(f"{'round':>5} {'rows':>6} {'rss':>7} {'files':>6} {'threads':>8} {'processes':>10} "
          f"{'temporary':>10}")  # fmt: skip
    with Machine(work / "machine", root) as machine:
        while time.monotonic() < until:
            number = len(figures)
            rows = FEWEST + STEP * number
            kills += killed(machine, work, rows, chance)
            here(work, FIXED)  # so that memory does not follow the data
            temporary = set(root.iterdir()) | (set(Path("/dev/shm").iterdir()) - shared)
            figures.append([*left(), float(len(temporary))])
            rss, files, threads, processes, beside = figures[-1]
            print(f"{number:5} {rows:6} {rss:7.1f} {files:6.0f} {threads:8.0f} {processes:10.0f} "
                  f"{beside:10.0f}", flush=True)  # fmt: skip
    return judge(np.array(figures), kills)


def write_arrays(folder: Path, rows: int) -> list[object]:
    """Pairs of a shared latent; gives the options of import."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(rows)
    latent = rng.normal(size=(rows, 8))
    for name, width in (("i", 48), ("t", 32)):
        np.save(folder / f"{name}.npy", (latent @ rng.normal(size=(8, width))).astype(np.float32))
    splits = [("train", "train", "train", "val", "test")[row % 5] for row in range(rows)]
    lines = [f"{row},caption {row},{split}" for row, split in enumerate(splits)]
    (folder / "p.csv").write_text("\n".join(["image_id,caption,split", *lines]))
    options = ("--images", folder / "i.npy", "--texts", folder / "t.npy", "--pairs")
    return [*options, folder / "p.csv"]


def killed(machine: Machine, work: Path, rows: int, chance: random.Random) -> int:
    """The pipeline in processes that are killed now and then; returns how many were."""
    outs = machine.root / "kept"
    given = write_arrays(work / "arrays", rows)
    features, run, aligned = (outs / name for name in ("features", "run", "aligned"))
    commands: list[list[object]] = [
        ["import", *given, "--out", features],
        ["train", features, "--out", run, "--steps", 20, "--batch-size", 64, "--save-every", 4],
        ["apply", features, "--adapter", run, "--out", aligned],
        ["eval", features, "--adapter", run, "--resamples", 100, "--report", outs / "page.html"],
    ]
    outs.mkdir()
    kills = 0
    for command in commands:
        for _ in range(chance.randint(0, 2)):
            done = machine.run(*command, kill_after=chance.uniform(0.02, 1.0))
            kills += done.code == -9
            if done.code == 0:
                break
        else:
            done = machine.run(*command)
        # Killed when it was done, and so in its own way.
        assert done.code == 0 or "exists; choose another" in done.errors, done.errors
    left_over = {path.name for path in outs.iterdir()} - {"features", "run", "aligned", "page.html"}
    assert not left_over, left_over
    shutil.rmtree(outs)
    return kills


def here(work: Path, rows: int) -> None:
    """The pipeline in this process."""
    write_arrays(work / "small", rows)
    outs = Path(tempfile.mkdtemp(dir=work))
    arrays = {"images": work / "small" / "i.npy", "texts": work / "small" / "t.npy"}
    features, run = outs / "features", outs / "run"
    import_arrays(ImportConfig(**arrays, pairs=work / "small" / "p.csv", out=features))
    train(TrainConfig(features=features, out=run, steps=8, batch_size=64, hidden=32))
    apply(ApplyConfig(features=features, adapter=run, out=outs / "aligned"))
    evaluate(EvalConfig(features=features, adapter=run, resamples=100))
    shutil.rmtree(outs)


def left() -> tuple[float, float, float, float]:
    """MiB resident, open files, threads, and processes below this one but for the server."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = os.getpid()
    children = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            children += int(path.read_text().rpartition(")")[2].split()[1]) == own
        except OSError:
            continue
    rss = int(status["VmRSS"].split()[0]) / 1024
    return rss, len([*Path("/proc/self/fd").iterdir()]), int(status["Threads"]), children - 1


def judge(figures: np.ndarray, kills: int) -> int:
    """Tell how the figures grew after the first third of the rounds, which is warming up."""
    steady = figures[len(figures) // 3 :]
    first, last = (part.mean(axis=0) for part in np.array_split(steady, 2))
    growth = last - first
    print(f"\n{len(figures)} rounds, {kills} kills; from the first to the second half of what came "
          f"after {len(figures) // 3} rounds:")  # fmt: skip
    for name, value, grown in zip(
        ("rss, MiB", "files", "threads", "processes", "temporary"), last, growth, strict=True
    ):
        print(f"  {name:10} {value:8.1f}, {grown:+.2f}")
    noise = 3 * steady[:, 0].std() / np.sqrt(max(1, len(steady) / 2)) + 4
    return int((growth[1:] > 0.01).any() or growth[0] > noise)


if __name__ == "__main__":
    sys.exit(main())
