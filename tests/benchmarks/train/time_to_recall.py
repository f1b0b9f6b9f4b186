"""Seconds until an InfoNCE MLP's best validation recall is reached, by it and by `csalign train`.

    python tests/benchmarks/train/time_to_recall.py FEATURES --work DIR [--epochs 10,40]
        [--seeds 0,1,2] [--threads 1] [--csalign OPTIONS] [--json FILE]

FEATURES has the splits train and val (icons' `prepare.py`: 80,541 training images, 500 to validate
on). The MLP is what one would write with open_clip at hand: two networks [linear 1024, GELU,
dropout 0.3, linear 256] on unit rows times the square root of their width, open_clip's ClipLoss
with a learned scale from 14.29, AdamW at 2e-3 with 5 % warm-up and a cosine, batches of 512, a
caption per image and epoch: the settings that no trial of `openclipart/peers.py` beat. It is
trained for each number of --epochs, since a shorter schedule gets less recall sooner; 40
validations each.

Both are processes of their own, one after the other, on the same cores; what they write of a
validation is read as it appears, with the process's CPU time (user and system, all threads) and the
wall time since its start: imports, reading and csalign's closed form are included. The MLP reads
.npy files, csalign the feature set. csalign writes its figures in blocks, so its times are at most
some steps late. "done" is the end of the process, with the kernel and all else that csalign adds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

BATCH, WIDTH, HIDDEN, DROPOUT = 512, 256, 1024, 0.3
RATE, DECAY, SCALE, WARMUP = 2e-3, 0.01, 14.29, 0.05
VALIDATIONS = 40
TICK_S = 0.05
RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Point:
    """A validation: mean recall in [0, 1], and what the process had taken when it was seen."""

    step: int
    recall: float
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Course:
    """The validations of one process, and what it took to its end."""

    points: list[Point]
    cpu_s: float
    wall_s: float
    peak_mb: float

    @property
    def best(self) -> Point:
        """The first validation of the best recall."""
        return max(self.points, key=lambda point: point.recall)

    def first(self, recall: float) -> Point | None:
        """The first validation of at least that recall."""
        return next((point for point in self.points if point.recall >= recall), None)


def watch(command: Sequence[str], logs: Sequence[Path], threads: int) -> Course:
    """Run a command, and see when it writes a validation into the first of these files to exist."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.monotonic()
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stderr=errors)
    points: list[Point] = []
    seen = 0
    while True:
        try:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            cpu_s = usage.ru_utime + usage.ru_stime if done else cpu_of(process.pid)
        except FileNotFoundError:
            continue
        wall_s = time.monotonic() - began
        log = next((path for path in logs if path.exists()), None)
        if log is not None:
            whole = log.read_bytes()[seen:].rpartition(b"\n")[0]
            seen += len(whole) + bool(whole)
            for line in map(json.loads, whole.splitlines()):
                if "validation" in line and not {"refit"} & set(line):
                    recall = line["validation"]["mean_recall"]
                    points.append(Point(line["step"], recall, cpu_s, wall_s))
        if done:
            break
        time.sleep(TICK_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    with errors:
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{errors.read()[-2000:]}")
    return Course(points, cpu_s, wall_s, usage.ru_maxrss / 1024)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write_arrays(features: Path, folder: Path) -> None:
    """Write the captioned rows of both splits as .npy files, for the MLP to read."""
    from csalign.features.join import load_rows
    from csalign.features.reader import FeatureSet

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        rows = load_rows(FeatureSet.open(features), split)
        images = np.flatnonzero(rows.caption_counts)
        counts = rows.caption_counts[images]
        np.save(folder / f"{split}-images.npy", np.asarray(rows.images[images], np.float32))
        texts = rows.texts[rows.texts_by_image]
        np.save(folder / f"{split}-texts.npy", np.asarray(texts, np.float32))
        np.save(folder / f"{split}-counts.npy", counts)
        if split == "val" and (counts > 1).any():
            raise SystemExit(f"{features}: the split val needs one caption per image")


def mlp(width: int) -> nn.Sequential:
    """The network of one side."""
    return nn.Sequential(
        nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, WIDTH)
    )


def scaled(rows: Tensor) -> Tensor:
    """Unit rows times the square root of their width."""
    found: Tensor = normalize(rows, dim=1) * rows.shape[1] ** 0.5
    return found


def mean_recall(x: Tensor, y: Tensor) -> float:
    """Mean of recall at 1, 5 and 10 both ways of matched unit rows; ties count against."""
    scores = x @ y.T
    found = []
    for own in (scores, scores.T):
        ranks = (own >= own.diag()[:, None]).sum(1)
        found += [float((ranks <= k).float().mean()) for k in RECALL_AT]
    return sum(found) / len(found)


def train_mlp(folder: Path, log: Path, epochs: int, seed: int, threads: int) -> None:
    """Train the MLPs, and write a line of each validation."""
    from open_clip.loss import ClipLoss

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    arrays = {
        (split, name): np.load(folder / f"{split}-{name}.npy")
        for split in ("train", "val")
        for name in ("images", "texts", "counts")
    }
    images, texts = (torch.from_numpy(arrays["train", name]) for name in ("images", "texts"))
    counts = arrays["train", "counts"]
    starts = np.cumsum(counts) - counts
    val = [scaled(torch.from_numpy(arrays["val", name])) for name in ("images", "texts")]
    sides = nn.ModuleList(mlp(side.shape[1]) for side in (images, texts))
    log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
    groups = [
        {"params": [p for p in sides.parameters() if p.ndim > 1]},
        {"params": [*(p for p in sides.parameters() if p.ndim < 2), log_scale], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY, fused=True)
    per_epoch = len(images) // BATCH
    steps = epochs * per_epoch
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    loss = ClipLoss()
    every = max(1, steps // VALIDATIONS)
    for step in range(1, steps + 1):
        place = (step - 1) % per_epoch
        if place == 0:
            order = rng.permutation(len(images))
        rows = order[place * BATCH : (place + 1) * BATCH]
        captions = starts[rows] + rng.integers(0, counts[rows])
        batch = images[torch.from_numpy(rows)], texts[torch.from_numpy(captions)]
        x, y = (normalize(side(scaled(own)), dim=1) for side, own in zip(sides, batch, strict=True))
        optimizer.zero_grad()
        loss(x, y, log_scale.exp()).backward()
        nn.utils.clip_grad_norm_(sides.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            log_scale.clamp_(max=math.log(100))
        if step % every == 0 or step == steps:
            sides.eval()
            with torch.inference_mode():
                embedded = [
                    normalize(side(own), dim=1) for side, own in zip(sides, val, strict=True)
                ]
            sides.train()
            line = {"step": step, "validation": {"mean_recall": mean_recall(*embedded)}}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")


def print_table(courses: dict[str, list[Course]], own: str) -> None:
    """Print when each schedule's best recall is reached by it and by csalign, median over seeds."""
    print(
        "| MLP | its best recall, % | at step | until then, CPU s (wall) | `csalign train`, CPU s "
        "(wall) | MLP / csalign, CPU (wall) by seed | csalign's start, % | its best, % | at CPU s |"
        " done at CPU s |"
    )
    print("|---" * 10 + "|")
    for name, found in courses.items():
        if name == own:
            continue
        pairs = list(zip(found, courses[own], strict=True))
        reached = [ours.first(theirs.best.recall) for theirs, ours in pairs]
        ratios = [
            f"{theirs.best.cpu_s / point.cpu_s:.1f} ({theirs.best.wall_s / point.wall_s:.1f})"
            if point
            else "not reached"
            for (theirs, _), point in zip(pairs, reached, strict=True)
        ]
        there = [point for point in reached if point]
        ours = courses[own]
        cells = [
            name,
            f"{100 * middle(course.best.recall for course in found):.1f}",
            f"{middle(course.best.step for course in found):.0f}",
            f"{middle(course.best.cpu_s for course in found):.0f} "
            f"({middle(course.best.wall_s for course in found):.0f})",
            f"{middle(point.cpu_s for point in there):.0f} "
            f"({middle(point.wall_s for point in there):.0f})"
            if there
            else "-",
            ", ".join(ratios),
            f"{100 * middle(course.points[0].recall for course in ours):.1f}",
            f"{100 * middle(course.best.recall for course in ours):.1f}",
            f"{middle(course.best.cpu_s for course in ours):.0f}",
            f"{middle(course.cpu_s for course in ours):.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def middle(values) -> float:  # type: ignore[no-untyped-def]
    """Median."""
    return float(statistics.median(values))


def main() -> None:
    """Train both, seed by seed, and print the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", default="10,40", help="of the MLP, a run each")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csalign", default="", help="further options of csalign train")
    parser.add_argument("--json", type=Path, help="also write all validations here")
    parser.add_argument("--mlp", type=Path, help=argparse.SUPPRESS)  # the process of the MLP
    options = parser.parse_args()
    arrays = options.work / "arrays"
    if options.mlp:
        seed, epochs = int(options.seeds), int(options.epochs)
        train_mlp(arrays, options.mlp, epochs, seed, options.threads)
        return
    if not (arrays / "val-counts.npy").exists():
        write_arrays(options.features, arrays)
    own = f"csalign train {options.csalign}".strip()
    courses: dict[str, list[Course]] = {}

    def keep(name: str, found: Course) -> None:
        courses.setdefault(name, []).append(found)
        if options.json:
            document = {name: [asdict(run) for run in runs] for name, runs in courses.items()}
            options.json.write_text(json.dumps(document, indent=1))

    for seed in options.seeds.split(","):
        for epochs in options.epochs.split(","):
            log = options.work / f"mlp-{epochs}-{seed}.jsonl"
            log.unlink(missing_ok=True)
            command = [sys.executable, __file__, str(options.features)]
            command += ["--work", str(options.work), "--epochs", epochs, "--seeds", seed]
            command += ["--threads", str(options.threads), "--mlp", str(log)]
            keep(f"{epochs} epochs", watch(command, [log], options.threads))
        run = options.work / f"run-{seed}"
        command = [sys.executable, "-m", "csalign", "train", str(options.features), "--overwrite"]
        command += ["--out", str(run), "--seed", seed, *shlex.split(options.csalign)]
        command += ["--device", "cpu"]
        logs = [folder / "metrics.jsonl" for folder in (run.with_name(f"{run.name}.partial"), run)]
        for log in logs:
            log.unlink(missing_ok=True)
        keep(own, watch(command, logs, options.threads))
        print(f"\nafter seed {seed}, {options.threads} threads, {own}\n")
        print_table(courses, own)


if __name__ == "__main__":
    main()
