import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from csalign.cli.app import app
from csalign.core.errors import ConfigError
from csalign.evaluation.compare import compare
from csalign.evaluation.config import CompareConfig, DiagnoseConfig, EvalConfig
from csalign.evaluation.diagnose import diagnose
from csalign.evaluation.evaluate import evaluate
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.train import train

BLOCKS = ("retrieval", "gap", "mixed")


def store(folder: Path, images: Any, texts: Any, splits: list[str] | None = None) -> Path:
    """Store two arrays of pairs as a feature set, with ten classes and maybe splits."""
    folder.mkdir()
    np.save(folder / "x.npy", images.astype(np.float32))
    np.save(folder / "y.npy", texts.astype(np.float32))
    lines = ["image_id,caption,split"]
    lines += [f"{n},caption {n},{splits[n] if splits else ''}" for n in range(len(images))]
    (folder / "pairs.csv").write_text("\n".join(lines))
    labels = ["image_id,kind", *(f"{n},kind {n % 10}" for n in range(len(images)))]
    (folder / "kinds.csv").write_text("\n".join(labels))
    paths = {"images": folder / "x.npy", "texts": folder / "y.npy"}
    out = folder / "set"
    import_arrays(ImportConfig(**paths, pairs=folder / "pairs.csv", out=out, dtype="float32"))
    return out


@pytest.fixture
def offset(tmp_path: Path) -> Path:
    """300 pairs of one width: noise and an offset between the sides, half of them for training."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(300, 16))
    noise = 0.7 * rng.normal(size=(2, 300, 16))
    splits = ["train"] * 150 + ["test"] * 150
    return store(tmp_path / "offset", latent + noise[0] + 1, latent + noise[1] - 1, splits)


def test_each_row_is_what_its_name_gives_as_an_adapter(offset: Path, tmp_path: Path) -> None:
    run = train(TrainConfig(features=offset, out=tmp_path / "run", adapter="linear", steps=0)).run
    document = evaluate(EvalConfig(features=offset, adapter=run, baselines=True, resamples=100))
    found = document["baselines"]
    plain = evaluate(EvalConfig(features=offset, resamples=100))

    assert list(found) == ["raw", "mean-shift", "standardised", "closed-form"]
    assert {key: plain[key] for key in BLOCKS} == {key: found["raw"][key] for key in BLOCKS}
    for name in ("mean-shift", "closed-form"):
        alone = evaluate(EvalConfig(features=offset, adapter=name, resamples=100))

        assert {key: alone[key] for key in BLOCKS} == {key: found[name][key] for key in BLOCKS}
        assert alone["intervals"]["mean_recall"] == found[name]["intervals"]["mean_recall"]
        assert found[name]["fitted_on"] == f"{offset} (split train)"
    assert found["mean-shift"]["gap"]["centroid_distance"] < 0.2
    assert found["raw"]["gap"]["centroid_distance"] > 1
    assert evaluate(EvalConfig(features=offset, explain=True, baselines=True))["explanations"]


def test_the_measured_rows_stand_in_where_there_are_no_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    own = np.random.default_rng(0).normal(size=(60, 8))
    ends = np.full((60, 1), np.linalg.norm(own, axis=1, keepdims=True))
    features = store(tmp_path / "plain", np.hstack([own, ends]), np.hstack([own, -ends]))
    document = evaluate(EvalConfig(features=features, baselines=True, intervals=False))

    assert list(document["baselines"]) == ["raw", "mean-shift", "standardised"]
    assert document["baselines"]["mean-shift"]["retrieval"]["mean_recall"] == 1
    assert document["baselines"]["mean-shift"]["gap"]["centroid_distance"] < 1e-5
    assert document["baselines"]["mean-shift"]["fitted_on"] == f"{features}, which is measured here"
    assert "no pairs but those that are measured" in caplog.text


def test_sides_of_different_widths_have_the_closed_form_alone(features: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["eval", str(features), "--adapter", "closed-form", "--baselines", "--no-intervals"],
        env={"COLUMNS": "80"},
    )

    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())

    assert "(split train); nothing is trained. Those missing need sides of one width" in words
    refused = CliRunner().invoke(app, ["eval", str(features), "--adapter", "mean-shift"])

    assert refused.exit_code == 1
    assert "16, but mean-shift needs one width; use closed-form" in refused.stderr


def test_the_table_fits_a_narrow_screen_and_stands_in_the_page(
    offset: Path, tmp_path: Path
) -> None:
    page, labels = tmp_path / "page.html", offset.with_name("kinds.csv")
    words = ["eval", offset, "--baselines", "--adapter", "mean-shift", "--report", page]
    words += ["--labels", "kind", "--groups", labels, "--resamples", 100]
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    table = result.stdout.partition("\nbaselines")[2].partition("\nwrote")[0].splitlines()

    assert result.exit_code == 0, result.output
    assert max(map(len, table)) <= 80
    for name in ("raw", "mean-shift", "standardised", "closed-form"):
        assert any(line.strip().startswith(name) for line in table)
    for heading in (
        "recall % ↑",
        "mixed % ↑",
        "same side",
        "centroid ↓",
        "V-measure ↑",
        "k-NN % ↑",
    ):
        assert any(heading in line for line in table), heading
    text = page.read_text(encoding="utf-8")

    assert "Baselines" in text
    assert "(split train); nothing is trained" in text


def test_the_page_of_a_training_has_baselines_of_the_training_rows(
    offset: Path, tmp_path: Path
) -> None:
    page = tmp_path / "training.html"
    train(TrainConfig(features=offset, out=tmp_path / "run", steps=0, report=page))

    assert f"Fitted on {offset} (split train)" in page.read_text(encoding="utf-8")


def test_compare_takes_baselines_among_the_systems(offset: Path, tmp_path: Path) -> None:
    run = train(TrainConfig(features=offset, out=tmp_path / "run", adapter="linear", steps=0)).run
    systems = (offset, "mean-shift", "standardised", "closed-form", run)
    rows = compare(CompareConfig(systems=systems))["evaluations"]

    assert [row["name"].rpartition("/")[2] for row in rows] == [
        *("set (no adapter)", "mean-shift", "standardised", "closed-form", "run")
    ]
    assert rows[1]["verdict"] == "better"
    assert rows[1]["difference"]["centroid_distance"]["interval"][1] < 0
    with pytest.raises(ConfigError, match=r"mean-shift: is a baseline, .* with --features"):
        compare(CompareConfig(systems=("mean-shift", run)))


def test_a_document_of_a_baseline_is_measured_again_for_a_comparison(
    offset: Path, tmp_path: Path
) -> None:
    document = tmp_path / "mean-shift.json"
    document.write_text(json.dumps(evaluate(EvalConfig(features=offset, adapter="mean-shift"))))
    rows = compare(CompareConfig(systems=(offset, document)))["evaluations"]

    assert rows[1]["verdict"] == "better"


def test_diagnose_takes_a_baseline(offset: Path) -> None:
    document = diagnose(DiagnoseConfig(features=offset, adapter="mean-shift"))

    assert document["gap"]["centroid_share"] < 0.5
    assert document["logit_scale"] == 100
