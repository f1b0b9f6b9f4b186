"""Training on several sides, of which items lack some."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.adapters.kernel_sides import SidesSetting
from csalign.cli.app import app
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError
from csalign.features.reader import FeatureSet
from csalign.features.sides import load_sides
from csalign.training.config import AdapterOptions, TrainConfig
from csalign.training.sides.kernels import Chosen, assemble_sides
from csalign.training.sides.start import Starts
from csalign.training.sides.train import sides_work
from csalign.training.sides.validation import embed_sides, measure_sides
from csalign.training.train import train
from tests.training.sided import QUICK, run, write_sided


def recall(features: Path, folder: Path, *sides: str, split: str = "test") -> float:
    """Measure a run on the test split: mean recall over all pairs, or of two sides."""
    adapter = load_adapter(folder)
    rows = load_sides(FeatureSet.open(features), split, adapter.names)
    outputs = embed_sides(adapter, rows)
    chosen = {side: own for side, own in outputs.items() if not sides or side in sides}
    return measure_sides(chosen).score.mean_recall


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sided(tmp_path_factory.mktemp("sided") / "set")


@pytest.fixture(scope="module")
def whole(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(features, tmp_path_factory.mktemp("whole") / "run", refit=False).run


def test_a_run_has_an_adapter_of_each_side(features: Path, tmp_path: Path) -> None:
    result = run(features, tmp_path / "run")

    assert result.sides == ["image", "text", "audio"]
    assert result.start.startswith("generalised CCA")
    assert sum(result.pairs.values()) == 198
    assert result.refit.startswith("refitted on all 198 items, the 49 held out included")
    assert result.validation["kept"]["mean_recall"] >= result.validation["start"]["mean_recall"]
    info = read_info(result.run)
    assert {side: shape.width for side, shape in info.adapters.items()} == {
        "image": 20,
        "text": 20,
        "audio": 20,
    }
    assert info.encoders == {"image": "image", "text": "text", "audio": "audio"}
    assert recall(features, result.run) > 0.6
    assert len(list((result.run / "checkpoints").glob("step-*"))) == 3


def test_a_pair_of_sides_gains_from_the_items_that_lack_it(tmp_path: Path) -> None:
    sides = ("audio", "image", "text", "video")
    features = write_sided(tmp_path / "set", missing=0.7, items=600, sides=sides)

    own = run(features, tmp_path / "own", sides=("audio", "text"), ensemble="off")
    every = run(features, tmp_path / "all", ensemble="off")
    assert own.sides == ["text", "audio"]
    assert recall(features, every.run, "text", "audio") > recall(features, own.run, "text", "audio")


@pytest.mark.parametrize(
    "values",
    [
        {"hub": "text"},
        {"divergence": "holder"},
        {"divergence": "mmd", "unpaired_negatives": True},
        {"divergence": "gaussian-kl"},
        {"divergence": "sinkhorn"},
        {"divergence": "pairs-mse"},
        {"divergence": "none"},
        {"pairwise": "none", "cs_weight": 1.0},
        {"pairwise": "sigmoid", "adapter": "mlp", "cs_weight": "auto"},
        {"pairwise": "align-uniform", "bandwidth": (0.5, 1.0), "average": 0.5},
        {"init": "random", "adapter": "linear", "learn_scale": True},
        {"adapter": "transformer", "layers": 1, "label_smoothing": 0.1},
        {"width": 8, "val_split": "test"},
    ],
    ids=str,
)
def test_terms_and_kinds_of_two_sides_are_those_of_several(
    features: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    result = run(features, tmp_path / "run", refit=False, **values)

    assert recall(features, result.run) > (0.05 if values.get("init") == "random" else 0.5)
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 12
    assert bool(losses[0]["pairwise"]) is (values.get("pairwise") != "none")


def test_a_hub_pairs_only_what_it_has(tmp_path: Path) -> None:
    """The others learn nothing of each other but through the hub."""
    features = write_sided(tmp_path / "set")
    runs = [run(features, tmp_path / name, hub=name, refit=False) for name in ("text", "audio")]

    one, other = (load_file(own.run / "adapter.safetensors") for own in runs)
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_without_validation_the_last_weights_are_kept(tmp_path: Path) -> None:
    features = write_sided(tmp_path / "set", items=115, missing=0.0)

    result = run(features, tmp_path / "run")
    assert not result.validation
    assert result.best_step == 12
    assert result.refit == "not refitted: all items are trained on already"


@pytest.mark.parametrize("after", [5, 17])
def test_a_stopped_run_is_resumed_as_an_uninterrupted_one(
    features: Path, tmp_path: Path, after: int
) -> None:
    values: dict[str, Any] = {"save_every": 2, "patience": 99}
    expected = run(features, tmp_path / "expected", **values)
    count = itertools.count()

    def progress(what: str, done: int, total: int | None) -> None:
        if what.endswith("step") and next(count) == after:
            raise KeyboardInterrupt

    config = TrainConfig(
        features=features, out=tmp_path / "run", steps=12, batch_size=64, hidden=16,
        validations=4, **values,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(config, progress)
    assert (tmp_path / "run.partial/resume").exists()
    with pytest.raises(OutputError, match="hub None, not text"):
        train(config.model_copy(update={"hub": "text"}))
    assert train(config).validation == expected.validation
    weights = (tmp_path / "run/adapter.safetensors").read_bytes()
    assert weights == (expected.run / "adapter.safetensors").read_bytes()


def test_the_order_of_rows_and_sides_changes_nothing(
    features: Path, whole: Path, tmp_path: Path
) -> None:
    other = write_sided(tmp_path / "set", order=np.random.default_rng(1))

    sides = ("audio", "text", "image")
    permuted = run(other, tmp_path / "run", refit=False, sides=sides).run
    one, two = (load_file(own / "adapter.safetensors") for own in (whole, permuted))
    assert one.keys() == two.keys()
    assert all(np.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert recall(other, permuted) == pytest.approx(recall(features, whole), abs=1e-3)


def test_names_change_little(features: Path, whole: Path, tmp_path: Path) -> None:
    """Noise and rounding follow the order of the names."""
    other = write_sided(tmp_path / "set", names={"audio": "image", "image": "text", "text": "z"})

    renamed = run(other, tmp_path / "run", refit=False).run
    assert recall(other, renamed) == pytest.approx(recall(features, whole), abs=0.03)


def test_a_side_is_added_to_a_run_whose_weights_stay(features: Path, tmp_path: Path) -> None:
    base = run(features, tmp_path / "base", sides=("image", "audio"), adapter="linear").run
    joint = run(features, tmp_path / "joint").run

    result = run(features, tmp_path / "run", add_side="text", into=base)
    assert result.sides == ["image", "audio", "text"]
    assert result.start.startswith("ridge regression onto the others")
    before, after = (load_file(own / "adapter.safetensors") for own in (base, result.run))
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert {name.partition(".")[0] for name in after.keys() - before.keys()} == {"text"}
    kept = sorted((result.run / "checkpoints").iterdir())[-1]
    assert load_adapter(kept).names == ("image", "audio", "text")
    assert recall(features, result.run) > recall(features, joint) - 0.05
    info = read_info(result.run)
    assert info.encoders == {"image": "image", "audio": "audio", "text": "text"}
    with pytest.raises(ConfigError, match="has a side text already"):
        run(features, tmp_path / "again", add_side="text", into=result.run)
    with pytest.raises(ConfigError, match="--add-side and --into go together"):
        run(features, tmp_path / "again", into=base)


def test_a_side_that_is_added_is_validated_on_the_items_that_have_it(tmp_path: Path) -> None:
    few = write_sided(tmp_path / "set", items=500, missing=0.0, only={"audio": 60})
    base = run(few, tmp_path / "base", sides=("image", "text")).run

    result = run(few, tmp_path / "run", add_side="audio", into=base)
    assert result.pairs == {"train": 45, "validation": 15}
    with pytest.raises(ConfigError, match=r"--width: the space of .*base stays as it is"):
        run(few, tmp_path / "other", add_side="audio", into=base, width=8)
    with pytest.raises(ConfigError, match="--text-adapter: there is no text side among audio"):
        run(few, tmp_path / "other", add_side="audio", into=base, text_adapter="linear")


def test_kinds_of_ones_own_are_loaded_again_for_the_refit(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_kind.py").write_text(
        "from csalign.adapters.builtin import Linear\nclass Own(Linear):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kinds = {"adapter": "own_kind:Own", "image_adapter": "linear", "text_adapter": "linear"}
    values: dict[str, Any] = {**QUICK, **kinds, "ensemble": "off"}

    def progress(what: str, done: int, total: int | None) -> None:
        if what.startswith("refitting") and done:
            raise KeyboardInterrupt

    config = TrainConfig(features=features, out=tmp_path / "run", **values)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress)
    train(config)
    shapes = read_info(tmp_path / "run").adapters
    assert [shape.kind for shape in shapes.values()] == ["linear", "linear", "own_kind:Own"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixing": 0.5}, "--mixing: works with images and texts alone, and the sides are image"),
        ({"networks": 2}, "--networks: works with images and texts alone"),
        ({"captions": "all"}, "--captions: works with images and texts alone"),
        ({"unpaired": "other"}, "--unpaired: works with images and texts alone"),
        ({"report": "page.html"}, "--report: works with images and texts alone"),
        ({"token_weight": 1.0}, "--token-weight: works with images and texts alone"),
        ({"adapter": "identity"}, "--adapter identity: needs one of two sides"),
        ({"batch_size": "auto"}, "--batch-size auto: needs a set of two sides"),
        ({"other_captions": 0.5}, "--other-captions: one row of an item is drawn"),
        ({"any_encoder": True}, "--any-encoder: is for a set whose sides are added --into a run"),
        ({"hub": "smell"}, "--hub: smell is not a side of .*; there are image, text, audio"),
        ({"sides": ("text", "smell")}, "--sides: smell is not in .*; its sides are image, text"),
        ({"sides": ("text",)}, "two sides or more are needed"),
        ({"sides": ("text", "audio"), "image_adapter": "mlp"}, "there is no image side"),
        ({"width": 300}, "--width: 300 is more than the 20 of the second widest side"),
        ({"train_split": "test", "val_split": "test"}, "would be both trained and validated on"),
    ],
    ids=str,
)
def test_what_has_no_meaning_for_several_sides_is_refused(
    features: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        run(features, tmp_path / "run", **values)


def test_two_sides_of_a_set_train_as_ever(features: Path, tmp_path: Path) -> None:
    result = run(features, tmp_path / "run", sides=("image", "text"), ensemble="off")

    assert result.sides is None
    assert result.start.startswith("CCA")
    with pytest.raises(ConfigError, match="--hub: needs sides beside image and text"):
        run(features, tmp_path / "other", sides=("image", "text"), hub="text")


def test_the_command_shows_sides_and_items(features: Path, tmp_path: Path) -> None:
    words = ["train", str(features), "--out", str(tmp_path / "run"), "--steps", "4"]
    words += ["--hidden", "8", "--minutes", "1"]

    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    done = CliRunner().invoke(app, [word for word in words if word not in ("--steps", "4")])
    assert done.exit_code == 0, done.output
    assert re.search(r"sides +image, text, audio\n +items +train 149, validation 49", done.output)
    assert re.search(r"start .*generalised CCA", done.output)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_kernels_stand_beside_a_network(features: Path, tmp_path: Path, share: float) -> None:
    config = TrainConfig(features=features, out=tmp_path / "run", **QUICK)
    work = sides_work(config)
    assert work is not None
    starts = Starts(config.group(AdapterOptions), work.data, work.kinds, 0)
    start = starts.initialize()

    chosen = Chosen(SidesSetting(gamma=0.5, ridge=0.1), share, None)
    fits = starts, start.setting, work.data.held_out
    joined = assemble_sides(chosen, start.adapter, *fits)
    kernel = assemble_sides(chosen._replace(share=1.0), start.adapter, *fits)
    rows = {side: own.embeddings for side, own in work.data.rows.sides.items()}
    cosines = [
        own.embed("image", rows[Modality.IMAGE]) @ own.embed("text", rows[Modality.TEXT]).T
        for own in (joined, kernel, start.adapter)
    ]
    expected = share * cosines[1] + (1 - share) * cosines[2]
    np.testing.assert_allclose(cosines[0], expected, atol=1e-4)
    assert work.data.val is not None
    assert measure_sides(embed_sides(kernel, work.data.val)).score.mean_recall > 0.5


def test_a_baseline_is_fitted_on_images_and_texts_alone(features: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapter mean-shift: is fitted on images and texts"):
        train(TrainConfig(features=features, out=tmp_path / "run", adapter="mean-shift"))
