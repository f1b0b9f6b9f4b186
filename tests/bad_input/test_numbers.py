"""Numbers that are degenerate, but no errors: told once, with the consequence, and never NaN."""

import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from csalign import inspect
from csalign.adapters.checkpoint import load_adapter_with_info, save_adapter
from csalign.cli.app import app
from tests.bad_input.conftest import Refused

RNG = np.random.default_rng(0)
LATENT = RNG.normal(size=(160, 6))
IMAGES = (LATENT @ RNG.normal(size=(6, 12))).astype(np.float32)
TEXTS = (LATENT @ RNG.normal(size=(6, 10))).astype(np.float32)
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A function that imports, trains and evaluates; gives what was told and what was printed."""

    def call(*arguments: object) -> tuple[str, str]:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.stderr
        return done.stdout, done.stderr

    def go(images: Any, texts: Any, *options: str, captions: Any = None) -> dict[str, Any]:
        np.save(tmp_path / "i.npy", images)
        np.save(tmp_path / "t.npy", texts)
        lines = ["image_id,caption,split"]
        for row in range(len(images)):
            split = "test" if row % 4 == 0 else "train"
            lines.append(f"{row},{captions[row] if captions else row},{split}")
        (tmp_path / "p.csv").write_text("\n".join(lines))
        arrays = ("--images", tmp_path / "i.npy", "--texts", tmp_path / "t.npy")
        folder = tmp_path / str(uuid.uuid4())
        folder.mkdir()
        out, run = folder / "f", folder / "r"
        found: dict[str, Any] = {"folder": folder}
        found["import"] = call("import", *arrays, "--pairs", tmp_path / "p.csv", "--out", out)[1]
        train = ("train", out, "--out", run, "--steps", 6, "--batch-size", 16, "--hidden", 8)
        found["train"] = call(*train, *options)[1]
        document, found["eval"] = call("eval", out, "--adapter", run, "--json", "--resamples", 100)
        found["document"] = json.loads(document)
        _all_finite(found["document"])
        _all_finite(inspect(run))
        return found

    return go


def _all_finite(document: Any) -> None:
    if isinstance(document, dict):
        for value in document.values():
            _all_finite(value)
    elif isinstance(document, list):
        for value in document:
            _all_finite(value)
    elif isinstance(document, float):
        assert math.isfinite(document)


def constant(rows: Any) -> Any:
    return np.repeat(rows[:1], len(rows), axis=0)


@pytest.mark.parametrize(
    ("images", "texts", "told"),
    [
        (constant(IMAGES), TEXTS, "images: 100 % repeat one embedding"),
        (IMAGES, constant(TEXTS), "texts: 100 % repeat one embedding"),
        (
            IMAGES[:1] + 1e-4 * RNG.normal(size=IMAGES.shape).astype(np.float32),
            TEXTS,
            "images: they are nearly the same, so nothing can be learnt",
        ),
        (IMAGES[np.arange(160) // 2], TEXTS, "% of the images repeat the embedding of another"),
        (
            IMAGES,
            TEXTS[np.where(np.arange(160) % 8 < 6, 0, np.arange(160))],
            "texts: 75 % repeat one embedding",
        ),
    ],
    ids=["constant images", "constant texts", "nearly constant", "repeated", "one class"],
)
def test_what_hardly_anything_can_be_learnt_from_is_told_once(
    run: Run, images: Any, texts: Any, told: str
) -> None:
    found = run(images, texts)

    assert found["train"].count(told) == 1


def test_sound_rows_are_not_warned_of(run: Run) -> None:
    # Enough that 105 are held out for validation.
    latent = RNG.normal(size=(560, 6))
    found = run(*(latent @ RNG.normal(size=(6, width)) for width in (12, 10)))

    for step in ("import", "train", "eval"):
        assert "warning" not in found[step]


def test_answers_that_no_figure_can_tell_apart_are_told(run: Run) -> None:
    found = run(IMAGES, TEXTS[np.arange(160) // 8 * 8])

    assert ": 40 texts have the embedding or caption of another" in found["eval"]
    assert found["document"]["retrieval"]["image_to_text"]["R@1"] < 1


def test_a_tiny_split_is_told_by_what_one_image_is_worth(run: Run) -> None:
    found = run(IMAGES[:40], TEXTS[:40])

    assert "only 10 images have texts, so each is 10.0 % of a recall" in found["eval"]


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e14])
def test_the_scale_of_features_changes_no_figure(run: Run, scale: float) -> None:
    # Of full rank: where rows do not vary, an optimizer makes steps of roundings.
    rng = np.random.default_rng(1)
    images, texts = (
        (rows + 0.3 * rng.normal(size=rows.shape)).astype(np.float32) for rows in (IMAGES, TEXTS)
    )
    plain, scaled = (
        run(images * np.float32(factor), texts)["document"]["gap"] for factor in (1, scale)
    )

    # Training amplifies roundings a little.
    assert scaled["cs_divergence"] == pytest.approx(plain["cs_divergence"], rel=1e-2)
    assert scaled["centroid_distance"] == pytest.approx(plain["centroid_distance"], rel=1e-2)


@pytest.mark.parametrize(("scale", "value"), [(1e-13, "e-13"), (1e20, "e+20"), (1e37, "e+37")])
def test_a_scale_that_float32_cannot_square_is_refused(
    tmp_path: Path, refused: Refused, scale: float, value: str
) -> None:
    np.save(tmp_path / "i.npy", IMAGES * np.float32(scale))

    told = refused("import --images i.npy --out out", 1, "scale the embeddings to norms about 1")
    assert "i.npy, row 0: has" in told.stderr
    assert value in told.stderr


def test_what_float16_keeps_few_digits_of_is_counted_once(tmp_path: Path) -> None:
    small = (IMAGES * 1e-6).astype(np.float16)
    small[:100] = IMAGES[:100]
    np.save(tmp_path / "i.npy", small)
    done = CliRunner().invoke(
        app, ["import", "--images", str(tmp_path / "i.npy"), "--out", str(tmp_path / "f")]
    )

    assert done.exit_code == 0
    assert done.stderr.count("60 embeddings are so small that float16 keeps few") == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7e4, "is not finite once stored as float16; use --dtype float32"),
        (1e-9, "has norm 0 once stored as float16; use --dtype float32"),
    ],
)
def test_what_float16_cannot_hold_is_refused_by_row(
    tmp_path: Path, refused: Refused, value: float, message: str
) -> None:
    values = IMAGES.copy()
    values[9] = value
    np.save(tmp_path / "i.npy", values)

    refused("import --images i.npy --dtype float16 --out out", 1, f"i.npy, row 9: {message}")


@pytest.mark.parametrize("factor", [0.0, 1e-30])
def test_a_collapsed_adapter_is_told_and_gives_no_nan(run: Run, factor: float) -> None:
    folder = run(IMAGES, TEXTS)["folder"]
    adapter, info = load_adapter_with_info(folder / "r")
    with torch.no_grad():
        for parameter in adapter.image.parameters():
            parameter.mul_(factor)
    save_adapter(folder / "r", adapter, info)
    arguments = ["eval", str(folder / "f"), "--adapter", str(folder / "r"), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--resamples", "100"])

    if done.exit_code == 0:
        assert "all image embeddings are nearly the same" in done.stderr
        _all_finite(json.loads(done.stdout))
    else:
        assert "Traceback" not in done.stderr
        assert "collapsed" in done.stderr
