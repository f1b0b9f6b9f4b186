"""Each recipe of ``csalign train`` against the default settings, on held-out rows.

Usage::

    python tests/benchmarks/recipes/run.py --features DIR --work DIR [--recipes few-pairs,...]

The features need the splits "train", "val" and "test". `few-pairs` is trained on so many pairs
(--pairs), whose images and captions are all that is paired; the other training rows lose their
partners. `text-to-image` is compared with the default settings with images frozen too. The brackets
hold 95 % bootstrap intervals over test images, of differences on the same images.
"""

from __future__ import annotations

import argparse
import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csalign.adapters.checkpoint import load_adapter
from csalign.core.enums import Modality
from csalign.evaluation.compare import compare
from csalign.evaluation.config import CompareConfig
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.metrics.gap import cmmd
from csalign.training.config import TrainConfig, recipe_names
from csalign.training.train import train

SMALL = {"steps": 120, "batch_size": 256, "hidden": 256, "validations": 4}
FROZEN = {"image_adapter": "identity"}
HEAD = "| | mean recall, % | difference | centroid | RMG | CS | Frechet | cosine | CMMD | s |"


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipes", default=",".join(recipe_names()))
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--small", action="store_true", help="narrow adapters, few small steps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    shared = SMALL if arguments.small else {}
    for name in arguments.recipes.split(","):
        features = arguments.features
        if name == "few-pairs":
            features = arguments.work / f"features-{arguments.pairs}"
            if not features.exists():
                keep_pairs(arguments.features, features, arguments.pairs)
        rows: dict[str, dict[str, Any]] = {"default": {}}
        if name == "text-to-image":
            rows["default, images frozen"] = FROZEN
        rows[name] = {"recipe": name}
        runs = [
            trained(arguments.work / f"{features.name}-{label}".replace(", ", "-"), features, own)
            for label, own in ((label, {**shared, **own}) for label, own in rows.items())
        ]
        print_table(name, list(rows), runs, features)


def trained(run: Path, features: Path, settings: dict[str, Any]) -> Path:
    """Train a run, if it is not there."""
    run = run.with_name(run.name.replace(" ", "-"))
    if not run.exists():
        train(TrainConfig(features=features, out=run, **settings))
    return run


def keep_pairs(source: Path, out: Path, pairs: int) -> None:
    """Write the set with so many training images that keep their captions."""
    opened = FeatureSet.open(source)
    images, texts = [], []
    image_table: list[tuple[Any, ...]] = [("id", "split")]
    text_table: list[tuple[Any, ...]] = [("id", "image_id", "caption", "split")]
    for split in ("train", "val", "test"):
        rows = load_rows(opened, split)
        ids = rows.image_ids.to_pylist()
        owners = [ids[row] if row >= 0 else "" for row in rows.text_image]
        if split == "train":
            captioned = np.flatnonzero(rows.caption_counts)
            chosen = np.random.default_rng(0).choice(captioned, pairs, replace=False)
            keeping = {ids[row] for row in chosen}
            owners = [owner if owner in keeping else "" for owner in owners]
        images.append(rows.images)
        texts.append(rows.texts)
        image_table += [(own, split) for own in ids]
        described = zip(rows.text_ids.to_pylist(), owners, rows.captions.to_pylist(), strict=True)
        text_table += [(*row, split) for row in described]
    folder = out.with_name(f"{out.name}-arrays")
    folder.mkdir(parents=True, exist_ok=True)
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


def print_table(name: str, labels: list[str], runs: list[Path], features: Path) -> None:
    """Print one recipe's rows as Markdown."""
    print(f"\n{name}\n\n{HEAD}\n|{'---|' * HEAD.count(' |')}", flush=True)
    found = compare(CompareConfig(systems=tuple(runs), split="test"))["evaluations"]
    rows = load_rows(FeatureSet.open(features), "test")
    paired = np.flatnonzero(rows.text_image >= 0)
    for label, run, row in zip(labels, runs, found, strict=True):
        adapter = load_adapter(run)
        x, y = adapter.embed(Modality.IMAGE, rows.images), adapter.embed(Modality.TEXT, rows.texts)
        cosine = float((x[rows.text_image[paired]] * y[paired]).sum(1).mean())
        apart = cmmd(torch.from_numpy(x), torch.from_numpy(y))
        own = row["difference"].get("mean_recall")
        told = "0"
        if own is not None:
            low, high = (100 * end for end in own["interval"])
            told = f"{100 * own['value']:+.2f} [{low:+.2f}, {high:+.2f}]"
        cells = [
            f"{100 * row['mean_recall']:.2f}",
            told,
            *(f"{row[key]:.3f}" for key in ("centroid_distance", "rmg", "cs_divergence")),
            f"{row['frechet']:.3f}",
            f"{cosine:.3f}",
            f"{apart:.3f}",
            f"{row['seconds']:.0f}",
        ]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
