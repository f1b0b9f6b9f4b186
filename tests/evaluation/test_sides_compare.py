"""``csalign compare`` and ``diagnose`` of sets of several sides."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import csalign
from csalign.core.errors import ConfigError

Write = Callable[..., Path]
ALL = ("image", "text", "audio")


@pytest.fixture
def systems(tmp_path: Path, write_sided: Write, write_run: Write) -> list[Path]:
    """A set, a run on it, and one that keeps 3 of 12 dimensions."""
    features = write_sided(tmp_path / "set")
    return [
        features,
        write_run(tmp_path / "good", features, ALL),
        write_run(tmp_path / "poor", features, ALL, 3),
    ]


def test_runs_are_compared_by_direction_with_paired_intervals(systems: list[Path]) -> None:
    found = csalign.compare(*systems)

    assert found["sides"] == [*ALL]
    plain, good, poor = found["evaluations"]
    assert [own["verdict"] for own in found["evaluations"]] == ["baseline", "better", "worse"]
    for row, run in ((good, systems[1]), (poor, systems[2])):
        alone = csalign.evaluate(run, subsets=False)
        assert row["mean_recall"] == alone["mean_recall"]
        cell = alone["matrix"]["audio"]["text"]["mean_recall"]
        assert row["audio_to_text_mean_recall"] == cell
        difference = row["difference"]["audio_to_text_mean_recall"]
        assert difference["value"] == pytest.approx(cell - plain["audio_to_text_mean_recall"])
        low, high = difference["interval"]
        assert low <= difference["value"] <= high
        assert row["image_audio_centroid_distance"] < plain["image_audio_centroid_distance"]
    assert len(poor["verdicts"]) == 6
    for name, verdict in poor["verdicts"].items():
        low, high = poor["difference"][name]["interval"]
        assert verdict == ("worse" if high < 0 else "better" if low > 0 else "cannot tell")
    assert plain["parameters"] is None
    assert good["parameters"] == 3 * (12 * 12 + 12)


def test_documents_are_ranked_again_and_paired(systems: list[Path], tmp_path: Path) -> None:
    document = tmp_path / "good.json"
    document.write_text(json.dumps(csalign.evaluate(systems[1], resamples=100)))

    found = csalign.compare(document, systems[2])["evaluations"]

    assert [own["verdict"] for own in found] == ["baseline", "worse"]
    assert len(found[1]["difference"]) == 1 + 6 + 3


def test_systems_of_other_sides_are_refused(
    systems: list[Path], tmp_path: Path, write_run: Write
) -> None:
    pair = write_run(tmp_path / "pair", systems[0], ("text", "audio"))

    with pytest.raises(
        ConfigError, match=r"image and text and audio, pair on text and audio.*--sides"
    ):
        csalign.compare(systems[1], pair)
    found = csalign.compare(systems[1], pair, sides="text,audio")
    assert found["sides"] == ["text", "audio"]
    assert found["evaluations"][1]["difference"]["mean_recall"]["value"] == 0
    with pytest.raises(ConfigError, match="--labels: only for images and texts"):
        csalign.compare(*systems, labels="source")


def test_a_diagnosis_counts_items_and_compares_all_pairs(
    tmp_path: Path, write_sided: Write
) -> None:
    features = write_sided(tmp_path / "set", widths={"audio": 20})

    found = csalign.diagnose(features, split="all")

    counts, pairs = found["counts"], found["forecast"]["pairs"]
    assert sum(counts["items_by_sides"].values()) == counts["items"]
    assert [*counts["items_by_sides"]] == ["1", "2", "3"]
    sides = counts["items_by_side"]
    assert sum(int(k) * n for k, n in counts["items_by_sides"].items()) == sum(sides.values())
    own = pairs["image"]["audio"]
    assert own == pairs["audio"]["image"]
    assert own["compared"] == own["items"] < min(sides["image"], sides["audio"])
    assert own["mutual_knn"] > own["mutual_knn_chance"] + 0.1
    assert not own["looks_random"]
    first, few, *_ = found["forecast"]["words"]
    assert f"of {counts['items']} items have two sides or more" in first
    assert f"image and audio ({own['items']})" in few
    with pytest.raises(ConfigError, match="--pairs, --report: only for images and texts"):
        csalign.diagnose(features, pairs=50, report=tmp_path / "page.html")


def test_two_named_sides_are_diagnosed_as_images_and_texts_are(
    tmp_path: Path, write_sided: Write
) -> None:
    features, page = write_sided(tmp_path / "set"), tmp_path / "page.html"

    found = csalign.diagnose(features, sides="text,audio", split="train", report=page)

    assert (found["features"], found["split"]) == (str(features), "train")
    assert found["names"] == {"image": "text", "text": "audio"}
    assert found["pairs"] == found["forecast"]["pairs"] > 20
    assert "gradient_cosine" in found["objective"]
    assert "Diagnosis of set" in page.read_text(encoding="utf-8")
