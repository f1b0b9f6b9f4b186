"""What released versions wrote is read for good: ``v1`` is of csalign 0.1.0."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from csalign import inspect
from csalign.adapters.checkpoint import load_adapter
from csalign.core.enums import Modality
from csalign.core.errors import SchemaError
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.features.join import ALL, load_rows
from csalign.features.reader import FeatureSet, batch_tokens
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig

V1 = Path(__file__).parent / "v1"
IMAGES = ((np.arange(24 * 4).reshape(24, 4) % 7 - 3.25) / 4).astype(np.float16)
TEXTS = ((np.arange(26 * 3).reshape(26, 3) % 5 - 1.75) / 2).astype(np.float16)


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """A copy of what that version wrote."""
    shutil.copytree(V1, tmp_path / "v1")
    return tmp_path / "v1"


def test_a_feature_set_of_version_1_is_read(v1: Path) -> None:
    features = FeatureSet.open(v1 / "features")
    features.verify()
    rows = load_rows(features, ALL)
    tokens = [row for _, batch in features.images.read("tokens") for row in batch_tokens(batch)]

    assert features.images.encoder.spec == "eye"
    assert features.texts.encoder.fingerprint == "ab" * 32
    assert np.array_equal(rows.images, IMAGES)
    assert np.array_equal(rows.texts, TEXTS)
    assert rows.text_image.tolist() == [*range(24), -1, -1]
    assert rows.captions.to_pylist()[2:4] == ["caption é 2", None]
    assert [len(row) for row in tokens] == [k % 3 for k in range(24)]
    assert features.splits() == {
        "test": {"images": 4, "texts": 4},
        "train": {"images": 20, "texts": 21},
        None: {"images": 0, "texts": 1},
    }


def test_a_run_of_version_1_maps_as_it_did(v1: Path, tmp_path: Path) -> None:
    adapter, expected = load_adapter(v1 / "run"), np.load(v1 / "expected.npz", allow_pickle=False)
    described = inspect(v1 / "run")
    document = evaluate(EvalConfig(features=v1 / "features", adapter=v1 / "run", resamples=100))
    applied = apply(ApplyConfig(features=v1 / "features", adapter=v1 / "run", out=tmp_path / "out"))

    for side, rows in ((Modality.IMAGE, IMAGES), (Modality.TEXT, TEXTS)):
        np.testing.assert_allclose(adapter.embed(side, rows), expected[side], atol=1e-5)
    assert described["written_by"] == "0.1.0"
    assert document["counts"] == {"images": 4, "texts": 4, "pairs": 4}
    assert (applied.images, applied.texts) == (24, 26)


def test_documents_with_a_checksum_of_their_own_are_read(v1: Path) -> None:
    for name in ("features/manifest.json", "run/adapter.json", "run/environment.json"):
        document = json.loads((v1 / name).read_text()) | {"checksum": "0" * 64}
        (v1 / name).write_text(json.dumps(document))

    assert load_rows(FeatureSet.open(v1 / "features"), ALL).images.shape == (24, 4)
    assert inspect(v1 / "run")["written_by"] == "0.1.0"


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("features/manifest.json", 3, "manifest.json: format version 3, .* upgrade csalign"),
        ("features/manifest.json", 0, "manifest.json: format_version: "),
        ("features/manifest.json", "1", "manifest.json: format_version: "),
        ("run/adapter.json", 2, "adapter.json: format version 2, .* upgrade csalign"),
        ("run/adapter.json", 0, "adapter.json: format_version: "),
    ],
)
def test_another_version_is_refused_by_name(
    v1: Path, name: str, version: object, message: str
) -> None:
    document = json.loads((v1 / name).read_text()) | {"format_version": version}
    (v1 / name).write_text(json.dumps(document))

    with pytest.raises(SchemaError, match=message):
        inspect((v1 / name).parent)
