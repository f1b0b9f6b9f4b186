"""What a training job of many processes holds and sends: by formula, and as measured with gloo.

    python tests/benchmarks/machines/account.py formula [--rows 1000000000] [--width 512]
    python tests/benchmarks/machines/account.py check --work DIR [--rows 10000,40000,160000]
        [--processes 2,4] [--batch 512]

``formula`` prints what `csalign train` holds per process and sends per step with its default
adapter. The parameters are counted on the adapter itself. Bytes per row beside the embeddings
are those of the arrays that the code keeps, and the peaks those of reading and of drawing an epoch,
all measured here on made-up sets of two sizes (`--work`, a temporary folder by default), whose
difference leaves out what does not grow.

``check`` trains under torchrun, with torch's collectives wrapped, for 10 and for 20 steps; the
difference is what a step sends. It prints that beside the formula, and how the resident memory of a
process grows with the rows. It takes five minutes of CPU. Batches below 256 rows would not show the
sums: every process then computes the objective by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, OUT = 1024, 256  # csalign's defaults
WIDTHS = 32, 24  # of a made-up set
VALIDATED = 500  # pairs of a made-up set
STEPS = (10, 20)  # the bandwidth is made again every 10
FLOAT = 4
WIRES = {"10 Gb/s": 1.25e9, "100 Gb/s": 12.5e9, "NVLink, 450 GB/s": 450e9}  # bytes per second
RATES = {"a core, 100 GFLOP/s": 1e11, "a GPU, 50 TFLOP/s": 5e13}


@dataclass(frozen=True)
class Step:
    """Sizes of a step with the default objective, a caption per image.

    Attributes:
        batch: pairs.
        width: of the outputs.
        parameters: of both adapters.
        bandwidths: of the kernels.
    """

    batch: float
    width: int
    parameters: int
    bandwidths: int = 1

    @property
    def gathered(self) -> float:
        """Bytes of the rows of both sides, which all processes gather in each."""
        return 2 * self.batch * self.width * FLOAT

    @property
    def reduced(self) -> dict[str, float]:
        """Bytes of what all processes sum."""
        return {
            # A log-sum-exp of rows, columns and kernels: once for the largest, once for the sums.
            "sums": 2 * (2 * self.batch + 3 * self.bandwidths) * FLOAT,
            "gradients of rows": 2 * self.batch * self.width * FLOAT,
            "gradients of the adapters": self.parameters * FLOAT,
        }

    def sent(self, processes: int) -> float:
        """Bytes that a process sends per step, where rings are used."""
        share = (processes - 1) / processes
        return share * (self.gathered + 2 * sum(self.reduced.values()))

    def operations(self, processes: int) -> tuple[float, float]:
        """Floating point operations per process: of the adapters, and of the tiles."""
        adapters = 6 * self.parameters * self.batch / processes
        return adapters, 14 * self.batch**2 * self.width / processes


def default_parameters(image: int, text: int, out: int = OUT) -> int:
    """Parameters of the default adapters."""
    from csalign.adapters.model import Adapter
    from csalign.adapters.side import SideShape
    from csalign.core.enums import Modality

    shapes = {
        side: SideShape("glu", width, out, hidden=HIDDEN)
        for side, width in ((Modality.IMAGE, image), (Modality.TEXT, text))
    }
    adapter = Adapter(shapes)
    return sum(p.numel() for p in adapter.parameters() if p.requires_grad)


def make_set(folder: Path, rows: int) -> Path:
    """Import made-up pairs, if they are not there yet."""
    if (folder / "features" / "manifest.json").exists():
        return folder / "features"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((rows, 16), np.float32)
    for name, width in zip(("images", "texts"), WIDTHS, strict=True):
        view = latent @ rng.standard_normal((16, width), np.float32)
        values = view + 8 * rng.standard_normal(view.shape, np.float32)
        np.save(folder / f"{name}.npy", values.astype(np.float16))
    command = ["import", *(str(folder / f"{name}.npy") for name in ("images", "texts"))]
    command += ["--out", str(folder / "features"), "--val", str(VALIDATED), "--no-group", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "csalign", *command], check=True, stdout=subprocess.DEVNULL
    )
    return folder / "features"


def kept_bytes(things: Iterable[Any]) -> int:
    """Bytes of all arrays that are reachable from some objects, each once."""
    seen: set[int] = set()
    total, left = 0, list(things)
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            if thing.base is None or not isinstance(thing.base, np.ndarray):
                total += thing.nbytes
            else:
                left.append(thing.base)
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, list | tuple):
            left += thing
        elif type(thing).__module__.startswith("csalign"):
            left += getattr(thing, "__dict__", {}).values()
    return total


def held(features: Path, out: Path) -> dict[str, float]:
    """Bytes that a process keeps, and at most has, to train on a set; epochs by blocks."""
    import pyarrow as pa

    from csalign.training.config import DataOptions, TrainConfig
    from csalign.training.data import load_data
    from csalign.training.network.sampler import PairSampler, order_for

    config = TrainConfig(features=features, out=out, device="cpu")
    pool = pa.default_memory_pool()
    arrow = pool.bytes_allocated()
    tracemalloc.start()
    data = load_data(config.group(DataOptions), out=out, seed=0)
    read = tracemalloc.get_traced_memory()[1]
    rows = data.rows
    size = rows.images.nbytes + rows.texts.nbytes
    order = order_for(rows, window_bytes=size // 4, block_bytes=size // 64)
    sampler = PairSampler(rows, "first", other_weight=0.3, once=True, order=order)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    batches = sampler.epoch(512, np.random.default_rng(0))
    next(batches)
    during, drawn = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    began = time.process_time()
    next(sampler.epoch(512, np.random.default_rng(1)))
    seconds = time.process_time() - began
    return {
        "rows": rows.pairs,
        "embeddings": size,
        "kept": kept_bytes([rows, sampler, data.unpaired]) - size,
        "read": read - size,
        "strings": pool.max_memory() - arrow,
        "epoch": drawn - before,
        "epoch kept": during - before,
        "seconds": seconds,
    }


def slopes(work: Path, sizes: tuple[int, int] = (100_000, 400_000)) -> dict[str, float]:
    """Bytes per pair of what grows with the pairs, each size in a process of its own."""
    found = []
    for rows in sizes:
        features = make_set(work / f"set-{rows}", rows)
        command = [sys.executable, __file__, "held", "--features", str(features)]
        command += ["--work", str(work)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(printed.splitlines()[-1]))
    more = found[1]["rows"] - found[0]["rows"]
    return {name: (found[1][name] - found[0][name]) / more for name in found[0] if name != "rows"}


def print_formula(options: argparse.Namespace, work: Path) -> None:
    """Print the account at `options.rows`."""
    per_row, rows = slopes(work), options.rows
    row_bytes = 2 * 2 * options.width
    words = {
        "kept": "arrays of numbers kept beside the embeddings",
        "read": "of those and others at once while reading",
        "strings": "ids and other strings at once while reading",
        "epoch kept": "an epoch's order, kept",
        "epoch": "an epoch's order, at once while it is drawn",
    }
    print(f"\n{rows:,} pairs, both sides {options.width} wide in float16\n")
    print("| | bytes per pair | GB |")
    print("|---|---|---|")
    cells = [("embeddings, a copy per machine, mapped if they do not fit", row_bytes)]
    cells += [(f"each process: {words[name]}", per_row[name]) for name in words]
    for name, value in cells:
        print(f"| {name} | {value:,.0f} | {value * rows / 1e9:,.0f} |")
    minutes = per_row["seconds"] * rows / 60
    print(f"| each process: CPU minutes to draw an epoch's order (linear) | | {minutes:,.0f} min |")
    count = default_parameters(options.width, options.width)
    print(f"\nDefault adapters: {count:,} parameters, {OUT} wide; sent per process and step, MB\n")
    processes = (1, 8, 64)
    names = " | ".join(f"{p} processes" for p in processes)
    print(f"| batch | rows gathered | sums | gradients of rows | of adapters | {names} |")
    print("|---" * (5 + len(processes)) + "|")
    for batch in (512, 4_096, 16_384, 65_536):
        step = Step(batch, OUT, count)
        sizes = [step.gathered, *step.reduced.values(), *(step.sent(p) for p in processes)]
        print(f"| {batch:,} | {' | '.join(f'{size / 1e6:,.2f}' for size in sizes)} |")
    print("\nSeconds of a step per process, products : wire\n")
    print(f"| batch | processes | {' | '.join(RATES)} | {' | '.join(WIRES)} |")
    print("|---" * (2 + len(RATES) + len(WIRES)) + "|")
    for batch in (512, 4_096, 65_536):
        for p in processes[1:]:
            step = Step(batch, OUT, count)
            times = [sum(step.operations(p)) / rate for rate in RATES.values()]
            times += [step.sent(p) / wire for wire in WIRES.values()]
            print(f"| {batch:,} | {p} | {' | '.join(f'{t:.2g}' for t in times)} |")


def watch_memory(found: dict[str, float], over: threading.Event) -> None:
    """Keep the most of each kind of resident memory, bytes."""
    while not over.wait(0.02):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.startswith("Rss") or name == "VmHWM":
                found[name] = max(found.get(name, 0), int(value.split()[0]) * 1024)


def worker(options: argparse.Namespace) -> None:
    """Train in one of several processes, and write what it sent and held."""
    from torch import distributed

    from csalign.training.config import TrainConfig
    from csalign.training.train import train

    sent: Counter[str] = Counter()

    def counted(name: str, size_of: Callable[..., int]) -> None:
        call = getattr(distributed, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            sent[name] += size_of(*args)
            sent[f"{name} calls"] += 1
            return call(*args, **kwargs)

        setattr(distributed, name, wrapped)

    def nbytes(tensor: Any, *rest: Any) -> int:
        return int(tensor.numel() * tensor.element_size())

    counted("all_reduce", nbytes)
    counted("broadcast", nbytes)
    counted("all_gather", lambda found, own, *rest: sum(map(nbytes, found)))
    counted("broadcast_object_list", lambda values, *rest: len(pickle.dumps(len(values))))
    memory: dict[str, float] = {}
    over = threading.Event()
    thread = threading.Thread(target=watch_memory, args=(memory, over))
    thread.start()
    config = TrainConfig(
        features=options.features,
        out=options.work / "run",
        overwrite=True,
        steps=options.steps,
        validations=1,
        batch_size=options.batch,
        ensemble="off",
        refit=False,
        match_moments=False,
        device="cpu",
    )
    result = train(config)
    over.set()
    thread.join()
    trained = default_parameters(*WIDTHS, result.width)
    document = {"sent": sent, "memory": memory, "trained": trained, "width": result.width}
    rank = os.environ.get("RANK", "0")
    (options.work / f"rank-{rank}.json").write_text(json.dumps(document))


def torchrun(options: argparse.Namespace, features: Path, processes: int, steps: int) -> list[Any]:
    """What the workers of a job wrote, by rank."""
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), __file__, "worker", "--work", folder]
        command += ["--features", str(features), "--steps", str(steps)]
        command += ["--batch", str(options.batch)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return [
            json.loads((Path(folder) / f"rank-{rank}.json").read_text())
            for rank in range(processes)
        ]


def check(options: argparse.Namespace) -> None:
    """Train with 2 and 4 processes on growing sets, and compare."""
    sizes = [int(rows) for rows in options.rows_list.split(",")]
    counts = [int(p) for p in options.processes.split(",")]
    print(f"\nSent per step, bytes, batch {options.batch}\n")
    print("| rows | processes | all-reduced | formula | ratio | gathered | formula | ratio |")
    print("|---" * 8 + "|")
    held_by: dict[tuple[int, int], list[dict[str, float]]] = {}
    for rows in sizes:
        features = make_set(options.work / f"set-{rows}", rows)
        for processes in counts:
            few, many = (torchrun(options, features, processes, steps) for steps in STEPS)
            held_by[rows, processes] = [own["memory"] for own in many]
            trained = rows - VALIDATED
            batch = trained / -(-trained // options.batch)  # of an epoch, divided evenly
            step = Step(batch, many[0]["width"], many[0]["trained"])
            cells: list[str] = []
            for name, expected in (
                ("all_reduce", sum(step.reduced.values())),
                ("all_gather", step.gathered),
            ):
                growth = many[0]["sent"].get(name, 0) - few[0]["sent"].get(name, 0)
                per_step = growth / (STEPS[1] - STEPS[0])
                cells += [f"{per_step:,.0f}", f"{expected:,.0f}", f"{per_step / expected:.4f}"]
            print(f"| {rows:,} | {processes} | {' | '.join(cells)} |", flush=True)
    print("\nMost resident memory of a process, MiB: anonymous (the main process, the others); ")
    print("bytes per pair between the last two sizes\n")
    names = " | ".join(f"{rows:,} pairs" for rows in sizes)
    print(f"| processes | {names} | bytes per pair: main, others |")
    print("|---" * (2 + len(sizes)) + "|")
    for processes in counts:
        cells = []
        for rows in sizes:
            main, *others = [own["RssAnon"] for own in held_by[rows, processes]]
            cells.append(f"{main / 2**20:,.0f}, {max(others) / 2**20:,.0f}")
        last, before = held_by[sizes[-1], processes], held_by[sizes[-2], processes]
        more = sizes[-1] - sizes[-2]
        growth = [
            (max(own["RssAnon"] for own in last[part]) - max(o["RssAnon"] for o in before[part]))
            / more
            for part in (slice(0, 1), slice(1, None))
        ]
        cells.append(", ".join(f"{value:,.0f}" for value in growth))
        print(f"| {processes} | {' | '.join(cells)} |")


def main() -> None:
    """Parse the command line, and print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("formula", "check", "held", "worker"))
    parser.add_argument("--rows", default=None)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "worker":
        worker(options)
        return
    with tempfile.TemporaryDirectory(prefix="machines-") as folder:
        options.work = options.work or Path(folder)
        options.work.mkdir(parents=True, exist_ok=True)
        if options.what == "held":
            print(json.dumps(held(options.features, options.work / "run")))
        elif options.what == "formula":
            options.rows = int(options.rows or 10**9)
            print_formula(options, options.work)
        else:
            options.rows_list = options.rows or "10000,40000,160000"
            check(options)


if __name__ == "__main__":
    main()
