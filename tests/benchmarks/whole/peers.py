"""What one would write without csalign, each a process of its own; started by ``run.py``.

    python peers.py NAME WORK [--steps N] [--threads N]

None imports csalign. Every script reads the .npy files of WORK and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

BATCH, HIDDEN, WIDTH, DROPOUT = 512, 1024, 256, 0.3
RATE, DECAY, SCALE = 2e-3, 0.01, 14.29
RECALL_AT = (1, 5, 10)
SAMPLE = 64  # rows per cell that cells are trained on


def copy(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """np.load, a check for nan and infinity, np.save."""
    for name in ("images", "texts"):
        rows = np.load(work / f"{name}.npy")
        if not np.isfinite(rows).all():
            raise SystemExit(f"{name}.npy: not finite")
        np.save(work / f"copy-{name}.npy", rows)
    return {"rows": len(rows)}


def loop(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two MLPs, open_clip's loss with a learned scale, AdamW with a cosine, a DataLoader."""
    import torch
    from open_clip.loss import ClipLoss
    from torch import nn
    from torch.nn.functional import normalize
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    sides = [torch.from_numpy(np.load(work / f"{name}.npy")) for name in ("images", "texts")]
    test = [side[: options.test] for side in sides]
    train = TensorDataset(*(side[options.test :] for side in sides))
    towers = nn.ModuleList(
        nn.Sequential(
            nn.LayerNorm(side.shape[1]),
            nn.Linear(side.shape[1], HIDDEN),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, WIDTH),
        )
        for side in sides
    )
    log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
    optimizer = torch.optim.AdamW(
        [*towers.parameters(), log_scale], lr=RATE, weight_decay=DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    loss, step = ClipLoss(), 0
    while step < options.steps:
        for batch in DataLoader(train, BATCH, shuffle=True, drop_last=True):
            x, y = (
                normalize(tower(rows.float()), dim=1)
                for tower, rows in zip(towers, batch, strict=True)
            )
            optimizer.zero_grad()
            loss(x, y, log_scale.exp().clamp(max=100)).backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == options.steps:
                break
    towers.eval()
    with torch.inference_mode():
        for name, tower, rows in zip(("images", "texts"), towers, test, strict=True):
            np.save(work / f"embedded-{name}.npy", normalize(tower(rows.float()), dim=1).numpy())
    return {"samples": BATCH * step}


def _embedded(work: Path) -> list[np.ndarray]:
    return [np.load(work / f"embedded-{name}.npy") for name in ("images", "texts")]


def exact(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """R@1, 5 and 10 both ways by faiss's exact search of 10."""
    import faiss

    faiss.omp_set_num_threads(options.threads)
    sides, found = _embedded(work), []
    for queries, items in (sides, sides[::-1]):
        index = faiss.IndexFlatIP(items.shape[1])
        index.add(items)
        hits = index.search(queries, max(RECALL_AT))[1] == np.arange(len(queries))[:, None]
        found += [float(hits[:, :k].any(1).mean()) for k in RECALL_AT]
    return {"mean_recall": sum(found) / len(found)}


def benchmark(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """CLIP_benchmark's own retrieval figures, given an encoder that hands the embeddings out."""
    from types import SimpleNamespace

    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    x, y = map(torch.from_numpy, _embedded(work))
    batches = (
        (x[start : start + 64], y[start : start + 64].split(1)) for start in range(0, len(x), 64)
    )
    model = SimpleNamespace(encode_image=lambda rows: rows, encode_text=lambda rows: rows)
    found = zeroshot_retrieval.evaluate(
        model, batches, torch.stack, "cpu", amp=False, recall_k_list=list(RECALL_AT)
    )
    return {"mean_recall": sum(found.values()) / len(found)}


def build(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """An index of unit image rows by faiss's index_factory: exact, or 4 sqrt(n) cells, 16 read."""
    import faiss

    faiss.omp_set_num_threads(options.threads)
    rows = np.load(work / "images.npy").astype(np.float32)
    faiss.normalize_L2(rows)
    cells = 4 * round(len(rows) ** 0.5)
    factory = "Flat" if len(rows) <= 50_000 else f"IVF{cells},Flat"
    index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(rows[:: max(1, len(rows) // (SAMPLE * cells))])
    index.add(rows)
    faiss.write_index(index, str(work / "by-hand.faiss"))
    return {"factory": factory}


def auto(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """autofaiss's build_index, of the unit rows in a .npy file that this writes first."""
    from functools import partial
    from types import SimpleNamespace

    from autofaiss import build_index
    from autofaiss.external import optimize

    # It writes numpy's numbers as JSON, which numpy 2 made an error.
    optimize.json = SimpleNamespace(dump=partial(json.dump, default=float))
    folder = work / "autofaiss"
    folder.mkdir(exist_ok=True)
    rows = np.load(work / "images.npy").astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(folder / "rows.npy", rows)
    del rows
    build_index(
        embeddings=str(folder),
        index_path=str(work / "auto.faiss"),
        index_infos_path=str(work / "auto.json"),
        metric_type="ip",
        nb_cores=options.threads,
        current_memory_available="16G",
        max_index_memory_usage="8G",
        verbose=30,
    )
    return json.loads((work / "auto.json").read_text())


def find(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The 10 nearest of each query, as lines of JSON."""
    import faiss

    faiss.omp_set_num_threads(options.threads)
    index = faiss.read_index(str(work / f"{options.index}.faiss"), faiss.IO_FLAG_MMAP)
    if options.index == "by-hand" and hasattr(index, "nprobe"):
        index.nprobe = 16
    queries = np.load(work / "queries.npy").astype(np.float32)
    faiss.normalize_L2(queries)
    scores, items = index.search(queries, 10)
    with (work / f"found-{options.index}.jsonl").open("w") as file:
        for own in zip(items.tolist(), scores.tolist(), strict=True):
            hits = [{"id": str(row), "score": score} for row, score in zip(*own, strict=True)]
            file.write(json.dumps({"hits": hits}) + "\n")
    return {}


PEERS = {own.__name__: own for own in (copy, loop, exact, benchmark, build, auto, find)}


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--test", type=int, default=1_000, help="rows that are not trained on")
    parser.add_argument("--index", default="by-hand")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    options = parser.parse_args()
    print(json.dumps(PEERS[options.name](options.work, options), default=str))


if __name__ == "__main__":
    main()
