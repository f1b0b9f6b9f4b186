"""A run to read."""

from pathlib import Path

import pytest

from csalign.training.config import TrainConfig
from csalign.training.train import train


@pytest.fixture
def run(features: Path, tmp_path: Path) -> Path:
    """The closed form on `features`."""
    train(TrainConfig(features=features, out=tmp_path / "run", steps=0))
    return tmp_path / "run"
