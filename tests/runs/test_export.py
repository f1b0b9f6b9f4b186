import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from sentence_transformers import SentenceTransformer

import csalign
from csalign.adapters.checkpoint import AdapterInfo, save_adapter
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.cli.artifact_tables import inspect_table
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError, ShapeError
from csalign.encoders.openclip_models import build_network, find_model, load_weights
from csalign.evaluation.config import EvalConfig, InspectConfig
from csalign.evaluation.evaluate import evaluate
from csalign.evaluation.inspect import inspect
from csalign.features.join import ALL, load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract import extract
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig, ExportConfig
from csalign.runs.export import export, write_checked
from csalign.sources.images import read_image
from csalign.training.config import TrainConfig
from csalign.training.train import train

DATA = Path(__file__).parents[2] / "sample_data"


def saved(folder: Path, kind: str, *, token_width: int | None = None) -> Path:
    """A run folder with random weights, images 12 wide and texts 8, or 12 where kinds keep it."""
    torch.manual_seed(3)
    keeps = kind == "low-rank"
    shapes = {
        side: SideShape(
            "linear" if kind == "parts" else kind,
            width,
            12 if keeps else 8,
            hidden=16,
            signed_sqrt=not keeps,
            scaled=not keeps,
            token_width=token_width,
        )
        for side, width in zip(Modality, (12, 12 if keeps else 8), strict=True)
    }
    if kind == "parts":
        for side, last in zip(Modality, ("linear", "kernel"), strict=True):
            own = tuple(replace(shapes[side], kind=one, landmarks=7) for one in ("glu", last))
            shapes[side] = SideShape(kind, own[0].input_width, 16, parts=own)
    adapter = Adapter(shapes)
    for side, shape in shapes.items():
        if not shape.scaled:
            continue
        adapter.side(side).set_scale(torch.linspace(0.1, 1, shape.input_width))
    for parameter in adapter.parameters():  # also of what starts at zero
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    info = AdapterInfo(
        adapters=shapes,
        encoders=dict.fromkeys(Modality, "a | <b>"),
        start="random",
        step=1,
        logit_scale=7.0,
        bandwidth=None,
        data_fingerprint="f" * 64,
        train_split="train",
    )
    save_adapter(folder, adapter, info)
    return folder


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        ("onnx", "transformer"),
        ("safetensors", "low-rank"),
        ("hub-folder", "linear"),
        ("onnx", "parts"),
    ],
)
def test_every_form_computes_what_the_run_does(to: Any, kind: str, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", kind)
    told = export(ExportConfig(run=run, to=to, out=tmp_path / "out"))

    assert max(told["differences"].values()) <= 1e-5
    assert {"README.md", "adapter.json"} <= set(told["files"])
    assert sorted(told["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_runtime_torch_and_the_wrapped_model_agree_with_apply(tmp_path: Path) -> None:
    config, weights = DATA / "tiny-clip/tiny-clip.json", DATA / "tiny-clip/tiny-clip.safetensors"
    features, run, aligned = tmp_path / "features", tmp_path / "run", tmp_path / "aligned"
    source = tmp_path / "few.csv"
    table = (DATA / "drawings/captions.csv").read_text(encoding="utf-8").splitlines()
    source.write_text("\n".join(table[:25]), encoding="utf-8")
    extract(
        ExtractConfig(
            source=str(DATA / "drawings"),
            captions=source,
            encoder=f"open_clip:{config}+{weights}",
            out=features,
            dtype="float32",
        )
    )
    train(TrainConfig(features=features, out=run, steps=2, hidden=16, patience=1))
    apply(ApplyConfig(features=features, adapter=run, out=aligned, dtype="float32"))
    export(ExportConfig(run=run, to="onnx", out=tmp_path / "onnx", features=features))
    model, preprocess = clip(config, weights)
    wrapped = csalign.wrap(model, run)
    rows, expected = (load_rows(FeatureSet.open(path), ALL) for path in (features, aligned))

    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=model.context_length)
    tokens = tokenizer(rows.captions.to_pylist())
    pixels = torch.stack([preprocess(name) for name in rows.image_ids.to_pylist()])
    with torch.no_grad():
        by_model = {
            Modality.IMAGE: wrapped.encode_image(pixels).numpy(),
            Modality.TEXT: wrapped.encode_text(tokens).numpy(),
        }
    for side in Modality:
        raw, want = rows.embeddings(side), expected.embeddings(side)
        session = onnxruntime.InferenceSession(str(tmp_path / f"onnx/{side}.onnx"))
        (by_runtime,) = session.run(None, {"embeddings": raw})
        by_torch = csalign.load_adapter(tmp_path / "run").embed(side, raw)
        for found in (by_runtime, by_torch, by_model[side]):
            np.testing.assert_allclose(found, want, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(by_model[side], axis=1), 1.0, atol=1e-5)


def clip(config: Path, weights: Path) -> Any:
    """The model of the sample data, and what makes its pixels of a drawing's id."""
    architecture, found = find_model(f"{config}+{weights}")
    model = build_network(architecture, found)
    assert found is not None
    load_weights(model, found, architecture)
    model.eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return model, lambda name: transform(read_image((DATA / "drawings" / name).read_bytes()))


def test_a_wrapped_model_of_another_width_is_told(
    tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    run = saved(tmp_path / "run", "linear")
    model, _ = clip(*tiny_clip)
    with pytest.raises(ShapeError, match="image embeddings are 16 wide, the adapter takes 12"):
        csalign.wrap(model, run).encode_image(torch.zeros(1, 3, 32, 32))


def test_what_embeds_with_tokens_is_refused_where_there_is_no_room_for_them(
    tmp_path: Path,
) -> None:
    run = saved(tmp_path / "run", "transformer", token_width=6)
    with pytest.raises(ConfigError, match="with their tokens"):
        export(ExportConfig(run=run, to="onnx", out=tmp_path / "out"))
    for make in (
        lambda: csalign.wrap(torch.nn.Linear(1, 1), run),
        lambda: csalign.SentenceAdapter(run),
    ):
        with pytest.raises(ConfigError, match="with their tokens"):
            make()
    told = export(ExportConfig(run=run, to="safetensors", out=tmp_path / "out"))

    assert "adapter.safetensors" in told["files"]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("hf:/home/me/models/minilm", "hf:minilm"),
        ("hf:user/name", "hf:user/name"),
        ("open_clip:ViT-B-32/laion2b", "open_clip:ViT-B-32/laion2b"),
        ("open_clip:/home/me/tiny.json+../me/w.pt", "open_clip:tiny.json+w.pt"),
        ("hf:user/name | /home/me/run", "hf:user/name | run"),
    ],
)
def test_what_strangers_read_names_local_files_by_their_names_alone(
    tmp_path: Path, spec: str, name: str
) -> None:
    run, out = saved(tmp_path / "run", "linear"), tmp_path / "out"
    info = json.loads((run / "adapter.json").read_text())
    info["encoders"]["image"] = spec
    (run / "adapter.json").write_text(json.dumps(info))
    export(ExportConfig(run=run, to="hub-folder", out=out, license="mit"))
    text = (out / "README.md").read_text(encoding="utf-8")

    assert "/home/me" not in text
    assert f"| {name} |" in text.replace("\\|", "|").replace("name &#124; run", "name | run")
    assert json.loads((out / "adapter.json").read_text())["encoders"]["image"] == name
    assert 'license: "mit"' in text
    assert csalign.load_adapter(out).side(Modality.IMAGE).shape.input_width == 12


def test_the_parts_of_an_adapter_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = saved(tmp_path / "run", "parts"), tmp_path / "out"
    log = {"step": 1, "refit": {"pairs": 1_234, "steps": 1}}
    (run / "metrics.jsonl").write_text(json.dumps(log) + "\n")
    export(ExportConfig(run=run, to="hub-folder", out=out))
    text = (out / "README.md").read_text(encoding="utf-8")
    config = InspectConfig(path=run)
    found = inspect(config)
    inspect_table(found, config)
    printed = " ".join(capsys.readouterr().out.split())

    assert found["kinds"] == {"image": "glu + linear", "text": "glu + kernel (7 landmarks)"}
    assert found["shares"] == [0.5, 0.5]
    assert found["refit"] == {"pairs": 1_234, "steps": 1}
    for word in ("glu + kernel (7 landmarks)", "50 % + 50 %", "on all 1,234 pairs"):
        assert word in text
        assert word in printed
    assert "shared space 16 (8 + 8)" in printed
    assert "{" not in printed


def test_a_card_without_a_licence_says_so(tmp_path: Path) -> None:
    export(
        ExportConfig(run=saved(tmp_path / "run", "linear"), to="safetensors", out=tmp_path / "o")
    )

    assert "Not stated: whoever publishes" in (tmp_path / "o/README.md").read_text(encoding="utf-8")


def test_the_card_is_one_that_the_hub_reads(features: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(TrainConfig(features=features, out=run, steps=0))
    document = evaluate(EvalConfig(features=features, adapter=run, intervals=False))
    (tmp_path / "eval.json").write_text(json.dumps(document))
    config = ExportConfig(
        run=run, to="hub-folder", out=tmp_path / "my|model", evaluation=tmp_path / "eval.json"
    )
    export(config)
    text = (tmp_path / "my|model/README.md").read_text(encoding="utf-8")
    card = huggingface_hub.ModelCard(text).data
    assert isinstance(card, huggingface_hub.ModelCardData)

    assert card.library_name == "csalign"
    assert card.eval_results is not None
    assert card.eval_results[0].metric_value == document["retrieval"]["image_to_text"]["R@1"]
    info = json.loads((run / "adapter.json").read_text())
    for told in (
        info["data_fingerprint"],
        info["weights_sha256"],
        "## Intended use",
        "load_adapter",
    ):
        assert told in text
    assert str(tmp_path) not in text.replace(str(features), "")
    assert "# my|model" in text
    with pytest.raises(DataError, match="evaluates another adapter"):
        export(
            ExportConfig(
                run=saved(tmp_path / "other", "linear"),
                to="safetensors",
                out=tmp_path / "x",
                evaluation=tmp_path / "eval.json",
            )
        )


@pytest.mark.parametrize(("kind", "token_width"), [("mlp", None), ("transformer", 6)])
def test_what_computes_something_else_is_not_written(
    tmp_path: Path, kind: str, token_width: int | None
) -> None:
    run = saved(tmp_path / "run", kind, token_width=token_width)
    config = ExportConfig(run=run, to="safetensors", out=tmp_path / "out")
    with pytest.raises(OutputError, match="random rows, more than -1; nothing was written"):
        write_checked(config, -1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_sentence_transformer_gives_aligned_embeddings_and_comes_back_from_disk(
    tmp_path: Path,
) -> None:
    from sentence_transformers.sentence_transformer.modules import BoW

    run = saved(tmp_path / "run", "glu")
    words = ["a", "red", "car", "blue", "boat", "of", "wood", "green"]
    texts = ["a red car", "blue boat of wood"]
    model = SentenceTransformer(modules=[BoW(words)], device="cpu")
    raw = model.encode(texts)
    model.append(csalign.SentenceAdapter(run))
    model.save(str(tmp_path / "model"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")

    expected = csalign.load_adapter(run).embed(Modality.TEXT, np.asarray(raw))
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-6)
    np.testing.assert_allclose(again.encode(texts), expected, atol=1e-6)
    assert model.get_embedding_dimension() == 8
