import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign import inspect
from csalign.core.errors import ConfigError, DataError, SchemaError, ShapeError
from csalign.evaluation.compare import compare
from csalign.evaluation.config import CompareConfig, EvalConfig
from csalign.evaluation.documents import FIGURES, OF_GROUPS
from csalign.evaluation.evaluate import evaluate
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.train import train


@pytest.fixture
def runs(features: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Random weights, and the closed form, which is far better."""
    made = []
    for name, init in (("random", "random"), ("closed", "canonical")):
        config = TrainConfig(
            features=features, out=tmp_path / name, steps=0, init=init, adapter="linear"
        )
        made.append(train(config).run)
    return made[0], made[1]


@pytest.fixture
def document_of(features: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that evaluates a run on the features and keeps the document."""

    def write(run: Path | None, name: str = "", **changes: Any) -> Path:
        config: dict[str, Any] = {"features": features, "adapter": run, **changes}
        path = tmp_path / f"{name or run}.json"
        path.write_text(json.dumps(evaluate(EvalConfig(**config))))
        return path

    return write


def change(path: Path, **values: Any) -> Path:
    """Set keys of a document; None removes one."""
    document = json.loads(path.read_text()) | values
    kept = {key: value for key, value in document.items() if value is not None}
    path.write_text(json.dumps(kept))
    return path


def rows_of(*paths: Path, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = compare(CompareConfig(systems=paths, **options))["evaluations"]
    return rows


def test_a_better_run_is_better_with_intervals_of_both_and_of_the_difference(
    runs: tuple[Path, Path], features: Path
) -> None:
    base, row = rows_of(*runs)
    document = evaluate(EvalConfig(features=features, adapter=runs[1]))
    resampled = {"mean_recall", "image_to_text_R@1", "text_to_image_R@1"}
    resampled |= {"centroid_distance", "rmg", "mixed_ndcg@10", "same_side@10"}

    assert (base["name"], base["split"], base["verdict"]) == ("random", "test", "baseline")
    assert base["difference"] == {}
    assert (row["name"], row["split"], row["verdict"]) == ("closed", "test", "better")
    for figure, (part, *place) in FIGURES.items():
        value = document[part]
        for key in place:
            value = value[key]
        assert row[figure] == value
    assert row["intervals"]["mean_recall"] == document["intervals"]["mean_recall"]
    assert row["intervals"]["text_to_image_R@1"] == document["intervals"]["text_to_image"]["R@1"]
    assert set(row["intervals"]) == set(row["difference"]) == resampled
    difference = row["difference"]["mean_recall"]
    assert difference["value"] == row["mean_recall"] - base["mean_recall"]
    assert 0 < difference["interval"][0] < difference["value"] < difference["interval"][1]
    assert json.loads(json.dumps(row)) == row


def test_documents_are_measured_again_and_say_what_runs_say(
    runs: tuple[Path, Path],
    document_of: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Without its own intervals: those come from measuring it again.
    documents = [document_of(runs[0]), document_of(runs[1], intervals=False)]

    assert rows_of(*documents) == rows_of(*runs)
    assert rows_of(documents[0], runs[1]) == rows_of(*runs)
    assert not caplog.records


def test_labels_add_clusters_and_neighbours_also_to_documents_without_them(
    runs: tuple[Path, Path], document_of: Callable[..., Path], features: Path, tmp_path: Path
) -> None:
    table = tmp_path / "info.csv"
    ids = FeatureSet.open(features).images.column("id").to_pylist()
    lines = [f"{key},{number % 3},{number % 2}" for number, key in enumerate(ids)]
    table.write_text("\n".join(["id,topic,other", *lines]))
    options = {"labels": f"{table}:topic"}
    other = document_of(runs[1], "other", labels=f"{table}:other")  # of another column
    older = change(document_of(runs[1], "older"), mixed=None)
    base, row, again, third = rows_of(*runs, other, older, **options)

    document = evaluate(EvalConfig(features=features, adapter=runs[1], **options))
    assert row["v_measure"] == document["groups"]["v_measure"]
    assert row["knn"] == document["groups"]["knn"]["mean"]
    for found in (row, again, third):
        for figure in (*OF_GROUPS, "mixed_ndcg@10"):
            assert found[figure] == row[figure]
            assert found["intervals"][figure] == row["intervals"][figure]
            assert found["difference"][figure] == row["difference"][figure]
    assert row["difference"]["knn"]["value"] == row["knn"] - base["knn"]
    with pytest.raises(ConfigError, match="--groups: name its column by --labels"):
        rows_of(*runs, groups=table)


def test_a_run_cannot_be_told_from_itself(
    runs: tuple[Path, Path], document_of: Callable[..., Path]
) -> None:
    _, row = rows_of(runs[1], document_of(runs[1]))

    assert row["verdict"] == "cannot tell"
    for difference in row["difference"].values():
        assert difference == {"value": 0, "interval": [0, 0]}


@pytest.mark.parametrize("chosen", ["2", "closed", "PATH"])
def test_the_baseline_is_chosen_by_number_name_or_path(
    runs: tuple[Path, Path], chosen: str
) -> None:
    name = str(runs[1]) if chosen == "PATH" else chosen

    assert [row["verdict"] for row in rows_of(*runs, baseline=name)] == ["worse", "baseline"]


@pytest.mark.parametrize("chosen", ["0", "3", "²", "other"])
def test_a_baseline_that_is_none_of_them_is_refused(runs: tuple[Path, Path], chosen: str) -> None:
    with pytest.raises(ConfigError, match=r"is not one of random, closed; .* number, 1 to 2"):
        compare(CompareConfig(systems=runs, baseline=chosen))


def test_documents_of_an_older_eval_are_shown_and_not_paired(
    runs: tuple[Path, Path], document_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    new = ("fingerprints", "intervals", "parameters", "bandwidth", "mixed")
    old = [change(document_of(run), **dict.fromkeys(new)) for run in runs]
    base, row = rows_of(*old)

    assert base["verdict"] == "baseline"
    assert row["verdict"] == "cannot tell (not paired)"
    assert row["intervals"] == row["difference"] == {}
    assert row["mean_recall"] > base["mean_recall"]
    assert row["parameters"] is row["mixed_ndcg@10"] is row["same_side@10"] is None
    assert len(caplog.records) == 1
    assert "closed (written by an older csalign eval" in caplog.text


def test_other_splits_are_not_paired(
    runs: tuple[Path, Path], document_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = document_of(runs[1], split="val")
    _, row, paired = rows_of(runs[0], other, runs[1])

    assert (row["split"], row["verdict"]) == ("val", "cannot tell (not paired)")
    stated = json.loads(other.read_text())["intervals"]
    assert row["intervals"]["mean_recall"] == stated["mean_recall"]
    assert paired["verdict"] == "better"
    assert "closed (split val, the baseline test)" in caplog.text
    assert [row["verdict"] for row in rows_of(other, *runs, split="val")][1:] == [
        "worse",
        "cannot tell",
    ]


def test_other_features_are_not_paired(
    runs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    z = tmp_path / "z.npy"
    import_arrays(ImportConfig(images=z, texts=z, out=tmp_path / "other"))
    path = tmp_path / "other.json"
    path.write_text(json.dumps(evaluate(EvalConfig(features=tmp_path / "other"))))
    _, row = rows_of(runs[0], path)

    assert row["name"] == "other (no adapter)"
    assert row["verdict"] == "cannot tell (not paired)"
    assert "other (no adapter) (other features)" in caplog.text


@pytest.mark.parametrize("which", ["baseline", "other"])
def test_what_changed_since_its_evaluation_is_not_paired(
    runs: tuple[Path, Path],
    features: Path,
    document_of: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    which: str,
) -> None:
    documents = [document_of(run) for run in runs]
    changed = runs[0] if which == "baseline" else runs[1]
    train(
        TrainConfig(features=features, out=changed, steps=0, init="random", seed=9, overwrite=True)
    )
    _, row = rows_of(*documents)

    assert row["verdict"] == "cannot tell (not paired)"
    assert row["difference"] == {}
    assert set(row["intervals"]) == set(FIGURES) - {"cs_divergence", "frechet"}
    assert f"{changed} changed since its evaluation" in caplog.text
    assert ("of the baseline" in caplog.text) == (which == "baseline")


def test_documents_stand_without_what_they_were_made_from(
    runs: tuple[Path, Path],
    features: Path,
    document_of: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    documents = [document_of(run) for run in runs]
    features.rename(features.with_name("moved"))
    _, row = rows_of(*documents)

    assert row["verdict"] == "cannot tell (not paired)"
    assert "no such feature set" in caplog.text
    with pytest.raises(DataError, match=r"random: its features are not at .*--features FEATURES"):
        rows_of(*runs)
    assert rows_of(*runs, features=features.with_name("moved"))[1]["verdict"] == "better"


def test_cs_figures_of_different_bandwidths_are_warned_about(
    runs: tuple[Path, Path], document_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows_of(document_of(runs[0], bandwidth=1), runs[1])

    assert "different bandwidths (0.5, 1)" in caplog.text


def test_features_that_changed_since_training_are_refused_unless_they_are_named(
    runs: tuple[Path, Path], features: Path
) -> None:
    rng = np.random.default_rng(1)
    for name, width in (("x", 24), ("y", 16)):
        np.save(features.parent / f"{name}.npy", rng.normal(size=(40, width)).astype(np.float32))
    x, y = (features.parent / f"{name}.npy" for name in "xy")
    import_arrays(ImportConfig(images=x, texts=y, out=features, overwrite=True))
    with pytest.raises(DataError, match=rf"random: was trained on features .* but {features} has"):
        rows_of(*runs)

    assert [row["split"] for row in rows_of(*runs, features=features)] == ["all", "all"]


@pytest.fixture
def square(tmp_path: Path) -> Path:
    """Pairs of one width, so that they can be compared without an adapter; 40 are held out."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(200, 6))
    for name in "xy":
        mixed = latent @ rng.normal(size=(6, 12)) + 0.5 * rng.normal(size=(200, 12))
        np.save(tmp_path / f"{name}.npy", mixed.astype(np.float32))
    lines = [f"{row},caption {row},{'train' if row < 160 else 'test'}" for row in range(200)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image_id,caption,split", *lines]))
    out = tmp_path / "square"
    x, y = (tmp_path / f"{name}.npy" for name in "xy")
    import_arrays(ImportConfig(images=x, texts=y, pairs=tmp_path / "pairs.csv", out=out))
    return out


def test_a_feature_set_is_the_baseline_without_an_adapter(square: Path, tmp_path: Path) -> None:
    run = train(TrainConfig(features=square, out=tmp_path / "run", steps=0)).run
    before, after = rows_of(square, run)
    plain = evaluate(EvalConfig(features=square))

    assert (before["name"], before["split"]) == ("square (no adapter)", "test")
    assert before["mean_recall"] == plain["retrieval"]["mean_recall"]
    assert before["intervals"]["mean_recall"] == plain["intervals"]["mean_recall"]
    assert (before["verdict"], before["parameters"]) == ("baseline", None)
    assert (after["name"], after["verdict"]) == ("run", "better")
    assert after["difference"]["mean_recall"]["value"] > 0


def test_a_feature_set_of_two_widths_has_no_before_and_is_left_out(
    runs: tuple[Path, Path], features: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(features, *runs)

    assert [row["verdict"] for row in rows] == ["baseline", "better"]
    assert "left out: " in caplog.text
    assert "images are 24 wide and texts 16" in caplog.text


def test_runs_are_compared_from_any_folder_and_after_being_copied(
    runs: tuple[Path, Path], features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, elsewhere = rows_of(*runs), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert [row["mean_recall"] for row in rows_of(*runs)] == [row["mean_recall"] for row in there]

    for path in (features, *runs):
        path.rename(elsewhere / path.name)
    monkeypatch.chdir(tmp_path)
    moved = rows_of(*(elsewhere / run.name for run in runs))

    assert [row["mean_recall"] for row in moved] == [row["mean_recall"] for row in there]


def test_one_warning_covers_all_runs_and_each_set_is_warned_of_once(
    runs: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows_of(*runs, split="train,val")

    trained = [record for record in caplog.messages if "trained on rows" in record]
    assert len(trained) == 1
    assert all(str(run) in trained[0] for run in runs)


def test_parameters_and_seconds_are_told_where_a_run_has_them(
    runs: tuple[Path, Path], document_of: Callable[..., Path]
) -> None:
    for run in runs:
        path = run / "environment.json"
        environment = json.loads(path.read_text()) | {"seconds": 1.5}
        path.write_text(json.dumps(environment))
    random, closed = rows_of(runs[0], document_of(runs[1]))

    assert random["parameters"] == sum(inspect(runs[0])["parameters"].values())
    assert closed["parameters"] == random["parameters"]
    assert closed["seconds"] == 1.5
    (runs[1] / "environment.json").write_text("{}")
    assert rows_of(*runs)[1]["seconds"] is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"adapter": 5}',
        '{"features": "f", "adapter": null, "split": "test", "counts": {}, "retrieval": {}, '
        '"gap": {}}',
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "eval.json"
    path.write_text(content)

    with pytest.raises(DataError, match=r"eval\.json: is not a document of csalign eval --json"):
        rows_of(path)


@pytest.mark.parametrize("value", ["high", float("nan"), {"R@1": 1.0}])
def test_figures_that_are_no_numbers_are_refused(
    runs: tuple[Path, Path], document_of: Callable[..., Path], value: object
) -> None:
    path = document_of(runs[0])
    gap = json.loads(path.read_text())["gap"]

    with pytest.raises(DataError, match="is not a document of csalign eval --json"):
        rows_of(change(path, gap={**gap, "rmg": value}))


def test_a_run_must_name_its_features(runs: tuple[Path, Path], features: Path) -> None:
    change(runs[0] / "environment.json", features=None)
    (runs[0] / "config.toml").write_text("features = 5\n")
    with pytest.raises(SchemaError, match=r"config\.toml: names no features; name the set"):
        rows_of(*runs)
    (runs[0] / "config.toml").unlink()
    with pytest.raises(SchemaError, match=r"config\.toml: names no features; name the set"):
        rows_of(*runs)
    assert rows_of(*runs, features=features)[1]["verdict"] == "better"


def test_a_folder_that_is_neither_a_run_nor_comparable_is_refused(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShapeError, match="they can only be compared through an adapter"):
        rows_of(features)
    with pytest.raises(DataError, match="is not a run"):
        rows_of(tmp_path)


@pytest.mark.parametrize("which", ["baseline", "other"])
def test_an_approximate_evaluation_is_marked_and_not_judged(
    runs: tuple[Path, Path],
    document_of: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    which: str,
) -> None:
    indexes = {"baseline": ("ivf", "exact"), "other": ("exact", "ivf")}[which]
    documents = [document_of(run, index=kind) for run, kind in zip(runs, indexes, strict=True)]
    base, row = rows_of(*documents)

    assert (base["index"], row["index"]) == indexes
    assert (base["verdict"], row["verdict"]) == ("baseline", "cannot tell (approximate)")
    assert row["difference"] == {}
    stated = json.loads(documents[1].read_text())
    assert row["mean_recall"] == stated["retrieval"]["mean_recall"]
    assert row["intervals"]["mean_recall"] == stated["intervals"]["mean_recall"]
    assert "closed (ranks {}, the baseline {})".format(*reversed(indexes)) in caplog.text


def test_runs_with_adapters_of_ones_own_are_compared_if_they_are_allowed(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_adapters.py").write_text(
        "from csalign.adapters.builtin import Linear\n"
        "class Own(Linear):\n"
        '    """Linear, under a name of its own."""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    kind = "own_adapters:Own"
    run = train(
        TrainConfig(features=features, out=tmp_path / "own", steps=0, init="random", adapter=kind)
    ).run
    document = evaluate(EvalConfig(features=features, adapter=run, allow_adapter=kind))
    path = tmp_path / "own.json"
    path.write_text(json.dumps(document))

    row = rows_of(run, path, allow_adapter=kind, device="cpu")[1]
    assert row["verdict"] == "cannot tell"
    with pytest.raises(SchemaError, match="own_adapters:Own"):
        rows_of(run)


@pytest.mark.parametrize(
    ("key", "kind"), [("zero_shot", "classification"), ("distribution", "image distances")]
)
def test_documents_without_retrieval_are_refused_for_that_reason(
    tmp_path: Path, key: str, kind: str
) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"features": "f", "adapter": None, "counts": {}, key: {}}))

    with pytest.raises(DataError, match=rf"eval\.json: contains {kind} only"):
        rows_of(path)
