"""Feature sets and a run that the tests of training share and only read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.train import train

QUICK: dict[str, Any] = {
    "steps": 12,
    "batch_size": 64,
    "hidden": 16,
    "validations": 4,
    "patience": 99,
}


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two .npy files of 300 pairs that share a latent: images 24 wide, texts 16 wide."""
    folder = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(300, 8))
    paths = (folder / "images.npy", folder / "texts.npy")
    for path, width in zip(paths, (24, 16), strict=True):
        mixed = latent @ rng.normal(size=(8, width)) + 0.7 * rng.normal(size=(300, width))
        np.save(path, mixed.astype(np.float32))
    return paths


@pytest.fixture(scope="session")
def features(arrays: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arrays as a feature set: 200 training, 40 validation and 60 test pairs."""
    folder = tmp_path_factory.mktemp("features")
    splits = ["train"] * 200 + ["val"] * 40 + ["test"] * 60
    table = folder / "texts.csv"
    lines = [f"{row},caption {row},{split}" for row, split in enumerate(splits)]
    table.write_text("\n".join(["image_id,caption,split", *lines]))
    out = folder / "features"
    import_arrays(ImportConfig(images=arrays[0], texts=arrays[1], pairs=table, out=out))
    return out


@pytest.fixture(scope="session")
def quick_run(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with 4 validations and all logs but wandb."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    config = TrainConfig(features=features, out=out, log_to=("csv", "tensorboard"), **QUICK)
    return train(config).run
