import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from csalign.core.errors import ConfigError
from csalign.core.progress import reported_to, show_figures, silent
from csalign.training.config import TrainConfig
from csalign.training.loggers import open_logs
from csalign.training.train import train


def test_csv_and_tensorboard_hold_what_the_lines_hold(quick_run: Path) -> None:
    run = quick_run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()

    assert "refit" in lines[-1]  # which the table has no column of
    assert [int(row["step"]) for row in rows] == [line["step"] for line in lines[:-1]]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [float(row["loss"]) for row in rows if row["loss"]] == losses
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    recalls = [line["validation"]["mean_recall"] for line in lines if "validation" in line]
    name = "validation/mean_recall"
    assert [float(row[name]) for row in rows if row[name]] == recalls
    assert [event.step for event in events.Scalars(name)] == [0, 3, 6, 9, 12]


def test_the_token_loss_has_a_column(tmp_path: Path) -> None:
    with open_logs(("csv",), tmp_path, "run", {}) as log:
        log([{"step": 1, "loss": 3.0, "token": 0.5}])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)

    assert row["token"] == "0.5"


def test_a_log_that_is_not_installed_is_named_with_its_extra_before_the_work(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'csalign\[wandb\]'"):
        train(TrainConfig(features=features, out=tmp_path / "run", log_to=("wandb",)))

    assert not (tmp_path / "run").exists()


def test_an_unknown_log_is_refused(features: Path) -> None:
    with pytest.raises(ConfigError, match="log-to"):
        TrainConfig.resolve(None, {"features": features, "out": "run", "log_to": "csv,paper"})


def test_figures_reach_a_listener_that_shows_them_and_no_other() -> None:
    class Listener:
        seen: Mapping[str, str]

        def __call__(self, what: str, done: int, total: int | None) -> None: ...

        def figures(self, figures: Mapping[str, str], notable: bool) -> None:
            self.seen = figures

    listener = Listener()
    with reported_to(listener):
        show_figures({"loss": "1.00"})
    with reported_to(silent):
        show_figures({"loss": "2.00"})

    assert listener.seen == {"loss": "1.00"}


def test_wandb_gets_the_figures_without_a_network(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TrainConfig(features=features, out=tmp_path / "run", steps=2, log_to=("wandb",))
    run = train(config).run

    assert len(list((run / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
