"""Training on fewer than 30 pairs, or none, beside unpaired rows."""

import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.adapters.assignment import Trust
from csalign.core.errors import ConfigError, DataError, OutputError, Stopped
from csalign.core.results import TrainResult
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.train import train

TEST = 400
CHANCE = (1 + 5 + 10) / 3 / TEST  # mean recall
OTHER = 99  # seed of a latent without relation


def latent(seed: int, n: int) -> np.ndarray:
    """Rows around 40 uneven centres in 8 dimensions, which are those of all seeds but `OTHER`."""
    centres = np.random.default_rng(seed if seed == OTHER else 0).normal(size=(40, 8))
    rng = np.random.default_rng(seed)
    if seed == OTHER:
        return rng.normal(size=(n, 8))
    return centres[rng.integers(40, size=n)] * np.linspace(1.5, 0.5, 8) + 0.25 * rng.normal(
        size=(n, 8)
    )


def make_set(folder: Path, pairs: int, unpaired: int, *, related: bool = True) -> Path:
    """Two rotations of one latent: some pairs, unpaired rows of both sides, and a test split."""
    train_rows = pairs + unpaired
    x = latent(1, train_rows + TEST)
    rng = np.random.default_rng(3)
    y = x if related else latent(OTHER, train_rows + TEST)
    images, texts = (
        rows @ np.linalg.qr(rng.normal(size=(width, 8)))[0].T
        + 0.1 * rng.normal(size=(len(x), width))
        for rows, width in ((x, 24), (y, 20))
    )
    order = np.arange(len(x))
    order[pairs:train_rows] = np.random.default_rng(2).permutation(order[pairs:train_rows])
    splits = ["train"] * train_rows + ["test"] * TEST
    owners = ["" if pairs <= row < train_rows else str(row) for row in range(len(x))]
    for name, values in (("images", images), ("texts", texts[order])):
        np.save(folder / f"{name}.npy", values.astype(np.float32))
    tables = folder / "images.csv", folder / "texts.csv"
    tables[0].write_text("\n".join(["id,split", *(f"{i},{s}" for i, s in enumerate(splits))]))
    lines = [f"{i},{o},{s}" for i, (o, s) in enumerate(zip(owners, splits, strict=True))]
    tables[1].write_text("\n".join(["id,image_id,split", *lines]))
    out = folder / "features"
    import_arrays(
        ImportConfig(
            images=folder / "images.npy",
            texts=folder / "texts.npy",
            image_table=tables[0],
            text_table=tables[1],
            out=out,
        )
    )
    return out


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, width=8, **values))


def recall(features: Path, adapter: Path) -> float:
    found = evaluate(EvalConfig(features=features, adapter=adapter, split="test"))
    return float(found["retrieval"]["mean_recall"])


@pytest.fixture(scope="module")
def unpaired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("none"), 0, 1_500)


@pytest.fixture(scope="module")
def aligned(unpaired: Path) -> TrainResult:
    """A run that was stopped once, and started again."""

    def progress(now: str, done: int, total: int | None) -> None:
        if now == "matching clusters":
            raise Stopped(signal.SIGTERM)

    out = unpaired.parent / "run"
    with pytest.raises(Stopped):
        train(TrainConfig(features=unpaired, out=out, width=8), progress)
    assert not out.exists()
    return run(unpaired, out)


def test_sides_without_a_pair_are_aligned_by_their_distributions(
    unpaired: Path, aligned: TrainResult
) -> None:
    assert recall(unpaired, aligned.run) > 10 * CHANCE
    assert aligned.pairs == {"train": 0, "validation": 0}
    assert aligned.steps == 0
    assert aligned.start.startswith("clusters matched without pairs: agreement of 3 starts")
    assert aligned.start.split(": ")[-1].startswith(("good", "doubtful"))


def test_such_a_run_is_finished_and_replaced_as_any_other(
    unpaired: Path, aligned: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    weights = (aligned.run / "adapter.safetensors").read_bytes()
    with pytest.raises(OutputError, match="overwrite"):
        run(unpaired, aligned.run)
    again = run(unpaired, aligned.run, overwrite=True)

    assert (again.run / "adapter.safetensors").read_bytes() == weights
    assert "no pairs: aligning the distributions of both sides alone" in caplog.text
    assert "1500 images and 1500 texts without pairs" in caplog.text


def test_five_pairs_are_aligned_with_the_unpaired_rows(tmp_path: Path) -> None:
    features = make_set(tmp_path, 5, 1_500)
    found = run(features, tmp_path / "run")
    run(features, tmp_path / "alone", unpaired_matches=False, steps=0)

    assert found.start.startswith("clusters matched with 5 pairs")
    assert "chance" not in found.start
    assert found.steps == 0
    alone = recall(features, tmp_path / "alone")
    assert recall(features, tmp_path / "run") > max(10 * CHANCE, 1.5 * alone)


def test_sides_without_relation_are_called_chance_and_clusters_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = run(make_set(tmp_path, 10, 1_000, related=False), tmp_path / "run", steps=0)

    assert found.start.startswith("CCA")
    assert "chance; do not rely on it" in caplog.text


def test_too_few_rows_without_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no pairs.*choose one of them"):
        run(make_set(tmp_path, 0, 200), tmp_path / "run")


@pytest.mark.parametrize("given", [{"init": "random"}, {"unpaired_matches": False}])
def test_options_that_need_pairs_are_refused_without_any(
    unpaired: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"has no pairs, so that .* leave out"):
        run(unpaired, tmp_path / "run", **given)


def test_a_few_left_out_pairs_are_no_evidence() -> None:
    assert Trust(0.2, 0.7, rank=0.0, pairs=2).word == "chance"
    assert Trust(0.5, 0.7, rank=0.02, pairs=20).word == "good"
    assert Trust(0.5, 0.7, rank=0.2, pairs=20).word == "doubtful"
    assert Trust(0.9, 0.7, rank=0.45, pairs=20).word == "chance"
