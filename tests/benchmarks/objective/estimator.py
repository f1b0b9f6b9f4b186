"""Mean kernels of large sets: landmarks against a sample.

    python tests/benchmarks/objective/estimator.py errors [--rows 10000] [--pair FEATURES RUN]
    python tests/benchmarks/objective/estimator.py time [--rows 1000000]

"errors" compares each estimate of the CS divergence with the exact one, from all pairs, over seeds;
"time" measures landmarks on float16 rows. Seconds are of the processor, one thread.
"""

import argparse
import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.enums import Modality
from csalign.features.join import ALL, load_rows
from csalign.features.reader import FeatureSet
from csalign.metrics.landmarks import Estimate, estimate_mean_kernels
from csalign.objective.divergences import cs_divergence
from csalign.objective.kernels import tiled_log_mean_kernels
from csalign.runs.config import LoadOptions
from csalign.runs.load import embed_rows, load_adapter_for

WIDTH = 512
CLUSTERS = 200
SIGMAS = (0.3, 0.5, 1.0)
SAMPLE = 5_000
OTHER_SEEDS = 4
NONE = math.nan  # the error of an estimate that states none

Sets = tuple[Tensor, Tensor]
Estimator = Callable[[Tensor, Tensor, float, int], tuple[float, float]]


def clusters(rows: int, apart: float, seed: int, centres_seed: int = 0) -> Sets:
    """Two sets of unit rows around the same centres, moved apart; (rows, WIDTH) float32 each."""
    generator = torch.Generator().manual_seed(centres_seed)
    centres = normalize(torch.randn(CLUSTERS, WIDTH, generator=generator), dim=1)
    shift = normalize(torch.randn(WIDTH, generator=generator), dim=0) * apart / 2
    generator.manual_seed(seed + 1)

    def side(sign: int) -> Tensor:
        near = centres[torch.randint(CLUSTERS, (rows,), generator=generator)]
        noise = torch.randn(rows, WIDTH, generator=generator) * 0.6 / WIDTH**0.5
        return normalize(near + noise + sign * shift, dim=1)

    return side(1), side(-1)


def aligned(features: Path, run: Path) -> Sets:
    """All rows of a feature set, through an adapter."""
    opened = FeatureSet.open(features)
    rows = load_rows(opened, ALL)
    adapter, _ = load_adapter_for(opened, run, LoadOptions(device="cpu"))
    images, texts = (embed_rows(adapter, side, rows, opened) for side in Modality)
    return torch.from_numpy(images), torch.from_numpy(texts)


def exact(x: Tensor, y: Tensor) -> list[float]:
    """The CS divergence at each of `SIGMAS`, from all pairs."""
    sets = ((x, x), (y, y), (x, y))
    xx, yy, xy = (tiled_log_mean_kernels(a, b, sigma=SIGMAS) for a, b in sets)
    found: list[float] = (xx + yy - 2 * xy).tolist()
    return found


def by_landmarks(x: Tensor, y: Tensor, sigma: float, seed: int) -> Estimate:
    """The estimator of `csalign eval`."""
    (means,) = estimate_mean_kernels(x, y, sigmas=(sigma,), seed=seed)
    return means.cs_divergence()


def by_sample(x: Tensor, y: Tensor, sigma: float, seed: int) -> tuple[float, float]:
    """All pairs of `SAMPLE` rows a side, or of a third of a smaller side."""
    generator = torch.Generator().manual_seed(seed)
    few = [
        rows[torch.randperm(len(rows), generator=generator)[: min(SAMPLE, len(rows) // 3)]]
        for rows in (x, y)
    ]
    return float(cs_divergence(few[0], few[1], sigma=sigma)), NONE


ESTIMATORS: dict[str, Estimator] = {
    "landmarks": by_landmarks,
    "sample": by_sample,
}


def compare(name: str, sets: Sets, seeds: int) -> Iterator[str]:
    """Rows of the table of one pair of sets."""
    x, y = sets
    truths = exact(x, y)
    for sigma, truth in zip(SIGMAS, truths, strict=True):
        for method, estimate in ESTIMATORS.items():
            began = time.process_time()
            tried = seeds if method == "landmarks" else OTHER_SEEDS
            found = [estimate(x, y, sigma, seed) for seed in range(tried)]
            seconds = (time.process_time() - began) / tried
            off = torch.tensor([value - truth for value, _ in found])
            errors = torch.tensor([error for _, error in found])
            root = float(off.square().mean().sqrt())
            within = stated = "-"
            if not errors.isnan().all():
                within = f"{float((off.abs() < 2 * errors).float().mean()):.0%}"
                stated = f"{100 * float(errors.mean()) / truth:.2f}"
            yield (
                f"| {name} | {sigma} | {truth:.4f} | {method} | {100 * root / truth:.2f} | "
                f"{100 * float(off.mean()) / truth:+.2f} | {stated} | {within} | {seconds:.2f} |"
            )


def timed(rows: int) -> str:
    """Landmarks on so many float16 rows in all, half of them per side."""
    side = clusters(min(rows // 2, 20_000), 0.6, 0)
    x, y = (part.half().repeat(-(-rows // 2 // len(part)), 1)[: rows // 2] for part in side)
    began = time.process_time()
    found = by_landmarks(x, y, 0.5, 0)
    spent = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return (
        f"| {2 * len(x):,} | {spent:.1f} | {1e6 * spent / len(x) / 2:.1f} | {peak:,} | "
        f"{found.value:.5f} ± {found.error:.1g} |"
    )


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("errors", "time"))
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--pair", nargs=2, type=Path, action="append", default=[])
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    if wanted.what == "time":
        print("| rows | s | us per row | peak MiB | CS |\n|---|---|---|---|---|")
        for rows in wanted.rows or (1_000_000,):
            print(timed(rows), flush=True)
        return
    print(
        "| sets | sigma | exact | by | rms error, % | bias, % | stated, % | within 2 stated | s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    cases: dict[str, Callable[[], Sets]] = {}
    for rows in wanted.rows or ():
        cases[f"clusters, {rows:,} a side"] = lambda rows=rows: clusters(rows, 0.6, 0)
        cases[f"far clusters, {rows:,} a side"] = lambda rows=rows: clusters(rows, 2.0, 0)
    for features, run in wanted.pair:
        cases[run.name] = lambda features=features, run=run: aligned(features, run)
    for name, make in cases.items():
        for line in compare(name, make(), wanted.seeds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
