import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import csalign
from csalign.core.enums import Modality
from csalign.evaluation.agreement import Sample
from csalign.evaluation.forecast import Curve, expect, gallery_recall, learn_curve, log_odds

KEYS = {
    *("split", "pairs", "unpaired", "compared", "cka", "mutual_knn", "mutual_knn_chance"),
    *("mutual_knn_uncentred", "sliced_wasserstein", "mean_energy", "top_energy", "removal"),
    *(
        "centring_errors",
        "removal_errors",
        "effective_rank",
        "repeated",
        "expected",
        "curve",
        "extrapolated",
        "words",
    ),
}


def sides(n: int, noise: float = 0.5, seed: int = 0) -> tuple[Any, Any]:
    """Pairs (n, 40) and (n, 24) of a common latent of 12 dimensions."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, 12))
    maps = np.random.default_rng(9)
    rows = (
        latent @ maps.normal(size=(12, width)) + noise * rng.normal(size=(n, width))
        for width in (40, 24)
    )
    images, texts = (own.astype(np.float32) for own in rows)
    return images, texts


def diagnosed(images: Any, texts: Any) -> dict[str, Any]:
    document: dict[str, Any] = csalign.diagnose(features=(images, texts))
    found: dict[str, Any] = document["forecast"]
    return found


def test_sides_of_different_widths_are_foretold_alone() -> None:
    document = csalign.diagnose(features=sides(400))
    found = document["forecast"]

    assert "objective" not in document
    assert set(found) == KEYS
    assert set(found["expected"]) == {"mean_recall", "low", "high", "gallery"}
    assert [own["pairs"] for own in found["extrapolated"]] == [400, 800, 1600]
    for own in (*found["curve"], *found["extrapolated"], found["expected"]):
        assert 0 <= own["low"] <= own["mean_recall"] <= own["high"] <= 1
    assert json.loads(json.dumps(found)) == found


def test_equal_widths_are_foretold_and_analysed() -> None:
    images, texts = sides(250)
    document = csalign.diagnose(features=(images[:, :24], texts))

    assert document["forecast"]["pairs"] == document["pairs"] == 250
    assert {"objective", "gap", "by_scale"} < set(document)


def test_a_rotation_is_foretold_to_align() -> None:
    images, _ = sides(600)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0]
    found = diagnosed(images, (images @ rotation).astype(np.float32)[:, ::-1].copy())

    assert found["cka"] == pytest.approx(1, abs=1e-4)
    assert found["mutual_knn"] > 0.99
    assert found["words"][0].startswith("These encoders align well")
    assert found["curve"][-1]["mean_recall"] > 0.9
    assert found["expected"]["mean_recall"] > 0.5


def test_shuffled_pairs_are_foretold_to_be_random() -> None:
    images, texts = sides(600)
    found = diagnosed(images, texts[::-1].copy())

    assert len(found["words"]) == 1
    assert found["words"][0].startswith("The pairs look random")
    assert found["curve"][-1]["mean_recall"] < 0.05


def test_few_pairs_foretell_nothing() -> None:
    found = diagnosed(*sides(12))

    assert set(found) == KEYS
    assert found["curve"] == found["extrapolated"] == []
    assert found["words"] == [
        "12 pairs are too few to foretell how well the encoders align; 200 different ones say more."
    ]
    assert diagnosed(*sides(8))["expected"] is None


def test_the_recall_of_a_small_gallery_foretells_that_of_a_large_one() -> None:
    rng = np.random.default_rng(0)
    chances = rng.beta(0.2, 1, size=4_000)  # that an item is ahead, of each query
    small, large = rng.binomial(199, chances), rng.binomial(999, chances)
    expected = np.mean([(large < most).mean() for most in (1, 5, 10)])

    assert gallery_recall(small, 200) == pytest.approx(expected, abs=0.02)
    assert gallery_recall(large, 1_000) == pytest.approx(expected)
    assert gallery_recall(np.zeros(5, np.int64), 1_000) == 1
    assert gallery_recall(np.full(5, 10), 20) == 0


def test_more_pairs_are_foretold_within_the_range() -> None:
    """Fit on the first 800 of 5,000 pairs; then measure five times as many."""
    images, texts = sides(5_000, noise=2.5)
    keys = np.arange(len(images))
    some = learn_curve(Sample(images[:1_000], texts[:1_000], keys[:1_000], {}))
    full = learn_curve(Sample(images, texts, keys, {}))
    assert some is not None
    assert full is not None
    pairs, measured = full.points()[-1]
    foretold = some.extrapolated(pairs)

    assert pairs == 5 * some.pairs[-1]
    assert foretold.low < measured.mean_recall < foretold.high
    means = [band.mean_recall for _, band in full.points()]
    assert means == sorted(means)


def test_a_known_curve_is_extrapolated_by_flattening_steps() -> None:
    odds = np.array([[-2.0, -1.5, -1.0, -0.5, 0.0]] * 3)
    curve = Curve(np.array([100, 200, 400, 800, 1600]), odds, 1_000)
    bands = [curve.extrapolated(n) for n in (1600, 3200, 6400)]
    now, twice, four = log_odds(np.array([band.mean_recall for band in bands]))

    assert now == pytest.approx(0)
    assert twice == pytest.approx(0.5 * 0.8)
    assert four == pytest.approx(0.5 * (0.8 + 0.64))
    level = curve._replace(odds=np.full((3, 5), 1.0))
    assert level.extrapolated(6400).mean_recall == pytest.approx(1 / (1 + np.exp(-1)))
    spread = [band.high - band.low for band in bands]
    assert spread == sorted(spread)


def test_captions_that_are_held_out_are_not_learnt_from() -> None:
    images, texts = sides(800)
    keys = np.arange(800) // 2
    curve = learn_curve(Sample(images, texts[keys * 2], keys, {}))

    assert curve is not None
    assert curve.gallery == 40  # a fifth of 400 captions, in two galleries
    assert curve.pairs[-1] == 800 - 2 * 80


def test_agreement_and_pairs_raise_the_expectation() -> None:
    low, high, more = (
        expect(*own).mean_recall for own in ((0.03, 1_000), (0.2, 1_000), (0.2, 10_000))
    )

    assert 0 < low < high < more < 1
    assert expect(-0.01, 1_000).mean_recall < 0.02


def test_unpaired_rows_that_lie_elsewhere_are_in_the_words_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, texts = sides(700)
    texts[400:] += 6
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "texts.npy", texts)
    pairs = tmp_path / "pairs.csv"
    lines = [f"{n},{n}" for n in range(400)]
    pairs.write_text("\n".join(["image,text", *lines]) + "\n")
    out = tmp_path / "set"
    csalign.import_arrays(tmp_path / "images.npy", tmp_path / "texts.npy", out=out, pairs=pairs)
    found = csalign.diagnose(features=out)["forecast"]

    assert found["unpaired"] == {"image": 300, "text": 300}
    image, text = (found["sliced_wasserstein"][side.value] for side in Modality)
    assert text["value"] > 2 * text["noise"] > 0
    assert image["value"] < 2 * image["noise"]
    assert any("unpaired texts lie far from the paired ones" in line for line in found["words"])
    assert any("unpaired texts lie far" in line for line in csalign.inspect(out)["findings"])
    csalign.train(out, tmp_path / "run", steps=0)
    assert [text for text in caplog.messages if "unpaired texts lie far" in text]
