"""The encoders of features, compared with those of a run."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from csalign.adapters.checkpoint import AdapterInfo, read_info
from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.features.reader import FeatureSet
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig
from csalign.runs.load import check_encoders, public_spec
from csalign.training.config import TrainConfig
from csalign.training.train import train

WIDTH = 8
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes 40 pairs whose texts come from a known encoder."""

    def write(name: str, *, spec: str = "A", fingerprint: str | None = "a" * 64) -> Path:
        rng = np.random.default_rng(len(name))
        latent, ids = rng.normal(size=(40, WIDTH)), [str(row) for row in range(40)]
        encoders = {
            Modality.IMAGE: EncoderInfo(spec="I", fingerprint="i" * 64, width=WIDTH),
            Modality.TEXT: EncoderInfo(spec=spec, fingerprint=fingerprint, width=WIDTH),
        }
        folder = tmp_path / name
        folder.mkdir()
        with FeatureWriter(folder, encoders, "float32") as writer:
            for side in Modality:
                columns = {"id": ids, "image_id": ids} if side is Modality.TEXT else {"id": ids}
                noise = 0.1 * rng.normal(size=latent.shape)
                writer.write(side, Rows(columns, latent + noise))
        return folder

    return write


def trained(features: Path, **changes: object) -> AdapterInfo:
    run = features.with_name("run")
    if not run.exists():
        train(TrainConfig(features=features, out=run, steps=0))
    return read_info(run).model_copy(update=changes)


def check(place: Path, info: AdapterInfo, *, any_encoder: bool = False) -> None:
    check_encoders(FeatureSet.open(place), Path("run"), info, any_encoder=any_encoder)


def test_a_run_records_the_fingerprint_of_each_encoder(make: Make) -> None:
    info = trained(make("features"))

    assert info.encoder_fingerprints == {Modality.IMAGE: "i" * 64, Modality.TEXT: "a" * 64}


def test_features_of_another_encoder_of_the_same_width_are_refused(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    info, other = trained(make("features")), make("other", spec="B", fingerprint="b" * 64)
    said = r"other: the text embeddings come from B \(weights bbbb.* run was trained on A"
    with pytest.raises(DataError, match=rf"{said}.*--any-encoder"):
        check(other, info)
    check(other, info, any_encoder=True)

    assert "come from B (weights" in caplog.text


def test_the_commands_that_map_features_refuse_other_encoders_unless_insisted(
    make: Make, tmp_path: Path
) -> None:
    trained(make("features"))
    other, run = make("other", fingerprint="b" * 64), tmp_path / "run"
    with pytest.raises(DataError, match="--any-encoder"):
        evaluate(EvalConfig(features=other, adapter=run))
    with pytest.raises(DataError, match="--any-encoder"):
        apply(ApplyConfig(features=other, adapter=run, out=tmp_path / "out"))

    assert evaluate(EvalConfig(features=other, adapter=run, any_encoder=True))["counts"]


@pytest.mark.parametrize(
    ("spec", "fingerprint", "said"),
    [
        ("A", "a" * 64, None),
        ("renamed", "a" * 64, None),  # the same weights
        ("A", None, "run was trained on (text: A by its name, weights unknown)"),
        ("unknown", None, "other: may .* run was trained on (text: no encoder recorded, there A)"),
    ],
)
def test_an_unknown_encoder_is_warned_of_and_the_same_is_not(
    make: Make,
    caplog: pytest.LogCaptureFixture,
    spec: str,
    fingerprint: str | None,
    said: str | None,
) -> None:
    info = trained(make("features"))
    caplog.clear()
    check(make("other", spec=spec, fingerprint=fingerprint), info)

    if said:
        assert re.search(said.replace("(", r"\(").replace(")", r"\)"), caplog.text)
    else:
        assert not caplog.records


def test_encoders_of_other_names_are_refused_where_fingerprints_are_unknown(make: Make) -> None:
    info, other = trained(make("features")), make("other", spec="B", fingerprint=None)
    with pytest.raises(DataError, match=r"come from B, run was trained on A; .*--any-enc"):
        check(other, info)
    check(other, info, any_encoder=True)


def test_a_run_of_an_older_version_compares_names(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    info = trained(make("features"), encoder_fingerprints=None)
    check(make("same", fingerprint="b" * 64), info)
    assert "text: A by its name, weights unknown" in caplog.text
    with pytest.raises(DataError, match="come from B"):
        check(make("another", spec="B", fingerprint="b" * 64), info)


def test_encoders_that_nobody_named_are_warned_of_in_other_features_only(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    features = make("features", spec="unknown", fingerprint=None)
    info = trained(features)
    caplog.clear()
    check(features, info)
    assert not caplog.records
    check(make("other", spec="unknown", fingerprint=None), info)

    assert "(text: no encoder recorded, there no encoder recorded)" in caplog.text


def test_an_adapter_is_not_applied_twice(make: Make, tmp_path: Path) -> None:
    features = make("features")
    info = trained(features)
    out = tmp_path / "aligned"
    apply(ApplyConfig(features=features, adapter=tmp_path / "run", out=out))
    with pytest.raises(DataError, match=r"aligned: the image .* are aligned already \(I \| run\)"):
        check(out, info)
    again = train(TrainConfig(features=out, out=tmp_path / "again", steps=0)).run

    assert evaluate(EvalConfig(features=out, adapter=again))["counts"]["pairs"] == 40


def test_a_second_stage_takes_what_its_own_first_stage_aligned(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features, other, aligned = make("features"), make("other"), []
    for number, (rows, seed) in enumerate([(features, 0), (features, 1), (other, 0)]):
        run = tmp_path / f"{min(number, 1)}/run"
        if number < 2:
            train(TrainConfig(features=rows, out=run, steps=2, hidden=8, seed=seed))
        out = tmp_path / f"aligned-{number}"
        aligned.append(apply(ApplyConfig(features=rows, adapter=run, out=out)).features)
    second = train(TrainConfig(features=aligned[1], out=tmp_path / "second", steps=0)).run
    caplog.clear()

    assert evaluate(EvalConfig(features=aligned[2], adapter=second))["counts"]["pairs"] == 40
    assert not caplog.records
    with pytest.raises(DataError, match=r"come from I \| run \(weights .* was trained on I \| run"):
        evaluate(EvalConfig(features=aligned[0], adapter=second))


@pytest.mark.parametrize(
    ("spec", "public"),
    [
        ("open_clip:ViT-B-32/laion2b", "open_clip:ViT-B-32/laion2b"),
        ("open_clip:/home/me/a b/c.json+/home/me/c.safetensors", "open_clip:c.json+c.safetensors"),
        ("open_clip:/home/me/c.json/none", "open_clip:c.json/none"),
        ("hf:~/models/mini | run", "hf:mini | run"),
        ("timm:vit+weights/x.safetensors", "timm:vit+weights/x.safetensors"),
    ],
)
def test_a_published_spec_names_no_folder_of_the_user(spec: str, public: str) -> None:
    assert public_spec(spec) == public
