import json
import logging
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csalign import import_arrays
from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.core.enums import Modality
from csalign.core.errors import (
    ConfigError,
    DataError,
    OutputError,
    SchemaError,
    ShapeError,
    TrainingError,
)
from csalign.core.results import TrainResult
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.ingest.config import ImportConfig
from csalign.training.config import AdapterOptions, ObjectiveOptions, TrainConfig
from csalign.training.train import train

QUICK: dict[str, Any] = {
    "steps": 12,
    "batch_size": 64,
    "hidden": 16,
    "validations": 4,
    "patience": 99,
}
# The first steps of the warm-up are harmless, then the weights overflow.
EXPLODES = {"learning_rate": 1e25, "clip_norm": 1e30, "warmup": 1.0, "steps": 40, "patience": 99}


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{**QUICK, **values}))


def lines(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def recall(features: Path, run_folder: Path) -> float:
    return float(
        evaluate(EvalConfig(features=features, adapter=run_folder))["retrieval"]["mean_recall"]
    )


def test_training_aligns_what_a_random_map_cannot(features: Path, tmp_path: Path) -> None:
    run(features, tmp_path / "random", init="random", steps=0)
    run(features, tmp_path / "closed", steps=0)
    run(features, tmp_path / "infonce", init="random", steps=150, learning_rate=5e-3)

    chance = (1 + 5 + 10) / 3 / 60
    assert recall(features, tmp_path / "random") < 2 * chance
    assert recall(features, tmp_path / "closed") > 5 * chance
    assert recall(features, tmp_path / "infonce") > 4 * chance


def test_a_run_folder_holds_what_repeats_it(features: Path, quick_run: Path) -> None:
    settings = tomllib.loads((quick_run / "config.toml").read_text())
    environment = json.loads((quick_run / "environment.json").read_text())
    info = read_info(quick_run)
    logs = ("csv", "tensorboard")

    assert {path.name for path in quick_run.iterdir()} == {
        "adapter.json",
        "adapter.safetensors",
        "checkpoints",
        "config.toml",
        "environment.json",
        "metrics.csv",
        "metrics.jsonl",
        "tensorboard",
    }
    given = {"features": features, "out": quick_run, "log_to": logs}
    assert TrainConfig(**settings) == TrainConfig(**given, **QUICK)
    assert environment["seed"] == 0
    assert environment["device"] == "cpu"
    assert len(info.data_fingerprint) == 64
    assert info.validation in [
        line["validation"] for line in lines(quick_run) if "validation" in line
    ]


def test_metrics_have_a_line_per_step_and_validation(quick_run: Path) -> None:
    logged = lines(quick_run)
    steps = [line for line in logged if "loss" in line]
    scores = [line for line in logged if "validation" in line]

    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in scores] == [0, 3, 6, 9, 12]
    for line in steps:
        expected = line["pairwise"] + 0.1 * line["divergence"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert 0.5 < line["bandwidth"] < 2
        assert line["logit_scale"] == pytest.approx(7)
    assert {"mean_recall", "mrr", "centroid_distance"} == set(scores[0]["validation"])


def test_checkpoints_can_be_evaluated_like_a_run_and_only_the_newest_are_kept(
    features: Path, quick_run: Path
) -> None:
    kept = sorted(path.name for path in (quick_run / "checkpoints").iterdir())

    assert kept == ["step-000006", "step-000009", "step-000012"]
    assert recall(features, quick_run / "checkpoints/step-000009") > 0


def test_old_settings_load_without_the_estimator_that_was_removed() -> None:
    given = {"features": "f", "out": "o"}
    config = TrainConfig.resolve(None, {**given, "divergence_estimator": "exact"})

    assert config == TrainConfig.resolve(None, given)
    with pytest.raises(ConfigError, match="divergence-estimator: was removed"):
        TrainConfig.resolve(None, {**given, "divergence_estimator": "rff"})


def test_a_part_gets_its_group_of_options_alone() -> None:
    config = TrainConfig(features="f", out="o", cs_weight=0.5, hidden=8)

    assert config.group(ObjectiveOptions) == ObjectiveOptions(cs_weight=0.5)
    assert config.group(AdapterOptions).kinds == dict.fromkeys(Modality, "glu")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    features: Path, tmp_path: Path
) -> None:
    config = {"init": "random", "steps": 12}
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        torch.manual_seed(seed * 7 + len(name))  # the caller's generator must not matter
        run(features, tmp_path / name, seed=seed, **config)
    one, two, three = (
        (tmp_path / name / "adapter.safetensors").read_bytes() for name in ("one", "two", "three")
    )

    assert one == two
    assert one != three


def test_training_leaves_the_callers_random_generator_alone(features: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(features, tmp_path / "run")

    assert torch.equal(before, torch.get_rng_state())


def test_the_best_weights_are_kept_and_the_closed_form_when_nothing_beats_it(
    features: Path, tmp_path: Path
) -> None:
    spoilt = run(features, tmp_path / "spoilt", learning_rate=30.0, clip_norm=1e6)
    run(features, tmp_path / "closed", steps=0)

    assert spoilt.best_step == 0
    assert spoilt.validation["kept"] == spoilt.validation["start"]
    assert recall(features, tmp_path / "spoilt") == recall(features, tmp_path / "closed")


def test_training_stops_early_when_validation_no_longer_improves(
    features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "csalign"):
        result = run(
            features,
            tmp_path / "run",
            learning_rate=30.0,
            clip_norm=1e6,
            steps=100,
            patience=2,
            validations=20,
        )

    assert result.steps == 10
    stopped = "early stopping: no improvement in 2 validations (best 100.0 % at the start)"
    assert stopped in caplog.messages


@pytest.mark.parametrize("steps", [0, 5])
def test_steps_and_epochs_are_refused_together(features: Path, tmp_path: Path, steps: int) -> None:
    with pytest.raises(ConfigError, match="--steps and --epochs both say how long"):
        run(features, tmp_path / "run", steps=steps, epochs=2)


def equal_sides(path: Path, pairs: int) -> Path:
    """A feature set whose texts are its images, so that every start finds all matches."""
    rows = np.random.default_rng(0).normal(size=(pairs, 16))
    import_arrays(images=rows, texts=rows, out=path)
    return path


def test_a_perfect_start_ends_training_unless_patience_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = equal_sides(tmp_path / "equal", 400)  # 100 of them to validate on
    with caplog.at_level(logging.INFO, "csalign"):
        stopped = run(features, tmp_path / "stopped", patience=None)
        trained = run(features, tmp_path / "trained", patience=3)

    (message,) = (text for text in caplog.messages if text.startswith("validation recall is 100 %"))
    assert "at the start, so no step can improve it: stopping" in message
    assert "pass --patience" in message
    assert (stopped.steps, stopped.best_step) == (0, 0)
    assert trained.steps == 9  # 3 validations, none of a gap below 0


@pytest.mark.parametrize(("pairs", "options"), [(200, {}), (400, {"cs_weight": "auto"})])
def test_few_validation_rows_or_an_automatic_weight_train_on_at_full_recall(
    tmp_path: Path, pairs: int, options: dict[str, Any]
) -> None:
    features = equal_sides(tmp_path / "equal", pairs)
    result = run(features, tmp_path / "run", steps=3, patience=None, **options)

    assert result.validation["start"]["mrr"] == 1
    assert result.steps == 3


def test_training_names_its_rows_and_its_phases(
    arrays: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}

    def progress(what: str, done: int, total: int | None) -> None:
        seen.setdefault(what, []).append((done, total))

    images, texts = arrays
    unsplit = import_arrays(ImportConfig(images=images, texts=texts, out=tmp_path / "f")).features
    with caplog.at_level(logging.INFO, "csalign"):
        train(TrainConfig(features=unsplit, out=tmp_path / "run", **QUICK), progress)

    phases = ["closed form", "training: step", "saving"]
    assert [phase for phase in seen if phase in phases] == phases
    assert "reading: rows" in seen
    tried = len(seen["closed form"]) - 1
    assert seen["closed form"] == [(done, None) for done in range(tried + 1)]
    assert {step for step, _ in seen["training: step"]} == set(range(13))
    rows, validated, untested, few, start, steps, _, refit = caplog.messages
    assert rows == f"training on 225 pairs of 225 images: {unsplit}"
    assert validated == "validating on 75 pairs of 75 images: held out from these images"
    assert untested.startswith("no test split")
    assert "csalign split" in untested
    assert few.startswith("validating on 75 images, where the standard error of mean recall is")
    assert re.match(
        rf"closed form: {tried} settings in \d+ s, best R [\d.]+ % over 5 hold-outs: CCA", start
    )
    assert steps == "training on cpu: 12 steps of 64 pairs"
    assert refit == (
        "refitted on all 300 pairs, the 75 held out included; the figures are those before it"
    )


def test_weight_zero_takes_the_divergence_out(features: Path, tmp_path: Path) -> None:
    run(features, tmp_path / "run", cs_weight=0)
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]

    assert all(line["loss"] == line["pairwise"] for line in steps)
    assert all(line["divergence"] is None and line["bandwidth"] is None for line in steps)


def test_the_divergence_closes_the_gap_that_a_high_logit_scale_opens(
    features: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "init": "random",
        "logit_scale": 100.0,
        "steps": 150,
        "learning_rate": 3e-3,
        "noise": 0.0,
        "patience": 99,
    }
    gaps = {}
    for name, weight in (("plain", 0.0), ("aligned", 1.0)):
        run(features, tmp_path / name, cs_weight=weight, bandwidth=0.5, **settings)
        config = EvalConfig(features=features, adapter=tmp_path / name)
        gaps[name] = evaluate(config)["gap"]["centroid_distance"]

    assert gaps["aligned"] < gaps["plain"] / 2


def test_a_learned_scale_moves_and_a_fixed_one_does_not(features: Path, tmp_path: Path) -> None:
    run(features, tmp_path / "learned", learn_scale=True, learning_rate=0.05)
    run(features, tmp_path / "fixed")

    learned, fixed = (
        [line["logit_scale"] for line in lines(tmp_path / name) if "loss" in line]
        for name in ("learned", "fixed")
    )
    assert learned[-1] != pytest.approx(7, abs=0.01)
    assert fixed[-1] == pytest.approx(7)


def test_a_bandwidth_that_makes_the_kernel_nearly_diagonal_is_warned_about_once(
    features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "csalign"):
        run(features, tmp_path / "run", bandwidth=0.05)

    warned = [r.getMessage() for r in caplog.records if "each row with itself" in r.getMessage()]
    assert len(warned) == 1
    assert "--bandwidth median" in warned[0]


@pytest.mark.parametrize("bandwidth", ["median", 0.5])
def test_a_safe_bandwidth_is_not_warned_about(
    features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, bandwidth: Any
) -> None:
    with caplog.at_level(logging.WARNING, "csalign"):
        run(features, tmp_path / "run", bandwidth=bandwidth)

    assert not [message for message in caplog.messages if "bandwidth" in message]


def test_a_loss_that_is_not_finite_stops_and_names_step_term_and_checkpoint(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"step \d+: .* is (nan|inf)") as caught:
        run(features, tmp_path / "run", **{**EXPLODES, "learning_rate": 1e7}, validations=40)
    message = str(caught.value)

    assert "--learning-rate" in message
    assert not (tmp_path / "run").exists()
    load_adapter(Path(message.split("last good checkpoint is ")[1]))


def test_a_loss_that_is_not_finite_from_the_start_has_no_checkpoint_to_name(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        run(features, tmp_path / "run", **EXPLODES, validations=1)


def test_the_description_is_of_the_weights_that_were_kept(features: Path, tmp_path: Path) -> None:
    result = run(features, tmp_path / "run", learning_rate=30.0, clip_norm=1e6, learn_scale=True)
    info = read_info(tmp_path / "run")

    assert result.steps == 12
    assert info.step == result.best_step == 0
    assert info.logit_scale == pytest.approx(7)
    assert info.train_split == "train,val"


def test_a_fixed_scale_stays_what_it_was_set_to(features: Path, tmp_path: Path) -> None:
    run(features, tmp_path / "run", logit_scale=150.0)

    assert all(line["logit_scale"] == pytest.approx(150) for line in lines(tmp_path / "run")[1:2])


@pytest.mark.parametrize(
    ("train_split", "val_split"),
    [("all", "val"), ("train, val", "val"), ("train", "all"), ("train,test", "val,test")],
)
def test_no_split_is_both_trained_and_validated_on(
    features: Path, tmp_path: Path, train_split: str, val_split: str
) -> None:
    with pytest.raises(DataError, match="would be both trained and validated on"):
        run(features, tmp_path / "run", train_split=train_split, val_split=val_split)


def test_a_validation_split_that_is_trained_on_is_replaced_by_a_share_of_the_rows(
    features: Path, tmp_path: Path
) -> None:
    result = run(features, tmp_path / "run", train_split="train, val", steps=0)

    assert result.validation["start"]["mean_recall"] > 0


def test_a_width_that_the_closed_form_cannot_give_is_refused(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="width: 64 is more than the narrower encoder's 16"):
        run(features, tmp_path / "run", width=64)
    assert load_adapter(run(features, tmp_path / "narrow", width=5).run).image.shape.width == 5


def make_set(tmp_path: Path, n: int, *, width: int = 16, splits: str | None = None) -> Path:
    rng = np.random.default_rng(n)
    latent = rng.normal(size=(n, 8))
    for name in ("x", "y"):
        mixed = latent @ rng.normal(size=(8, width)) + 0.3 * rng.normal(size=(n, width))
        np.save(tmp_path / f"{name}{n}.npy", mixed.astype(np.float32))
    out = tmp_path / f"set-{n}"
    table = None
    if splits is not None:
        table = tmp_path / "splits.csv"
        table.write_text("\n".join(["split", *[splits] * n]))
    import_arrays(
        ImportConfig(
            images=tmp_path / f"x{n}.npy", texts=tmp_path / f"y{n}.npy", image_table=table, out=out
        )
    )
    return out


def test_without_splits_a_tenth_is_held_out_with_the_seed(tmp_path: Path) -> None:
    features = make_set(tmp_path, 300)
    first = run(features, tmp_path / "a", steps=0)
    again = run(features, tmp_path / "b", steps=0)
    other = run(features, tmp_path / "c", steps=0, seed=5)

    assert first.validation == again.validation
    assert first.validation != other.validation


def test_too_few_pairs_for_a_validation_train_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(make_set(tmp_path, 12), tmp_path / "run")

    assert result.validation == {}
    assert result.best_step == result.steps == 12
    assert "too few pairs" in caplog.text


def test_encoders_that_already_agree_are_not_made_worse_by_few_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(260, 128))
    shift = 8 * rng.normal(size=128) / 128**0.5
    for name, move in (("x", shift), ("y", -shift)):
        noisy = shared + 0.9 * rng.normal(size=shared.shape) + move
        np.save(tmp_path / f"{name}.npy", noisy.astype(np.float32))
    features = tmp_path / "features"
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["split", *["train"] * 100, *["test"] * 160]))
    import_arrays(
        ImportConfig(
            images=tmp_path / "x.npy", texts=tmp_path / "y.npy", image_table=table, out=features
        )
    )
    before = evaluate(EvalConfig(features=features))
    run(features, tmp_path / "run")
    after = evaluate(EvalConfig(features=features, adapter=tmp_path / "run"))

    assert after["retrieval"]["mean_recall"] >= before["retrieval"]["mean_recall"] - 0.02
    assert after["gap"]["centroid_distance"] < before["gap"]["centroid_distance"] / 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_split": "nope"}, "has no pairs; the splits of the set are test: 60 images"),
        ({"val_split": "nope"}, "has no pairs"),
    ],
)
def test_splits_that_cannot_be_used_are_refused(
    features: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(features, tmp_path / "run", **values)


def test_a_set_whose_splits_have_other_names_asks_which_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="splits of the set are everything: 30 images, 30 texts"):
        run(make_set(tmp_path, 30, splits="everything"), tmp_path / "run")


def test_a_run_is_not_replaced_unless_asked(features: Path, tmp_path: Path) -> None:
    run(features, tmp_path / "run", steps=0)

    with pytest.raises(OutputError, match="--overwrite"):
        run(features, tmp_path / "run", steps=0)
    with pytest.raises(OutputError, match="is read from"):
        run(features, features, overwrite=True)
    assert run(features, tmp_path / "run", steps=2, overwrite=True).steps == 2


def test_a_failed_replacement_leaves_the_old_run(features: Path, tmp_path: Path) -> None:
    run(features, tmp_path / "run", steps=0)
    before = (tmp_path / "run/adapter.safetensors").read_bytes()

    with pytest.raises(TrainingError):
        run(features, tmp_path / "run", overwrite=True, **EXPLODES)
    assert (tmp_path / "run/adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("image", "text", "start"),
    [
        ("glu", "glu", "CCA"),
        ("transformer", "linear", "CCA"),
        ("mlp", "identity", "ridge regression to the text side"),
        ("identity", "glu", "ridge regression to the image side"),
        ("mlp", "low-rank", "ridge regression to the text side"),
    ],
)
def test_each_kind_of_adapter_starts_from_a_closed_form_and_comes_back_the_same(
    features: Path, tmp_path: Path, image: str, text: str, start: str
) -> None:
    result = run(features, tmp_path / "run", image_adapter=image, text_adapter=text)
    closed = run(features, tmp_path / "closed", image_adapter=image, text_adapter=text, steps=0)

    assert start in result.start
    assert recall(features, tmp_path / "run") >= 0.9 * recall(features, tmp_path / "closed") > 0.3
    kinds = {side.value: shape.kind for side, shape in read_info(tmp_path / "run").adapters.items()}
    assert kinds == {"image": image, "text": text}
    assert closed.parameters["text"] == 0 or text != "identity"


def test_sides_that_cannot_share_a_space_are_refused_before_training(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShapeError, match="keep each encoder's width"):
        run(features, tmp_path / "run", adapter="low-rank")
    with pytest.raises(ConfigError, match="identity on both sides leaves nothing to train"):
        run(features, tmp_path / "run", adapter="identity")
    with pytest.raises(ConfigError, match="no such kind of adapter; there are linear, mlp"):
        run(features, tmp_path / "run", adapter="lienar")
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_ones_own_is_imported_only_where_it_is_named(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from csalign.adapters.side import SideAdapter\n"
        "class Mine(SideAdapter):\n"
        "    def __init__(self, shape):\n"
        "        super().__init__(shape)\n"
        "        self.map = nn.Linear(shape.input_width, shape.width)\n"
        "    def forward(self, x, noise=0.0):\n"
        "        return self.map(self.inputs(x, noise))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = run(features, tmp_path / "run", text_adapter="mine:Mine")

    assert result.start == "random"
    with pytest.raises(SchemaError, match="mine:Mine"):
        evaluate(EvalConfig(features=features, adapter=tmp_path / "run"))
    document = evaluate(
        EvalConfig(features=features, adapter=tmp_path / "run", allow_adapter="mine:Mine")
    )
    assert document["retrieval"]["mean_recall"] > 0


def test_an_adapter_that_depends_on_values_trains_with_512_pairs(
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "branching.py").write_text(
        "from torch import nn\n"
        "from csalign.adapters.side import SideAdapter\n"
        "class Branching(SideAdapter):\n"
        "    def __init__(self, shape):\n"
        "        super().__init__(shape)\n"
        "        self.map = nn.Linear(shape.input_width, shape.width)\n"
        "    def forward(self, x, noise=0.0):\n"
        "        z = self.map(self.inputs(x, noise))\n"
        "        return z / 2 if float(z.detach().abs().mean()) > 9 else z\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    named = {"text_adapter": "branching:Branching"}
    run(features, tmp_path / "run", **named, batch_size="auto")
    assert "using 512 pairs" in caplog.text


def test_unpaired_rows_reach_the_divergence_and_are_negatives(
    features: Path, arrays: tuple[Path, Path], tmp_path: Path
) -> None:
    import_arrays(ImportConfig(images=arrays[0], out=tmp_path / "images"))
    import_arrays(ImportConfig(texts=arrays[1], out=tmp_path / "texts"))
    further: dict[str, Any] = {"unpaired": (tmp_path / "images", tmp_path / "texts")}
    further |= {"match_moments": False, "noise": 0.0, "dropout": 0.0, "steps": 4}
    for name, weight, given in (
        ("alone", 1.0, {**further, "unpaired": ()}),
        ("more", 1.0, further),
        ("negatives", 1.0, {**further, "unpaired_negatives": True}),
        ("none", 0.0, {**further, "unpaired": ()}),
        ("none more", 0.0, further),
    ):
        run(features, tmp_path / name, cs_weight=weight, **given)

    alone, more, negatives = (lines(tmp_path / name)[1] for name in ("alone", "more", "negatives"))
    assert alone["pairwise"] == pytest.approx(more["pairwise"], rel=1e-5)
    assert more["pairwise"] < negatives["pairwise"]
    assert alone["divergence"] != pytest.approx(more["divergence"], rel=1e-4)
    assert more["divergence"] == pytest.approx(negatives["divergence"], rel=1e-5)
    none, none_more = (lines(tmp_path / name)[-1] for name in ("none", "none more"))
    assert none == none_more
    import_arrays(ImportConfig(images=arrays[1], out=tmp_path / "narrow"))
    with pytest.raises(ShapeError, match="16 wide, those to train on 24; extract both"):
        run(features, tmp_path / "run", unpaired=str(tmp_path / "narrow"))


@pytest.mark.parametrize("name", ["holder", "mmd", "gaussian-kl", "sinkhorn", "pairs-mse", "none"])
def test_each_divergence_can_take_the_place_of_cs(
    features: Path, tmp_path: Path, name: str
) -> None:
    result = run(features, tmp_path / "run", divergence=name, cs_weight=0.5)
    first = next(line for line in lines(tmp_path / "run") if "loss" in line)

    assert result.steps == 12
    assert first["loss"] == pytest.approx(
        first["pairwise"] + 0.5 * (first["divergence"] or 0) + 0.3 * (first["pairwise_others"] or 0)
    )
    assert (first["divergence"] is None) is (name == "none")


@pytest.mark.parametrize(
    "options",
    [
        {"pairwise": "sigmoid", "logit_scale": 10.0},
        {"pairwise": "none", "cs_weight": 1.0},
        {"label_smoothing": 0.1},
        {"mixing": 1.0},
        {"bandwidth": (0.5, 1.0)},
        {"bandwidth": "tied", "logit_scale": 4.0},
    ],
)
def test_other_losses_mixing_and_bandwidths_train(
    features: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    learning = {"init": "random", "noise": 0.0, "dropout": 0.0, "steps": 40, "learning_rate": 3e-3}
    run(features, tmp_path / "run", **learning, **options)
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]

    assert logged[-1]["loss"] < 0.95 * logged[0]["loss"]
    if "bandwidth" in options:
        assert logged[0]["bandwidth"] == ([0.5, 1.0] if options["bandwidth"] != "tied" else 0.5)


def test_a_run_in_an_object_store_is_refused_before_training(features: Path) -> None:
    with pytest.raises(ConfigError, match=r"out: .*must be on a local disk"):
        TrainConfig.resolve(None, {"features": features, "out": "s3://bucket/run"})
    with pytest.raises(ConfigError, match=r"adapter: .*must be on a local disk"):
        EvalConfig.resolve(None, {"features": features, "adapter": "s3://bucket/run"})


def test_adapters_that_cannot_be_compiled_train_as_they_are(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(*_: Any, **__: Any) -> None:
        tried.append(True)
        raise RuntimeError("there is no compiler")  # as one that is there takes a minute

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    losses = []
    for name in ("plain", "compiled"):
        config: dict[str, Any] = {"steps": 3, "hidden": 8, "compile": name == "compiled"}
        config |= {"average": 0.5, "noise": 0.0, "dropout": 0.0}
        run(features, tmp_path / name, **config)
        losses.append([line["loss"] for line in lines(tmp_path / name) if "loss" in line])

    assert tried
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
