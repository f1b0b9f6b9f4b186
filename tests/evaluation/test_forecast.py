import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import csalign
from csalign.core.enums import Modality
from csalign.evaluation.agreement import Sample
from csalign.evaluation.forecast import Curve, gallery_recall, learn_curve, log_odds

KEYS = {
    *("split", "pairs", "different", "unpaired", "compared", "cka", "mutual_knn"),
    *("mutual_knn_chance", "sliced_wasserstein", "mean_energy", "top_energy", "removal"),
    *("effective_rank", "repeated", "expected", "curve", "extrapolated", "words"),
    "looks_random",
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
    assert found["curve"][-1]["mean_recall"] > 0.6  # all of a gallery of 60 are found
    assert found["expected"]["mean_recall"] > 0.5


def test_shuffled_pairs_are_foretold_to_be_random() -> None:
    images, texts = sides(600)
    found = diagnosed(images, texts[::-1].copy())

    assert len(found["words"]) == 1
    assert found["words"][0].startswith("The pairs look random")
    assert found["looks_random"]
    assert found["curve"] == found["extrapolated"] == []
    assert found["expected"] is None


def test_few_pairs_foretell_nothing() -> None:
    found = diagnosed(*sides(12))

    assert set(found) == KEYS
    assert found["curve"] == found["extrapolated"] == []
    assert found["words"] == [
        "12 pairs are too few to foretell how well the encoders align; pass 200 different ones or "
        "more."
    ]
    assert diagnosed(*sides(8))["expected"] is None


def test_the_recall_of_a_small_gallery_foretells_that_of_a_large_one() -> None:
    x = torch.randn(1_000, 16, generator=torch.Generator().manual_seed(0))
    y = x + 0.8 * torch.randn(1_000, 16, generator=torch.Generator().manual_seed(1))
    scores = x @ y.T
    ranks = [(own >= own.diag()[:, None]).sum(1) for own in (scores, scores.T)]
    expected = np.mean([(torch.cat(ranks) <= most).float().mean() for most in (1, 5, 10)])
    small = np.mean([gallery_recall(x[n : n + 250], y[n : n + 250]) for n in range(0, 1_000, 250)])

    assert gallery_recall(x, y) == pytest.approx(expected)
    assert small == pytest.approx(expected, abs=0.03)
    assert gallery_recall(x, x * 0) == 0  # ties


def test_more_pairs_are_foretold_within_the_range() -> None:
    """Fit on the first 800 of 5,000 pairs; then measure five times as many."""
    images, texts = sides(5_000, noise=2.5)
    some = learn_curve(Sample(images[:1_000], texts[:1_000], {}))
    full = learn_curve(Sample(images, texts, {}))
    assert some is not None
    assert full is not None
    pairs, measured = int(full.pairs[-1]), 1 / (1 + np.exp(-full.odds.mean(0)))
    foretold = some.extrapolated(pairs)

    assert pairs == 5 * some.pairs[-1]
    assert foretold.low < measured[-1] < foretold.high
    assert measured.tolist() == sorted(measured)


def test_a_known_curve_is_extrapolated_by_a_damped_slope() -> None:
    odds = np.array([[-2.0, -1.5, -1.0, -0.5, 0.0]] * 3)
    curve = Curve(np.array([100, 200, 400, 800, 1600]), odds, 1_000)
    bands = [curve.extrapolated(n) for n in (1600, 3200, 6400)]
    now, twice, four = log_odds(np.array([band.mean_recall for band in bands]))

    assert now == pytest.approx(0)
    assert twice == pytest.approx(0.7 * 0.5)
    assert four == pytest.approx(0.7 * 1.0)
    level = curve._replace(odds=np.full((3, 5), 1.0))
    assert level.extrapolated(6400).mean_recall == pytest.approx(1 / (1 + np.exp(-1)))
    spread = [band.high - band.low for band in bands]
    assert spread == sorted(spread)
    trained = curve.extrapolated(1600, trained=True)
    assert trained.mean_recall > 0.5
    assert trained.low < 0.5
    assert curve.extrapolated(800) == bands[0]  # never less than what is measured


def test_pairs_with_the_same_caption_count_once(tmp_path: Path) -> None:
    images, texts = sides(800)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "texts.npy", texts[np.arange(800) // 2 * 2])
    lines = [f"{n},{n},thing {n // 2}" for n in range(800)]
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("\n".join(["image,text,caption", *lines]) + "\n")
    arrays = (tmp_path / "images.npy", tmp_path / "texts.npy")
    csalign.import_arrays(*arrays, out=tmp_path / "set", pairs=pairs)
    found = csalign.diagnose(features=tmp_path / "set")["forecast"]

    assert (found["pairs"], found["different"], found["compared"]) == (800, 400, 400)
    assert found["repeated"] == {"image": 0, "text": 0.5}
    assert [own["pairs"] for own in found["curve"]] == [20, 40, 80, 160, 320]
    assert "all 400 different pairs" in found["words"][0]


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
