"""How long exact ranks take, and how much memory.

    python tests/benchmarks/eval/ranks.py [--rounds 3] [--threads 1] [--square 20000] [--only CASE]

On 5,000 images with five captions each, 512 wide: `rank_both_ways`, which gives all ranks, against
R@1, 5 and 10 by CLIP_benchmark's own `evaluate`, given an encoder that hands the embeddings out
(`pip install --no-deps clip-benchmark tqdm`), or by its formula where it is not installed. Then on
a square of one-caption pairs against the bare product of the two, in strips. Each case runs in a
process of its own, in alternated rounds. The ratios are of CPU time, which a busy machine does not
stretch as it does wall time; memory is what the peak adds to the arrays. RESULTS.md has the
results.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from csalign.metrics.retrieval import RECALL_AT, rank_both_ways

try:
    from clip_benchmark.metrics import zeroshot_retrieval as package
except ImportError:
    package = None

WIDTH = 512
BATCH = 64  # CLIP_benchmark's default
STRIP = 240


def pairs(images: int, captions: int, noise: float = 6.0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of both sides, and the image of each text."""
    torch.manual_seed(0)
    x = torch.randn(images, WIDTH)
    owners = torch.arange(images).repeat_interleave(captions)
    y = torch.randn(len(owners), WIDTH).mul_(noise).add_(x[owners])
    return normalize(x), normalize(y), owners


def ours(x: Tensor, y: Tensor, owners: Tensor) -> dict[str, float]:
    """R@K of both directions from all ranks."""
    directions = rank_both_ways(x.numpy(), y.numpy(), owners.numpy())
    return {
        f"{name} R@{k}": direction.summary()[f"R@{k}"]
        for name, direction in zip(("i2t", "t2i"), directions, strict=True)
        for k in RECALL_AT
    }


def dense(x: Tensor, y: Tensor, owners: Tensor) -> dict[str, float]:
    """The same by CLIP_benchmark's formula."""
    scores = y @ x.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(y)), owners] = True
    return {
        f"{name} R@{k}": float(_dense_recall(s, p, k))
        for k in RECALL_AT
        for name, s, p in (("t2i", scores, positive), ("i2t", scores.T, positive.T))
    }


def _dense_recall(scores: Tensor, positive: Tensor, k: int) -> Tensor:
    found = []
    for s, p in zip(scores.split(BATCH), positive.split(BATCH), strict=True):
        top = one_hot(s.topk(k, dim=1).indices, num_classes=s.shape[1])
        hits = (top * p[:, None, :]).sum(dim=(1, 2))
        found.append(hits / p.sum(dim=1) > 0)
    return torch.cat(found).float().mean()


def clip_benchmark(x: Tensor, y: Tensor, owners: Tensor) -> dict[str, float]:
    """The same by the package itself."""
    captions = len(y) // len(x)
    batches = (
        (x[start : start + BATCH], y[start * captions : (start + BATCH) * captions].split(captions))
        for start in range(0, len(x), BATCH)
    )
    model = SimpleNamespace(encode_image=lambda rows: rows, encode_text=lambda rows: rows)
    found = package.evaluate(
        model, batches, torch.stack, "cpu", amp=False, recall_k_list=list(RECALL_AT)
    )
    return {
        f"{name} R@{k}": found[f"{what}_retrieval_recall@{k}"]
        for name, what in (("i2t", "text"), ("t2i", "image"))
        for k in RECALL_AT
    }


def product(x: Tensor, y: Tensor, owners: Tensor) -> dict[str, float]:
    """The scores alone, strip by strip, thrown away."""
    out = torch.empty(STRIP * torch.get_num_threads(), len(y))
    for rows in x.split(len(out)):
        torch.mm(rows, y.T, out=out[: len(rows)])
    return {}


def measured(
    case: Callable[[Tensor, Tensor, Tensor], dict[str, float]],
    images: int,
    captions: int,
    threads: int,
) -> tuple[float, float, float, dict[str, float]]:
    """CPU and wall seconds, MB above the inputs, and figures of a case."""
    torch.set_num_threads(threads)
    data = pairs(images, captions)
    case(*pairs(50, captions))  # loads what is loaded on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    figures = case(*data)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu, wall, resident("VmHWM") - before, figures


def resident(which: str) -> float:
    """Resident memory of this process, now (VmRSS) or at its peak (VmHWM), MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(which)) / 1e3


def alternate(
    images: int,
    captions: int,
    cases: list[Callable[[Tensor, Tensor, Tensor], dict[str, float]]],
    rounds: int,
    threads: int,
) -> None:
    """Run cases in turn, each time in a new process, and print medians and ratios by round."""
    results: dict[str, list[tuple[float, float, float, dict[str, float]]]] = {}
    context = multiprocessing.get_context("spawn")
    for _ in range(rounds):
        for case in cases:
            with context.Pool(1) as pool:
                found = pool.apply(measured, (case, images, captions, threads))
            results.setdefault(case.__name__, []).append(found)
            cpu, wall, memory, _ = found
            print(
                f"{case.__name__}: CPU {cpu:.2f} s, wall {wall:.2f} s, {memory:.0f} MB", flush=True
            )
    texts = images * captions
    print(f"{images:,} images, {texts:,} texts, {WIDTH} wide, {threads} thread(s)", flush=True)
    first = next(iter(results.values()))
    for name, found in results.items():
        cpu, wall, memory, _ = zip(*found, strict=True)
        ratios = [run[0] / base[0] for run, base in zip(found, first, strict=True)]
        print(
            f"  {name:14} CPU {np.median(cpu):8.2f} s ({min(cpu):.2f}-{max(cpu):.2f})"
            f"  x{np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            f"  wall {np.median(wall):8.2f} s  {max(memory):8.0f} MB"
        )
    for name, found in results.items():
        if found[0][3]:
            print(f"  {name:14} {json.dumps(found[0][3], sort_keys=True)}")


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--square", type=int, default=20_000)
    parser.add_argument("--only", choices=["square", "captions"])
    arguments = parser.parse_args()
    if arguments.only != "captions":
        cases = [ours, product]
        alternate(arguments.square, 1, cases, arguments.rounds, arguments.threads)
    if arguments.only != "square":
        cases = [ours, clip_benchmark if package else dense]
        alternate(5_000, 5, cases, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
