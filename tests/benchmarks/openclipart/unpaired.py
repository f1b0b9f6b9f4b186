"""What unpaired rows bring on the Open Clip Art set: few pairs, and the rest without partners.

Usage::

    python tests/benchmarks/openclipart/unpaired.py --work DIR [--seeds 3] [--pairs 1000,3500]

DIR is the folder of ``prepare.py``. Some drawings of the splits "train" and "val2" keep their
captions; the others' drawings lose their captions and the others' captions their drawings. Choices
were made on "val" and "val2"; the test split is only measured here. `±` is the standard deviation
over seeds, each with pairs of its own; the brackets hold the 95 % bootstrap interval over test
images of the difference to the pairs alone, on the same images.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csalign.adapters.checkpoint import load_adapter
from csalign.core.enums import Modality
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.metrics.retrieval import RECALL_AT, rank_both_ways
from csalign.training.config import TrainConfig
from csalign.training.train import train

POOL = ("train", "val2")
SPLITS = (*POOL, "val", "test")
ALONE = "pairs alone"
OFF: dict[str, Any] = {"match_moments": False}
ROWS: dict[str, dict[str, Any]] = {
    ALONE: {**OFF, "unpaired_ratio": 0.0},
    "+ unpaired in the CS term": OFF,
    "+ moments matched: the default": {},
    "+ unpaired as negatives of InfoNCE": {"unpaired_negatives": True},
    "closed form, pairs alone": {**OFF, "steps": 0},
    "closed form, + unpaired, moments matched": {"steps": 0},
}
GAPS = ("centroid_distance", "frechet", "cs_divergence", "rmg")


@dataclass(frozen=True)
class Run:
    """One trained model on the test split.

    Attributes:
        document: what ``csalign eval --json`` prints.
        hits: (n,) the mean of the six recalls of each test image and its title.
        seconds: of training.
    """

    document: dict[str, Any]
    hits: NDArray[np.float64]
    seconds: float


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", default="1000,3500", help="numbers of pairs, by comma")
    parser.add_argument("--rows", help="rows of the table to measure, by number from 0, by comma")
    arguments = parser.parse_args()
    names = list(ROWS)
    if arguments.rows:
        names = [names[int(number)] for number in arguments.rows.split(",")]
    for pairs in map(int, arguments.pairs.split(",")):
        table: dict[str, list[Run]] = {name: [] for name in names}
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                features = Path(folder) / "features"
                write_features(arguments.work / "features", features, pairs, seed)
                for name in names:
                    run = measure(features, Path(folder) / "run", ROWS[name], seed)
                    table[name].append(run)
                    print(pairs, seed, name, told(run), file=sys.stderr, flush=True)
        print_table(table, pairs)


def write_features(source: Path, out: Path, pairs: int, seed: int) -> None:
    """Write the set with so many pairs in the pool, and no partners for its other rows."""
    opened = FeatureSet.open(source)
    images, texts = [], []
    image_table: list[tuple[str, ...]] = [("id", "split")]
    text_table: list[tuple[str, ...]] = [("id", "image_id", "caption", "split")]
    pool = load_rows(opened, ",".join(POOL))
    captioned = np.flatnonzero(pool.caption_counts)
    chosen = np.random.default_rng([seed, pairs]).choice(captioned, pairs, replace=False)
    keeping = {pool.image_ids[int(row)].as_py() for row in chosen}
    for split in SPLITS:
        rows = load_rows(opened, split)
        ids = rows.image_ids.to_pylist()
        owners = [ids[row] if row >= 0 else "" for row in rows.text_image]
        if split in POOL:
            owners = [owner if owner in keeping else "" for owner in owners]
        images.append(rows.images)
        texts.append(rows.texts)
        image_table += [(name, split) for name in ids]
        described = zip(rows.text_ids.to_pylist(), owners, rows.captions.to_pylist(), strict=True)
        text_table += [(*row, split) for row in described]
    folder = out.parent
    np.save(folder / "images.npy", np.concatenate(images))
    np.save(folder / "texts.npy", np.concatenate(texts))
    for name, table in (("images", image_table), ("texts", text_table)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(table)
    import_arrays(
        ImportConfig(
            images=folder / "images.npy",
            texts=folder / "texts.npy",
            image_table=folder / "images.csv",
            text_table=folder / "texts.csv",
            out=out,
        )
    )


def measure(features: Path, run: Path, settings: Mapping[str, Any], seed: int) -> Run:
    """Train one row with one seed and measure it on the test split."""
    config = TrainConfig(
        features=features,
        out=run,
        overwrite=True,
        train_split=",".join(POOL),
        val_split="val",
        seed=seed,
        **settings,
    )
    seconds = train(config).seconds
    document = evaluate(EvalConfig(features=features, adapter=run, split="test", intervals=False))
    rows, adapter = load_rows(FeatureSet.open(features), "test"), load_adapter(run)
    ranks = rank_both_ways(
        adapter.embed(Modality.IMAGE, rows.images),
        adapter.embed(Modality.TEXT, rows.texts),
        rows.text_image,
    )
    # One title an image, so both directions have a query for each test image; texts are in the
    # order of their images.
    hits = np.mean([direction.first <= k for direction in ranks for k in RECALL_AT], axis=0)
    return Run(document, hits, seconds)


def told(run: Run) -> str:
    """The figures of one run, on a line."""
    gap = run.document["gap"]
    recall = 100 * run.document["retrieval"]["mean_recall"]
    return f"{recall:.2f} {' '.join(f'{gap[name]:.4f}' for name in GAPS)} {run.seconds:.0f} s"


def print_table(table: Mapping[str, Sequence[Run]], pairs: int) -> None:
    """Print the table as Markdown."""
    baseline = next(iter(table))
    print(f"\n| {pairs:,} pairs | mean recall | difference | centroid | Frechet | CS | RMG | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in table.items():
        if name.endswith(ALONE):
            baseline = name
        recall = 100 * np.array([run.document["retrieval"]["mean_recall"] for run in runs])
        cells = [f"{recall.mean():.2f} ± {recall.std():.2f}", difference(runs, table[baseline])]
        gaps = [np.array([run.document["gap"][key] for run in runs]) for key in GAPS]
        cells += [f"{values.mean():.3f} ± {values.std():.3f}" for values in gaps]
        seconds = float(np.median([run.seconds for run in runs]))
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def difference(runs: Sequence[Run], baseline: Sequence[Run]) -> str:
    """Mean recall against the baseline's, in points, with its interval."""
    paired = zip(runs, baseline, strict=True)
    hits: NDArray[np.float64] = np.mean([run.hits - base.hits for run, base in paired], axis=0)
    picked = np.random.default_rng(0).integers(0, len(hits), (2_000, len(hits)))
    low, high = np.percentile(100 * hits[picked].mean(axis=1), (2.5, 97.5))
    return f"{100 * hits.mean():+.2f} ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    main()
