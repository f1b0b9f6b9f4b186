"""Feature sets of several sides, and runs on them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csalign.adapters.checkpoint import save_adapter, unknown_info
from csalign.adapters.model import Adapter, build_side
from csalign.adapters.side import SideShape
from csalign.core.enums import side_of
from csalign.features.reader import FeatureSet
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows

ITEMS, WIDTH = 120, 12


@pytest.fixture
def write_sided() -> Callable[..., Path]:
    """Write a set whose items have 70 % of their sides, with up to two rows on each."""

    def write(
        folder: Path,
        sides: Sequence[str] = ("image", "text", "audio"),
        *,
        noise: float = 0.6,
        widths: dict[str, int] | None = None,
        turned: bool = False,
        only_train: Sequence[str] = (),
        shared: int = ITEMS,
    ) -> Path:
        """Write rows that depend on the names alone; `turned` turns the order of sides and rows.

        Items from number `shared` on are others on each side.
        """
        hidden = np.random.default_rng(1).normal(size=(ITEMS, WIDTH))
        wide = {side: (widths or {}).get(side, WIDTH) for side in sides}
        encoders = {side: EncoderInfo(spec="x", width=wide[side]) for side in sides}
        folder.mkdir(parents=True)
        with FeatureWriter(folder, encoders, "float32", items=True) as writer:
            for side in reversed(sides) if turned else sides:
                rng = np.random.default_rng([*side.encode()])
                there = np.flatnonzero(rng.random(ITEMS) < 0.7)
                items = np.repeat(there, rng.integers(1, 3, len(there)))
                rows = np.pad(hidden, ((0, 0), (0, max(0, wide[side] - WIDTH))))[items]
                rows = rows + noise * rng.normal(size=rows.shape) + rng.normal(size=rows.shape[1])
                order = np.arange(len(items))[:: -1 if turned else 1]
                columns: dict[str, Any] = {
                    "id": [f"{side}-{row}" for row in order],
                    "item": [
                        f"item-{item:03}" if item < shared else f"{side}-{item}"
                        for item in items[order]
                    ],
                    "split": [
                        "test" if item % 2 and side not in only_train else "train"
                        for item in items[order]
                    ],
                }
                if side == "text":
                    columns["image_id"] = [None] * len(items)
                writer.write(side_of(side), Rows(columns, rows[order].astype(np.float32)))
        return folder

    return write


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Write a run whose adapters centre each side, and keep some of its dimensions."""

    def write(folder: Path, features: Path, sides: Sequence[str], kept: int = WIDTH) -> Path:
        found, adapters = FeatureSet.open(features), {}
        for side in map(side_of, sides):
            values = torch.from_numpy(found.table(side).embeddings())
            own: Any = build_side(SideShape("linear", values.shape[1], WIDTH))
            with torch.no_grad():
                own.mean.copy_(torch.nn.functional.normalize(values, dim=1).mean(0))
                own.projection.bias.zero_()
                own.projection.weight.copy_(torch.eye(WIDTH, values.shape[1]))
                own.projection.weight[kept:] = 0
            adapters[side] = own
        adapter = Adapter.of_sides(adapters)
        known = {
            "data_fingerprint": found.manifest.fingerprint(),
            "train_split": "train",
            "encoders": dict.fromkeys(adapter.shapes, "x"),
        }
        folder.mkdir(parents=True)
        save_adapter(folder, adapter, unknown_info(adapter.shapes).model_copy(update=known))
        (folder / "environment.json").write_text(f'{{"features": "{features.absolute()}"}}')
        return folder

    return write
