import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from csalign import inspect
from csalign.core.errors import (
    ConfigError,
    CsalignError,
    DataError,
    EncoderError,
    OutputError,
    SchemaError,
    ShapeError,
)
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.measure import measure
from csalign.evaluation.protocols import Gallery
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.indexing.build import index
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.indexing.search import search
from csalign.ingest.config import ExtractConfig, ImportConfig
from csalign.ingest.extract import extract
from csalign.ingest.import_arrays import import_arrays
from csalign.metrics.retrieval import corrected
from csalign.training.config import TrainConfig
from csalign.training.train import train

COLOURS = {"red": (220, 30, 30), "green": (20, 180, 60), "blue": (30, 60, 220), "grey": (90,) * 3}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Feature set of 300 pairs that share a latent: 200 train, 40 val, 60 test."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(300, 8))
    for name, width in (("images", 24), ("texts", 16)):
        mixed = latent @ rng.normal(size=(8, width)) + 0.7 * rng.normal(size=(300, width))
        np.save(folder / f"{name}.npy", mixed.astype(np.float32))
    splits = ["train"] * 200 + ["val"] * 40 + ["test"] * 60
    lines = [f"{row},caption {row},{split}" for row, split in enumerate(splits)]
    (folder / "texts.csv").write_text("\n".join(["image_id,caption,split", *lines]))
    images, texts = (folder / f"{name}.npy" for name in ("images", "texts"))
    out = folder / "features"
    import_arrays(ImportConfig(images=images, texts=texts, pairs=folder / "texts.csv", out=out))
    return out


@pytest.fixture(scope="module")
def run(features: Path) -> Path:
    out = features.with_name("run")
    train(TrainConfig(features=features, out=out, steps=0, init="random"))
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Path:
    """A folder with squares of four colours, their feature set by a tiny CLIP, and its index."""
    folder = tmp_path_factory.mktemp("drawn")
    pictures = folder / "pictures"
    pictures.mkdir()
    rows = ["filepath,caption"]
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(pictures / f"{name}.png")
        rows.append(f"{name}.png,<b>{name}</b> square")
    (pictures / "captions.csv").write_text("\n".join(rows))
    encoder = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    extract(ExtractConfig(source=str(pictures), encoder=encoder, out=folder / "features"))
    index(IndexConfig(features=folder / "features", out=folder / "index"))
    return folder


def asked(folder: Path, **values: Any) -> Any:
    return search(SearchConfig(index=folder, **values))


def queries_of(features: Path, side: str, tmp_path: Path) -> tuple[Path, Any]:
    """The test split's embeddings of a side as a file, and its rows."""
    rows = load_rows(FeatureSet.open(features), "test")
    path = tmp_path / f"{side}.npy"
    np.save(path, rows.images if side == "image" else rows.texts)
    return path, rows


@pytest.mark.parametrize("correct", [None, "csls", "inverted-softmax", "centre"])
def test_an_exact_search_places_the_right_image_where_eval_does(
    features: Path, run: Path, tmp_path: Path, correct: Any
) -> None:
    config = IndexConfig(
        features=features, adapter=run, split="test", out=tmp_path / "index", correct=correct
    )
    index(config)
    path, rows = queries_of(features, "text", tmp_path)
    found = asked(tmp_path / "index", embedding=path, top=1_000)["queries"]
    measured = measure(EvalConfig(features=features, adapter=run, split="test"))
    images, texts = measured.aligned.images, measured.aligned.texts
    if correct is not None:
        images, texts = corrected(images, texts, correct)
    expected = Gallery(images, texts, measured.aligned.rows.text_image).rank()[1].first

    ids = rows.image_ids.to_pylist()
    ranks = [
        [hit["id"] for hit in one["hits"]].index(ids[owner]) + 1
        for one, owner in zip(found, rows.text_image, strict=True)
    ]
    assert ranks == expected.tolist()
    assert 20 < max(ranks) <= 60


def test_an_index_of_features_without_the_other_side_is_searched_by_its_own(
    features: Path, tmp_path: Path
) -> None:
    path, rows = queries_of(features, "text", tmp_path)
    import_arrays(ImportConfig(texts=path, out=tmp_path / "texts"))
    index(IndexConfig(features=tmp_path / "texts", side="text", out=tmp_path / "index"))
    found = asked(tmp_path / "index", embedding=path, top=1)["queries"]
    assert [one["hits"][0]["id"] for one in found] == [str(row) for row in range(len(rows.texts))]


def test_texts_can_be_what_is_found(features: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    index(IndexConfig(features=features, adapter=run, split="test", side="text", out=out))
    path, rows = queries_of(features, "image", tmp_path)
    found = asked(out, embedding=path, top=60)["queries"]
    expected = measure(EvalConfig(features=features, adapter=run, split="test")).ranks[0].first

    ids = rows.image_ids.to_pylist()
    owners = [[hit["image_id"] for hit in one["hits"]] for one in found]
    assert [own.index(name) + 1 for own, name in zip(owners, ids, strict=True)] == expected.tolist()
    assert all(hit["caption"].startswith("caption ") for hit in found[0]["hits"])


@pytest.mark.parametrize(
    ("factory", "effort"), [("IVF16,Flat", "nprobe"), ("HNSW16", "efSearch"), ("PCA16,Flat", None)]
)
def test_an_approximate_index_reports_its_recall(
    features: Path, run: Path, tmp_path: Path, factory: str, effort: str | None
) -> None:
    out = tmp_path / "index"
    document = index(
        IndexConfig(features=features, adapter=run, out=out, factory=factory, recall=0.9)
    )

    assert document["factory"] == factory
    assert list(document["effort"]) == ([] if effort is None else [effort])
    assert document["recall"]["value"] >= (0.9 if effort else 0.7)
    assert document["recall"]["of"] == "texts"
    assert inspect(out) == document
    found = asked(out, embedding=queries_of(features, "text", tmp_path)[0])
    assert found["recall@10"] == document["recall"]["value"]


def test_the_effort_can_be_given_and_a_low_recall_is_warned_of(
    features: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"features": features, "adapter": run, "factory": "IVF64,Flat"}
    document = index(IndexConfig(out=tmp_path / "index", effort=1, **given))

    assert document["effort"] == {"nprobe": 1}
    assert document["recall"]["value"] < 0.95
    assert "below the target of 0.95; raise --effort" in caplog.text


def test_a_feature_set_is_searched_exactly_without_an_index(
    features: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    index(IndexConfig(features=features, adapter=run, split="test", side="text", out=out))
    query: dict[str, Any] = {"embedding": queries_of(features, "image", tmp_path)[0], "top": 7}
    stored = asked(out, **query)
    direct = asked(features, adapter=run, split="test", side="text", **query)

    assert direct.pop("index") == str(features)
    assert stored.pop("index") == str(out)
    assert direct == stored
    assert (direct["factory"], direct["recall@10"], direct["rows"]) == ("Flat", 1.0, 60)
    with pytest.raises(ConfigError, match=r"adapter, split: .* is an index, which was built with"):
        asked(out, adapter=run, split="test", **query)


def test_a_text_and_a_picture_are_embedded_by_the_encoder_of_the_features(drawn: Path) -> None:
    by_text = asked(drawn / "index", query="a blue square", top=2)
    by_picture = asked(drawn / "index", image=str(drawn / "pictures" / "green.png"))["queries"][0][
        "hits"
    ]

    assert [len(one["hits"]) for one in by_text["queries"]] == [2]
    assert by_picture[0]["id"] == "green.png"
    assert by_picture[0]["score"] == pytest.approx(1.0, abs=1e-3)
    assert by_picture[0]["caption"] == "<b>green</b> square"
    assert Path(by_picture[0]["source"]).name == "green.png"


def test_many_queries_come_from_stdin(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.TextIOWrapper(io.BytesIO("red\n\nein grünes Quadrat\n".encode()))
    monkeypatch.setattr(sys, "stdin", given)

    assert [one["query"] for one in asked(drawn / "index", text="-")["queries"]] == [
        "red",
        "ein grünes Quadrat",
    ]


def test_a_page_shows_pictures_and_runs_nothing(drawn: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    asked(drawn / "index", text="<script>alert(1)</script>", report=page)
    text = page.read_text(encoding="utf-8")

    assert text.count("data:image/jpeg;base64,") == 4
    assert "<script" not in text
    assert "&lt;b&gt;red&lt;/b&gt; square" in text
    assert len(text) < 100_000
    with pytest.raises(OutputError, match=r"the folder .* does not exist"):
        asked(drawn / "index", text="x", report=tmp_path / "no" / "page.html")


def test_another_encoder_is_refused(
    drawn: Path, tiny_clip: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = f"open_clip:{tiny_clip[0]}/none"
    with pytest.raises(DataError, match=r"come from open_clip:tiny-clip.json/none \(weights "):
        asked(drawn / "index", text="red", encoder=other)
    changed = changed_index(drawn, tmp_path, lambda d: d["encoders"]["text"].pop("fingerprint"))
    assert asked(changed, text="red", top=1)["queries"][0]["hits"]
    assert "by its name, weights unknown" in caplog.text


def test_an_index_of_an_older_version_is_to_be_built_again(drawn: Path, tmp_path: Path) -> None:
    folder = changed_index(drawn, tmp_path, lambda document: document.update(format_version=1))
    with pytest.raises(SchemaError, match=r"format_version: .*; build the index again"):
        asked(folder, text="red")


def changed_index(drawn: Path, tmp_path: Path, change: Callable[[Any], Any]) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(drawn / "index", folder)
    document = json.loads((folder / "index.json").read_text())
    change(document)
    (folder / "index.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("spec", ["made by hand", "os:getcwd", "hf:x?trust_remote_code=true"])
def test_an_encoder_that_is_unknown_or_runs_code_is_not_loaded(
    drawn: Path, tmp_path: Path, spec: str
) -> None:
    folder = changed_index(
        drawn, tmp_path, lambda document: document["encoders"]["text"].update(spec=spec)
    )
    with pytest.raises(EncoderError, match=r"pass the query's own embedding with --embedding"):
        asked(folder, text="red")


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ({}, ConfigError, "missing a query; for instance: csalign search"),
        ({"text": "a", "image": "b"}, ConfigError, "--text and --image are 2 queries"),
        ({"query": "a", "text": "b"}, ConfigError, "QUERY and --text are 2 queries"),
        ({"text": " "}, DataError, "the query is empty"),
        ({"image": "nowhere.png"}, DataError, r"nowhere\.png: cannot be read"),
        ({"embedding": "nowhere.npy"}, DataError, r"nowhere\.npy: no such file"),
        ({"embedding": "wide.npy"}, ShapeError, "has width 5, the text embeddings of"),
        ({"embedding": "nothing.npy"}, DataError, r"nothing\.npy, row 1: has no direction"),
        ({"embedding": "pickle.npy"}, DataError, "cannot be read as"),
        ({"text": "a", "query_side": "text"}, ConfigError, "is the side of --embedding"),
    ],
)
def test_a_query_that_cannot_be_used_is_named(
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    query: dict[str, Any],
    error: type[CsalignError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.ones((2, 5), np.float32))
    np.save("nothing.npy", np.stack([np.ones(16), np.zeros(16)]))
    np.save("pickle.npy", np.array([{}], dtype=object), allow_pickle=True)

    with pytest.raises(error, match=message):
        asked(drawn / "index", **query)


@pytest.mark.parametrize("name", ["vectors.faiss", "items.arrow", "adapter/adapter.safetensors"])
def test_a_damaged_index_is_one_line(features: Path, run: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "index"
    index(IndexConfig(features=features, adapter=run, out=out))
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 255
    (out / name).write_bytes(content)
    with pytest.raises(SchemaError, match=f"{name}: the content does not match"):
        asked(out, embedding=queries_of(features, "text", tmp_path)[0])
    (out / name).unlink()
    with pytest.raises(SchemaError, match=f"{name}: is missing"):
        inspect(out)


def test_an_index_is_written_only_where_it_may_be(drawn: Path, tmp_path: Path) -> None:
    features = drawn / "features"
    with pytest.raises(OutputError, match="exists"):
        index(IndexConfig(features=features, out=drawn / "index"))
    with pytest.raises(ConfigError, match=r"need .* of memory"):
        index(IndexConfig(features=features, out=tmp_path / "index", memory=0))
    with pytest.raises(ConfigError, match="factory: FAISS cannot build 'nonsense' for width 16"):
        index(IndexConfig(features=features, out=tmp_path / "index", factory="nonsense"))
    with pytest.raises(DataError, match="rows are too few to train IVF64,Flat"):
        index(IndexConfig(features=features, out=tmp_path / "index", factory="IVF64,Flat"))
    with pytest.raises(DataError, match="no such index"):
        asked(tmp_path / "index", text="red")
    with pytest.raises(DataError, match="name another --split"):
        index(IndexConfig(features=features, out=tmp_path / "index", split="nowhere"))
    assert not list(tmp_path.iterdir())
