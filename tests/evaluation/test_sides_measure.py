"""``csalign eval`` of sets of several sides."""

import json
import logging
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import csalign
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.evaluation.sides.measure import subsets_of
from csalign.features.checks import scaled
from csalign.features.reader import FeatureSet
from csalign.features.sides import load_sides
from csalign.metrics.explain import EXPLANATIONS

Write = Callable[..., Path]


def expected_recall(features: Path, a: str, b: str, k: int) -> float:
    """R@k by sorting, of the rows of a whose item has a row of b."""
    rows = load_sides(FeatureSet.open(features), "test").sides
    x, y = (next(own for own in rows.values() if own.name == name) for name in (a, b))
    scores = scaled(x.embeddings).astype(np.float64) @ scaled(y.embeddings).astype(np.float64).T
    hits = []
    for row, item in zip(scores, x.items, strict=True):
        if item in y.items:
            hits.append(item in y.items[np.argsort(-row)[:k]])
    return float(np.mean(hits))


def test_the_document_has_all_directions_and_subsets(tmp_path: Path, write_sided: Write) -> None:
    features = write_sided(tmp_path / "set")

    found = csalign.evaluate(features, resamples=100, explain=True)

    assert found["sides"] == ["image", "text", "audio"]
    assert (found["split"], found["adapter"]) == ("test", None)
    counts = found["counts"]
    for a, b in permutations(found["sides"], 2):
        cell = found["matrix"][a][b]
        for k in (1, 5, 10):
            assert cell[f"R@{k}"] == pytest.approx(expected_recall(features, a, b, k))
        low, high = found["intervals"]["matrix"][a][b]["mean_recall"]
        assert low <= cell["mean_recall"] <= high
        assert cell["gallery"] == counts["rows"][b]
        assert 0 < cell["queries"] <= counts["rows"][a]
        assert counts["pairs"][a][b] == counts["pairs"][b][a] >= cell["queries"]
        gap, around = found["gap"][a][b], found["intervals"]["gap"][a][b]
        assert {*gap["uniformity"]} == {a, b, "cross"}
        for name in ("centroid_distance", "rmg", "alignment"):
            assert around[name][0] <= gap[name] <= around[name][1]
    cells = [own["mean_recall"] for row in found["matrix"].values() for own in row.values()]
    assert found["mean_recall"] == pytest.approx(np.mean(cells))
    assert {target: [*own] for target, own in found["subsets"].items()} == {
        "image": ["audio+text"],
        "text": ["audio+image"],
        "audio": ["image+text"],
    }
    block = found["subsets"]["text"]["audio+image"]
    recalls = {
        name: (found["matrix"][name]["text"], found["matrix"]["text"][name])
        for name in ("audio", "image")
    }
    best = max(recalls, key=lambda name: sum(own["mean_recall"] for own in recalls[name]))
    assert block["best_side"] == best
    assert block["gain"] == pytest.approx(
        block["query_weighted"]["mean_recall"] - block["best_single"]["mean_recall"]
    )
    low, high = found["intervals"]["subsets"]["text"]["audio+image"]["gain"]
    assert low <= block["gain"] <= high
    json.dumps(found, allow_nan=False)
    of_sides = ("sides", "matrix.", "mean_recall", "subsets.", "effective_rank.")
    assert {key for key in EXPLANATIONS if key.startswith(of_sides)} <= {*found["explanations"]}
    assert found["explanations"]["subsets.*.gain"]["name"] == "gain"
    assert found["explanations"]["gap.rmg"]["name"] == "RMG"


def test_the_order_of_sides_and_rows_changes_no_figure(tmp_path: Path, write_sided: Write) -> None:
    one, other = (
        csalign.evaluate(write_sided(tmp_path / name, turned=name == "b"), resamples=100)
        for name in ("a", "b")
    )

    for name in ("matrix", "mean_recall", "gap", "subsets", "intervals", "counts"):
        mine, others = (dict(leaves(own[name])) for own in (one, other))
        assert mine.keys() == others.keys()
        for place, value in mine.items():
            if isinstance(value, str):
                assert others[place] == value
            else:
                assert others[place] == pytest.approx(value, abs=1e-6)


def leaves(value: Any, place: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, dict):
        return [(place, value)]
    return [own for key, inner in value.items() for own in leaves(inner, (*place, key))]


def test_a_run_is_measured_on_its_sides(
    tmp_path: Path, write_sided: Write, write_run: Write, caplog: pytest.LogCaptureFixture
) -> None:
    features = write_sided(tmp_path / "set", widths={"audio": 20})
    run = write_run(tmp_path / "run", features, ("text", "audio"))

    with pytest.raises(ShapeError, match=r"image 12, text 12, audio 20.*pass --adapter RUN"):
        csalign.evaluate(features)
    with caplog.at_level(logging.INFO):
        alone = csalign.evaluate(run, resamples=100)
    assert "has no adapter for image, measured without" in caplog.text
    named = csalign.evaluate(features, adapter=run, sides="text,audio", resamples=100)
    assert alone == named
    assert named["sides"] == ["text", "audio"]
    assert named["parameters"] == 12 * 12 + 12 * 20 + 2 * 12
    assert named["subsets"] == {}
    with pytest.raises(ConfigError, match=r"no adapter for image, only for text, audio"):
        csalign.evaluate(features, adapter=run, sides=("image", "audio"))
    with pytest.raises(ConfigError, match=r"closed-form: is fitted on images and texts"):
        csalign.evaluate(features, adapter="closed-form", sides="text,audio")


def test_a_run_warns_of_rows_it_was_trained_on(
    tmp_path: Path, write_sided: Write, write_run: Write, caplog: pytest.LogCaptureFixture
) -> None:
    features = write_sided(tmp_path / "set")
    run = write_run(tmp_path / "run", features, ("image", "text", "audio"))

    csalign.evaluate(features, adapter=run, split="train", subsets=False, intervals=False)

    assert "trained on rows that are measured here (split train" in caplog.text


def test_options_of_images_and_texts_are_refused(tmp_path: Path, write_sided: Write) -> None:
    features = write_sided(tmp_path / "set")

    with pytest.raises(ConfigError, match=r"--protocol, --labels: only for images and texts"):
        csalign.evaluate(features, protocol="coco-5k", labels="source")
    with pytest.raises(ConfigError, match=r"--sides: video is not in .*image, text, audio"):
        csalign.evaluate(features, sides="video,text")


def test_sides_without_rows_in_a_split_are_left_out(
    tmp_path: Path, write_sided: Write, caplog: pytest.LogCaptureFixture
) -> None:
    features = write_sided(tmp_path / "set", only_train=("audio",))

    found = csalign.evaluate(features, intervals=False)

    assert found["sides"] == ["image", "text"]
    assert "(split test): no rows of audio, left out" in caplog.text
    with pytest.raises(DataError, match="has rows of text only; name another --split"):
        csalign.evaluate(features, sides="audio,text")
    with pytest.raises(DataError, match="has no rows"):
        csalign.evaluate(features, split="nowhere")


def test_sides_that_share_few_items_or_none(
    tmp_path: Path, write_sided: Write, caplog: pytest.LogCaptureFixture
) -> None:
    few, none = (
        write_sided(tmp_path / name, ("image", "audio", "video"), shared=shared)
        for name, shared in (("few", 5), ("none", 0))
    )

    found = csalign.evaluate(few, split="all", resamples=100)

    assert "have two sides or more, so recalls are uncertain" in caplog.text
    json.dumps(found, allow_nan=False)
    with pytest.raises(DataError, match="no item has rows of two of image, audio, video"):
        csalign.evaluate(none, split="all")


def test_two_sides_of_images_and_texts_take_the_path_of_two(
    tmp_path: Path, write_sided: Write
) -> None:
    features = write_sided(tmp_path / "set", ("image", "text"))

    with pytest.raises(DataError, match="has no pairs"):  # which these texts do not name
        csalign.evaluate(features)


def test_subsets_are_few_for_many_sides() -> None:
    assert subsets_of("cab") == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    assert len(subsets_of("abcd")) == 11
    assert subsets_of("abcde") == [
        *(tuple(n for n in "abcde" if n != left) for left in "edcba"),
        tuple("abcde"),
    ]


def test_a_page_has_heat_maps_and_the_subsets(tmp_path: Path, write_sided: Write) -> None:
    features, page = write_sided(tmp_path / "set"), tmp_path / "page.html"

    csalign.evaluate(features, report=page, resamples=100)

    text = page.read_text(encoding="utf-8")
    assert text.count('"type":"heatmap"') == 4
    for words in ("image \\u2192 audio", "Retrieval by several sides", "text by audio+image"):
        assert words in text or words.replace("\\u2192", "→") in text


def test_the_result_is_a_frame_and_lines(tmp_path: Path, write_sided: Write) -> None:
    found = csalign.evaluate(write_sided(tmp_path / "set"), resamples=100)

    frame = found.to_frame()
    row = frame[(frame.block == "matrix") & (frame.part == "image.audio") & (frame.figure == "R@1")]
    assert row["value"].item() == found["matrix"]["image"]["audio"]["R@1"]
    assert row["low"].item() <= row["value"].item() <= row["high"].item()
    shown = dict(line.strip().rsplit(maxsplit=1) for line in repr(found).splitlines()[1:])
    assert shown["mean recall % ↑"] == f"{100 * found['mean_recall']:.2f}"
    recall = found["matrix"]["image"]["audio"]["mean_recall"]
    assert shown["image to audio mean recall % ↑"] == f"{100 * recall:.2f}"
