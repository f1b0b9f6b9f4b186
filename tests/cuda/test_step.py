"""A training step runs on a GPU without making the host wait."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows
from csalign.training.config import DataOptions, TrainConfig
from csalign.training.data import load_data
from csalign.training.loop import Trainer
from csalign.training.phases import Work, find_tokens
from tests.cuda.pretend import pretended

WIDTH, IMAGES = 12, 90
STEPS = 2  # a median bandwidth is computed in the first and kept in the second
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"bandwidth": "tied", "learn_scale": True, "average": 0.9},
    "several": {"bandwidth": (0.5, 1.0), "other_captions": 0.5, "captions": "first"},
    "all captions": {"captions": "all", "divergence": "gaussian-kl"},
    "sigmoid": {"pairwise": "sigmoid", "divergence": "sinkhorn", "adapter": "mlp"},
    "uniform": {"pairwise": "align-uniform", "divergence": "mmd", "adapter": "low-rank"},
    "mixed": {"mixing": 0.5, "captions": "first", "cs_weight": "auto"},
    "rounded": {"precision": "bfloat16"},
    "sub-batches": {"sub_batch": 16, "unpaired_negatives": True},
    "tokens": {"token_weight": 0.1},
    "transformer": {"token_weight": 0.1, "adapter": "transformer", "layers": 1},
}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with two captions and up to 5 tokens each; the last third is held out."""
    folder = tmp_path_factory.mktemp("features")
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
    values = {"batch_size": 40, "hidden": 16, "steps": STEPS, **options}
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
            token_width=work.token_widths.get(side),
            layers=1,
        )
        for side, kind in config.kinds.items()
    }
    return work.trainer(Adapter(shapes))


def steps(trainer: Trainer, count: int = STEPS) -> None:
    for _ in range(count):
        trainer._train_step(next(trainer._loader))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_reads_nothing(features: Path, name: str) -> None:
    with pretended() as reads:
        trainer = trainer_of(features, device="cuda", **OPTIONS[name])
        reads.clear()
        steps(trainer)

    assert {p.device.type for p in trainer.adapter.parameters()} == {"cuda"}
    assert not reads.lines
    assert not reads.uploads
