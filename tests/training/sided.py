"""A small set of three sides that share a latent, each with a part of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csalign.core.arrays import Array, Ints
from csalign.core.enums import side_of
from csalign.core.results import TrainResult
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows
from csalign.training.config import TrainConfig
from csalign.training.train import train

WIDTHS = {"audio": 20, "image": 24, "text": 16, "video": 18}
QUICK: dict[str, Any] = {"steps": 12, "batch_size": 64, "hidden": 16, "validations": 4}


def write_sided(
    folder: Path,
    *,
    sides: Sequence[str] = ("audio", "image", "text"),
    items: int = 400,
    missing: float = 0.4,
    order: np.random.Generator | None = None,
    names: dict[str, str] | None = None,
    only: dict[str, int] | None = None,
) -> Path:
    """Write items with a latent of 6, of whose training items a share of the sides is missing.

    The last 100 items are of the split test and complete. With `order` all rows are permuted;
    `names` renames sides, and `only` limits the number of training rows of some.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(items, 6))
    written: dict[str, tuple[Array, Ints]] = {}
    for side, width in WIDTHS.items():
        values = latent @ rng.normal(size=(6, width)) + 1.2 * rng.normal(size=(items, width))
        there = np.flatnonzero((rng.random(items) > missing) | (np.arange(items) >= items - 100))
        is_kept = (there >= items - 100) | (np.arange(len(there)) < (only or {}).get(side, items))
        there = there[is_kept]
        written[side] = values[there].astype(np.float32), there
    images = {*written["image"][1].tolist()}
    named = {side: side_of((names or {}).get(side, side)) for side in sides}
    encoders = {name: EncoderInfo(spec=side, width=WIDTHS[side]) for side, name in named.items()}
    with FeatureWriter(folder, encoders, "float32", items=True) as writer:
        for side, name in named.items():
            values, there = written[side]
            if order is not None:
                shuffled = order.permutation(len(there))
                values, there = values[shuffled], there[shuffled]
            columns: dict[str, list[str | None]] = {
                "id": [f"{side}{item}" for item in there],
                "item": [f"i{item}" for item in there],
                "split": ["test" if item >= items - 100 else "train" for item in there],
            }
            if side == name == "text":
                columns["image_id"] = [f"image{item}" if item in images else None for item in there]
            writer.write(name, Rows(columns, values))
    return folder


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{**QUICK, **values}))
