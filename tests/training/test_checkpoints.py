"""A run that is stopped or killed goes on to the bytes of a run in one go."""

import csv
import json
import logging
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
from csalign.training.state import read_values, write_values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.core import atomic
from csalign.core.errors import OutputError, SchemaError, Stopped, TrainingError
from csalign.core.results import TrainResult
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.checkpoints import SECONDS_BETWEEN, TrainingFolder
from csalign.training.config import TrainConfig
from csalign.training.sampler import Batches, PairSampler
from csalign.training.train import train

QUICK = {"steps": 12, "batch_size": 40, "hidden": 16, "validations": 4, "patience": 99}
IN_A_PROCESS = """
import sys
import torch
from csalign.training.config import TrainConfig
from csalign.training.train import train

torch.set_num_threads(1)
train(TrainConfig.model_validate_json(sys.argv[1]))
"""
OF_THIS_RUN = {"config.toml", "environment.json", "tensorboard"}


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{**QUICK, **values}))


def stop(features: Path, out: Path, after: int, **values: Any) -> None:
    """Train, and be stopped after a step."""

    def progress(what: str, done: int, total: int | None) -> None:
        if what == "training steps" and done >= after:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(TrainConfig(features=features, out=out, **{**QUICK, **values}), progress)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a run that should be the same, by name."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {
        str(path): (folder / path).read_bytes()
        for path in paths
        if path.parts[0] not in OF_THIS_RUN
    }


def unfinished(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def states(out: Path) -> list[Path]:
    return sorted((unfinished(out) / "resume").iterdir())


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """150 images with up to three captions, 40 of them without any, and 30 captions alone."""
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


OPTIONS: list[dict[str, Any]] = [
    {},
    {"captions": "sample", "cs_weight": "auto", "average": 0.9, "learn_scale": True},
    {"captions": "all", "pairwise": "sigmoid", "bandwidth": (0.5, 1.0), "adapter": "glu"},
    {"divergence_estimator": "rff", "sub_batch": 16, "captions": "sample"},
    {"init": "random", "mixing": 0.5, "image_adapter": "linear", "divergence": "sinkhorn"},
    {"learning_rate": 30.0, "clip_norm": 1e6, "patience": 2, "validations": 12},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_stopped_after_each_step_has_the_bytes_of_one_in_one_go(
    mixed: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = run(mixed, tmp_path / "whole", **options)
    for after in range(1, whole.steps):
        stop(mixed, tmp_path / "run", after, **options)
        torch.manual_seed(after)  # the caller's generator must not matter
    result = run(mixed, tmp_path / "run", **options)

    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert result.validation == whole.validation
    assert (result.steps, result.best_step) == (whole.steps, whole.best_step)
    assert result.start == whole.start


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": "transformer", "layers": 1, "tokens": True},
        {"adapter": "transformer", "layers": 1, "token_weight": 1.0, "token_pairs": 9},
        {"token_weight": 0.5, "token_samples": 2},
    ],
)
def test_so_does_one_with_tokens(
    write_tokens: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    features = write_tokens()
    options = {"batch_size": 24, **options}
    run(features, tmp_path / "whole", **options)
    for after in (1, 5, 12):
        stop(features, tmp_path / "run", after, **options)
    run(features, tmp_path / "run", **options)

    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_so_does_one_with_rows_of_further_sets_and_without_validation(
    mixed: Path, features: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    for name in ("i", "t"):
        np.save(tmp_path / f"few-{name}.npy", np.load(tmp_path / f"{name}.npy")[:15])
    import_arrays(
        ImportConfig(images=tmp_path / "few-i.npy", texts=tmp_path / "few-t.npy", out=few)
    )
    options = {"unpaired": f"{mixed},{features}", "batch_size": 8}
    whole = run(few, tmp_path / "whole", **options)
    for after in (3, 4, 11, 12):
        stop(few, tmp_path / "run", after, **options)
    run(few, tmp_path / "run", **options)

    assert whole.validation == {}
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_what_a_killed_process_was_writing_is_not_in_the_run(mixed: Path, tmp_path: Path) -> None:
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
    lines.write_bytes(lines.read_bytes().replace(b"loss", b"lost", 1))
    with pytest.raises(SchemaError, match=r"metrics\.jsonl: was changed or is damaged"):
        run(mixed, out)
    run(mixed, out, overwrite=True)


def test_a_run_killed_at_any_moment_has_the_bytes_of_one_in_one_go(
    mixed: Path, tmp_path: Path
) -> None:
    options = {"steps": 60, "validations": 10, "captions": "sample", "save_every": 4}
    run(mixed, tmp_path / "whole", **options)
    out = tmp_path / "run"
    rng = np.random.default_rng(0)
    config = TrainConfig(features=mixed, out=out, **{**QUICK, **options})
    for lines in (5, 13, 45):
        kill_when(unfinished(out) / "metrics.jsonl", lines, rng, config)
    assert len(list((unfinished(out) / "resume").glob("step-*"))) >= 2
    run(mixed, out, **options)

    assert content(out) == content(tmp_path / "whole")


def kill_when(log: Path, lines: int, rng: np.random.Generator, config: TrainConfig) -> None:
    """Train in a process that is killed soon after the log has so many lines."""
    # Not forked: torch's threads do not survive that.
    child = subprocess.Popen([sys.executable, "-c", IN_A_PROCESS, config.model_dump_json()])
    while not (log.is_file() and log.read_bytes().count(b"\n") >= lines):
        assert child.poll() is None
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.01))
    child.kill()
    child.wait()


def test_what_a_stopped_run_leaves_is_bounded_and_can_be_used(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 11, save_every=1)

    assert [path.name for path in states(out)] == ["step-000010", "step-000011"]
    assert len(list((unfinished(out) / "checkpoints").iterdir())) == 3
    assert read_info(states(out)[-1]).step == 11
    load_adapter(states(out)[-1])
    run(mixed, out)
    assert not unfinished(out).exists()
    assert not {"resume", atomic.JOB, atomic.LOCK} & {path.name for path in out.iterdir()}


def test_other_options_are_refused_by_name_unless_the_run_may_be_begun_anew(
    mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 5)
    kept = states(out)
    with pytest.raises(
        OutputError, match=r"begun with steps 12, not 13; learning-rate 0.001, not 0.01:"
    ) as caught:
        run(mixed, out, learning_rate=0.01, steps=13)

    assert "width" not in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert states(out) == kept
    anew = run(mixed, out, learning_rate=0.01, overwrite=True)
    run(mixed, tmp_path / "whole", learning_rate=0.01)
    assert anew.steps == 12
    assert content(out) == content(tmp_path / "whole")


def test_what_does_not_change_the_weights_may_be_another(mixed: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    stop(mixed, tmp_path / "run", 5)
    mixed.rename(moved)
    run(moved, tmp_path / "run", save_every=2, log_to=("csv",), overwrite=True)
    run(moved, tmp_path / "whole", log_to=("csv",))

    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_features_of_other_content_are_refused(mixed: Path, features: Path, tmp_path: Path) -> None:
    stop(mixed, tmp_path / "run", 5)
    with pytest.raises(OutputError, match="begun with features of other content:"):
        run(features, tmp_path / "run")


def test_nothing_is_refused_where_nothing_would_be_lost(mixed: Path, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    out = unfinished(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(features=mixed, out=tmp_path / "run", **QUICK), progress)
    atomic.remove_folder(out / "resume")
    run(mixed, tmp_path / "run", seed=1)

    assert not out.exists()


def test_a_run_that_diverged_is_begun_anew(mixed: Path, tmp_path: Path) -> None:
    bad = {"learning_rate": 1e25, "clip_norm": 1e30, "warmup": 1.0, "save_every": 1}
    with pytest.raises(TrainingError, match="last good checkpoint"):
        run(mixed, tmp_path / "run", **bad, validations=12)
    run(mixed, tmp_path / "run")
    run(mixed, tmp_path / "whole")

    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter.json", "flip"),
        ("adapter.safetensors", "flip"),
        ("state.safetensors", "flip"),
        ("state.safetensors", "cut"),
        ("state.safetensors", "remove"),
        ("SHA256SUMS", "cut"),
        ("SHA256SUMS", "remove"),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_it_taken(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
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
    run(mixed, tmp_path / "whole")

    assert str(path.parent) in caplog.text
    assert name in caplog.text or name == "SHA256SUMS"
    assert "going back to" in caplog.text
    assert "step-000006" in caplog.text
    assert content(out) == content(tmp_path / "whole")


def test_where_all_states_are_damaged_only_overwrite_begins_anew(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 8)
    (unfinished(out) / "metrics.jsonl").write_text("")
    with pytest.raises(SchemaError, match=r"metrics.jsonl: is shorter than .*--overwrite"):
        run(mixed, out)
    run(mixed, out, overwrite=True)
    run(mixed, tmp_path / "whole")

    assert "starting anew" in caplog.text
    assert content(out) == content(tmp_path / "whole")


def test_where_it_cannot_be_told_what_was_begun_only_overwrite_begins_anew(
    mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 5)
    (unfinished(out) / ".csalign-job.json").write_text('{"format": "csalign-training"')
    with pytest.raises(SchemaError, match=r"csalign-job\.json: is damaged .*--overwrite"):
        run(mixed, out)
    run(mixed, out, overwrite=True)
    run(mixed, tmp_path / "whole")

    assert content(out) == content(tmp_path / "whole")


def test_a_state_of_something_else_with_right_checksums_is_refused(
    mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 8)
    state = states(out)[-1]
    values = {**read_values(state / "state.safetensors"), "trainer": {"step": 8}}
    write_values(state / "state.safetensors", values)
    names = ("adapter.json", "adapter.safetensors", "state.safetensors")
    sums = [f"{atomic.sha256_file(state / name)}  {name}\n" for name in names]
    (state / "SHA256SUMS").write_text("".join(sums))
    with pytest.raises(SchemaError, match="is no state of this run"):
        run(mixed, out)


def test_an_unfinished_run_is_not_swept_away_by_another_command(
    mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop(mixed, out, 5)
    with pytest.raises(OutputError, match="holds an unfinished training run; finish it"):
        import_arrays(ImportConfig(images=tmp_path / "i.npy", texts=tmp_path / "i.npy", out=out))

    assert len(states(out)) == 1


def test_two_processes_do_not_train_in_one_folder(mixed: Path, tmp_path: Path) -> None:
    with (
        atomic.lock_folder(unfinished(tmp_path / "run")),
        pytest.raises(OutputError, match="another process is writing there"),
    ):
        run(mixed, tmp_path / "run")


def test_logs_hold_each_step_once(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"log_to": ("csv", "tensorboard"), "save_every": 2}
    stop(mixed, out, 7, **options)
    atomic.remove_folder(states(out)[-1])  # as if it had been killed, one step after the last save
    run(mixed, out, **options)
    run(mixed, tmp_path / "whole", **options)

    assert content(out) == content(tmp_path / "whole")
    with (out / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
    assert steps == list(range(1, 13))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))


def test_other_conditions_than_at_the_start_are_told(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop(mixed, tmp_path / "run", 5)
    path = unfinished(tmp_path / "run") / "environment.json"
    environment = json.loads(path.read_text())
    environment["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(environment))
    with caplog.at_level(logging.WARNING, "csalign"):
        run(mixed, tmp_path / "run")

    assert "begun with torch 1.0, not " in caplog.text


def test_saving_takes_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    (tmp_path / "metrics.jsonl").write_text("")
    folder = TrainingFolder(tmp_path, None, None)

    def save_weights(where: Path) -> None:
        nonlocal now
        for name in ("adapter.json", "adapter.safetensors"):
            (where / name).write_text("{}")
        now += 5

    assert not folder.is_due(1)
    now += SECONDS_BETWEEN + 1
    assert folder.is_due(1)
    folder.save(1, save_weights, {"weights": torch.zeros(2)})
    now += 49 * 5
    assert not folder.is_due(2)
    now += 6
    assert folder.is_due(2)


def test_batches_go_on_from_any_place(mixed: Path) -> None:
    sampler = PairSampler(
        load_rows(FeatureSet.open(mixed), "all"), "sample", other_weight=0.3, once=True
    )
    drawn, places = Batches(sampler, 40, 0), []
    expected = []
    for _ in range(9):
        places.append(json.loads(json.dumps(drawn.state())))
        expected.append(next(drawn).texts.tolist())
    for number, place in enumerate(places):
        again = Batches(sampler, 40, 99)
        again.go_to(place)
        assert [next(again).texts.tolist() for _ in expected[number:]] == expected[number:]


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    values: dict[str, Any] = {
        "a/b": {"c.d": shared, "same": shared, "turned": shared.T},
        "list": [1, 2**100, 0.1, None, True, "word", shared.to(torch.uint8)],
        "none": torch.tensor(3.0),
    }
    write_values(tmp_path / "file", values)
    found = read_values(tmp_path / "file")

    assert torch.equal(found["a/b"]["turned"], shared.T)
    assert torch.equal(found["a/b"]["c.d"], found["a/b"]["same"])
    assert found["list"][:6] == values["list"][:6]
    assert found["list"][6].dtype == torch.uint8
    assert found["none"].shape == ()


@pytest.mark.parametrize("text", [b"", b"no tensors", b"\xff" * 64])
def test_a_file_of_something_else_holds_no_values(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(SchemaError, match="file: cannot be read"):
        read_values(tmp_path / "file")
