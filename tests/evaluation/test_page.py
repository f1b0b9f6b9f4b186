import csv
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.core import __version__
from csalign.core.errors import OutputError, SchemaError
from csalign.core.progress import recorded_call
from csalign.evaluation.config import EvalConfig, PageOptions
from csalign.evaluation.evaluate import evaluate
from csalign.evaluation.measure import describe, measure
from csalign.evaluation.page import _ranked_queries, write_report
from csalign.features.schema import read_manifest
from csalign.ingest.config import ExtractConfig, ImportConfig
from csalign.ingest.extract import extract
from csalign.ingest.import_arrays import import_arrays
from csalign.report.thumbnails import Pictures
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
    assert "Worst ranks, image to text" in text
    assert "Most confident mistakes, text to image" in text
    assert "&lt;i&gt;caption" in text
    assert len(set(text.split("data:image/jpeg;base64,")[1:])) >= 1
    assert "https://example.com" not in text


def test_the_page_of_an_adapter_shows_both_stages_and_its_training(
    features: Path, tmp_path: Path
) -> None:
    pages = tmp_path / "train.html", tmp_path / "eval.html"
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
        assert "<th>before</th>" not in text  # of two widths
        curves, table = text.index("Training loss"), text.index("<h2>Retrieval")
        assert (curves < table) == (page is pages[0])
        assert str(features) not in text.split("<h2>Environment")[1]


def square_set(tmp_path: Path) -> Path:
    """Sixty pairs of one width, with a rotation between the sides."""
    rng = np.random.default_rng(0)
    rows, turn = rng.normal(size=(60, 8)), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", rows @ turn + 0.3 * rng.normal(size=rows.shape))
    paths = {name: tmp_path / f"{file}.npy" for name, file in (("images", "x"), ("texts", "y"))}
    return import_arrays(ImportConfig(**paths, out=tmp_path / "square")).features


def test_tables_show_before_and_after_and_the_head_says_where_it_comes_from(
    tmp_path: Path,
) -> None:
    features, page = square_set(tmp_path), tmp_path / "page.html"
    run = train(TrainConfig(features=features, out=tmp_path / "run", steps=0)).run
    plain = evaluate(EvalConfig(features=features))
    with recorded_call("csalign eval <i> --report page.html"):
        document = evaluate(EvalConfig(features=features, adapter=run, report=page, explain=True))
    text = page.read_text(encoding="utf-8")
    head, rest = text.split("</header>")
    recalls = [f"{100 * each['retrieval']['mean_recall']:.2f}" for each in (plain, document)]

    assert document["before"] == {key: plain[key] for key in ("retrieval", "gap", "mixed")}
    assert "gap.centroid_distance" in document["explanations"]
    assert "before" not in evaluate(EvalConfig(features=features, adapter=run))
    assert "<h1>Evaluation of run on square, split all</h1>" in head
    assert f"Mean recall {recalls[0]} % → {recalls[1]} %, centroid distance" in head
    assert f"csalign {__version__}: <code>csalign eval &lt;i&gt; --report" in head
    assert f"{datetime.now(UTC):%Y-%m-}" in head
    assert "trained on rows that are measured here" in head.split('class="warnings"')[1]
    assert "<tr><th></th><th>before</th><th>after</th></tr>" in rest
    row = rest.split("<td>mean recall % ↑</td>")[1].split("</tr>")[0]
    assert row.startswith(f"<td>{recalls[0]}</td><td>{recalls[1]}<small>")
    assert "<td>centroid distance ↓</td>" in rest
    row = rest.split("<td>image queries NDCG@10 % ↑</td>")[1].split("</tr>")[0]
    places = [stage["mixed"]["image"]["ndcg@10"] for stage in (plain, document)]
    assert row.startswith("<td>{:.2f}</td><td>{:.2f}<small>".format(*(100 * v for v in places)))


def test_confident_mistakes_are_wrong_and_the_widest_margin_comes_first(tmp_path: Path) -> None:
    measured = measure(EvalConfig(features=square_set(tmp_path), intervals=False))
    cosines = measured.aligned.images @ measured.aligned.texts.T
    (found,) = [
        queries
        for heading, queries in _ranked_queries(measured, Pictures(8)).items()
        if heading == "Most confident mistakes, image to text"
    ]
    own = cosines.diagonal().copy()
    np.fill_diagonal(cosines, -np.inf)
    best = np.where(cosines.max(1) >= own, cosines.max(1), -np.inf)
    rows = np.argsort(-best)[:8]
    rows = rows[np.argsort((own - best)[rows])]

    assert [one.query.note.strip() for one in found] == [str(row) for row in rows]
    assert [one.match.note for one in found] == [f"{row} {own[row]:.3f}" for row in rows]
    assert [one.first.note for one in found] == [
        f"{cosines[row].argmax()} {best[row]:.3f}" for row in rows
    ]
    assert all(one.rank > 1 for one in found)


def test_pictures_are_found_from_any_directory_or_their_absence_is_said(
    tiny_clip: tuple[Path, Path],
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos = make_images(*(f"{number}.png" for number in range(8)))
    lines = [f"{number}.png,photo {number}" for number in range(8)]
    (photos / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    monkeypatch.chdir(tmp_path)
    encoder = "open_clip:{}+{}".format(*tiny_clip)
    features = tmp_path / "features"
    extract(ExtractConfig(source="photos", encoder=encoder, out=features))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def page(**options: Any) -> str:
        with recorded_call("eval"):
            evaluate(EvalConfig(features=features, report=elsewhere / "p.html", **options))
        return (elsewhere / "p.html").read_text(encoding="utf-8")

    assert read_manifest(features).source_root == str(tmp_path)
    text = page()
    assert "data:image/jpeg" in text
    assert "pictures not found" not in text

    photos.rename(tmp_path / "moved")
    text = page()
    assert "data:image/jpeg" not in text
    said = rf"\d+ of \d+ pictures not found under {tmp_path} \(such as photos/\d.png\); pass"
    assert re.search(said, text.split("</header>")[0])
    for folder in (tmp_path / "moved", Path("../moved")):
        assert "data:image/jpeg" in page(pictures=folder)


def test_the_page_maps_neighbours_on_request(features: Path, tmp_path: Path) -> None:
    run = train(TrainConfig(features=features, out=tmp_path / "run", steps=0)).run
    measured = measure(EvalConfig(features=features, adapter=run, intervals=False))
    page = tmp_path / "page.html"
    # UMAP takes long without its compiler; see conftest.
    options = PageOptions(report=page, umap=True)
    write_report(options, "neighbours", measured, describe(measured), run, drawn=20)

    assert page.read_text(encoding="utf-8").count("the adapter: neighbours") == 2


def test_a_split_whose_pairs_all_belong_to_one_image_has_a_page(tmp_path: Path) -> None:
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
    with pytest.raises(OutputError, match="create it first"):
        train(TrainConfig(features=features, out=tmp_path / "run", report=tmp_path / "no" / "p"))

    assert not (tmp_path / "run").exists()


def test_a_damaged_record_of_the_run_is_named(features: Path, tmp_path: Path) -> None:
    run = train(TrainConfig(features=features, out=tmp_path / "run", steps=0)).run
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n{")
    with pytest.raises(SchemaError, match=r"metrics\.jsonl: was changed or is damaged"):
        evaluate(EvalConfig(features=features, adapter=run, report=tmp_path / "page.html"))
