"""Runs of any number of sides: applied, exported, inspected, and used beside two-sided ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import csalign
from csalign.adapters.model import Adapter
from csalign.cli.artifact_tables import inspect_table
from csalign.core.errors import ConfigError, SchemaError
from csalign.evaluation.config import InspectConfig
from csalign.features.reader import FeatureSet
from csalign.features.sides import load_sides
from csalign.features.writer import FeatureWriter, Rows
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig, ExportConfig
from csalign.runs.export import export
from tests.conftest import Sided

SIDES = ("image", "text", "audio", "depth")


def applied(sided: Sided, out: Path, **values: Any) -> Any:
    return apply(ApplyConfig(features=sided.features, adapter=sided.run, out=out, **values))


def two_sided(sided: Sided, folder: Path) -> Path:
    """The images and texts of the set, as a set of version 1."""
    stored = FeatureSet.open(sided.features)
    folder.mkdir()
    encoders = {side: stored.table(side).encoder for side in ("image", "text")}
    with FeatureWriter(folder, encoders, "float32") as writer:
        for side, names in (("image", ["id", "split"]), ("text", ["id", "image_id", "split"])):
            columns = {name: stored.table(side).strings(name) for name in names}
            writer.write(side, Rows(columns, sided.rows[side]))
    return folder


def test_apply_writes_all_sides_with_their_items(sided: Sided, tmp_path: Path) -> None:
    result = applied(sided, tmp_path / "out", dtype="float32")
    before, after = (
        load_sides(FeatureSet.open(sided.features)),
        load_sides(FeatureSet.open(tmp_path / "out")),
    )

    assert [*after.sides] == [*SIDES]
    assert after.keys.equals(before.keys)
    for side, own in after.sides.items():
        np.testing.assert_allclose(own.embeddings, sided.latents[side], atol=1e-6)
        assert own.items.tolist() == before.sides[side].items.tolist()
    made = FeatureSet.open(tmp_path / "out")
    assert made.splits() == FeatureSet.open(sided.features).splits()
    assert made.table("text").strings("caption")[0].as_py().startswith("caption ")
    assert made.table("audio").encoder.spec == "audio-encoder | run"
    assert result["sides"]["audio"] == {
        "rows": 40,
        "unpaired": 0,
        "width": 6,
        "encoder": "audio-encoder",
    }
    assert result["counts"]["by_sides"] == {"2": 20, "3": 30, "4": 10}


def test_texts_keep_their_items_without_the_images(sided: Sided, tmp_path: Path) -> None:
    applied(sided, tmp_path / "out", sides="text,audio")
    made = FeatureSet.open(tmp_path / "out")

    assert made.sides == ("text", "audio")
    assert made.table("text").strings("item").to_pylist() == sided.items["text"]
    assert made.table("text").strings("image_id").null_count == 60
    rows = load_sides(made)
    assert len(rows.pairs("text", "audio")[0]) == 40


def test_npy_has_a_file_per_side_that_import_reads(sided: Sided, tmp_path: Path) -> None:
    out = tmp_path / "out"
    applied(sided, out, format="npy", dtype="float32")

    files = {
        f"{name}{end}" for name in ("images", "texts", "audio", "depth") for end in (".npy", ".csv")
    }
    assert {path.name for path in out.iterdir()} == files | {"aligned.json", "config.toml"}
    np.testing.assert_allclose(np.load(out / "depth.npy"), sided.latents["depth"], atol=1e-6)
    csalign.import_arrays(
        side={"audio": out / "audio.npy", "depth": out / "depth.npy"}, out=tmp_path / "again"
    )
    again = FeatureSet.open(tmp_path / "again")
    assert again.table("audio").strings("item").to_pylist() == sided.items["audio"]
    assert again.table("depth").encoder.spec == "depth-encoder | run"
    applied(sided, out, format="npy", overwrite=True)


def test_clip_retrieval_stores_images_and_texts_only(sided: Sided, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="not audio, depth; pass --sides image,text or --format"):
        applied(sided, out, format="clip-retrieval")
    assert applied(sided, out, format="clip-retrieval", sides="image,text")["pairs"] == 60


def test_a_side_that_the_set_or_the_run_lacks_is_named(sided: Sided, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="has no side 'video'; its sides are image, text, audio, depth"
    ):
        applied(sided, tmp_path / "out", sides="video,text")
    adapter = csalign.load_adapter(sided.run)
    fewer = {side: adapter.side(side) for side in ("image", "text", "audio")}
    Adapter.of_sides(fewer).save(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"has the side depth, the adapter .* --sides.*--add-side"
    ):
        csalign.apply(sided.features, tmp_path / "run", tmp_path / "out")
    csalign.apply(sided.features, tmp_path / "run", tmp_path / "out", sides="image,audio")
    with pytest.raises(ConfigError, match="mean-shift: fits images and texts only, not audio"):
        csalign.apply(sided.features, "mean-shift", tmp_path / "shifted")


@pytest.mark.parametrize("form", ["safetensors", "onnx", "hub-folder"])
def test_a_run_is_exported_with_all_sides(sided: Sided, tmp_path: Path, form: Any) -> None:
    found = export(
        ExportConfig(run=sided.run, out=tmp_path / "out", to=form, features=sided.features)
    )
    card = (tmp_path / "out" / "README.md").read_text()

    assert "of 4 frozen encoders" in card
    assert all(f"| {side} | linear | " in card for side in SIDES)
    assert {f"rows of the features, {side}" for side in SIDES} < found["differences"].keys()
    if form == "onnx":
        assert {f"{side}.onnx" for side in SIDES} < {*found["files"]}
        assert 'InferenceSession("depth.onnx")' in card
    else:
        again = csalign.load_adapter(tmp_path / "out")
        np.testing.assert_allclose(
            again.embed("audio", sided.rows["audio"]), sided.latents["audio"], atol=1e-6
        )
    assert csalign.inspect(tmp_path / "out")["kinds"] == dict.fromkeys(SIDES, "linear")
    csalign.export(sided.run, tmp_path / "out", to=form, overwrite=True)


def test_the_card_has_the_results_of_an_evaluation(sided: Sided, tmp_path: Path) -> None:
    document = csalign.evaluate(sided.features, adapter=sided.run, intervals=False)
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(document))
    export(ExportConfig(run=sided.run, out=tmp_path / "out", to="safetensors", evaluation=path))
    card = (tmp_path / "out" / "README.md").read_text()

    recall = document["matrix"]["audio"]["depth"]["R@5"]
    assert f"| audio to depth R@5 | {recall:.4f} |" in card
    distance = document["gap"]["image"]["audio"]["centroid_distance"]
    assert f"| image and audio: centroid distance | {distance:.4f} |" in card


def test_a_run_of_more_sides_serves_a_set_of_two(sided: Sided, tmp_path: Path) -> None:
    features = two_sided(sided, tmp_path / "features")
    adapter = csalign.load_adapter(sided.run)
    both = Adapter.of_sides({side: adapter.side(side) for side in ("image", "text")})
    both.save(tmp_path / "both")

    own, other = (
        csalign.evaluate(features, adapter=run, intervals=False)
        for run in (sided.run, tmp_path / "both")
    )
    assert own["retrieval"] == other["retrieval"]
    assert own["gap"] == other["gap"]
    csalign.apply(features, sided.run, tmp_path / "aligned")
    csalign.index(features, tmp_path / "index", adapter=sided.run)
    found = csalign.search(tmp_path / "index", embedding=sided.rows["text"][:1], top=1)
    best = int((sided.latents["image"] @ sided.latents["text"][0]).argmax())
    assert found["queries"][0]["hits"][0]["id"] == f"i{best}"
    assert "side" not in found["queries"][0]["hits"][0]


def test_other_programs_name_the_side(sided: Sided, tmp_path: Path) -> None:
    adapter = csalign.load_adapter(sided.run)
    adapter.save(tmp_path / "copy")
    copy = csalign.load_adapter(tmp_path / "copy")
    assert copy.names == SIDES
    with pytest.raises(ConfigError, match="'video' is not a side; use image or text or audio or"):
        copy.embed("video", np.ones((1, 8)))

    module = csalign.SentenceAdapter(sided.run, "audio")
    rows = {"sentence_embedding": torch.from_numpy(sided.rows["audio"])}
    aligned = module(rows)["sentence_embedding"].detach().numpy()
    np.testing.assert_allclose(aligned, sided.latents["audio"], atol=1e-6)
    module.save(str(tmp_path / "module"))
    assert csalign.SentenceAdapter.load(str(tmp_path / "module"))._modality == "audio"
    (tmp_path / "module" / "config.json").write_text('{"side": "video"}')
    with pytest.raises(SchemaError, match="side is 'video', not image or text or audio or depth"):
        csalign.SentenceAdapter.load(str(tmp_path / "module"))

    model: Any = torch.nn.Module()
    model.encode_image = model.encode_text = torch.nn.Linear(3, sided.rows["image"].shape[1])
    assert csalign.wrap(model, sided.run).encode_image(torch.ones(2, 3)).shape == (2, 6)
    heard = Adapter.of_sides({side: adapter.side(side) for side in ("audio", "depth")})
    with pytest.raises(ConfigError, match="wrap: the adapter has no images, its sides are audio"):
        csalign.wrap(model, heard)


def test_inspect_counts_sides_items_and_pairs(
    sided: Sided, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = csalign.inspect(sided.features)
    assert found["sides"]["depth"]["rows"] == 20
    assert found["counts"]["pairs"]["image"] == {"text": 60, "audio": 40, "depth": 20}
    assert found["counts"]["pairs"]["audio"] == {"depth": 10}
    assert found["encoders"]["audio"]["spec"] == "audio-encoder"
    assert found["shards"] == 4
    assert {"image", "audio", "depth"} < found["health"].keys()

    monkeypatch.setenv("COLUMNS", "80")
    for path in (sided.features, sided.run):
        inspect_table(csalign.inspect(path), InspectConfig(path=path))
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if str(sided.run.parent) not in line]
    assert max(map(len, lines)) <= 80
    assert "40 rows, 8 wide, encoder audio-encoder" in printed
    assert "image 10, text 11, audio 8, depth 9; shared space 6" in printed


def test_a_damaged_file_of_a_side_is_named(sided: Sided, tmp_path: Path) -> None:
    shutil.copytree(sided.features, tmp_path / "copy")
    path = tmp_path / "copy" / "sides" / "depth" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"sides/depth/part-00000\.parquet: does not match"):
        csalign.inspect(tmp_path / "copy")
