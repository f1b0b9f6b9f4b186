"""A search over a million vectors: time a query, measured recall, memory told and taken.

    python tests/benchmarks/search/million.py --work FOLDER [--rows 1000000] [--width 256]

Images lie around centres that overlap, in far fewer dimensions than their vectors have, as real
ones do; texts lie near images. The feature set is written once and kept in the work folder. Each
index is built by `csalign index` in a process of its own, whose largest resident size is told;
queries are timed in a fresh process on the mapped index, one at a time (medians), 1,000 at once,
and as the command has them, with ids and captions. Times are of the CPU, but for the first, so
that they say the same on a busy machine.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from csalign.core.enums import Modality
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows
from csalign.indexing.config import SearchConfig
from csalign.indexing.manifest import VECTORS, read_index_manifest
from csalign.indexing.search import find
from csalign.indexing.vectors import VectorIndex

CHUNK = 50_000
TEXTS = 20_000
LATENT = 32  # dimensions that real embeddings about vary in
QUERIES = 1_000


def write_features(folder: Path, rows: int, width: int) -> None:
    """Images around 2,000 centres that overlap in 32 dimensions, and texts near some of them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2_000, LATENT))
    spread = rng.normal(size=(LATENT, width)) / LATENT**0.5
    encoders = {side: EncoderInfo(spec="made up", width=width) for side in Modality}
    every = rows // TEXTS
    owners, texts = [], []
    folder.mkdir(parents=True)
    with FeatureWriter(folder, encoders, "float16") as writer:
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            latent = centres[rng.integers(0, len(centres), count)]
            latent += 0.7 * rng.normal(size=latent.shape)
            images = latent @ spread + 0.1 * rng.normal(size=(count, width))
            names = [f"{row:07d}" for row in range(start, start + count)]
            writer.write(Modality.IMAGE, Rows({"id": names}, images))
            owners += names[::every]
            own = latent[::every]
            own = (own + 0.4 * rng.normal(size=own.shape)) @ spread
            texts.append(own + 0.1 * rng.normal(size=own.shape))
        columns = {
            "id": [f"t{name}" for name in owners],
            "image_id": owners,
            "caption": [f"caption of {name}" for name in owners],
        }
        writer.write(Modality.TEXT, Rows(columns, np.concatenate(texts).astype(np.float32)))
    np.save(folder.parent / "queries.npy", np.concatenate(texts)[:QUERIES].astype(np.float32))


def build(features: Path, out: Path, factory: str) -> dict[str, float | str]:
    """Build an index in a process of its own."""
    command = ("index", features, "--factory", factory, "--out", out, "--overwrite")
    process = subprocess.Popen(
        [sys.executable, "-m", "csalign", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, told
    (said,) = re.findall(r"about (.*? GB) of memory", told)
    seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "said": said, "peak": usage.ru_maxrss / 1e6}


def resident() -> dict[str, float]:
    """Of this process in GB: what is its own, and what is mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {name: int(value) / 1e6 for name, value in sizes.items()}


def ask(folder: Path) -> None:
    """Time queries on a mapped index, and print what was found as JSON."""
    before = resident()["RssAnon"]
    manifest = read_index_manifest(folder)
    index = VectorIndex.open(folder / VECTORS, manifest.factory)
    for effort in manifest.effort.values():
        index.set_effort(effort)
    queries = np.load(folder.parent / "queries.npy")
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    index.search(queries, 10)  # reads what is on disk
    begin = time.process_time()
    index.search(queries, 10)
    together = (time.process_time() - begin) / len(queries)
    walls, each = [], []
    for query in queries:
        wall, begin = time.perf_counter(), time.process_time()
        index.search(query[None], 10)
        each.append(time.process_time() - begin)
        walls.append(time.perf_counter() - wall)
    config = SearchConfig(index=folder, embedding=folder.parent / "queries.npy")
    begin = time.process_time()
    found = len(list(find(config).queries))
    whole = (time.process_time() - begin) / found
    document = {
        "recall": 1.0 if manifest.recall is None else manifest.recall.value,
        "effort": manifest.effort,
        "wall_ms": 1e3 * float(np.median(walls)),
        "median_ms": 1e3 * float(np.median(each)),
        "p99_ms": 1e3 * float(np.quantile(each, 0.99)),
        "together_ms": 1e3 * together,
        "whole_ms": 1e3 * whole,
        "own_gb": resident()["RssAnon"] - before,
        "disk_gb": sum((folder / name).stat().st_size for name in manifest.files) / 1e9,
    }
    print(json.dumps(document))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--factories", default="Flat auto HNSW32 IVF4000,SQ8 OPQ64,IVF4000,PQ64,RFlat"
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ask", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below
    if options.ask is not None:
        ask(options.ask)
        return
    features = options.work / "features"
    if not features.exists():
        write_features(features, options.rows, options.width)
    print(f"{options.rows:,} vectors of width {options.width}, one thread\n")
    print(
        "| factory | search | recall@10 | a query, ms | of it CPU | CPU, 99 % | of 1,000 at once | "
        "`csalign search` | build, CPU s | memory told | process peak, GB | "
        "searching: own memory, GB | disk, GB |"
    )
    print("|---" * 13 + "|")
    for kind in options.factories.split():
        out = options.work / kind.replace(",", "-")
        built = build(features, out, kind)
        command = [sys.executable, __file__, "--work", str(options.work), "--ask", str(out)]
        asked = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        effort = ", ".join(f"{name} {value}" for name, value in asked["effort"].items())
        cells = [
            kind,
            effort,
            f"{asked['recall']:.4f}",
            *(
                f"{asked[f'{name}_ms']:.2f}"
                for name in ("wall", "median", "p99", "together", "whole")
            ),
            f"{built['seconds']:.0f}",
            built["said"],
            f"{built['peak']:.2f}",
            f"{asked['own_gb']:.3f}",
            f"{asked['disk_gb']:.2f}",
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
