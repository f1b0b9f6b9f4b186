import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from csalign.cli.app import app
from csalign.core.enums import renamed
from csalign.core.errors import ConfigError
from csalign.features.schema import read_manifest
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays

NAMES = {"image": "audio", "text": "description"}


def told(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("image to text", "audio to description"),
        ("5 images, 1 text", "5 audio, 1 description"),
        ("i2t R@1", "audio to description R@1"),
        ("a context of image_id, image-like", "a context of image_id, image-like"),
    ],
)
def test_whole_words_alone_are_renamed(label: str, expected: str) -> None:
    assert renamed(label, NAMES) == expected
    assert renamed(label, None) == label


def test_a_pair_of_modalities_goes_through_everything_by_its_own_names(
    arrays: tuple[Path, Path], tmp_path: Path
) -> None:
    features, run, aligned = (tmp_path / name for name in ("sounds", "run", "aligned"))
    given = ("--images", arrays[0], "--texts", arrays[1], "--names", "audio,description")
    shown = [
        told("import", *given, "--out", features),
        told("inspect", features),
        told("train", features, "--out", run, "--steps", 0),
        told("apply", features, "--adapter", run, "--out", aligned),
        told("eval", features, "--adapter", run, "--no-intervals"),
        told("index", features, "--adapter", run, "--out", tmp_path / "index"),
    ]
    document = json.loads(told("eval", aligned, "--json", "--no-intervals"))
    (tmp_path / "eval.json").write_text(json.dumps(document))
    shown.append(told("compare", tmp_path / "eval.json"))

    assert "300 audio, 300 description" in shown[0]
    for text in shown:
        assert "audio" in text
        assert "image to text" not in text
        assert " images" not in text
    assert "audio to description" in shown[4]
    assert document["names"] == NAMES
    assert "image_to_text" in document["retrieval"]
    assert document["counts"]["images"] == 300


def test_features_without_names_have_the_manifest_that_they_had(features: Path) -> None:
    assert "names" not in json.loads((features / "manifest.json").read_text())
    assert read_manifest(features).names is None


def test_names_that_say_nothing_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 2), np.float32))
    given = {"images": tmp_path / "x.npy", "texts": tmp_path / "x.npy", "out": tmp_path / "out"}
    for names in ("audio", "audio,", "audio,audio", "<b>,x"):
        with pytest.raises(ConfigError, match="names"):
            import_arrays(ImportConfig.resolve(None, {**given, "names": names}))
