"""Held-out pairs are learned from once everything is chosen; further networks."""

import json
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, OutputError, SchemaError, Stopped
from csalign.core.results import TrainResult
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.closed_forms.initialization import fit_setting
from csalign.training.closed_forms.settings import Setting
from csalign.training.config import AdapterOptions, DataOptions, TrainConfig
from csalign.training.data import TrainingData, load_data
from csalign.training.network.loop import Phase, Trainer
from csalign.training.network.sampler import make_sampler
from csalign.training.train import train
from csalign.training.work import Work

QUICK: dict[str, Any] = {"steps": 12, "batch_size": 20, "hidden": 8, "validations": 4}
QUICK |= {"patience": 99, "learning_rate": 3e-3, "noise": 0.1}
QUICK |= {"init": "random"}  # which steps improve


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four splits of 120 images in turn, a quarter without captions, and texts without an image."""
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    owners = [f"{image}" for image in range(120) if image % 4 for _ in range(1 + image % 2)]
    owners += [""] * 20
    latent = rng.normal(size=(121, 6))
    order = rng.permutation(len(owners))
    owners = [owners[row] for row in order]
    texts = latent[[int(owner or 120) for owner in owners]]
    for name, values, width in (("i", latent[:120], 12), ("t", texts, 8)):
        made = values @ rng.normal(size=(6, width)) + 0.3 * rng.normal(size=(len(values), width))
        np.save(folder / f"{name}.npy", made.astype(np.float32))
    splits = ["train", "val", "train", "test"]
    images = [f"{image},{splits[image // 2 % 4]}" for image in range(120)]
    (folder / "i.csv").write_text("\n".join(["id,split", *images]))
    lines = [
        f"{row},{owner},caption {row % 90},{splits[(int(owner) if owner else row) // 2 % 4]}"
        for row, owner in enumerate(owners)
    ]
    (folder / "t.csv").write_text("\n".join(["id,image_id,caption,split", *lines]))
    config = ImportConfig(
        images=folder / "i.npy",
        texts=folder / "t.npy",
        image_table=folder / "i.csv",
        text_table=folder / "t.csv",
        out=folder / "set",
    )
    return import_arrays(config).features


def load(features: Path, **values: Any) -> tuple[TrainingData, list[Any]]:
    """Load rows; return the pairs trained on first as well, as rows of the tables."""
    options = DataOptions(features=features, **values)
    data = load_data(options, out=features.parent / "run", seed=0)
    sampler = make_sampler(options, 0.3, data.rows, None, data.held_out)
    (images, texts), weights = sampler.weighted_pairs()
    places = (
        data.rows.table_rows(side)[rows].tolist()
        for side, rows in zip(Modality, (images, texts), strict=True)
    )
    return data, sorted(zip(*places, weights.tolist(), strict=True))


def pool(data: TrainingData, side: Modality) -> list[int]:
    (part,) = data.unpaired.parts[side]
    found: list[int] = data.rows.table_rows(side)[part.rows].tolist()
    return found


@pytest.mark.parametrize("split", [{}, {"val_split": "val"}, {"train_split": "train,val"}])
def test_a_refit_adds_the_held_out_rows_and_changes_nothing_before_it(
    several: Path, split: dict[str, str]
) -> None:
    before, expected = load(several, refit=False, **split)
    after, found = load(several, **split)

    assert found == expected
    assert after.trained == before.trained
    assert before.refit_split is None
    assert after.refit_split == "train,val"
    assert after.val is not None
    assert before.val is not None
    assert after.val.image_ids == before.val.image_ids
    for side in Modality:
        assert pool(after, side) == pool(before, side)
    whole = load_rows(FeatureSet.open(several), "train,val")
    assert after.rows.pairs == whole.pairs == after.trained[0] + after.val.pairs
    held_out = after.rows.take(after.folds[0])
    validated = after.val.table_rows(Modality.TEXT)[after.val.text_image >= 0]
    assert sorted(held_out.table_rows(Modality.TEXT)) == sorted(validated)
    owners = whole.text_image >= 0
    pairs = {
        whole.table_rows(Modality.TEXT)[text]: whole.table_rows(Modality.IMAGE)[image]
        for text, image in zip(np.flatnonzero(owners), whole.text_image[owners], strict=True)
    }
    for rows in (after.rows, held_out):
        for text, image in enumerate(rows.text_image):
            if image >= 0:
                text_row, image_row = (
                    rows.table_rows(side)[row]
                    for side, row in ((Modality.TEXT, text), (Modality.IMAGE, image))
                )
                assert pairs[text_row] == image_row
                np.testing.assert_array_equal(
                    rows.texts[text], FeatureSet.open(several).texts.embeddings()[text_row]
                )


def test_few_pairs_are_held_out_several_times_and_the_first_is_validated_on(several: Path) -> None:
    options = {"train_split": "train,val"}
    for refit in (False, True):
        data, _ = load(several, refit=refit, **options)
        assert len(data.folds) == 5
        for fold in data.folds:
            held_out = data.rows.take(fold)
            sampler = make_sampler(DataOptions(features=several), 0.3, data.rows, None, fold)
            (images, texts), _ = sampler.weighted_pairs()
            assert not fold[images].any()
            keys = data.rows.caption_keys
            assert not set(keys[texts]) & set(
                keys[np.isin(data.rows.text_image, np.flatnonzero(fold))]
            )
            assert 15 <= (held_out.caption_counts > 0).sum() <= 20
        assert data.val is not None
        assert (
            data.val.image_ids.to_pylist()
            == FeatureSet.open(several)
            .images.strings("id", data.rows.take(data.folds[0]).image_rows)
            .to_pylist()
        )


def test_few_held_out_rows_are_no_reason_to_refit(several: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = ["image_id,caption,split"]
    table += [f"{row},caption {row},{'val' if row < 9 else 'train'}" for row in range(500)]
    (tmp_path / "t.csv").write_text("\n".join(table))
    for name in ("i", "t"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(500, 4)).astype(np.float32))
    paths = {"images": tmp_path / "i.npy", "texts": tmp_path / "t.npy", "pairs": tmp_path / "t.csv"}
    features = import_arrays(ImportConfig(out=tmp_path / "set", **paths)).features
    data, _ = load(features)

    assert data.refit_split is None
    assert data.folds == ()
    assert data.no_refit == "the 9 images held out are few beside all 500"


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{**QUICK, **values}))


def stop(features: Path, out: Path, what: str, after: int, **values: Any) -> None:
    """Train, and be stopped after a step of a phase."""

    def progress(now: str, done: int, total: int | None) -> None:
        if now == what and done >= after:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(TrainConfig(features=features, out=out, **{**QUICK, **values}), progress)


def weights(out: Path) -> dict[str, Any]:
    return load_file(out / "adapter.safetensors")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-5, atol=1e-5, err_msg=name)


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return any(not np.allclose(one[name], other[name], atol=1e-4) for name in one)


@pytest.fixture(scope="module")
def learned(several: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption: one network, then two on all pairs."""
    out = tmp_path_factory.mktemp("learned") / "run"
    assert run(several, out, networks=2).best_step == read_info(out).step > 0
    return out


STOPS = [
    ("training: step", 5),
    ("refitting the closed form", 0),
    ("refitting: step", 0),
    ("refitting: step", 3),
    ("saving", 0),
]


@pytest.mark.parametrize("stops", [STOPS[:1] + STOPS[3:], STOPS[1:3], STOPS[4:]])
def test_a_run_stopped_in_any_phase_is_an_uninterrupted_one(
    several: Path, learned: Path, tmp_path: Path, stops: list[tuple[str, int]]
) -> None:
    out = tmp_path / "run"
    for what, after in stops:
        stop(several, out, what, after, networks=2)
    result = run(several, out, networks=2)

    assert_same(weights(out), weights(learned))
    assert [line["step"] for line in lines(out)] == [line["step"] for line in lines(learned)]
    assert read_info(out).step == read_info(learned).step
    assert result.validation["kept"]["mean_recall"] == pytest.approx(
        read_info(out).validation["mean_recall"]  # type: ignore[index]
    )
    assert not (out / "resume").exists()
    names = [
        sorted(path.name for path in (own / "checkpoints").iterdir()) for own in (out, learned)
    ]
    assert names[0] == names[1]


def test_the_phase_that_was_stopped_is_the_one_that_is_resumed(
    several: Path, learned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, partial = tmp_path / "run", tmp_path / "run.partial"
    stop(several, out, "refitting the closed form", 0, networks=2)
    assert [path.name for path in (partial / "resume").iterdir()] == ["phase-01"]
    with pytest.raises(OutputError, match="networks 2, not 3"):
        run(several, out, networks=3)
    stale = partial / "resume" / "step-000003"  # of a process killed just before it was removed
    shutil.copytree(partial / "resume" / "phase-01", stale)
    seen = set()

    def progress(what: str, done: int, total: int | None) -> None:
        seen.add(what)

    train(TrainConfig(features=several, out=out, networks=2, **QUICK), progress)
    assert "training: step" not in seen
    assert "refitting: step" in seen
    assert_same(weights(out), weights(learned))

    stop(several, tmp_path / "damaged", "refitting: step", 2, networks=2)
    phase = tmp_path / "damaged.partial" / "resume" / "phase-01"
    assert (phase / "step-000002").is_dir()
    shutil.rmtree(phase / "step-000002")
    (phase / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(SchemaError, match=r"phase-01.*checksum.*start again with --overwrite"):
        run(several, tmp_path / "damaged", networks=2)
    run(several, tmp_path / "damaged", networks=2, overwrite=True)
    assert_same(weights(tmp_path / "damaged"), weights(learned))


def test_without_a_refit_the_run_is_its_first_phase(several: Path, tmp_path: Path) -> None:
    kept = run(several, tmp_path / "kept", refit=False)
    refitted = run(several, tmp_path / "refitted")

    assert kept.refit == "not refitted: --no-refit"
    pairs = sum(refitted.pairs.values())
    assert refitted.refit.startswith(f"refitted on all {pairs} pairs, the ")
    assert kept.validation == refitted.validation
    assert (kept.pairs, kept.best_step, kept.steps) == (
        refitted.pairs,
        refitted.best_step,
        refitted.steps,
    )
    assert lines(tmp_path / "refitted")[:-1] == lines(tmp_path / "kept")
    assert lines(tmp_path / "refitted")[-1]["refit"] == {"pairs": pairs, "steps": kept.best_step}
    assert read_info(tmp_path / "kept").train_split == "train"
    assert read_info(tmp_path / "refitted").train_split == "train,val"
    newest = max((tmp_path / "refitted" / "checkpoints").iterdir())
    assert read_info(newest).train_split == "train"
    assert differ(weights(tmp_path / "kept"), weights(tmp_path / "refitted"))


def test_a_closed_form_is_refitted_as_if_nothing_had_been_held_out(
    several: Path, tmp_path: Path
) -> None:
    refitted = run(several, tmp_path / "refitted", steps=0, init="canonical")
    data, _ = load(several, train_split="train,val", val_split="test", refit=False)
    options = TrainConfig(features=several, out=tmp_path / "x", **{**QUICK, "init": "canonical"})
    sampler = make_sampler(DataOptions(features=several), 0.3, data.rows, None)
    groups = options.group(AdapterOptions)
    ridge, power = map(float, re.findall(r"[\d.]+", refitted.start))
    setting = Setting(form="cca", ridge=ridge, power=power)
    expected, _ = fit_setting(setting, groups, data, sampler, {}, 0)

    images, texts = data.rows.images, data.rows.texts
    found = load_adapter(tmp_path / "refitted")
    for side, rows in zip(Modality, (images, texts), strict=True):
        np.testing.assert_allclose(found.embed(side, rows), expected.embed(side, rows), atol=1e-5)


@pytest.mark.parametrize(("networks", "steps", "count"), [(1, 12, 0), (3, 12, 2), (3, 0, 0)])
def test_further_networks_without_a_refit_learn_from_the_training_pairs(
    several: Path, tmp_path: Path, networks: int, steps: int, count: int
) -> None:
    began = []

    def progress(what: str, done: int, total: int | None) -> None:
        if what == "training another network: step" and done == 0:
            began.append(total)

    options = {**QUICK, "steps": steps, "networks": networks, "refit": False}
    result = train(TrainConfig(features=several, out=tmp_path / "run", **options), progress)

    assert set(began) == ({result.best_step} if count else set())
    assert read_info(tmp_path / "run").train_split == "train"
    assert "kept" in result.validation


def test_networks_that_would_be_equal_are_not_trained_and_a_warning_says_so(
    several: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = run(several, tmp_path / "one", steps=0)
    three = run(several, tmp_path / "three", steps=0, networks=3)

    assert "--networks 3: trains no further network, since the start is kept" in caplog.text
    assert three.width == one.width
    assert_same(weights(tmp_path / "three"), weights(tmp_path / "one"))


def test_networks_that_cannot_stand_side_by_side_are_refused(several: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--networks 2: identity keeps the width"):
        run(several, tmp_path / "run", networks=2, image_adapter="identity")
    assert not (tmp_path / "run.partial").exists()


def test_a_refit_repeats_the_weights_of_an_automatic_distribution_term(
    several: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        features=several, out=tmp_path / "run", **{**QUICK, "cs_weight": "auto", "batch_size": 64}
    )
    data, _ = load(several)
    work = Work(config, data, None)

    def cs_weights(trainer: Trainer) -> list[float]:
        lines: list[Mapping[str, Any]] = []
        assert list(trainer.fit(lines.extend))
        return [line["cs_weight"] for line in lines if "cs_weight" in line]

    first = work.trainer(work.initialize().adapter)
    expected = cs_weights(first)
    assert len(set(expected)) > 1
    phase = Phase(1, "refitting", first.schedule.steps, first.last, first.weights)
    assert cs_weights(work.trainer(work.initialize().adapter, phase)) == expected
