import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from csalign.core.errors import OutputError, SchemaError
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import describe, evaluate, measure
from csalign.evaluation.page import write_report
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.train import train


def pictured(tmp_path: Path, photos: Path) -> Path:
    """Twelve pairs of one width, of which some images have a file and one a damaged one."""
    rows = np.random.default_rng(0).normal(size=(12, 8))
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", rows + np.random.default_rng(1).normal(size=rows.shape))
    (photos / "damaged.png").write_bytes(b"no picture")
    sources = [str(photos / f"{name}.png") for name in ("a", "b", "damaged", "lost")]
    sources += ["https://example.com/a.png"] * 8
    for name, header, lines in (
        ("images", ["id", "source"], [[f"i{n}", source] for n, source in enumerate(sources)]),
        ("texts", ["image_id", "caption"], [[f"i{n}", f"<i>caption {n}</i>"] for n in range(12)]),
    ):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *lines])
    return import_arrays(
        ImportConfig(
            images=tmp_path / "x.npy",
            texts=tmp_path / "y.npy",
            image_table=tmp_path / "images.csv",
            text_table=tmp_path / "texts.csv",
            out=tmp_path / "set",
        )
    ).features


def test_the_page_shows_queries_and_what_pictures_can_be_read(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    features = pictured(tmp_path, make_images("a.png", "b.png"))
    page = tmp_path / "page.html"
    document = evaluate(EvalConfig(features=features, report=page))
    text = page.read_text(encoding="utf-8")

    assert f"{100 * document['retrieval']['mean_recall']:.2f}" in text
    assert "The embeddings" in text
    assert "Worst from image to text" in text
    assert "&lt;i&gt;caption" in text
    assert len(set(text.split("data:image/jpeg;base64,")[1:])) >= 1
    assert "https://example.com" not in text


def test_the_page_of_an_adapter_shows_both_stages_and_its_training(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = tmp_path / "train.html", tmp_path / "eval.html"
    monkeypatch.setitem(sys.modules, "umap", None)
    config = TrainConfig(
        features=features, out=tmp_path / "run", steps=4, patience=9, report=pages[0]
    )
    run = train(config).run
    evaluate(EvalConfig(features=features, adapter=run, report=pages[1]))

    for page in pages:
        text = page.read_text(encoding="utf-8")
        for title in ("before the adapter", "after the adapter", "Training loss", "Configuration"):
            assert title in text
        assert "the adapter: neighbours" not in text


def test_the_page_maps_neighbours_where_umap_is_installed(features: Path, tmp_path: Path) -> None:
    run = train(TrainConfig(features=features, out=tmp_path / "run", steps=0)).run
    report = describe(measure(EvalConfig(features=features, adapter=run, intervals=False)))
    page = tmp_path / "page.html"
    # UMAP takes long without its compiler; see conftest.
    write_report(page, "neighbours", report, run, 0, drawn=20)

    assert page.read_text(encoding="utf-8").count("the adapter: neighbours") == 2


def test_a_split_whose_pairs_all_belong_to_one_image_has_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(1, 8)))
    np.save(tmp_path / "y.npy", rng.normal(size=(3, 8)))
    (tmp_path / "pairs.csv").write_text("image_id,caption\n0,a\n0,b\n0,c\n")
    paths = {name: tmp_path / f"{file}.npy" for name, file in (("images", "x"), ("texts", "y"))}
    config = ImportConfig(**paths, pairs=tmp_path / "pairs.csv", out=tmp_path / "set")
    features = import_arrays(config).features
    page = tmp_path / "page.html"
    evaluate(EvalConfig(features=features, report=page))
    text = page.read_text(encoding="utf-8")

    assert '"name":"matched"' in text
    assert '"name":"unmatched"' not in text


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="name a file"):
        evaluate(EvalConfig(features=features, report=tmp_path))
    with pytest.raises(OutputError, match="make it first"):
        train(TrainConfig(features=features, out=tmp_path / "run", report=tmp_path / "no" / "p"))

    assert not (tmp_path / "run").exists()


def test_a_damaged_record_of_the_run_is_named(features: Path, tmp_path: Path) -> None:
    run = train(TrainConfig(features=features, out=tmp_path / "run", steps=0)).run
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n{")
    with pytest.raises(SchemaError, match=r"metrics\.jsonl: was changed or is damaged"):
        evaluate(EvalConfig(features=features, adapter=run, report=tmp_path / "page.html"))
