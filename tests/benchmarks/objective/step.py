"""What a step of the objective costs, in time and memory.

    python tests/benchmarks/objective/step.py [--sizes 1024,4096,16384] [--rounds 5] [--json FILE]
        [--memory-only] [--largest 65536]

A step is: normalise B pairs 512 wide, InfoNCE with a learned scale, loss and gradients. Cases:

- clip: open_clip's ClipLoss alone;
- dense: InfoNCE + CS by the plain formulas under autograd;
- csalign: `Objective`, InfoNCE + CS, in float32; with torch's products in place of oneDNN's; and
  with bfloat16 factors;
- infonce: `Objective`, InfoNCE alone;
- products: the seven bare products of B x B x 512 that the fused step needs and nothing else, at
  the faster of two tile sizes.

Times are of the CPU, which a busy machine stretches less than it does wall time, on one thread;
cases take turns in each round, and ratios are the medians over rounds of those within a round. The
peak of memory is what a process of its own adds to the embeddings.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.enums import Precision
from csalign.objective import tiles
from csalign.objective.divergences import cs_divergence
from csalign.objective.loss import Objective
from csalign.objective.pairwise import infonce
from csalign.objective.products import product

WIDTH, SIGMA, LAMBDA, SCALE = 512, 0.5, 0.1, 14.0

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """open_clip's loss, which wants unit rows."""
    loss: Tensor = ClipLoss()(normalize(x, dim=1), normalize(y, dim=1), scale)
    return loss


def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The plain formulas."""
    x, y = normalize(x, dim=1), normalize(y, dim=1)
    return infonce(x, y, logit_scale=scale) + LAMBDA * cs_divergence(x, y, sigma=SIGMA)


def csalign(weight: float = LAMBDA, precision: Precision = Precision.FLOAT32) -> Step:
    """The objective as `csalign train` calls it."""
    objective = Objective(weight=weight, precision=precision)
    return lambda x, y, scale: (
        objective(x, y, logit_scale=scale, max_scale=SCALE, sigma=SIGMA).total
    )


STEPS: dict[str, Step] = {
    "clip": clip,
    "dense": dense,
    "csalign": csalign(),
    "csalign mm": csalign(),
    "csalign bf16": csalign(precision=Precision.BFLOAT16),
    "infonce": csalign(weight=0.0),
}


def inputs(rows: int, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that are alike to some extent, and a scale, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    y = torch.randn(rows, width, generator=generator).mul_(2).add_(x)
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(SCALE, requires_grad=True)


def timed_step(step: Step, leaves: tuple[Tensor, Tensor, Tensor]) -> float:
    """CPU seconds of loss and gradients."""
    for leaf in leaves:
        leaf.grad = None
    tiles.product = torch_product if step is STEPS["csalign mm"] else product  # type: ignore[attr-defined]
    start = time.process_time()
    step(*leaves).backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start


def torch_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute `products.product` as torch does."""
    return a @ b.T


def timed_products(tile: int, x: Tensor, y: Tensor) -> float:
    """CPU seconds of the products alone: three tables and four additions a tile."""
    sums = torch.zeros_like(x)
    spans = [slice(start, start + tile) for start in range(0, len(x), tile)]
    start = time.process_time()
    with torch.no_grad():
        for i in spans:
            for j in spans:
                for _ in range(3):
                    made = product(x[i], y[j])
                for _ in range(2):
                    sums[i].add_(product(made, y[j].T))
                    sums[j].add_(product(made.T, x[i].T))
    return time.process_time() - start


def measure_times(rows: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each case in each round."""
    leaves = inputs(rows)
    small = inputs(512)
    for step in STEPS.values():
        timed_step(step, small)
    spans = {f"tiles of {tile}": tile for tile in (512, min(1024, rows))}
    times: dict[str, list[float]] = {name: [] for name in (*STEPS, *spans)}
    for _ in range(rounds):
        for name, step in STEPS.items():
            times[name].append(timed_step(step, leaves))
        for name, tile in spans.items():
            times[name].append(timed_products(tile, leaves[0], leaves[1]))
    fastest = min(spans, key=lambda name: statistics.median(times[name]))
    times["products"] = times[fastest]
    print(f"B = {rows}: the fastest products are {fastest}")
    return times


def peak() -> float:
    """The most that was resident so far, MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1.024e-3


def peak_of(case: str, rows: int, width: int, pipe: Any) -> None:
    """Send what one step adds to the peak of memory of this process, MB, and its CPU seconds."""
    torch.set_num_threads(1)
    leaves = inputs(rows, width)
    timed_step(STEPS[case], inputs(512, width))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before = peak()
    seconds = timed_step(STEPS[case], leaves)
    pipe.send((peak() - before, seconds))


def measure_peak(case: str, rows: int, width: int = WIDTH) -> tuple[float, float]:
    """The same, from here."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=peak_of, args=(case, rows, width, theirs))
    process.start()
    found: tuple[float, float] = ours.recv()
    process.join()
    return found


def told(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def show(rows: int, times: dict[str, list[float]]) -> None:
    """Print a table of one batch size."""
    print(f"\n| B = {rows} | CPU s | to clip | to products | dense to it |")
    print("| --- | --- | --- | --- | --- |")
    for name in (*STEPS, "products"):
        by = {
            other: [a / b for a, b in zip(times[name], times[other], strict=True)]
            for other in ("clip", "products", "dense")
        }
        dense_to_it = [1 / ratio for ratio in by["dense"]]
        print(
            f"| {name} | {told(times[name])} | {told(by['clip'])} | {told(by['products'])} "
            f"| {statistics.median(dense_to_it):.2f} |",
            flush=True,
        )


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024,4096,16384")
    parser.add_argument("--rounds", type=int, default=5, help="halved at the largest size")
    parser.add_argument("--largest", type=int, help="also one fused step of so many pairs")
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    document: dict[str, Any] = {"torch": torch.__version__, "times": {}, "memory": {}}
    for rows in sizes:
        if not arguments.memory_only:
            rounds = math.ceil(arguments.rounds / 2) if rows > 8192 else arguments.rounds
            document["times"][rows] = measure_times(rows, rounds)
            show(rows, document["times"][rows])
        peaks = {name: measure_peak(name, rows)[0] for name in STEPS}
        document["memory"][rows] = peaks
        print(f"\nB = {rows}, extra MB: " + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items()))
        gradients = 2 * rows * WIDTH * 4 / 1e6
        ratio = peaks["dense"] / peaks["csalign"]
        print(
            f"dense / csalign {ratio:.1f}; the gradients alone are {gradients:.0f} MB", flush=True
        )
    if arguments.largest:
        peak, seconds = measure_peak("csalign", arguments.largest)
        document["memory"][arguments.largest] = {"csalign": peak}
        print(f"\nB = {arguments.largest}: csalign, extra {peak:.0f} MB, {seconds:.0f} CPU s")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
