"""A run that is stopped or killed is resumed with the result of an uninterrupted one."""

import csv
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.core import atomic, locks, outputs
from csalign.core.enums import Modality
from csalign.core.errors import OutputError, SchemaError, Stopped, TrainingError
from csalign.core.results import TrainResult
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.checkpoints import (
    SECONDS_BETWEEN,
    UnfinishedRun,
)
from csalign.training.config import TrainConfig
from csalign.training.data import Part, Unpaired
from csalign.training.loggers import figures_of
from csalign.training.network.sampler import BatchLoader, PairSampler
from csalign.training.state import read_state, write_state
from csalign.training.train import train

QUICK = {"steps": 12, "batch_size": 40, "hidden": 16, "validations": 4, "patience": 99}
KILLED_AT = """
import os, signal, sys
import torch
from csalign.training.config import TrainConfig
from csalign.training.train import train

def progress(what, done, total):
    if what == "training: step" and done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
train(TrainConfig.model_validate_json(sys.argv[1]), progress)
"""


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{**QUICK, **values}))


def stop(features: Path, out: Path, after: int, **values: Any) -> None:
    """Train, and be stopped after a step."""

    def progress(what: str, done: int, total: int | None) -> None:
        if what == "training: step" and done >= after:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(TrainConfig(features=features, out=out, **{**QUICK, **values}), progress)


def figures(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [figures_of(json.loads(line)) for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Both folders have the same files, the same figures and the same weights."""
    names = [
        {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and path.parent.name != "tensorboard"
        }
        for folder in (one, other)
    ]
    assert names[0] == names[1]
    for found, expected in zip(figures(one), figures(other), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name in ("", *(f"checkpoints/{path.name}" for path in (one / "checkpoints").glob("*"))):
        found, expected = (
            load_file(folder / name / "adapter.safetensors") for folder in (one, other)
        )
        for key, values in expected.items():
            np.testing.assert_allclose(found[key], values, rtol=1e-5, atol=1e-5)
        assert read_info(one / name).step == read_info(other / name).step


def unfinished(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def states(out: Path) -> list[Path]:
    return sorted((unfinished(out) / "resume").iterdir())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images with up to three captions, 40 of them without any, and 30 captions alone."""
    tmp_path = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(1)
    latent = rng.normal(size=(150, 8))
    owners = np.sort(np.concatenate([np.arange(110), rng.integers(0, 110, 90)]))
    texts = np.concatenate([latent[owners], rng.normal(size=(30, 8))])
    for name, values, width in (("i", latent, 24), ("t", texts, 16)):
        made = values @ rng.normal(size=(8, width)) + 0.5 * rng.normal(size=(len(values), width))
        np.save(tmp_path / f"{name}.npy", made.astype(np.float32))
    table = tmp_path / "t.csv"
    of = [*map(str, owners), *[""] * 30]
    lines = [f"{row},{owner},caption {row % 190}" for row, owner in enumerate(of)]
    table.write_text("\n".join(["id,image_id,caption", *lines]))
    ids = tmp_path / "i.csv"
    ids.write_text("\n".join(["id", *map(str, range(150))]))
    config = ImportConfig(
        images=tmp_path / "i.npy",
        texts=tmp_path / "t.npy",
        image_table=ids,
        text_table=table,
        out=tmp_path / "mixed",
    )
    return import_arrays(config).features


@pytest.fixture(scope="module")
def whole(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    return run(mixed, tmp_path_factory.mktemp("whole") / "run").run


OPTIONS: list[dict[str, Any]] = [
    {"captions": "sample", "cs_weight": "auto", "average": 0.9, "learn_scale": True},
    {"captions": "all", "pairwise": "sigmoid", "bandwidth": (0.5, 1.0)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_stopped_several_times_is_an_uninterrupted_one(
    mixed: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = run(mixed, tmp_path / "whole", **options)
    for after in (1, 3, 4, 11):
        stop(mixed, tmp_path / "run", after, **options)
        torch.manual_seed(after)  # the caller's generator must not matter
    result = run(mixed, tmp_path / "run", **options)

    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (result.steps, result.best_step) == (whole.steps, whole.best_step)
    assert result.start == whole.start


def test_so_is_one_with_tokens(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    features = write_tokens()
    options = {"batch_size": 24, "adapter": "transformer", "layers": 1, "token_pairs": 9}
    options |= {"token_weight": 1.0}
    run(features, tmp_path / "whole", **options)
    for after in (1, 5):
        stop(features, tmp_path / "run", after, **options)
    run(features, tmp_path / "run", **options)

    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_so_is_one_with_rows_of_further_sets_and_without_validation(
    mixed: Path, features: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    for name in ("i", "t"):
        np.save(tmp_path / f"few-{name}.npy", np.load(mixed.parent / f"{name}.npy")[:15])
    import_arrays(
        ImportConfig(images=tmp_path / "few-i.npy", texts=tmp_path / "few-t.npy", out=few)
    )
    options = {"unpaired": (mixed, features), "batch_size": 8}
    whole = run(few, tmp_path / "whole", **options)
    for after in (3, 11):
        stop(few, tmp_path / "run", after, **options)
    run(few, tmp_path / "run", **options)

    assert whole.validation == {}
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_temporary_files_of_a_killed_process_are_not_in_the_run(
    mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 3)
    names = (".adapter.json.95b237641494.tmp", ".tmpPF9q5X")
    for name in names:
        (unfinished(out) / name).write_text("{")
    run(mixed, out)

    assert not any((out / name).exists() for name in names)


def test_a_log_that_was_damaged_meanwhile_is_named(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 3)
    lines = unfinished(out) / "metrics.jsonl"
    damaged = lines.read_bytes().replace(b"loss", b"lost", 1) + b"{}\n"
    lines.write_bytes(damaged)
    with pytest.raises(SchemaError, match=r"metrics\.jsonl: was changed or is damaged"):
        run(mixed, out)
    assert lines.read_bytes() == damaged  # cut back only once it is known to be intact
    run(mixed, out, overwrite=True)


def test_a_run_killed_between_checkpoints_is_resumed_as_an_uninterrupted_one(
    mixed: Path, tmp_path: Path
) -> None:
    options = {"steps": 20, "captions": "sample", "save_every": 4}
    run(mixed, tmp_path / "whole", **options)
    out = tmp_path / "run"
    config = TrainConfig(features=mixed, out=out, **{**QUICK, **options})
    # Not forked: torch's threads do not survive that.
    words = [sys.executable, "-c", KILLED_AT, config.model_dump_json(), "14"]
    killed = subprocess.run(words, check=False)
    found = [path.name for path in states(out)]
    run(mixed, out, **options)

    assert killed.returncode == -signal.SIGKILL
    assert found == ["step-000008", "step-000012"]
    assert_same_run(out, tmp_path / "whole")


def test_what_a_stopped_run_leaves_is_bounded_and_can_be_used(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 11, save_every=1)

    assert [path.name for path in states(out)] == ["step-000010", "step-000011"]
    assert len(list((unfinished(out) / "checkpoints").iterdir())) == 3
    assert read_info(states(out)[-1]).step == 11
    load_adapter(states(out)[-1])
    run(mixed, out)
    assert not unfinished(out).exists()
    assert not {"resume", outputs.JOB, locks.LOCK} & {path.name for path in out.iterdir()}


def test_other_options_are_refused_by_name_unless_overwritten(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 5)
    kept = states(out)
    with pytest.raises(
        OutputError, match=r"started with steps 12, not 13; learning-rate 0.001, not 0.01:"
    ) as caught:
        run(mixed, out, learning_rate=0.01, steps=13)

    assert "width" not in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert states(out) == kept
    anew = run(mixed, out, learning_rate=0.01, overwrite=True)
    run(mixed, tmp_path / "whole", learning_rate=0.01)
    assert anew.steps == 12
    assert_same_run(out, tmp_path / "whole")


def test_what_does_not_change_the_weights_may_be_another(
    mixed: Path, whole: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(mixed, moved)
    stop(mixed, tmp_path / "run", 5)
    run(moved, tmp_path / "run", save_every=2, device="cpu", memory=0, overwrite=True)

    assert_same_run(tmp_path / "run", whole)


def test_features_of_other_content_are_refused(mixed: Path, features: Path, tmp_path: Path) -> None:
    stop(mixed, tmp_path / "run", 5)
    with pytest.raises(OutputError, match="started with features of other content:"):
        run(features, tmp_path / "run")


def test_a_run_of_another_version_is_refused_as_such(mixed: Path, tmp_path: Path) -> None:
    stop(mixed, tmp_path / "run", 5)
    path = unfinished(tmp_path / "run") / outputs.JOB
    job = json.loads(path.read_text())
    path.write_text(json.dumps({**job, "version": 5, "options": {}}))
    with pytest.raises(OutputError, match=r"another version .* version 5, not 6\): finish it with"):
        run(mixed, tmp_path / "run")


def test_nothing_is_refused_where_nothing_would_be_lost(mixed: Path, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    out = unfinished(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(features=mixed, out=tmp_path / "run", **QUICK), progress)
    outputs.remove_folder(out / "resume")
    run(mixed, tmp_path / "run", seed=1)

    assert not out.exists()


def test_a_run_that_diverged_starts_again(mixed: Path, whole: Path, tmp_path: Path) -> None:
    bad = {"learning_rate": 1e9, "clip_norm": 1e30, "warmup": 1.0, "save_every": 1}
    with pytest.raises(TrainingError, match="last good checkpoint"):
        run(mixed, tmp_path / "run", **bad, validations=12)
    run(mixed, tmp_path / "run")

    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter.json", "flip"),
        ("adapter.safetensors", "flip"),
        ("state.safetensors", "flip"),
        ("state.safetensors", "remove"),
        ("SHA256SUMS", "remove"),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_it_taken(
    mixed: Path,
    whole: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 8, save_every=3)
    path = states(out)[-1] / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    if damage == "remove":
        path.unlink()
    with caplog.at_level(logging.WARNING, "csalign"):
        run(mixed, out, save_every=2)

    assert str(path.parent) in caplog.text
    assert name in caplog.text or name == "SHA256SUMS"
    assert "going back to" in caplog.text
    assert "step-000006" in caplog.text
    assert_same_run(out, whole)


def test_damaged_checkpoints_are_discarded_only_with_overwrite(
    mixed: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 8)
    (unfinished(out) / "metrics.jsonl").write_text("")
    with pytest.raises(SchemaError, match=r"metrics.jsonl: is shorter than .*--overwrite"):
        run(mixed, out)
    run(mixed, out, overwrite=True)

    assert "starting again" in caplog.text
    assert_same_run(out, whole)


def test_a_damaged_job_is_discarded_only_with_overwrite(
    mixed: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 5)
    (unfinished(out) / ".csalign-job.json").write_text('{"format": "csalign-training"')
    with pytest.raises(SchemaError, match=r"csalign-job\.json: is damaged .*--overwrite"):
        run(mixed, out)
    run(mixed, out, overwrite=True)

    assert_same_run(out, whole)


def test_a_state_of_something_else_with_right_checksums_is_refused(
    mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 8)
    state = states(out)[-1]
    values = {**read_state(state / "state.safetensors"), "state": {"step": 8}}
    write_state(state / "state.safetensors", values)
    names = ("adapter.json", "adapter.safetensors", "state.safetensors")
    sums = [f"{atomic.sha256_file(state / name)}  {name}\n" for name in names]
    (state / "SHA256SUMS").write_text("".join(sums))
    with pytest.raises(SchemaError, match="is not a checkpoint of this run"):
        run(mixed, out)


def test_an_unfinished_run_is_not_removed_by_another_command(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 5)
    with pytest.raises(OutputError, match="contains an unfinished training run; finish it"):
        import_arrays(
            ImportConfig(images=mixed.parent / "i.npy", texts=mixed.parent / "i.npy", out=out)
        )

    assert len(states(out)) == 1


def test_two_processes_do_not_train_in_one_folder(mixed: Path, tmp_path: Path) -> None:
    with (
        locks.lock_folder(unfinished(tmp_path / "run")),
        pytest.raises(OutputError, match="another process is writing there"),
    ):
        run(mixed, tmp_path / "run")


def test_logs_hold_each_step_once(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"log_to": ("csv", "tensorboard"), "save_every": 2}
    stop(mixed, out, 7, **options)
    outputs.remove_folder(states(out)[-1])  # as if it had been killed, one step after the last save
    run(mixed, out, **options)

    with (out / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
    assert steps == list(range(1, 13))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))


def test_a_checkpoint_is_saved_once_per_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    run = UnfinishedRun(tmp_path, [], None, None, 0.0)

    assert not run.is_due(1)
    now += SECONDS_BETWEEN + 1
    assert run.is_due(1)


def test_iterating_resumes_from_any_place(mixed: Path) -> None:
    rows = load_rows(FeatureSet.open(mixed), "all")
    sampler = PairSampler(rows, "sample", other_weight=0.3, once=True)
    pool = Unpaired({side: [Part(rows.embeddings(side), np.arange(9))] for side in Modality})
    cpu = torch.device("cpu")

    def loader() -> BatchLoader:
        return BatchLoader(rows, sampler, 40, 0, cpu, pool, unpaired_rows=3, mixing=0.5)

    places, expected, batches = [], [], loader()
    for _ in range(9):
        places.append(json.loads(json.dumps(batches.state_dict())))
        expected.append(next(batches).texts.rows)
    for number, place in enumerate(places):
        again = loader()
        again.load_state_dict(place)
        for rows_of_batch in expected[number:]:
            assert torch.equal(next(again).texts.rows, rows_of_batch)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    values: dict[str, Any] = {
        "a/b": {"c.d": shared, "same": shared, "turned": shared.T},
        "list": [1, 2**100, 0.1, None, True, "word", shared.to(torch.uint8)],
        "none": torch.tensor(3.0),
    }
    write_state(tmp_path / "file", values)
    found = read_state(tmp_path / "file")

    assert torch.equal(found["a/b"]["turned"], shared.T)
    assert torch.equal(found["a/b"]["c.d"], found["a/b"]["same"])
    assert found["list"][:6] == values["list"][:6]
    assert found["list"][6].dtype == torch.uint8
    assert found["none"].shape == ()


@pytest.mark.parametrize("text", [b"", b"no tensors", b"\xff" * 64])
def test_a_file_of_something_else_is_not_a_state(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(SchemaError, match="file: cannot be read"):
        read_state(tmp_path / "file")
