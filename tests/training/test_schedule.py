"""Steps follow from the number of pairs, or from the time there is, and stay as they are."""

import logging
import signal
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from csalign.core.errors import ConfigError, OutputError, Stopped
from csalign.core.progress import recorded_call
from csalign.training.config import DataOptions, TrainConfig, TuneConfig
from csalign.training.data import load_data
from csalign.training.network.loop import Trainer
from csalign.training.network.schedule import Schedule, Timer, plan
from csalign.training.state import read_state, write_state
from csalign.training.train import train
from csalign.training.work import Work

QUICK: dict[str, Any] = {"batch_size": 64, "hidden": 8, "patience": 99, "ensemble": "off"}


@pytest.mark.parametrize(
    ("pairs", "options", "steps", "every", "patience"),
    [
        (40, {}, 200, 10, 100),
        (7_000, {}, 206, 10, 103),
        (1_000_000, {}, 29_297, 1_000, 14_648),
        (4_000_000, {}, 58_594, 1_000, 29_297),
        (40, {"epochs": 15}, 15, 1, 10),
        (7_000, {"epochs": 40, "patience": 3}, 547, 27, 81),
        (7_000, {"steps": 1_000, "validations": 40}, 1_000, 25, 500),
        (7_000, {"steps": 1_000, "validations": 4}, 1_000, 250, 2_500),
        (7_000, {"steps": 50_000}, 50_000, 1_000, 25_000),
        (7_000, {"steps": 50_000, "validations": 20, "patience": 1}, 50_000, 2_500, 2_500),
        (7_000, {"steps": 0}, 0, 1, 10),
        (7_000, {"minutes": 5}, 547, 27, 273),
        (40, {"minutes": 5}, 200, 10, 100),
    ],
)
def test_the_schedule_follows_from_pairs_and_options(
    pairs: int, options: Mapping[str, Any], steps: int, every: int, patience: int
) -> None:
    found = plan(pairs, 512, **options)
    assert (found.steps, found.last, found.every) == (steps, steps, every)
    assert found.patient_steps == patience


def test_more_pairs_take_more_steps_but_fewer_epochs_and_are_all_seen() -> None:
    sizes = [round(10 ** (power / 4)) for power in range(8, 37)]
    steps = [plan(pairs, 512).steps for pairs in sizes]
    epochs = [512 * own / pairs for own, pairs in zip(steps, sizes, strict=True)]
    assert steps == sorted(steps)
    assert all(a >= b - 1e-2 for a, b in pairwise(epochs))
    assert min(epochs) >= 1


class Timed:
    """A trainer whose steps take seconds by a clock that depends on the steps made alone."""

    def __init__(
        self,
        features: Path,
        seconds: Callable[[int], float],
        *,
        state: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> None:
        config = TrainConfig(features=features, out=Path("run"), **{**QUICK, **values})
        data = load_data(config.group(DataOptions), out=config.out, seed=0)
        work = Work(config, data, None)
        timer = Timer(lambda: seconds(self.trainer.step), config.minutes, networks=2, combines=True)
        self.trainer: Trainer = work.trainer(work.initialize().adapter, timer=timer)
        if state is not None:
            self.trainer.load_state_dict(state)
        self.lines: list[Mapping[str, Any]] = []

    def fit(self, until: int | None = None) -> Schedule:
        """Train, at most up to a step; return the schedule."""
        for _ in self.trainer.fit(self.lines.extend):
            if self.trainer.step == until:
                break
        return self.trainer.schedule


def test_minutes_are_filled_by_both_networks_and_what_follows(
    features: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timed = Timed(features, lambda step: 2.0 * step, minutes=10)
    with caplog.at_level(logging.INFO, "csalign"):
        steps = timed.fit().steps

    assert steps == 120  # 570 s of 600, 90 of them for a kernel CCA
    assert timed.trainer.steps_made == 120
    assert "training on cpu: 120 steps of 64 pairs, about 9m30s in all" in caplog.messages
    rates = [line["learning_rate"] for line in timed.lines if "learning_rate" in line]
    assert len(rates) == 120
    assert rates[-1] == min(rates[13:]) < 1e-3 * max(rates)


def test_more_time_than_is_of_use_is_left(features: Path, caplog: pytest.LogCaptureFixture) -> None:
    timed = Timed(features, lambda step: 2.0 * step, minutes=60)
    with caplog.at_level(logging.INFO, "csalign"):
        assert timed.fit().steps == 200
    assert "--minutes 60: at most 40 epochs are taken" in caplog.messages


def test_slower_steps_end_in_time_with_the_best_weights(
    features: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(step: int) -> float:
        return 2.0 * step + 8.0 * max(0, step - 20)

    timed = Timed(features, seconds, minutes=10)
    with caplog.at_level(logging.INFO, "csalign"):
        schedule = timed.fit()

    assert schedule.steps == 120
    assert schedule.until == 600 - 90 - 2 * 120
    assert timed.trainer.steps_made == schedule.last == 44  # at 280 s of 270
    assert timed.lines[-1]["step"] == 44  # which was validated
    assert any("the time is up after 44 of 120 steps" in text for text in caplog.messages)
    assert timed.trainer.best_score is not None


def test_no_time_at_all_still_trains_a_little_and_says_so(
    features: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timed = Timed(features, lambda step: 1e4 + step, minutes=0.1)
    timed.fit()
    assert 0 < timed.trainer.steps_made <= 14
    assert "--minutes 0.1: 2h46m have passed before the steps; takes only 14" in caplog.messages


def test_steps_once_fixed_are_those_of_the_resumed_run(features: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"minutes": 10.0}
    stopped = Timed(features, lambda step: 2.0 * step, **values)
    stopped.fit(until=50)
    write_state(tmp_path / "state", stopped.trainer.state_dict())
    weights = stopped.trainer.adapter.state_dict()
    state = read_state(tmp_path / "state")

    resumed = Timed(features, lambda step: 0.5 * step, **values, state=state)
    resumed.trainer.adapter.load_state_dict(weights)
    assert resumed.fit() == stopped.trainer.schedule
    assert resumed.trainer.steps_made == 120


def test_a_run_stopped_before_its_steps_are_known_times_them_again(
    features: Path, tmp_path: Path
) -> None:
    stopped = Timed(features, lambda step: 2.0 * step, minutes=10.0)
    assert stopped.fit(until=8).until is None
    write_state(tmp_path / "state", stopped.trainer.state_dict())

    state = read_state(tmp_path / "state")
    resumed = Timed(features, lambda step: 4.0 * step, minutes=10.0, state=state)
    resumed.trainer.adapter.load_state_dict(stopped.trainer.adapter.state_dict())
    assert resumed.fit().steps < 80


def test_a_short_run_is_announced_without_an_estimate_and_a_trial_not_at_all(
    features: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = Timed(features, float, steps=12)
    with caplog.at_level(logging.INFO, "csalign"):
        short.fit()
    assert "training on cpu: 12 steps of 64 pairs" in caplog.messages

    trial = Timed(features, float, steps=20)
    trial.trainer._timer = Timer(announces=False)
    caplog.clear()
    with caplog.at_level(logging.INFO, "csalign"):
        trial.fit()
    assert not any("steps of" in text for text in caplog.messages)


def test_a_run_with_minutes_is_resumed_with_the_same_minutes_only(
    features: Path, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if what == "training: step" and done == 2:
            raise Stopped(signal.SIGTERM)

    config = TrainConfig(features=features, out=tmp_path / "run", minutes=1.0, **QUICK)
    with pytest.raises(Stopped):
        train(config, stop)
    with pytest.raises(OutputError, match=r"started with minutes 1\.0, not 2\.0"):
        train(config.model_copy(update={"minutes": 2.0}))
    assert train(config).steps == 200  # these pairs need no more


def test_the_time_of_a_run_begins_with_the_call(features: Path, tmp_path: Path) -> None:
    config = TrainConfig(features=features, out=tmp_path / "run", minutes=0.5, **QUICK)
    with recorded_call("csalign train") as call:
        call.began -= 60  # as if the libraries took so long to import
        result = train(config)
    assert result.seconds > 60
    assert result.steps <= 14


def test_time_that_is_up_is_not_blamed_on_what_was_not_asked_for(
    features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "csalign"):
        train(TrainConfig(features=features, out=tmp_path / "run", minutes=1e-4, **QUICK))
    assert not any("kernel CCA" in text for text in caplog.messages)


def test_minutes_are_instead_of_steps_and_epochs_and_not_those_of_trials(features: Path) -> None:
    for other in ("steps", "epochs"):
        config = TrainConfig(features=features, out=Path("run"), minutes=1, **{other: 3})
        with pytest.raises(ConfigError, match=f"--{other} and --minutes both say how long"):
            config.check()
    search = TuneConfig(features=features, out=Path("study"), minutes=0, steps=3)
    search.check()
    assert search.base().minutes is None
