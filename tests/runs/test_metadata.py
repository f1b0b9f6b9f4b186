import json
import logging
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

from csalign.adapters.checkpoint import DESCRIPTION
from csalign.core.errors import DataError, SchemaError
from csalign.features.schema import read_manifest
from csalign.ingest.config import ImportConfig, SplitConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.ingest.split import split
from csalign.runs.load import load_run
from csalign.runs.metadata import (
    ADAPTER,
    find_features,
    read_environment,
    read_lines,
    read_settings,
    run_folder,
)
from csalign.training.config import TrainConfig
from csalign.training.train import train

V1 = Path(__file__).parents[1] / "features/v1/run"


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return copytree(run, tmp_path / "own")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_run_records_the_checksum_of_each_file_that_its_weights_do_not_cover(run: Path) -> None:
    assert set(read_environment(run)["sha256"]) == {"config.toml", "metrics.jsonl", "adapter.json"}
    assert ADAPTER == DESCRIPTION


@pytest.mark.parametrize(
    ("name", "old", "new", "read"),
    [
        ("adapter.json", '"image_norm": 1', '"image_norm": 2', load_run),
        ("metrics.jsonl", '"step": 0', '"step": 1', read_lines),
    ],
)
def test_a_changed_digit_is_refused_by_file(
    own: Path, name: str, old: str, new: str, read: Callable[[Path], object]
) -> None:
    change(own / name, old, new)

    with pytest.raises(SchemaError, match=rf"{name}: was changed .* restore it, or train again"):
        read(own)


def test_a_log_that_is_gone_is_refused_and_an_adapter_that_is_gone_named(own: Path) -> None:
    (own / "metrics.jsonl").unlink()
    with pytest.raises(SchemaError, match=r"metrics\.jsonl: was changed"):
        read_lines(own)
    (own / "adapter.json").unlink()
    with pytest.raises(DataError, match="is not a run"):
        load_run(own)


def test_edited_settings_are_read_with_a_warning(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(own / "config.toml", "steps = 0", "steps = 9")
    with caplog.at_level(logging.WARNING, "csalign"):
        assert read_settings(own)["steps"] == 9

    assert "config.toml: was changed" in caplog.text


@pytest.mark.parametrize("text", ["{", "3\n", "[" * 100_000, "\udcff"])
def test_a_damaged_log_without_a_checksum_is_refused(own: Path, text: str) -> None:
    environment = json.loads((own / "environment.json").read_text())
    del environment["sha256"]
    (own / "environment.json").write_text(json.dumps(environment))
    (own / "metrics.jsonl").write_text(text, errors="surrogateescape")

    with pytest.raises(SchemaError, match=r"metrics\.jsonl: is damaged"):
        read_lines(own)


def test_a_run_of_version_0_1_0_has_no_checksums_and_is_read() -> None:
    assert load_run(V1)[1].csalign_version == "0.1.0"
    assert read_lines(V1)
    assert read_settings(V1)


def test_the_features_of_a_run_are_found_by_their_content(
    features: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = read_manifest(features).fingerprint()
    assert read_environment(run)["features"] == str(features)
    assert find_features(run, fingerprint) == features

    other = tmp_path / "other"
    other.mkdir()
    features.rename(other / "features")
    with pytest.raises(DataError, match=f"its features are not at {features}"):
        find_features(run, fingerprint)
    monkeypatch.chdir(other)  # the working directory, and then the folder of the run
    assert find_features(run, fingerprint).resolve() == other / "features"
    monkeypatch.chdir("/")
    assert find_features(copytree(run, other / "run"), fingerprint) == other / "features"
    with pytest.raises(DataError, match=r"fingerprint 0000, but .* has .*--features"):
        find_features(other / "run", "0000")


def test_features_divided_otherwise_are_taken_only_where_the_very_set_is_gone(
    arrays: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, run, other = tmp_path / "features", tmp_path / "run", tmp_path / "other"
    import_arrays(ImportConfig(source=arrays, out=features))
    train(TrainConfig(features=features, out=run, steps=0))
    fingerprint = read_manifest(features).fingerprint()
    divided = copytree(features, other / features.name)
    split(SplitConfig(features=divided, test=0.5))
    assert read_manifest(divided).fingerprint() != fingerprint
    monkeypatch.chdir(other)
    change(run / "config.toml", str(features), features.name)  # typed there, so found first

    assert find_features(run, fingerprint) == features
    features.rename(tmp_path / "moved")
    assert find_features(run, fingerprint).resolve() == divided


def test_a_run_of_version_0_1_0_names_its_features_as_they_were_typed(tmp_path: Path) -> None:
    assert "features" not in read_environment(V1)
    with pytest.raises(DataError, match="its features are not at"):
        find_features(copytree(V1, tmp_path / "run"), "f" * 64)


def test_a_checkpoint_belongs_to_its_run() -> None:
    assert run_folder(Path("run/checkpoints/step-000010")) == Path("run")
    assert run_folder(Path("run")) == Path("run")
