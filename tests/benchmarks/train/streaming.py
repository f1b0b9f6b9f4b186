"""Training on more rows than memory holds: resident memory, and the rate beside that from memory.

    python tests/benchmarks/train/streaming.py memory --work DIR [--pairs 5000000]
    python tests/benchmarks/train/streaming.py rate --work DIR [--pairs 400000]
    python tests/benchmarks/train/streaming.py read --work DIR [--pairs 400000]

``memory`` trains on a made-up set, images and texts 512 wide in float16, with little memory, and
prints the resident memory of the whole as it goes. ``rate`` times the steps of training from memory
and from the mapped file in turn. ``read`` times reading the images' embeddings whole, with their
checksums and once these are remembered, beside the same array by `np.load`, and beside the set's
bytes as the disk gives them: from the disk, and from what the system has kept of it in memory. All
leave the set in DIR, which takes 2 KB a pair; a run takes that much again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from csalign.core import __version__
from csalign.core.enums import Modality
from csalign.features.reader import FeatureSet
from csalign.features.schema import (
    FAILURES,
    Counts,
    EncoderInfo,
    Encoders,
    Manifest,
    Shards,
    write_manifest,
)
from csalign.features.writer import Rows, ShardWriter
from csalign.training.config import DataOptions, TrainConfig
from csalign.training.data import load_data
from csalign.training.train import train
from csalign.training.work import Work

WIDTH = 512
SHARD_ROWS = 250_000
CHUNK_ROWS = 25_000


def make_set(folder: Path, pairs: int) -> Path:
    """Write the set, if it is not there yet: noisy views of a latent, captions all different."""
    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    # Drawn once, since ten million rows of noise take longer than all else.
    noise = 3 * rng.standard_normal((2 * CHUNK_ROWS, WIDTH), np.float32)
    maps = {side: rng.normal(size=(32, WIDTH)).astype(np.float32) for side in Modality}
    info = EncoderInfo(spec="made up", width=WIDTH)
    shards: dict[Modality, list] = {side: [] for side in Modality}
    for part, first in enumerate(range(0, pairs, SHARD_ROWS)):
        writers = {
            side: ShardWriter(folder, f"part-{part:05d}", side, info, "float16")
            for side in Modality
        }
        for start in range(first, min(pairs, first + SHARD_ROWS), CHUNK_ROWS):
            count = min(CHUNK_ROWS, pairs - start)
            latent = rng.normal(size=(count, 32)).astype(np.float32)
            names = [f"{row:09d}" for row in range(start, start + count)]
            splits = ["val" if row < 2_000 else "train" for row in range(start, start + count)]
            for side, writer in writers.items():
                columns = {"id": names, "split": splits}
                if side is Modality.TEXT:
                    captions = [f"a made up caption of picture {name}" for name in names]
                    columns |= {"image_id": names, "caption": captions}
                shift = int(rng.integers(CHUNK_ROWS))
                writer.write(Rows(columns, latent @ maps[side] + noise[shift : shift + count]))
        for side, writer in writers.items():
            shard = writer.close()
            assert shard is not None
            shards[side].append(shard)
    (folder / FAILURES).touch()
    write_manifest(
        folder,
        Manifest(
            csalign_version=__version__,
            dtype="float16",
            encoders=Encoders(image=info, text=info),
            counts=Counts(images=pairs, texts=pairs, pairs=pairs, failures=0),
            shards=Shards(images=shards[Modality.IMAGE], texts=shards[Modality.TEXT]),
        ),
    )
    return folder


def resident() -> float:
    """Resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def watched() -> Iterator[list[float]]:
    """Resident memory, four times a second."""
    seen: list[float] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.25):
            seen.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def memory(options: argparse.Namespace, features: Path) -> None:
    """Train with little memory and print what is resident."""
    start = time.monotonic()

    def progress(what: str, done: int, total: int | None) -> None:
        if what == "training steps" and (done == 1 or done % 500 == 0):
            print(f"step {done:>6}  {time.monotonic() - start:7.0f} s  {resident():6.0f} MiB")

    print(f"imported             {resident():6.0f} MiB")
    with watched() as seen:
        train(
            TrainConfig(
                features=features,
                out=options.work / "run",
                overwrite=True,
                memory=options.mib,
                steps=options.steps,
                device="cpu",
            ),
            progress,
        )
    print(
        json.dumps(
            {
                "rows": 2 * options.pairs,
                "row bytes": 2 * WIDTH,
                "seconds": round(time.monotonic() - start),
                "peak resident MiB": round(max(seen)),
            }
        )
    )


def rate(options: argparse.Namespace, features: Path) -> None:
    """Time the same steps from memory and from the mapped file, in turn."""
    trainers = {}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for name, mib in (("memory", 1 << 20), ("mapped", 0)):
            config = TrainConfig(
                features=features,
                out=Path(folder) / name,
                memory=mib,
                steps=options.steps * (options.rounds + 1),
                validations=options.rounds + 1,
                device="cpu",
                init="random",
                other_captions=0,
                width=256,
            )
            data = load_data(config.group(DataOptions), out=config.out, seed=config.seed)
            work = Work(config, data, None)
            trainer = work.trainer(work.initialize().adapter)
            trainers[name] = (trainer.fit(lambda line: None), config.batch_size)
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(options.rounds + 1):
            for name, (steps, _) in trainers.items():
                began = time.process_time() if options.cpu_time else time.perf_counter()
                for _ in range(options.steps):
                    next(steps)
                now = time.process_time() if options.cpu_time else time.perf_counter()
                if number:  # the first warms up
                    seconds[name].append(now - began)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    per_second = {
        name: round(options.steps * batch / medians[name]) for name, (_, batch) in trainers.items()
    }
    ratios = [one / two for one, two in zip(seconds["memory"], seconds["mapped"], strict=True)]
    print(
        json.dumps(
            {
                "samples a second": per_second,
                "ratio of medians": round(medians["memory"] / medians["mapped"], 3),
                "ratio by round": [round(ratio, 3) for ratio in ratios],
            }
        )
    )


def read(options: argparse.Namespace, features: Path) -> None:
    """Time reading the embeddings of one side, in turn with what bounds it."""
    table = FeatureSet.open(features).table(Modality.IMAGE)
    plain = options.work / f"images-{options.pairs}.npy"
    if not plain.exists():
        np.save(plain, table.embeddings())
    shards = sorted((features / "images").glob("*.parquet"))
    # A later reading finds what the first one remembered; a file is remembered once it has settled.
    cache = options.work / "cache"
    os.environ["XDG_CACHE_HOME"] = str(cache)

    def first() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        table.embeddings()

    ways: dict[str, Callable[[], object]] = {
        "first": first,
        "later": table.embeddings,
        "by row group": lambda: [None for _ in table.read("id", "embedding")],
        "np.load": lambda: np.load(plain),
        "bytes": lambda: [read_through(shard) for shard in shards],
    }
    size = options.pairs * WIDTH * 2
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds + 1):
        for name, way in ways.items():
            for path in (plain, *shards):
                drop(path)
            for where in ("disk", "memory"):
                began = clock()
                way()
                if number:  # the first warms up
                    seconds.setdefault((name, where), []).append(clock() - began)
    for (name, where), own in seconds.items():
        ratios = [one / two for one, two in zip(own, seconds["np.load", where], strict=True)]
        print(
            f"{name:>12} from {where:<6}: {size / statistics.median(own) / 1e9:5.2f} GB/s, takes "
            f"{statistics.median(ratios):.2f} times as long as np.load "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def read_through(path: Path) -> None:
    """Read a file and keep nothing of it."""
    block = bytearray(1 << 22)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(block):
            pass


def drop(path: Path) -> None:
    """Let the system forget what it keeps of a file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Make the set and run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "rate", "read"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=400_000)
    parser.add_argument("--steps", type=int, default=200, help="In all, or of a round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=256, help="--memory of the run.")
    parser.add_argument("--cpu-time", action="store_true", help="For a machine that is busy.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    features = make_set(options.work / f"features-{options.pairs}", options.pairs)
    {"memory": memory, "rate": rate, "read": read}[options.what](options, features)


if __name__ == "__main__":
    main()
