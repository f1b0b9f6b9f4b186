from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign import fit
from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, ShapeError
from csalign.features.arrays import write_arrays
from csalign.features.reader import FeatureSet
from csalign.runs.config import ExportConfig
from csalign.runs.export import export
from csalign.runs.metadata import read_settings
from csalign.training.config import TrainConfig
from csalign.training.train import train


@pytest.fixture
def same_width(tmp_path: Path) -> Any:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(120, 10)) + 1
    write_arrays(tmp_path / "set", images, images - 2)
    return tmp_path / "set"


@pytest.mark.parametrize("name", ["mean-shift", "standardised"])
def test_a_baseline_becomes_a_run(same_width: Path, tmp_path: Path, name: str) -> None:
    result = train(TrainConfig(features=same_width, out=tmp_path / "run", adapter=name))
    info = read_info(result.run)
    adapter = load_adapter(result.run)
    rows = FeatureSet.open(same_width)

    assert result.steps == 0
    assert result.parts == ""
    assert info.start == name
    assert {own.kind for own in info.adapters.values()} == {"linear"}
    assert read_settings(result.run)["adapter"] == name
    x, y = (adapter.embed(side, rows.table(side).embeddings()) for side in Modality)

    assert np.abs(x.mean(0) - y.mean(0)).max() < 0.2
    export(ExportConfig(run=result.run, to="safetensors", out=tmp_path / "exported"))


def test_its_map_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 90, 6)) + np.array([[[1.0]], [[-1.0]]])
    adapter = fit(x, y, adapter="standardised")
    for side, rows in ((Modality.IMAGE, x), (Modality.TEXT, y)):
        u = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        z = (u - u.mean(0)) / u.std(0)
        z /= np.linalg.norm(z, axis=1, keepdims=True)

        assert np.allclose(adapter.embed(side, rows), z, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 5}, "--steps 5: mean-shift is fitted"),
        ({"epochs": 1}, "--epochs 1"),
        ({"image_adapter": "glu"}, "--image-adapter glu"),
        ({"ensemble": "auto"}, "--ensemble auto"),
        ({"tokens": True}, "--tokens"),
    ],
)
def test_options_of_training_are_refused(values: dict[str, Any], message: str) -> None:
    config = TrainConfig(**{"features": "set", "out": "run", "adapter": "mean-shift", **values})
    with pytest.raises(ConfigError, match=message):
        config.check()


def test_different_widths_name_other_adapters(features: Path, tmp_path: Path) -> None:
    config = TrainConfig(features=features, out=tmp_path / "run", adapter="mean-shift")
    with pytest.raises(ShapeError, match="needs one width; use closed-form"):
        train(config)


def test_the_closed_form_is_a_run_without_steps(features: Path, tmp_path: Path) -> None:
    result = train(TrainConfig(features=features, out=tmp_path / "run", adapter="closed-form"))

    assert result.steps == 0
    assert result.start.startswith("CCA")
