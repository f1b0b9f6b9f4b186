"""Indexes of any number of sides, and queries of one side or several."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import csalign
from csalign.cli.app import app
from csalign.core.errors import ConfigError, DataError, EncoderError, ShapeError
from csalign.encoders.base import EncoderOptions, load_encoders
from csalign.features.reader import FeatureSet
from csalign.features.writer import FeatureWriter, Rows
from csalign.indexing.build import index
from csalign.indexing.combined import combined_scores
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.indexing.search import search
from tests.conftest import Sided


def indexed(sided: Sided, out: Path, **values: Any) -> Any:
    return index(IndexConfig(features=sided.features, adapter=sided.run, out=out, **values))


def hits(place: Path, **values: Any) -> list[list[dict[str, Any]]]:
    found = search(SearchConfig(index=place, **values))
    return [one["hits"] for one in found["queries"]]


def saved(sided: Sided, folder: Path, *sides: str, rows: int = 5) -> dict[str, str]:
    """Files with the first rows of some sides, as queries."""
    for side in sides:
        np.save(folder / f"{side}.npy", sided.rows[side][:rows])
    return {side: str(folder / f"{side}.npy") for side in sides}


def scored(query: Any, items: Any) -> Any:
    """The combined score in the words of its definition."""
    out = []
    for item in items:
        weights = np.exp(query @ item / 0.1)
        mixed = (weights[:, None] * query).sum(axis=0)
        out.append(item @ mixed / np.linalg.norm(mixed))
    return np.array(out)


def test_a_hit_names_its_side_and_item(sided: Sided, tmp_path: Path) -> None:
    document = indexed(sided, tmp_path / "index", side="audio,images")
    assert document["side"] == "image,audio"
    assert document["rows"] == 100
    assert document["recall"] is None
    assert [*document["encoders"]] == ["image", "text", "audio", "depth"]

    found = hits(tmp_path / "index", queries=saved(sided, tmp_path, "depth"), top=100)[0]
    every = {
        f"i{row}" if side == "image" else f"{side}-{row}": value
        for side in ("image", "audio")
        for row, value in enumerate(sided.latents[side] @ sided.latents["depth"][0])
    }
    assert [hit["score"] for hit in found] == pytest.approx(sorted(every.values())[::-1], abs=1e-5)
    assert all(hit["score"] == pytest.approx(every[hit["id"]], abs=1e-5) for hit in found)
    for hit in found:
        row = int(hit["id"].removeprefix("audio-").removeprefix("i"))
        assert hit["item"] == sided.items[hit["side"]][row]
        assert hit["caption"] == f"caption {hit['item'][1:]}"
        assert hit["source"] == f"image-{hit['item'][1:]}"


def test_an_item_has_the_split_of_its_rows(sided: Sided, tmp_path: Path) -> None:
    assert indexed(sided, tmp_path / "index", side="audio", split="test")["rows"] == 13
    with pytest.raises(DataError, match="has no audio; name another --split"):
        indexed(sided, tmp_path / "none", side="audio", split="nowhere")


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_sides_of_a_query_are_combined_as_defined(
    sided: Sided, tmp_path: Path, factory: str
) -> None:
    out = tmp_path / "index"
    indexed(sided, out, side="image", factory=factory, recall=1)
    given = saved(sided, tmp_path, "text", "audio", "depth")
    found = hits(out, queries=given, top=7)

    assert len(found) == 5
    for row, own in enumerate(found):
        query = np.stack([sided.latents[side][row] for side in given])
        scores = scored(query, sided.latents["image"])
        best = np.argsort(-scores, kind="stable")[:7]
        assert [hit["id"] for hit in own] == [f"i{place}" for place in best]
        assert [hit["score"] for hit in own] == pytest.approx(scores[best].tolist(), abs=1e-5)


def test_one_side_of_a_query_is_a_plain_search(sided: Sided, tmp_path: Path) -> None:
    indexed(sided, tmp_path / "index")
    path = saved(sided, tmp_path, "audio")["audio"]
    one = hits(tmp_path / "index", queries={"audio": path})
    assert one == hits(tmp_path / "index", embedding=path, query_side="audio")
    twice = hits(sided.features, adapter=sided.run, queries={"audio": f"{path}:3"})
    assert [hit["id"] for hit in twice[0]] == [hit["id"] for hit in one[3]]


def test_combined_scores_are_cosines_of_a_weighted_sum() -> None:
    rng = np.random.default_rng(0)
    query, items = (rng.normal(size=(n, 5)) for n in (3, 40))
    query, items = (own / np.linalg.norm(own, axis=1, keepdims=True) for own in (query, items))
    np.testing.assert_allclose(combined_scores(query, items), scored(query, items), atol=1e-6)
    order = [2, 0, 1]
    np.testing.assert_allclose(
        combined_scores(query[order], items), combined_scores(query, items), atol=1e-6
    )
    np.testing.assert_allclose(combined_scores(query[:1], items), items @ query[0], atol=1e-6)


def test_compressed_vectors_are_warned_of(
    sided: Sided, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    indexed(sided, tmp_path / "index", factory="SQ8")
    given = saved(sided, tmp_path, "text", "audio")
    assert hits(tmp_path / "index", queries=given, top=1)
    assert "SQ8 stores compressed vectors, so combined scores are approximate" in caplog.text


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"queries": {"text": "text.npy", "audio": "few.npy"}}, ShapeError, "different numbers"),
        ({"queries": {"text": "text.npy:9"}}, DataError, "has 5 rows, numbered from 0; row 9"),
        ({"queries": {"video": "text.npy"}}, ConfigError, "'video' is not a side; use image or"),
        ({"queries": {"audio": "text.npy"}}, ShapeError, "has width 11, the audio embeddings"),
        ({"queries": {"audio": "a dog barks"}}, EncoderError, "--query audio=FILE.npy"),
        ({"queries": {"audio": "audio.npy:first"}}, ConfigError, "'first' is not a row"),
        ({"queries": {"audio": "missing.npy"}}, DataError, r"missing\.npy: no such file"),
        ({"queries": {"text": "text.npy"}, "text": "a dog"}, ConfigError, "are 2 queries"),
        ({"embedding": "text.npy"}, ConfigError, "name its side with --query-side"),
    ],
)
def test_a_query_that_cannot_be_used_is_named(
    sided: Sided,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(sided, tmp_path, "text", "audio")
    np.save("few.npy", sided.rows["audio"][:2])
    indexed(sided, tmp_path / "index")
    with pytest.raises(error, match=message):
        hits(tmp_path / "index", **values)


def test_what_an_index_cannot_do_is_said(sided: Sided, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="has no side 'video'; its sides are image, text, audio, depth"
    ):
        indexed(sided, tmp_path / "index", side="video")
    with pytest.raises(ConfigError, match="centre: has a mean for the items and one for the quer"):
        indexed(sided, tmp_path / "index", correct="centre")
    with pytest.raises(ShapeError, match=r"several widths \(image 10, audio 8\); pass --adapter"):
        index(IndexConfig(features=sided.features, side="image,audio", out=tmp_path / "index"))
    given = saved(sided, tmp_path, "depth")
    with pytest.raises(ShapeError, match="stores audio without an adapter, 8 wide"):
        hits(sided.features, side="audio", queries=given)
    indexed(sided, tmp_path / "index", correct="csls")
    with pytest.raises(ConfigError, match="build an index without --correct"):
        hits(tmp_path / "index", queries=saved(sided, tmp_path, "text", "audio"))
    assert hits(tmp_path / "index", queries=saved(sided, tmp_path, "audio"))


def test_words_and_pictures_are_encoded_for_any_side(
    sided: Sided, tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    spec = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    encoder: Any = load_encoders(None, spec, EncoderOptions(torch.device("cpu"))).text
    words = ["red", "green", "blue"]
    folder = tmp_path / "features"
    folder.mkdir()
    info = encoder.info
    with FeatureWriter(folder, {"title": info, "lyrics": info}, "float32") as writer:
        rows = encoder.embed(words).embeddings
        writer.write("title", Rows({"id": words, "item": words}, rows))
        writer.write("lyrics", Rows({"id": words, "item": words}, rows))

    found = hits(folder, side="title", queries={"lyrics": "green"}, top=3)[0]
    assert (found[0]["id"], found[0]["side"], found[0]["item"]) == ("green", "title", "green")
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    both = hits(folder, side="title", queries={"lyrics": "green", "title": "green"}, top=1)[0]
    assert both[0]["id"] == "green"


def test_queries_by_side_on_the_command_line_and_in_python(sided: Sided, tmp_path: Path) -> None:
    indexed(sided, tmp_path / "index")
    given = saved(sided, tmp_path, "text", "audio", rows=1)
    words = [word for side, path in given.items() for word in ("--query", f"{side}={path}")]
    result = CliRunner().invoke(app, ["search", str(tmp_path / "index"), *words, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    rows = {side: sided.rows[side][:1] for side in given}
    assert csalign.search(tmp_path / "index", query=rows)["queries"] == document["queries"]
    assert document["queries"][0]["query"] == "text: 0 + audio: 0"
    shown = CliRunner().invoke(app, ["search", str(tmp_path / "index"), *words, "--top", "1"])
    assert document["queries"][0]["hits"][0]["id"] in shown.stdout


def test_an_index_is_inspected(sided: Sided, tmp_path: Path) -> None:
    document = indexed(sided, tmp_path / "index", side="audio,depth")
    assert csalign.inspect(tmp_path / "index") == document
    assert document["fingerprint"] == FeatureSet.open(sided.features).manifest.fingerprint()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "index")])
    assert "Flat index of 60 audio, depth" in result.stdout
    assert "--query image=query.npy" in result.stdout
