"""What rows without a partner do to a run."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign import inspect
from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.core.results import TrainResult
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.features.join import join_ids
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.data import hold_out
from csalign.training.train import train

OFF: dict[str, Any] = {"match_moments": False}


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{"steps": 0, **values}))


def weights(run_folder: Path) -> bytes:
    return (run_folder / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training pairs among 600 images and 600 texts, 100 validation and 300 test pairs."""
    tmp_path = tmp_path_factory.mktemp("few")
    rng = np.random.default_rng(1)
    latent = rng.normal(size=(1_000, 8)) + 0.5
    for name, width in (("images", 24), ("texts", 16)):
        mixed = latent @ rng.normal(size=(8, width)) + 0.8 * rng.normal(size=(1_000, width))
        np.save(tmp_path / f"few-{name}.npy", (mixed + 1.0).astype(np.float32))
    splits = ["train"] * 600 + ["val"] * 100 + ["test"] * 300
    table = tmp_path / "few.csv"
    owners = ["" if 60 <= row < 600 else str(row) for row in range(1_000)]
    lines = [
        f"{row},{owner},caption {row},{split}"
        for row, (owner, split) in enumerate(zip(owners, splits, strict=True))
    ]
    table.write_text("\n".join(["id,image_id,caption,split", *lines]))
    images = tmp_path / "few-images.csv"
    images.write_text("\n".join(["id,split", *(f"{i},{s}" for i, s in enumerate(splits))]))
    out = tmp_path / "few"
    import_arrays(
        ImportConfig(
            images=tmp_path / "few-images.npy",
            texts=tmp_path / "few-texts.npy",
            image_table=images,
            text_table=table,
            out=out,
        )
    )
    return out


def test_without_unpaired_rows_nothing_is_matched(features: Path, tmp_path: Path) -> None:
    found = run(features, tmp_path / "default")
    run(features, tmp_path / "off", **OFF)

    assert weights(tmp_path / "default") == weights(tmp_path / "off")
    assert set(found.validation) == {"start", "kept"}


def test_matching_narrows_the_gap_on_new_pairs_and_recall_holds(
    few_pairs: Path, tmp_path: Path
) -> None:
    run(few_pairs, tmp_path / "off", **OFF)
    found = run(few_pairs, tmp_path / "matched")
    off, matched = (
        evaluate(EvalConfig(features=few_pairs, adapter=tmp_path / name))
        for name in ("off", "matched")
    )

    before, after = found.validation["kept"], found.validation["matched"]
    assert after["centroid_distance"] < before["centroid_distance"]
    assert matched["gap"]["centroid_distance"] < off["gap"]["centroid_distance"]
    assert matched["gap"]["frechet"] < off["gap"]["frechet"]
    assert matched["retrieval"]["mean_recall"] > off["retrieval"]["mean_recall"] - 0.02


def test_the_figures_of_the_matched_weights_are_those_that_are_recorded(
    few_pairs: Path, tmp_path: Path
) -> None:
    made = run(few_pairs, tmp_path / "run", refit=False)
    config = EvalConfig(features=few_pairs, adapter=tmp_path / "run", split="val")
    measured = evaluate(config)
    recorded = inspect(tmp_path / "run")["validation"][-1]
    info = read_info(tmp_path / "run")

    assert recorded["matched"]
    assert recorded["step"] == made.steps  # logs go back to no earlier step
    for figures in (recorded["validation"], info.validation):
        assert figures is not None
        recall, gap = measured["retrieval"]["mean_recall"], measured["gap"]["centroid_distance"]
        assert figures["mean_recall"] == pytest.approx(recall, abs=1e-6)
        assert figures["centroid_distance"] == pytest.approx(gap, abs=1e-4)


@pytest.mark.parametrize("given", ["a, ", "a,,b", ["a", ""]])
def test_an_empty_unpaired_set_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"unpaired: .*an entry is empty"):
        TrainConfig.resolve(None, {"features": "f", "out": "o", "unpaired": given})


def test_unpaired_sets_are_given_by_commas_or_repeatedly(tmp_path: Path) -> None:
    def parsed(given: Any) -> tuple[Path, ...]:
        return TrainConfig(features="f", out="o", unpaired=given).unpaired

    assert parsed("a, b") == parsed(["a", "b"]) == parsed(["a,b"]) == (Path("a"), Path("b"))
    with_comma = tmp_path / "with, comma"
    with_comma.mkdir()
    assert parsed([str(with_comma)]) == (with_comma,)
    assert parsed(None) == parsed([]) == ()


def test_a_frozen_side_stays_where_it_is(arrays: tuple[Path, Path], tmp_path: Path) -> None:
    few = np.load(arrays[0])
    np.save(tmp_path / "same.npy", few[:, ::-1] + 0.5)
    table = tmp_path / "same.csv"
    owners = [str(row) if row < 150 else "" for row in range(300)]
    table.write_text("\n".join(["id,image_id", *(f"{i},{o}" for i, o in enumerate(owners))]))
    features = tmp_path / "same"
    import_arrays(
        ImportConfig(images=arrays[0], texts=tmp_path / "same.npy", text_table=table, out=features)
    )
    found = run(features, tmp_path / "run", image_adapter="identity", text_adapter="linear")
    images = np.load(arrays[0])[:5]
    kept = load_adapter(tmp_path / "run").embed(Modality.IMAGE, images)

    np.testing.assert_allclose(
        kept, images / np.linalg.norm(images, axis=1, keepdims=True), atol=1e-6
    )
    assert "kept" in found.validation


def test_kinds_that_cannot_be_matched_are_left_alone(
    few_pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = {"adapter": "transformer", "hidden": 16, "layers": 1}
    found = run(few_pairs, tmp_path / "run", **settings)

    assert "matched" not in found.validation
    assert "cannot be matched" in caplog.text


def test_holding_out_pairs_keeps_the_texts_without_an_image(few_pairs: Path) -> None:
    features = FeatureSet.open(few_pairs)
    joined = join_ids(features, "train")
    mask = hold_out(features, joined, seed=0)[0]
    left, held_out = joined.take_images(~mask, unpaired_texts=True), joined.take_images(mask)

    assert (held_out.text_image >= 0).all()
    assert (left.text_image < 0).sum() == 540
    assert left.caption_counts.sum() + held_out.caption_counts.sum() == 60
    for part in (left, held_out):
        assert part.image_rows is not None
        assert part.text_rows is not None
        paired = np.flatnonzero(part.text_image >= 0)
        owners = part.image_rows[part.text_image[paired]]
        assert owners.tolist() == part.text_rows[paired].tolist()
