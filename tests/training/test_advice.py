import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import csalign

RNG = np.random.default_rng(0)
LATENT = RNG.normal(size=(600, 12))
IMAGES = (LATENT @ RNG.normal(size=(12, 64)) + 0.5 * RNG.normal(size=(600, 64))).astype(np.float32)
TEXTS = (LATENT @ RNG.normal(size=(12, 48)) + 0.5 * RNG.normal(size=(600, 48))).astype(np.float32)


def train(images: Any, texts: Any, run: Path, **options: Any) -> Any:
    return csalign.train((images, texts), run, steps=0, **options)


def test_few_validation_images_are_warned_of_with_their_standard_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(IMAGES[:64], TEXTS[:64], tmp_path / "few")

    [warning] = [text for text in caplog.messages if "standard error" in text]
    assert warning.startswith("validating on 16 images")
    assert "up to 10 points" in warning
    assert "csalign split --val" in warning


def test_pairs_that_agree_are_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(IMAGES, TEXTS, tmp_path / "run")

    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_random_pairs_and_encoders_that_hardly_agree_are_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(IMAGES, TEXTS[::-1], tmp_path / "random")
    [random] = [text for text in caplog.messages if "10-NN" in text]
    caplog.clear()
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(2, 3000, 64)).astype(np.float32)
    texts[:, :8] = images[:, :8]
    train(images, texts, tmp_path / "hardly")
    [hardly] = [text for text in caplog.messages if "10-NN" in text]

    assert random.startswith("the pairs look random (mutual 10-NN 0.0")
    assert "check the keys" in random
    assert hardly.startswith("the encoders hardly agree (mutual 10-NN 0.0")
    assert "expect low recall" in hardly


def test_loud_dimensions_cost_no_recall_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loud = IMAGES.copy()
    noise = RNG.normal(size=(600, 3)).astype(np.float32)
    loud[:, [7, 13, 40]] = 300 * np.abs(IMAGES).mean() * noise
    quiet = np.delete(IMAGES, [7, 13, 40], axis=1)
    with caplog.at_level("INFO", "csalign"):
        found = train(loud, TEXTS, tmp_path / "loud")["validation"]["start"]["mean_recall"]
    expected = train(quiet, TEXTS, tmp_path / "quiet")["validation"]["start"]["mean_recall"]

    assert (
        "image embeddings: 3 of 64 dimensions (7, 13, 40) vary more than 10 times as much as most "
        "others; scaled down"
    ) in caplog.messages
    assert not [text for text in caplog.messages if "10-NN" in text]
    assert found > expected - 0.05
    shapes = json.loads((tmp_path / "loud/adapter.json").read_text())["adapters"]
    assert shapes["image"]["scaled"]
    assert not shapes["text"]["scaled"]
    again = csalign.load_adapter(tmp_path / "loud")
    assert again.image.scale is not None
    assert again.image.scale[7] < 0.1
