import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from csalign.cli import eval_tables
from csalign.core.errors import ConfigError, DataError
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ExtractConfig, ImportConfig
from csalign.ingest.extract import extract
from csalign.ingest.import_arrays import import_arrays
from csalign.metrics.gap import image_distances

NAMES = tuple(f"{number}.png" for number in range(6))


@pytest.fixture
def encoder(tiny_clip: tuple[Path, Path]) -> str:
    return f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"


@pytest.fixture
def folders(make_images: Callable[..., Path]) -> tuple[Path, Path]:
    real, fake = make_images(*NAMES, folder="real"), make_images(*NAMES[:4], folder="fake")
    for path in fake.iterdir():
        Image.open(path).convert("L").convert("RGB").save(path)
    return real, fake


def test_folders_are_embedded_and_compared(
    encoder: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, fake = folders
    (fake / "broken.png").write_bytes(b"none")
    document = evaluate(
        EvalConfig(images=str(real), generated=str(fake), encoder=encoder, explain=True)
    )
    rows = []
    for folder in (real, fake):
        out = tmp_path / f"{folder.name}-features"
        extract(
            ExtractConfig(
                source=str(folder), image_encoder=encoder, text_encoder="none", out=out,
                dtype="float32", max_failures=1,
            )
        )  # fmt: skip
        rows.append(torch.from_numpy(np.array(FeatureSet.open(out).images.embeddings())))

    assert document["distribution"] == pytest.approx(image_distances(*rows), rel=1e-6)
    assert document["counts"] == {"images": 6, "generated": 4}
    assert document["encoder"] == encoder
    assert "1000 (mean k" in document["explanations"]["distribution.cmmd"]["formula"]
    json.dumps(document, allow_nan=False)
    stored = [str(tmp_path / f"{folder.name}-features") for folder in folders]
    again = evaluate(EvalConfig(images=stored[0], generated=stored[1]))
    assert again["distribution"] == pytest.approx(document["distribution"], rel=1e-6)
    assert again["fingerprints"] == document["fingerprints"]
    mixed = evaluate(EvalConfig(images=stored[0], generated=str(fake), encoder=encoder))
    assert mixed["distribution"] == pytest.approx(document["distribution"], rel=1e-6)
    eval_tables.eval_tables(document, EvalConfig())
    assert "CMMD" in capsys.readouterr().out


def test_few_images_and_those_left_out_are_told(
    encoder: str, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    real, fake = folders
    (fake / "broken.png").write_bytes(b"none")
    evaluate(EvalConfig(images=str(real), generated=str(fake), encoder=encoder))

    assert "skipped 1 unusable inputs" in caplog.text
    assert "broken.png is not an image of a known format" in caplog.text
    assert "4 images are too few for the Fréchet distance of embeddings of width 16" in caplog.text


def test_sets_of_different_encoders_are_refused(
    encoder: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32))
    out = tmp_path / "imported"
    import_arrays(ImportConfig(images=tmp_path / "a.npy", texts=tmp_path / "a.npy", out=out))
    with pytest.raises(DataError, match=r"by unknown \(width 16\); encode both by one encoder"):
        evaluate(EvalConfig(images=str(folders[0]), generated=str(out), encoder=encoder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "missing FEATURES; for instance: csalign eval"),
        ({"images": "a"}, "--images and --generated are compared; pass both"),
        ({"images": "a", "generated": "b", "features": "c"}, r"FEATURES\|RUN: cannot be used with"),
        (
            {"images": "a", "generated": "b", "by": "c", "seed": 1},
            "--by, --seed: cannot be used with",
        ),
        ({"images": "a", "generated": "b"}, "encoder is required, to encode the images of a"),
        ({"images": "a", "generated": "b", "encoder": "x", "split": "y"}, "split: is for feature"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(EvalConfig(**values))


def test_a_set_of_one_image_is_refused(encoder: str, make_images: Callable[..., Path]) -> None:
    folder = str(make_images("0.png"))
    with pytest.raises(DataError, match="contains 1 images, at least 2 are needed"):
        evaluate(EvalConfig(images=folder, generated=folder, encoder=encoder))
