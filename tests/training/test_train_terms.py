"""Which terms the loss has, what leads their weights, and which weights are kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from csalign.core.errors import ConfigError
from csalign.core.results import TrainResult
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import ObjectiveOptions, TrainConfig
from csalign.training.network.batch_loss import AUTO_WEIGHT, MAX_WEIGHT, MIN_WEIGHT, BatchLoss
from csalign.training.train import train

QUICK = {"steps": 12, "batch_size": 64, "hidden": 16, "validations": 4, "patience": 99}


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{**QUICK, **values}))


def steps(run_folder: Path) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in logged if "loss" in line]


def weights(run_folder: Path) -> bytes:
    return (run_folder / "adapter.safetensors").read_bytes()


@pytest.fixture
def captioned(arrays: tuple[Path, Path], tmp_path: Path) -> Path:
    """100 images with three captions each."""
    images = tmp_path / "hundred.npy"
    np.save(images, np.load(arrays[0])[::3])
    out = tmp_path / "captioned"
    import_arrays(
        ImportConfig(
            images=images, texts=arrays[1], captions_per_image=3, caption_order="blocks", out=out
        )
    )
    return out


def test_all_captions_train_at_once_in_the_pairwise_term(captioned: Path, tmp_path: Path) -> None:
    learning = {"init": "random", "noise": 0.0, "dropout": 0.0, "steps": 60, "learning_rate": 3e-3}
    run(captioned, tmp_path / "all", captions="all", cs_weight=0.0, **learning)
    logged = steps(tmp_path / "all")

    assert all(line["pairwise_others"] is None for line in logged)
    assert logged[-1]["loss"] < 0.9 * logged[0]["loss"]


def test_with_one_caption_per_image_all_captions_are_the_first(
    features: Path, tmp_path: Path
) -> None:
    run(features, tmp_path / "all", captions="all")
    run(features, tmp_path / "first", captions="first")

    for one, other in zip(steps(tmp_path / "all"), steps(tmp_path / "first"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("captions", ["first", "sample"])
def test_the_distribution_term_sees_all_captions_unless_told_otherwise(
    captioned: Path, tmp_path: Path, captions: str
) -> None:
    settings = {"captions": captions, "cs_weight": 1.0, "noise": 0.0, "dropout": 0.0}
    run(captioned, tmp_path / "all", **settings)
    run(captioned, tmp_path / "paired", cs_captions="paired", **settings)
    first = [steps(tmp_path / name)[0] for name in ("all", "paired")]

    assert first[0]["pairwise"] == pytest.approx(first[1]["pairwise"], rel=1e-5)
    assert first[0]["divergence"] != first[1]["divergence"]


def test_without_a_weight_there_is_infonce_alone_bit_for_bit(
    captioned: Path, tmp_path: Path
) -> None:
    run(captioned, tmp_path / "zero", cs_weight=0.0)
    run(captioned, tmp_path / "none", divergence="none", cs_weight=0.7)
    run(captioned, tmp_path / "paired", cs_weight=0.0, cs_captions="paired", bandwidth=0.5)

    assert weights(tmp_path / "zero") == weights(tmp_path / "none") == weights(tmp_path / "paired")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"captions": "all"},
        {"mixing": 0.5, "cs_weight": 1.0},
        {"divergence": "pairs-mse", "uniformity": 1.0},
    ],
)
def test_align_uniform_learns_with_every_kind_of_batch(
    captioned: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    rival = {"pairwise": "align-uniform", "cs_weight": 0.0, "init": "random", "steps": 60}
    run(captioned, tmp_path / "run", **{**rival, "learning_rate": 3e-3, **options})
    logged = steps(tmp_path / "run")

    assert logged[-1]["pairwise"] < logged[0]["pairwise"] - 0.5


def test_unpaired_rows_enter_the_uniformity_if_asked(
    features: Path, captioned: Path, tmp_path: Path
) -> None:
    rival = {"pairwise": "align-uniform", "cs_weight": 0.0, "noise": 0.0, "dropout": 0.0}
    off = {"init": "random", "match_moments": False, "refit": False, "steps": 1}
    further = {"unpaired": (features,)}
    for name, own in (
        ("none", {}),
        ("out", further),
        ("in", {**further, "unpaired_negatives": True}),
    ):
        run(captioned, tmp_path / name, **rival, **off, **own)
    none, out, within = (steps(tmp_path / name)[0]["pairwise"] for name in ("none", "out", "in"))

    assert out == pytest.approx(none, rel=1e-6)
    assert within != pytest.approx(none, rel=1e-4)


def test_align_uniform_leaves_a_smaller_gap_than_infonce_at_the_scale_of_clip(
    features: Path, tmp_path: Path
) -> None:
    plain = {"init": "random", "steps": 150, "learning_rate": 3e-3, "noise": 0.0, "cs_weight": 0.0}
    found = {}
    for name, own in (("infonce", {"logit_scale": 100.0}), ("align-uniform", {})):
        run(features, tmp_path / name, pairwise=name, **{**plain, **own})
        found[name] = evaluate(EvalConfig(features=features, adapter=tmp_path / name))
    gaps = [found[name]["gap"]["centroid_distance"] for name in ("align-uniform", "infonce")]
    recalls = [found[name]["retrieval"]["mean_recall"] for name in ("align-uniform", "infonce")]

    assert gaps[0] < 0.8 * gaps[1]
    assert recalls[0] > recalls[1] - 0.05


def test_low_rank_adapters_start_as_the_identity(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(120, 12))
    for name in ("x", "y"):
        np.save(tmp_path / f"{name}.npy", (shared + rng.normal(size=shared.shape)).astype("f4"))
    features = tmp_path / "set"
    import_arrays(ImportConfig(images=tmp_path / "x.npy", texts=tmp_path / "y.npy", out=features))
    run(features, tmp_path / "run", adapter="low-rank", init="random", steps=0)
    plain = evaluate(EvalConfig(features=features))
    adapted = evaluate(EvalConfig(features=features, adapter=tmp_path / "run"))

    assert adapted["retrieval"] == plain["retrieval"]
    assert adapted["gap"]["centroid_distance"] == pytest.approx(plain["gap"]["centroid_distance"])


def test_a_running_average_lags_behind_the_weights(features: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": 3e-3, "val_split": None, "init": "random"}
    found = {}
    for name, decay in (("plain", 0.0), ("hardly", 1e-9), ("slow", 0.99)):
        run(features, tmp_path / name, average=decay, cs_weight=0.0, **rates)
        found[name] = load_file(tmp_path / name / "adapter.safetensors")
    run(features, tmp_path / "start", steps=0, **rates)
    start = load_file(tmp_path / "start" / "adapter.safetensors")

    def moved(name: str) -> float:
        return float(sum(np.linalg.norm(found[name][key] - start[key]) for key in start))

    assert [line["loss"] for line in steps(tmp_path / "slow")] == [
        line["loss"] for line in steps(tmp_path / "plain")
    ]
    assert moved("hardly") == pytest.approx(moved("plain"), rel=1e-4)
    assert 0 < moved("slow") < 0.7 * moved("plain")


def test_an_automatic_weight_rises_while_recall_holds_and_falls_otherwise() -> None:
    for holds, limit in ((True, MAX_WEIGHT), (False, MIN_WEIGHT)):
        loss = BatchLoss(ObjectiveOptions(cs_weight="auto"))
        assert loss.weight == AUTO_WEIGHT
        loss.adapt_weight(recall_holds=holds)
        assert (loss.weight > AUTO_WEIGHT) is holds
        for _ in range(40):
            loss.adapt_weight(recall_holds=holds)
        assert loss.weight == limit


def test_a_weight_that_is_given_stays() -> None:
    loss = BatchLoss(ObjectiveOptions(cs_weight=0.3))
    loss.adapt_weight(recall_holds=False)

    assert loss.weight == 0.3


def test_an_adaptive_weight_closes_the_gap_where_that_costs_no_recall(
    features: Path, tmp_path: Path
) -> None:
    high: dict[str, Any] = {
        "init": "random",
        "logit_scale": 100.0,
        "steps": 150,
        "learning_rate": 3e-3,
        "noise": 0.0,
        "validations": 15,
    }
    found = {}
    for name, weight in (("plain", 0.0), ("auto", "auto")):
        run(features, tmp_path / name, cs_weight=weight, bandwidth=0.5, **high)
        found[name] = evaluate(EvalConfig(features=features, adapter=tmp_path / name))
    values = [line["cs_weight"] for line in steps(tmp_path / "auto")]

    assert max(values) > AUTO_WEIGHT
    gaps = [found[name]["gap"]["centroid_distance"] for name in ("auto", "plain")]
    assert gaps[0] < 0.8 * gaps[1]
    recalls = [found[name]["retrieval"]["mean_recall"] for name in ("auto", "plain")]
    assert recalls[0] > recalls[1] - 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pairwise": "sigmoid", "label_smoothing": 0.1},
            "label-smoothing: applies to infonce only.* sigmoid; leave it at 0",
        ),
        ({"uniformity": 1.0}, "applies to align-uniform only.* infonce; leave it at 2"),
        (
            {"pairwise": "align-uniform", "logit_scale": 100.0},
            "no logits; pass --logit-scale auto",
        ),
        (
            {"pairwise": "align-uniform", "learn_scale": True},
            "--learn-scale: align-uniform has no logits",
        ),
        (
            {"pairwise": "align-uniform", "label_smoothing": 0.1},
            "applies to infonce only, the pairwise loss is align-uniform",
        ),
        (
            {"pairwise": "sigmoid", "unpaired_negatives": True},
            "--unpaired-negatives: applies to infonce and align-uniform only",
        ),
        ({"pairwise": "none", "cs_weight": 0.0}, "leaves nothing to train on"),
        ({"pairwise": "none", "divergence": "none"}, "leaves nothing to train on"),
        ({"mixing": 1.0, "captions": "all"}, "use --captions first or sample"),
        ({"batch_size": 4}, "estimated from the 4 pairs of a step, which are too few"),
        ({"batch_size": 4, "divergence": "gaussian-kl"}, "gaussian-kl: is estimated from the 4"),
    ],
)
def test_terms_that_do_not_go_together_are_refused_before_training(
    features: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(features, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_terms_that_do_not_go_together_are_refused_before_rows_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="align-uniform has no logits"):
        run(tmp_path / "absent", tmp_path / "run", pairwise="align-uniform", learn_scale=True)


def test_sub_batches_give_what_the_whole_batch_gives(features: Path, tmp_path: Path) -> None:
    settings = {"noise": 0.0, "dropout": 0.0}
    run(features, tmp_path / "whole", **settings)
    run(features, tmp_path / "cut", sub_batch=20, **settings)

    for one, other in zip(steps(tmp_path / "whole"), steps(tmp_path / "cut"), strict=True):
        for name in ("loss", "pairwise", "divergence", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


def test_large_batches_with_rounded_products_train(features: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 300, "learn_scale": True, "train_split": "train,test"}
    run(features, tmp_path / "exact", **settings)
    run(features, tmp_path / "rounded", precision="bfloat16", **settings)

    for one, other in zip(steps(tmp_path / "exact"), steps(tmp_path / "rounded"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
