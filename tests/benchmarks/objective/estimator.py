"""Mean kernels of large sets: landmarks against random features, Nystrom and a sample.

    python tests/benchmarks/objective/estimator.py errors [--rows 10000] [--pair FEATURES RUN]
    python tests/benchmarks/objective/estimator.py time [--rows 1000000]

"errors" compares each estimate of the CS divergence with the exact one, all pairs by tiles, over
seeds, of which landmarks take more; "time" measures landmarks on float16 rows that are made chunk
by chunk. Seconds are of the processor, one thread.
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
from csalign.metrics.landmarks import Estimate, KernelSums, Landmarks
from csalign.objective.divergence import cs_divergence
from csalign.objective.features import RandomFeatures, mean_kernels
from csalign.objective.kernels import squared_distances
from csalign.runs.load import embed_rows, load_adapter_for

WIDTH = 512
CLUSTERS = 200
TILE = 512
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
    adapter, _ = load_adapter_for(opened, run, "cpu", None)
    images, texts = (embed_rows(adapter, side, rows, opened) for side in Modality)
    return torch.from_numpy(images), torch.from_numpy(texts)


def exact(x: Tensor, y: Tensor) -> list[float]:
    """The CS divergence at each of `SIGMAS`, from all pairs."""
    logs = [_log_means(a, b) for a, b in ((x, x), (y, y), (x, y))]
    return [xx + yy - 2 * xy for xx, yy, xy in zip(*logs, strict=True)]


def _log_means(x: Tensor, y: Tensor) -> list[float]:
    sums = [0.0] * len(SIGMAS)
    for a in torch.split(x, TILE):
        for b in torch.split(y, TILE):
            squares = squared_distances(a, b)
            for i, sigma in enumerate(SIGMAS):
                sums[i] += float((squares * (-0.5 / sigma**2)).exp_().sum())
    return [math.log(total / len(x) / len(y)) for total in sums]


def by_landmarks(x: Tensor, y: Tensor, sigma: float, seed: int) -> Estimate:
    """What csalign does."""
    sums = KernelSums(Landmarks.draw(x, y, seed=seed), (sigma,))
    sums.add(0, x)
    sums.add(1, y)
    return sums.means(sigma).cs_divergence()


def by_features(x: Tensor, y: Tensor, sigma: float, seed: int) -> tuple[float, float]:
    """Orthogonal random features, 2,048 cosines and sines; the error from its blocks."""
    features = RandomFeatures(x.shape[1], seed=seed)

    def mean(rows: Tensor) -> Tensor:
        parts = [len(p) * features.mean(p, sigma=sigma).double() for p in torch.split(rows, TILE)]
        return torch.stack(parts).sum(0) / len(rows)

    means = mean(x), mean(y)
    blocks = [
        _log_cs(*parts) for parts in zip(*(m.split(x.shape[1], 1) for m in means), strict=True)
    ]
    error = float(torch.tensor(blocks).std()) / math.sqrt(len(blocks))
    return _log_cs(*means), error


def _log_cs(mean_x: Tensor, mean_y: Tensor) -> float:
    means = mean_kernels(mean_x, mean_y)
    return float(means.xx.log() + means.yy.log() - 2 * means.xy.log())


def by_nystrom(x: Tensor, y: Tensor, sigma: float, seed: int) -> tuple[float, float]:
    """Nystrom's low-rank kernel alone, on 2,048 rows."""
    base = Landmarks.draw(x, y, seed=seed, base=1_024, witnesses=1).base
    wide = base.double()  # rounding leaves a float32 kernel with eigenvalues below 0
    kernel = squared_distances(wide, wide).mul_(-0.5 / sigma**2).exp_()
    factor = torch.linalg.cholesky(kernel + 1e-6 * torch.eye(len(base), dtype=torch.float64))

    def mean(rows: Tensor) -> Tensor:
        sums = torch.zeros(len(base), dtype=torch.float64)
        for part in torch.split(rows, TILE):
            sums += squared_distances(part, base).mul_(-0.5 / sigma**2).exp_().sum(0)
        return torch.linalg.solve_triangular(factor, sums[:, None] / len(rows), upper=False)[:, 0]

    a, b = mean(x), mean(y)
    return float((a @ a).log() + (b @ b).log() - 2 * (a @ b).log()), NONE


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
    "orthogonal features": by_features,
    "Nystrom alone": by_nystrom,
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
    """One pass over rows in all, half of them a side, made as float16 chunk by chunk."""
    first = clusters(20_000, 0.6, 0)
    sums = KernelSums(Landmarks.draw(*first, seed=0), (0.5,))
    spent, chunk, done = 0.0, min(rows // 2, 20_000), 0
    while done < rows // 2:
        halves = [
            side[: min(chunk, rows // 2 - done)].half() for side in clusters(chunk, 0.6, done)
        ]
        began = time.process_time()
        for side, part in enumerate(halves):
            sums.add(side, part)
        spent += time.process_time() - began
        done += len(halves[0])
    began = time.process_time()
    found = sums.means(0.5).cs_divergence()
    end = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return (
        f"| {2 * done:,} | {spent:.1f} | {end:.2f} | {1e6 * spent / done / 2:.1f} | {peak:,} | "
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
        print("| rows | pass, s | end, s | us a row | peak MiB | CS |\n|---|---|---|---|---|---|")
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
