"""Embeddings that look like those of a weak model, and healthy ones, which cause no warning."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import csalign
from csalign.core.progress import silent
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract import extract

Array = npt.NDArray[Any]
SAMPLE = Path(__file__).parents[2] / "sample_data"
N, D = 600, 64


def noise(seed: int, rows: int = N, width: int = D) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def cone(seed: int) -> Array:
    """Rows as CLIP's: a loud constant dimension, and a mean cosine of about 0.4."""
    rows = noise(seed)
    rows[:, 13] += 7
    return rows


def alternating(rows: Array, value: Array | float, share: float) -> Array:
    found: Array = np.where(np.arange(len(rows))[:, None] < share * len(rows), value, rows)
    return found.astype(np.float32)


X, Y = noise(0), noise(1)
HEALTHY: dict[str, Callable[[], tuple[Array, Array]]] = {
    "gaussian": lambda: (X, Y),
    "the cone of CLIP": lambda: (cone(0), cone(1)),
    "after a ReLU": lambda: (np.maximum(X, 0), Y),
    "norms as of words": lambda: (X * np.linspace(1, 4, N, dtype=np.float32)[:, None], Y),
    "ten captions": lambda: (X, Y[np.arange(N) % 10]),
    "some captions empty": lambda: (X, alternating(Y, 1, 0.3)),
    "half precision": lambda: (X.astype(np.float16), Y.astype(np.float16)),
    "aligned sides": lambda: (X, X + 0.1 * Y),
    "sorted by class": lambda: (np.repeat(noise(2, 6), 100, axis=0) + X, Y),
    "few rows": lambda: (X[:8] + 9, Y[:8]),
    "a few copies": lambda: (X[[0, 0, 1, 2, 3, 4, 5]], Y[[0, 0, 0, 1, 2, 3, 4]]),
}
DEGENERATE: dict[str, tuple[Callable[[], tuple[Array, Array]], str, str, float]] = {
    # rows of both sides, a warning, a figure of the images and its value
    "first tokens": (
        lambda: (X + 6, Y),
        "images: two rows have a cosine of 0.97",
        "mean_cosine",
        0.973,
    ),
    "a rogue dimension": (
        lambda: (X * np.where(np.arange(D) == 5, 50, 1).astype(np.float32), Y),
        "images: dimensions 5, ",
        "top3_share",
        0.85,
    ),
    "a column of ids": (
        lambda: (np.column_stack([np.arange(N), X]).astype(np.float32), Y),
        "images: dimensions 0, .* check for ids or labels among the columns",
        "top3_share",
        0.98,
    ),
    "black pictures": (
        lambda: (alternating(X, Y[0], 0.4), Y),
        "images: 40 % repeat one embedding; check the input",
        "equal_rows",
        0.4,
    ),
    "padding tokens": (
        lambda: (np.ones_like(X), Y),
        "images: 100 % repeat one embedding; .* pooling",
        "equal_rows",
        1,
    ),
    "one direction": (
        lambda: (X[:, :1] * Y[:1] + 0.05 * noise(2), Y),
        "images: they vary along 1.* of 64 dimensions",
        "effective_dimensions",
        1.05,
    ),
    "one file twice": (
        lambda: (X, X.copy()),
        "600 of 600 texts have the embedding of an image",
        "mean_cosine",
        0,
    ),
    "a permuted copy": (
        lambda: (X, X[np.random.default_rng(0).permutation(N)]),
        "600 of 600 texts have the embedding of an image",
        "mean_cosine",
        0,
    ),
    "a permuted copy of many": (
        lambda: (
            noise(3, 9_000, 16),
            noise(3, 9_000, 16)[np.random.default_rng(0).permutation(9_000)],
        ),
        ".* of 2,048 texts have the embedding of an image",
        "rows",
        2_048,
    ),
}


def imported(folder: Path, images: Array, texts: Array) -> Path:
    np.save(folder / "images.npy", images)
    np.save(folder / "texts.npy", texts)
    csalign.import_arrays(folder / "images.npy", folder / "texts.npy", out=folder / "f")
    return folder / "f"


def of_sides(document: Any) -> list[str]:
    """Findings beside those of the pairs, which are random here."""
    return [line for line in document["findings"] if "10-NN" not in line]


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_embeddings_cause_no_warning(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = csalign.inspect(imported(tmp_path, *HEALTHY[name]()))

    assert of_sides(document) == []
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert document["health"]["image"]["rows"] == document["counts"]["images"]


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_embeddings_are_named_at_import_and_by_inspect(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, line, figure, value = DEGENERATE[name]
    features = imported(tmp_path, *rows())
    document = csalign.inspect(features)

    (found,) = of_sides(document)
    np.testing.assert_allclose(document["health"]["image"][figure], value, rtol=0.05, atol=0.02)
    assert re.match(line, found)
    assert caplog.messages == [f"{features}: {found}"]


def test_real_features_are_healthy(caplog: pytest.LogCaptureFixture) -> None:
    document = csalign.inspect(SAMPLE / "features")

    assert of_sides(document) == []
    assert document["health"]["image"]["mean_cosine"] == pytest.approx(0.32, abs=0.02)
    assert document["health"]["text"]["mean_cosine"] == pytest.approx(0.14, abs=0.02)
    assert document["health"]["text"]["effective_dimensions"] > 50


def test_pictures_of_one_colour_are_named_after_extraction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        Image.new("RGB", (32, 32), "black").save(tmp_path / "pictures" / f"{number}.png")
    extract(
        ExtractConfig(
            source=str(tmp_path / "pictures"),
            image_encoder="timm:test_vit+none",
            text_encoder="none",
            out=tmp_path / "f",
        ),
        silent,
    )

    assert [text for text in caplog.messages if "100 % repeat one embedding" in text]


@pytest.mark.parametrize("blank", [60, 100])
def test_rows_that_are_mostly_one_are_a_collapse_and_no_image_of_many_captions(
    blank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = noise(1, 100)
    images[:blank] = images[0]
    features = imported(tmp_path, images, noise(2, 100))

    assert csalign.inspect(features)["counts"]["images"] == 100
    assert [text for text in caplog.messages if f"images: {blank} % repeat one embedding" in text]


def test_images_of_twenty_captions_each_are_one_image_each(tmp_path: Path) -> None:
    features = imported(tmp_path, noise(1, 5).repeat(20, axis=0), noise(2, 100))

    assert csalign.inspect(features)["counts"]["images"] == 5
