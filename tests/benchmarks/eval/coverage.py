"""How often the 95 % bootstrap intervals of `eval` and `compare` hold the truth.

    python tests/benchmarks/eval/coverage.py [--replications 400] [--sizes 100,300,1000]

Each replication draws n images with one to five captions from a known model and measures two
systems on them, one noisier than the other. The truth of the gap is that of the model, from very
many rows; it is shown against the mean over all replications too, since figures of few rows are
biased. Recall depends on the gallery, so its truth is the recall to be expected in a random gallery
of as many images: the mean over all replications (of a median rank, their median), whose own error
is 1 / sqrt(replications) of a replication's. The resamples keep the gallery, so this asks more of
them than they promise: that the luck of the gallery is small against that of the queries. Printed
is the share of intervals that hold the truth, for plain figures and for the difference of the two
systems. RESULTS.md has what was found.
"""

import argparse
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from csalign.metrics.bootstrap import Place, percentiles, resample
from csalign.metrics.gap import alignment, centroid_distance, relative_modality_gap
from csalign.metrics.retrieval import rank_both_ways

WIDTH = 32
MANY = 400_000
RESAMPLES = 500
FEWEST, MOST = 1, 5  # captions of an image
SYSTEMS = {"good": (0.6, 1.8), "noisy": (0.6, 2.0)}  # offset of the sides, noise of the captions
DIRECTIONS = ("image_to_text", "text_to_image")
RETRIEVAL = ("R@1", "R@5", "R@10", "true_recall@5", "mrr", "map", "r_precision", "mean_rank")
GAP: tuple[Place, ...] = (("centroid_distance",), ("alignment",), ("rmg",))
PLACES: tuple[Place, ...] = (
    *((direction, name) for direction in DIRECTIONS for name in (*RETRIEVAL, "median_rank")),
    ("mean_recall",),
    *GAP,
)
Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def draw(rng: np.random.Generator, images: int) -> Iterator[tuple[Floats, Floats, Ints]]:
    """The same images and captions as either system embeds them."""
    owners = np.repeat(np.arange(images), rng.integers(FEWEST, MOST + 1, images))
    meaning = rng.standard_normal((images, WIDTH), np.float32)
    noise_x = rng.standard_normal((images, WIDTH), np.float32)
    noise_y = rng.standard_normal((len(owners), WIDTH), np.float32)
    for offset, noise in SYSTEMS.values():
        x, y = meaning + 0.5 * noise_x, meaning[owners] + noise * noise_y
        x[:, 0] += offset
        y[:, 0] -= offset
        sides = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
        yield (*sides, owners)


def gap_truth(rng: np.random.Generator) -> list[dict[Place, float]]:
    """Figures of the gap of both systems, from very many rows."""
    truths = []
    for x, y, owners in draw(rng, MANY // MOST * 2):
        images, texts = torch.from_numpy(x), torch.from_numpy(y)
        pairs = torch.from_numpy(owners), torch.arange(len(owners))
        values = (
            centroid_distance(images, texts),
            alignment(images, texts, pairs),
            relative_modality_gap(images, texts, pairs),
        )
        truths.append(dict(zip(GAP, values, strict=True)))
    return truths


def replicate(rng: np.random.Generator, images: int) -> list[dict[Place, tuple[float, ...]]]:
    """Value, low and high end of each figure: of both systems, and of their difference."""
    values, resamples = [], []
    for x, y, owners in draw(rng, images):
        ranks = rank_both_ways(x, y, owners)
        few, texts = torch.from_numpy(x), torch.from_numpy(y)
        pairs = torch.from_numpy(owners), torch.arange(len(owners))
        found: dict[Place, float] = {
            (name, figure): value
            for name, side in zip(DIRECTIONS, ranks, strict=True)
            for figure, value in side.summary().items()
        }
        recalls = [found[name, f"R@{k}"] for name in DIRECTIONS for k in (1, 5, 10)]
        found[("mean_recall",)] = float(np.mean(recalls))
        found[("centroid_distance",)] = centroid_distance(few, texts)
        found[("alignment",)] = alignment(few, texts, pairs)
        found[("rmg",)] = relative_modality_gap(few, texts, pairs)
        values.append(found)
        resamples.append(resample(ranks, x, y, owners, resamples=RESAMPLES, seed=0))
    good, noisy = (made.figures for made in resamples)
    both = [
        {place: (found[place], *percentiles(made[place])) for place in PLACES}
        for found, made in zip(values, (good, noisy), strict=True)
    ]
    difference = {
        place: (values[0][place] - values[1][place], *percentiles(good[place] - noisy[place]))
        for place in PLACES
    }
    return [*both, difference]


def _told(low: Array, high: Array, truth: float, expected: float) -> str:
    held = np.mean((low <= truth) & (truth <= high))
    return f"{100 * held:6.1f} ({truth:8.4f} {expected:8.4f})"


def main() -> None:
    """Print a table a size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=400)
    parser.add_argument("--sizes", default="100,300,1000")
    arguments = parser.parse_args()
    first, second = gap_truth(np.random.default_rng(1))
    known = [first, second, {place: first[place] - second[place] for place in GAP}]
    for size in map(int, arguments.sizes.split(",")):
        rng = np.random.default_rng(size)
        runs = [replicate(rng, size) for _ in range(arguments.replications)]
        error = math.sqrt(0.95 * 0.05 / len(runs))
        print(f"\n{size:,} images, {len(runs)} replications: share that holds the truth, %")
        print(f"(of 95.0 %, standard error {100 * error:.1f}); truth, mean of the figure")
        for place in PLACES:
            cells, again = [], []
            for truths, kind in zip(known, zip(*runs, strict=True), strict=True):
                value, low, high = np.array([run[place] for run in kind]).T
                expected = np.median(value) if place[-1] == "median_rank" else value.mean()
                cells.append(_told(low, high, truths.get(place, expected), expected))
                again.append(_told(low, high, expected, expected))
            print(f"{' '.join(place):32} {'  '.join(cells)}", flush=True)
            if place in GAP:
                print(f"{'... of so many rows':32} {'  '.join(again)}", flush=True)


if __name__ == "__main__":
    main()
