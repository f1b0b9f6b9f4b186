"""A small feature set and its trainer, for tests of single steps."""

from pathlib import Path
from typing import Any

import numpy as np

from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows
from csalign.training.config import DataOptions, TrainConfig
from csalign.training.data import load_data
from csalign.training.network.loop import Trainer
from csalign.training.work import Work, find_tokens

WIDTH, IMAGES = 12, 90


def write_features(folder: Path) -> Path:
    """Write images with two captions and up to 5 tokens each; the last third is held out."""
    rng = np.random.default_rng(0)
    made_up = EncoderInfo(spec="made up", width=WIDTH, token_width=WIDTH, token_space="projected")
    with FeatureWriter(folder, dict.fromkeys(Modality, made_up), "float32") as writer:
        for side, count in ((Modality.IMAGE, IMAGES), (Modality.TEXT, 2 * IMAGES)):
            owners = [str(row % IMAGES) for row in range(count)]
            splits = ["train" if row % IMAGES < 60 else "val" for row in range(count)]
            columns: dict[str, Any] = {"id": [*map(str, range(count))], "split": splits}
            if side is Modality.TEXT:
                columns |= {"image_id": owners, "caption": [f"text {row}" for row in range(count)]}
            tokens = [rng.normal(size=(row % 6, WIDTH)) for row in range(count)]
            writer.write(side, Rows(columns, rng.normal(size=(count, WIDTH)), tokens))
    return folder


def trainer_of(features: Path, **options: Any) -> Trainer:
    """Build the trainer of a small run."""
    values = {"batch_size": 40, "hidden": 16, "steps": 100, **options}
    config = TrainConfig(features=features, out=features.parent / "run", **values)
    tokens = find_tokens(config)
    data = load_data(config.group(DataOptions), out=config.out, seed=0)
    work = Work(config, data, tokens)
    shapes = {
        side: SideShape(
            kind,
            input_width=data.rows.embeddings(side).shape[1],
            width=WIDTH,
            hidden=16,
            dropout=config.dropout,
            token_width=work.token_widths.get(side),
            layers=1,
        )
        for side, kind in config.kinds.items()
    }
    return work.trainer(Adapter(shapes))
