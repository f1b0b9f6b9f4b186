"""Embeddings of the same items by two models, by laws that hold whatever the models are."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

import csalign
from csalign.cli.app import app
from csalign.core.errors import ConfigError, DataError

Put = Callable[..., Path]
Array = npt.NDArray[np.float32]

WIDTH = 24


@pytest.fixture
def rows() -> Array:
    """Items with neighbours, as their dimensions have different variances."""
    generator = np.random.default_rng(0)
    scale = np.geomspace(3, 0.3, WIDTH)
    return (generator.normal(size=(300, WIDTH)) * scale).astype(np.float32)


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """A function that imports rows as the texts of a set."""

    def write(name: str, values: Array, **columns: list[str]) -> Path:
        array, table = tmp_path / f"{name}.npy", tmp_path / f"{name}.csv"
        np.save(array, values.astype(np.float32))
        columns = {"id": [f"item-{row}" for row in range(len(values))]} | columns
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
        out = tmp_path / name
        csalign.import_arrays(texts=array, text_table=table, out=out, dtype="float32")
        return out

    return write


def versions(*paths: Path, **options: Any) -> list[dict[str, Any]]:
    document = csalign.compare(*paths, **options)
    assert json.loads(json.dumps(document)) == document
    found: list[dict[str, Any]] = document["versions"]
    return found


def test_the_same_vectors_are_of_the_same_model(put: Put, rows: Array) -> None:
    (one,) = versions(put("old", rows), put("new", 2 * rows))  # norms do not count

    assert one["canary"]["mean"] == pytest.approx(1)
    assert one["canary"]["lowest_5_percent"] == pytest.approx(1)
    assert (one["canary"]["verdict"], one["advice"]) == ("same model", "keep")
    assert one["overlap"]["overlap@10"] == 1
    assert one["overlap"]["interval"] == [1, 1]
    for figures in (one["unmapped"], *one["maps"]):
        assert figures["retention@10"] == figures["hit@1"] == 1
        assert figures["median_cosine"] == pytest.approx(1)
    assert one["sides"] == {"old": "text", "new": "text"}
    assert one["ids"] == {
        "common": 300,
        "only_old": 0,
        "only_new": 0,
        "changed": 0,
        "distinct": 300,
    }
    assert [row["pairs"] for row in one["maps"]] == [100, 150]


def test_a_rotation_keeps_neighbours_and_a_map_undoes_it(put: Put, rows: Array) -> None:
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
    (one,) = versions(put("old", rows), put("new", rows @ rotation))

    assert one["overlap"]["overlap@10"] == pytest.approx(1, abs=0.001)
    assert one["canary"]["verdict"] == "another space"
    assert one["unmapped"]["retention@10"] < 0.3
    assert one["unmapped"]["hit@1"] < 0.1
    best = one["maps"][-1]
    assert best["map"] == "orthogonal Procrustes"
    assert best["retention@10"] == pytest.approx(1, abs=0.001)
    assert best["hit@1"] == 1
    assert best["median_cosine"] == pytest.approx(1, abs=1e-5)
    assert one["advice"] == "map"


def test_noise_lowers_every_figure(put: Put, rows: Array) -> None:
    noise = np.random.default_rng(2).normal(size=rows.shape)
    old = put("old", rows)
    little, much = versions(old, put("little", rows + 0.2 * noise), put("much", rows + noise))

    assert little["canary"]["verdict"] == much["canary"]["verdict"] == "same space"
    assert 1 > little["canary"]["mean"] > much["canary"]["mean"]
    assert 1 > little["overlap"]["overlap@10"] > much["overlap"]["overlap@10"]
    for place in ("retention@10", "median_cosine"):
        assert 1 > little["unmapped"][place] > much["unmapped"][place]
        assert 1 > little["maps"][-1][place] > much["maps"][-1][place]
        low, high = much["maps"][-1]["intervals"][place]
        assert low < much["maps"][-1][place] < high


def test_figures_equal_a_slow_reference(put: Put, rows: Array) -> None:
    new = np.tanh(rows @ np.random.default_rng(3).normal(size=(WIDTH, 30)) / 5)
    splits = ["train"] * 200 + ["test"] * 100
    (one,) = versions(put("old", rows, split=splits), put("new", new))

    def nearest(queries: Array, gallery: Array) -> list[set[int]]:
        scores = (
            queries
            / np.linalg.norm(queries, axis=1)[:, None]
            @ (gallery / np.linalg.norm(gallery, axis=1)[:, None]).T
        )
        np.fill_diagonal(scores, -np.inf)
        return [set(np.argsort(-row)[:10].tolist()) for row in scores]

    both = zip(nearest(rows[200:], rows[200:]), nearest(new[200:], new[200:]), strict=True)
    assert one["overlap"]["overlap@10"] == pytest.approx(
        np.mean([len(a & b) / 10 for a, b in both])
    )
    assert one["overlap"]["chance"] == pytest.approx(10 / 99)
    assert one["held_out"] == {"queries": 100, "gallery": 100, "learned": "split train"}
    assert one["widths"] == {"old": WIDTH, "new": 30}
    assert (one["canary"], one["unmapped"]) == (None, None)
    assert one["maps"][-1]["retention@10"] > 0.5


def test_shuffled_ids_are_caught(put: Put, rows: Array) -> None:
    (one,) = versions(put("old", rows), put("new", np.random.default_rng(4).permutation(rows)))

    assert one["overlap"]["overlap@10"] < 2 * one["overlap"]["chance"]
    assert one["maps"][-1]["retention@10"] < 3 * one["overlap"]["chance"]
    assert one["advice"] == "check ids"
    assert "check that ids name the same items" in one["words"][-1]


def test_sets_are_joined_by_id_and_changed_captions_are_reported(
    put: Put, rows: Array, caplog: pytest.LogCaptureFixture
) -> None:
    order = np.random.default_rng(5).permutation(300)[:250]
    captions = [f"caption {row}" for row in range(300)]
    ids = [*(f"item-{row}" for row in order), "other"]
    again = [captions[row] for row in order]
    again[:2] = ["edited", ""]
    values = np.concatenate([rows[order], rows[:1]])
    old = put("old", rows, caption=captions)
    (one,) = versions(old, put("new", values, id=ids, caption=[*again, "other"]))

    assert one["ids"]["common"] == 250
    assert (one["ids"]["only_old"], one["ids"]["only_new"]) == (50, 1)
    assert one["canary"]["verdict"] == "same model"
    assert one["ids"]["changed"] >= 1
    assert "have another caption" in caplog.text


def test_a_few_canaries_are_compared_alone(
    put: Put, rows: Array, caplog: pytest.LogCaptureFixture
) -> None:
    old = put("old", rows)
    (one,) = versions(old, put("few", rows[:20]))

    assert one["canary"]["verdict"] == "same model"
    assert (one["overlap"], one["unmapped"], one["maps"]) == (None, None, [])
    assert "20 different vectors with equal ids" in caplog.text
    with pytest.raises(
        DataError, match=r"20 different vectors with equal ids here; maps and .* need 60"
    ):
        csalign.compare(old, put("narrow", rows[:20, :8]))


def test_copies_of_an_item_count_once(put: Put, rows: Array) -> None:
    copies = np.concatenate([rows, rows[:100]])
    (one,) = versions(put("old", copies), put("new", copies[:, :20]))

    assert (one["ids"]["common"], one["ids"]["distinct"]) == (400, 300)
    assert one["held_out"]["gallery"] == 150


def test_a_split_limits_the_ids(put: Put, rows: Array) -> None:
    old = put("old", rows, split=["train"] * 200 + ["test"] * 100)
    (one,) = versions(old, put("new", rows), split="test")

    assert one["ids"]["common"] == 100
    assert one["held_out"] == {"queries": 50, "gallery": 50, "learned": "random ids"}


def test_what_cannot_be_compared_is_refused(put: Put, rows: Array, features: Path) -> None:
    old, other = put("old", rows), put("other", rows, id=[f"x{row}" for row in range(300)])

    with pytest.raises(ConfigError, match="contains texts only; compare it with another model"):
        csalign.compare(old, features)
    with pytest.raises(ConfigError, match=r"with nothing else: csalign compare .*old NEW"):
        csalign.compare(old)
    with pytest.raises(ConfigError, match="--baseline is for runs"):
        csalign.compare(old, old, baseline="old")
    with pytest.raises(DataError, match=r"no id in common \(such as 'item-0' and 'x0'\)"):
        csalign.compare(old, other)
    with pytest.raises(DataError, match="no common id in split 'dev'"):
        csalign.compare(old, old, split="dev")


def test_the_suggested_commands_make_a_map_that_serves(
    put: Put, rows: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
    put("old", rows)
    put("new", rows @ rotation)
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    shown = runner.invoke(app, ["compare", "old", "new"])
    assert shown.exit_code == 0, shown.output
    steps = re.findall(r"next: csalign (.*)", shown.stdout)
    assert [step.split()[0] for step in steps] == ["import", "train", "apply"]
    for step in steps:
        done = runner.invoke(app, step.split())
        assert done.exit_code == 0, done.output

    (one,) = versions(tmp_path / "mapped", tmp_path / "new")
    assert one["canary"]["verdict"] == "same space"
    assert one["unmapped"]["retention@10"] > 0.9

    document = tmp_path / "versions.json"
    document.write_text(runner.invoke(app, ["compare", "old", "new", "--json"]).stdout)
    assert csalign.inspect(document)["kind"] == "comparison of models"
    frame = csalign.compare(tmp_path / "old", tmp_path / "new").to_frame()
    assert frame["pairs"].tolist() == [100, 150]


def test_a_map_of_the_fewest_ids_is_not_taken_for_wrong_ids(put: Put, rows: Array) -> None:
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
    (one,) = versions(put("old", rows[:60]), put("new", rows[:60] @ rotation))

    assert one["held_out"]["gallery"] == 30
    assert one["advice"] == "map"


def test_sides_without_pairs_are_reported(
    put: Put, rows: Array, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sides = put("old", rows) / "texts", put("new", rows) / "texts"

    assert csalign.import_arrays(*sides, out=tmp_path / "apart").pairs == 0
    assert "300 images and 300 texts, but no pairs by image_id" in caplog.text
    assert "--pair-by id" in caplog.text


def test_texts_beside_images_are_warned_of(
    put: Put, rows: Array, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts, pictures = put("texts", rows), tmp_path / "pictures"
    csalign.import_arrays(
        images=tmp_path / "texts.npy", image_table=tmp_path / "texts.csv", out=pictures
    )
    (one,) = versions(texts, pictures)

    assert one["sides"] == {"old": "text", "new": "image"}
    assert f"{texts} contains texts and {pictures} images" in caplog.text
