from pathlib import Path

import numpy as np
import pytest

import csalign
from csalign import inspect
from csalign.adapters.checkpoint import load_adapter
from csalign.core.errors import ConfigError, DataError, OutputError, SchemaError, ShapeError
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.features.join import ALL, load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig
from csalign.training.config import TrainConfig
from csalign.training.train import train


@pytest.fixture
def run(features: Path, tmp_path: Path) -> Path:
    return train(TrainConfig(features=features, out=tmp_path / "run", steps=0)).run


def test_a_run_is_evaluated_on_its_own_features(
    features: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "csalign"):
        document = evaluate(EvalConfig(features=run))

    assert document == evaluate(EvalConfig(features=features, adapter=run))
    assert f"{run}: using the features it was trained on, {features}" in caplog.text
    with pytest.raises(ConfigError, match=f"{run}: is a run, not a feature set"):
        evaluate(EvalConfig(features=run, adapter=run))


def test_a_feature_set_in_place_of_a_run_is_named(features: Path) -> None:
    with pytest.raises(DataError, match=f"{features}: is a feature set, not a run"):
        evaluate(EvalConfig(features=features, adapter=features))


def aligned_set(tmp_path: Path, images: object, texts: object, pairs: str | None = None) -> Path:
    np.save(tmp_path / "x.npy", np.asarray(images, np.float32))
    np.save(tmp_path / "y.npy", np.asarray(texts, np.float32))
    table = None
    if pairs is not None:
        table = tmp_path / "pairs.csv"
        table.write_text(pairs)
    out = tmp_path / "aligned"
    import_arrays(
        ImportConfig(images=tmp_path / "x.npy", texts=tmp_path / "y.npy", pairs=table, out=out)
    )
    return out


def test_the_document_has_every_key(features: Path, run: Path) -> None:
    document = evaluate(EvalConfig(features=features, adapter=run))
    direction = {"R@1", "R@5", "R@10", "median_rank", "mean_rank", "mrr", "map", "r_precision"}
    direction |= {"true_recall@1", "true_recall@5", "true_recall@10"}

    assert document["features"] == str(features)
    assert document["adapter"] == str(run)
    assert document["split"] == "test"
    assert document["protocol"]["name"] == "all"
    assert document["counts"] == {"images": 60, "texts": 60, "pairs": 60}
    assert set(document["retrieval"]) == {"image_to_text", "text_to_image", "mean_recall"}
    assert set(document["retrieval"]["image_to_text"]) == direction
    assert set(document["retrieval"]["text_to_image"]) == direction
    assert set(document["gap"]) == {
        "centroid_distance",
        "rmg",
        "cs_divergence",
        "mmd",
        "frechet",
        "frechet_parts",
        "linear_separability",
        "alignment",
        "uniformity",
        "effective_rank",
        "spectrum",
    }
    assert set(document["hubness"]) == {"image_to_text", "text_to_image"}
    intervals = document["intervals"]
    assert set(intervals["image_to_text"]) == set(intervals["text_to_image"]) == direction
    whole = {"mean_recall", "centroid_distance", "rmg", "alignment"}
    assert set(intervals) == {"image_to_text", "text_to_image", "mixed", *whole}
    tasks = {"ndcg@10", "recall@10", "same_side@10"}
    for block in (document["mixed"], intervals["mixed"]):
        assert set(block) == {"image", "text", *tasks}
        assert set(block["image"]) == set(block["text"]) == tasks
    assert set(document["fingerprints"]) == {"features", "adapter"}
    assert set(document["gap"]["uniformity"]) == {"image", "text", "cross"}
    assert set(document["gap"]["effective_rank"]) == {"image", "text"}


def test_intervals_hold_the_figures_and_follow_seed_and_resamples(
    features: Path, run: Path
) -> None:
    config = EvalConfig(features=features, adapter=run, resamples=200)
    document = evaluate(config)
    intervals = document["intervals"]
    other = evaluate(config.model_copy(update={"seed": 1}))["intervals"]

    for name in ("image_to_text", "text_to_image"):
        for figure, (low, high) in intervals[name].items():
            assert low <= document["retrieval"][name][figure] <= high
    for figure in ("centroid_distance", "rmg", "alignment"):
        low, high = intervals[figure]
        assert low < document["gap"][figure] < high
    assert evaluate(config)["intervals"] == intervals
    assert other["alignment"] != intervals["alignment"]


def test_an_approximate_index_tells_its_own_recall(features: Path, run: Path) -> None:
    exact = evaluate(EvalConfig(features=features, adapter=run))
    listed = evaluate(EvalConfig(features=features, adapter=run, index="hnsw"))

    assert exact["index"] == {"kind": "exact", "device": "cpu"}
    assert listed["index"]["kind"] == "hnsw"
    assert set(listed["index"]["recall@10"]) == {"image_to_text", "text_to_image"}
    assert all(recall > 0.9 for recall in listed["index"]["recall@10"].values())
    assert listed["retrieval"]["mean_recall"] == pytest.approx(
        exact["retrieval"]["mean_recall"], abs=0.05
    )


def test_intervals_can_be_left_out(features: Path, run: Path) -> None:
    config = EvalConfig(features=features, adapter=run)
    document = evaluate(config.model_copy(update={"intervals": False}))

    assert document["intervals"] == {}
    assert document == {**evaluate(config), "intervals": {}}


def test_raw_features_of_one_width_are_measured_without_an_adapter(tmp_path: Path) -> None:
    axes = 3 * np.eye(4)
    document = evaluate(EvalConfig(features=aligned_set(tmp_path, axes, 0.5 * axes)))

    assert document["adapter"] is None
    assert document["split"] == "all"
    assert document["retrieval"]["mean_recall"] == 1
    assert document["gap"]["centroid_distance"] == pytest.approx(0, abs=1e-6)
    assert document["gap"]["cs_divergence"] == pytest.approx(0, abs=1e-6)


def test_unpaired_rows_are_distractors_and_not_queries(tmp_path: Path) -> None:
    x = np.eye(4)[[0, 1, 2]]
    y = np.eye(4)[[0, 1, 1]]
    folder = aligned_set(tmp_path, x, y, "image_id,caption\n0,a\n1,b\n,c\n")
    document = evaluate(EvalConfig(features=folder))

    assert document["counts"] == {"images": 3, "texts": 3, "pairs": 2}
    assert document["retrieval"]["image_to_text"]["median_rank"] == 1.5
    assert document["retrieval"]["text_to_image"]["R@1"] == 1


def test_different_widths_need_an_adapter(features: Path) -> None:
    with pytest.raises(ShapeError, match=r"24 wide and texts 16, .* --adapter"):
        evaluate(EvalConfig(features=features))


def test_an_adapter_of_other_widths_is_refused_with_both(tmp_path: Path, run: Path) -> None:
    other = aligned_set(tmp_path, np.eye(4), np.eye(4))

    with pytest.raises(ShapeError, match=r"image embeddings are 4 wide, the adapter .* takes 24"):
        evaluate(EvalConfig(features=other, adapter=run))
    with pytest.raises(ShapeError, match="image embeddings are 4 wide"):
        apply(ApplyConfig(features=other, adapter=run, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_that_were_trained_on_are_warned_about(
    features: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(EvalConfig(features=features, adapter=run, split="test"))
    assert not caplog.records
    evaluate(EvalConfig(features=features, adapter=run, split="all"))

    assert "trained on rows that are measured here (split all" in caplog.text


def test_a_split_that_is_not_there_is_refused(features: Path, run: Path) -> None:
    with pytest.raises(DataError, match="choose one of them"):
        evaluate(EvalConfig(features=features, adapter=run, split="nope"))


def test_applied_features_measure_like_the_adapter_that_made_them(
    features: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "aligned"
    result = apply(ApplyConfig(features=features, adapter=run, out=out, dtype="float32"))
    before, after = FeatureSet.open(features), FeatureSet.open(out)

    through = evaluate(EvalConfig(features=features, adapter=run))
    direct = evaluate(EvalConfig(features=out))
    assert direct["retrieval"] == through["retrieval"]
    assert direct["gap"]["frechet"] == pytest.approx(through["gap"]["frechet"], abs=1e-5)
    assert (result.images, result.texts, result.pairs) == (300, 300, 300)
    assert after.splits() == before.splits()
    assert after.texts.column("caption").equals(before.texts.column("caption"))
    norms = np.linalg.norm(load_rows(after, ALL).images, axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


def test_apply_does_not_replace_unless_asked(features: Path, run: Path, tmp_path: Path) -> None:
    config = ApplyConfig(features=features, adapter=run, out=tmp_path / "out")
    apply(config)

    with pytest.raises(OutputError, match="--overwrite"):
        apply(config)
    apply(config.model_copy(update={"overwrite": True}))


def test_inspect_describes_features_and_runs(features: Path, run: Path) -> None:
    described = inspect(features)

    assert described["kind"] == "features"
    assert described["counts"] == {"images": 300, "texts": 300, "pairs": 300, "failures": 0}
    assert described["splits"]["val"] == {"images": 40, "texts": 40}
    assert described["encoders"]["image"]["width"] == 24
    assert inspect(features / "manifest.json") == described
    described = inspect(run)
    assert described["kind"] == "run"
    assert described["start"].startswith("CCA")
    assert described["validation"][0]["step"] == 0


def test_inspect_finds_damage_that_a_size_does_not_show(features: Path) -> None:
    path = features / "images/part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(SchemaError, match=r"images/part-00000\.parquet"):
        inspect(features)


@pytest.mark.parametrize(("name", "message"), [("no", "no such file"), (".", "is not an artifact")])
def test_inspect_refuses_what_is_no_artifact(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        inspect(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, 3e38, 1e30])
def test_an_embedding_that_is_not_finite_is_refused(
    features: Path, tmp_path: Path, value: float
) -> None:
    """NaN would rank first in every list: recall 1."""
    run = train(TrainConfig(features=features, out=tmp_path / "run", adapter="linear", steps=0)).run
    adapter = load_adapter(run)
    for weights in adapter.side("text").parameters():
        weights.data.fill_(value)
    adapter.save(tmp_path / "broken")
    with pytest.raises(DataError, match=r"texts: \S*broken maps the embedding of '\S+' to nan"):
        evaluate(EvalConfig(features=features, adapter=tmp_path / "broken"))
    with pytest.raises(DataError, match=r"texts: the adapter maps the embedding of '\S+' to nan"):
        csalign.apply(features, tmp_path / "broken", tmp_path / "out")
    with pytest.raises(DataError, match="nan, infinity or 0"):
        csalign.index(features, tmp_path / "index", adapter=tmp_path / "broken", side="text")
