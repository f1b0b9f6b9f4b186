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
from csalign.evaluation.evaluate import measure
from csalign.evaluation.inspect import inspect
from csalign.evaluation.protocols import Gallery
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract import extract
from csalign.metrics.retrieval import corrected
from csalign.search.build import index
from csalign.search.config import IndexConfig, SearchConfig
from csalign.search.search import search
from csalign.training.config import TrainConfig
from csalign.training.train import train

COLOURS = {"red": (220, 30, 30), "green": (20, 180, 60), "blue": (30, 60, 220), "grey": (90,) * 3}


@pytest.fixture
def run(features: Path, tmp_path: Path) -> Path:
    train(TrainConfig(features=features, out=tmp_path / "run", steps=0, init="random"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
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
    images, texts = measured.images, measured.texts
    if correct is not None:
        images, texts = corrected(images, texts, correct)
    expected = Gallery(images, texts, measured.text_image).rank()[1].first

    ids = rows.image_ids.to_pylist()
    ranks = [
        [hit["id"] for hit in one["hits"]].index(ids[owner]) + 1
        for one, owner in zip(found, rows.text_image, strict=True)
    ]
    assert ranks == expected.tolist()
    assert 20 < max(ranks) <= 60


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


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_tells_its_recall_and_reaches_what_is_asked(
    features: Path, run: Path, tmp_path: Path, kind: Any
) -> None:
    out = tmp_path / "index"
    told = index(IndexConfig(features=features, adapter=run, out=out, kind=kind, recall=0.9))

    assert told["search"] == kind
    assert told["recall"]["value"] >= 0.85
    assert told["recall"]["of"] == "texts"
    assert inspect(out) == told
    assert asked(out, embedding=queries_of(features, "text", tmp_path)[0])["recall@10"] >= 0.85


def test_a_text_and_a_picture_are_embedded_by_the_encoder_of_the_features(drawn: Path) -> None:
    by_text = asked(drawn / "index", text="a blue square", top=2)
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
    asked(drawn / "index", text="<script>alert(1)</script>", html=page)
    text = page.read_text(encoding="utf-8")

    assert text.count("data:image/jpeg;base64,") == 4
    assert "<script" not in text
    assert "&lt;b&gt;red&lt;/b&gt; square" in text
    assert len(text) < 100_000
    with pytest.raises(OutputError, match="there is no folder"):
        asked(drawn / "index", text="x", html=tmp_path / "no" / "page.html")


def test_another_encoder_is_refused(
    drawn: Path, tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    other = f"open_clip:{tiny_clip[0]}/none"
    with pytest.raises(EncoderError, match="has other weights"):
        asked(drawn / "index", text="red", encoder=other)
    changed = changed_index(drawn, tmp_path, lambda d: d["encoders"]["text"].pop("fingerprint"))
    with pytest.raises(EncoderError, match="is not what embedded the features"):
        asked(changed, text="red", encoder=other)
    assert asked(changed, text="red", top=1)["queries"][0]["hits"]


def changed_index(drawn: Path, tmp_path: Path, change: Callable[[Any], Any]) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(drawn / "index", folder)
    document = json.loads((folder / "index.json").read_text())
    del document["checksum"]
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
    with pytest.raises(EncoderError, match=r"give the query's own embedding by --embedding"):
        asked(folder, text="red")


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ({}, ConfigError, "nothing to look for"),
        ({"text": "a", "image": "b"}, ConfigError, "--text and --image: give one of"),
        ({"text": " "}, DataError, "the query is empty"),
        ({"image": "nowhere.png"}, DataError, r"nowhere\.png: cannot be read"),
        ({"embedding": "nowhere.npy"}, DataError, r"nowhere\.npy: no such file"),
        ({"embedding": "wide.npy"}, ShapeError, "is 5 wide, the text embeddings of"),
        ({"embedding": "nothing.npy"}, DataError, r"nothing\.npy, row 1: is 0 or not finite"),
        ({"embedding": "pickle.npy"}, DataError, "cannot be read as"),
        ({"text": "a", "query_side": "text"}, ConfigError, "for --embedding alone"),
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


def test_rows_can_be_added_once(features: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    index(IndexConfig(features=features, adapter=run, split="train", out=out, kind="ivf"))
    told = index(IndexConfig(features=features, split="test", add_to=out))
    path, rows = queries_of(features, "image", tmp_path)
    found = asked(out, embedding=path, query_side="image", top=1)["queries"]

    assert told["rows"] == 260
    assert [taken["split"] for taken in told["taken"]] == ["train", "test"]
    ids = [one["hits"][0]["id"] for one in found]
    assert np.mean([a == b for a, b in zip(ids, rows.image_ids.to_pylist(), strict=True)]) > 0.9
    assert not list(tmp_path.glob("*.partial"))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    with pytest.raises(DataError, match=r"is in .* already"):
        index(IndexConfig(features=features, split="test", add_to=out))
    with pytest.raises(ConfigError, match="has one of its own"):
        index(IndexConfig(features=features, split="val", add_to=out, adapter=run))
    with pytest.raises(ConfigError, match=r"--side: .* has image, not text"):
        index(IndexConfig(features=features, split="val", add_to=out, side="text"))
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())


def test_features_of_other_encoders_cannot_be_added(
    features: Path, run: Path, drawn: Path, tmp_path: Path
) -> None:
    index(IndexConfig(features=features, adapter=run, out=tmp_path / "index"))
    with pytest.raises(ShapeError, match=r"the adapter .* takes 24"):
        index(IndexConfig(features=drawn / "features", add_to=tmp_path / "index"))


@pytest.mark.parametrize("name", ["vectors.faiss", "items.arrow", "adapter/adapter.safetensors"])
def test_a_damaged_index_is_one_line(features: Path, run: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "index"
    index(IndexConfig(features=features, adapter=run, out=out))
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 255
    (out / name).write_bytes(content)
    with pytest.raises(SchemaError, match=f"{name}: the content does not agree"):
        asked(out, embedding=queries_of(features, "text", tmp_path)[0])
    (out / name).unlink()
    with pytest.raises(SchemaError, match=f"{name}: is missing"):
        inspect(out)


def test_an_index_is_written_only_where_it_may_be(drawn: Path, tmp_path: Path) -> None:
    features = drawn / "features"
    with pytest.raises(ConfigError, match="give either --out"):
        index(IndexConfig(features=features))
    with pytest.raises(OutputError, match="exists"):
        index(IndexConfig(features=features, out=drawn / "index"))
    with pytest.raises(ConfigError, match=r"need .* of memory"):
        index(IndexConfig(features=features, out=tmp_path / "index", memory=0))
    with pytest.raises(DataError, match="no such index"):
        asked(tmp_path / "index", text="red")
    with pytest.raises(DataError, match="name another --split"):
        index(IndexConfig(features=features, out=tmp_path / "index", split="nowhere"))
    assert not list(tmp_path.iterdir())
