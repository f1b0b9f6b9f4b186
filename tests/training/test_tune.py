import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from csalign.core.errors import ConfigError, DataError, OutputError, SchemaError, TrainingError
from csalign.core.locks import lock_folder
from csalign.core.results import Trial, TuneResult
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig, TuneConfig
from csalign.training.train import train
from csalign.training.tuning.tune import tune, winner

QUICK = {"steps": 8, "batch_size": 64, "hidden": 8, "validations": 4, "patience": 99}
# The first steps of the warm-up are harmless, then the weights overflow.
EXPLODES = {"clip_norm": 1e30, "warmup": 1.0, "steps": 40, "patience": 99}


def search(features: Path, out: Path, **values: Any) -> TuneResult:
    return tune(TuneConfig(features=features, out=out, **{**QUICK, "trials": 5, **values}))


def table(trials: Sequence[Trial]) -> list[Trial]:
    return [replace(trial, seconds=0.0) for trial in trials]


def captioned(tmp_path: Path, widths: tuple[int, int] = (12, 12)) -> Path:
    """120 images with two captions each."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "i.npy", rng.normal(size=(120, widths[0])).astype(np.float32))
    np.save(tmp_path / "t.npy", rng.normal(size=(240, widths[1])).astype(np.float32))
    config = ImportConfig(
        images=tmp_path / "i.npy",
        texts=tmp_path / "t.npy",
        captions_per_image=2,
        caption_order="blocks",
        out=tmp_path / "captioned",
    )
    import_arrays(config)
    return tmp_path / "captioned"


def test_trial_0_is_the_default_and_trial_1_its_closed_form(features: Path, tmp_path: Path) -> None:
    some: dict[str, Any] = {**QUICK, "steps": None, "patience": 1}
    result = search(features, tmp_path / "study", trials=2, **some)
    default = train(TrainConfig(features=features, out=tmp_path / "a", **some))
    closed = train(TrainConfig(features=features, out=tmp_path / "b", **{**some, "steps": 0}))

    for trial, run in zip(result.trials, (default, closed), strict=True):
        kept = run.validation["kept"]
        assert (trial.mean_recall, trial.mrr) == (kept["mean_recall"], kept["mrr"])
        assert trial.start == run.start
    assert result.trials[0].settings["learning_rate"] == 1e-3
    assert result.trials[1].settings == {"steps": 0}
    assert result.trials[1].difference["mean_recall"]["value"] == pytest.approx(
        closed.validation["kept"]["mean_recall"] - default.validation["kept"]["mean_recall"]
    )


def test_given_steps_stay_fixed_so_no_trial_is_the_closed_form(
    features: Path, tmp_path: Path
) -> None:
    result = search(features, tmp_path / "study", trials=2)

    assert [trial.steps for trial in result.trials] == [8, 8]
    assert "steps" not in result.trials[1].settings


def test_given_epochs_compete_with_the_closed_form_and_are_not_written_with_it(
    features: Path, tmp_path: Path
) -> None:
    result = search(features, tmp_path / "study", trials=2, steps=None, epochs=2, seed=1)
    written = tomllib.loads(result.config.read_text())

    assert [trial.steps for trial in result.trials] == [7, 0]
    assert (written.get("epochs"), written.get("steps")) == ((2, None), (None, 0))[result.best]
    TrainConfig.resolve(result.config, {"out": tmp_path / "run"}).check()


def test_the_written_settings_train_to_what_the_winner_measured(
    features: Path, tmp_path: Path
) -> None:
    result = search(features, tmp_path / "study", init="random", trials=6)
    best = result.trials[result.best]
    config = TrainConfig.resolve(result.config, {"out": tmp_path / "run"})
    kept = train(config).validation["kept"]

    assert best.number > 0
    assert (best.mean_recall or 0) >= (result.trials[0].mean_recall or 0)
    assert kept == {
        "mean_recall": best.mean_recall,
        "mrr": best.mrr,
        "centroid_distance": best.centroid_distance,
    }
    assert config.hidden == 8
    assert config.init == "random"
    assert "out" not in tomllib.loads(result.config.read_text())


def test_a_study_holds_its_trials_in_optunas_journal_and_no_weights(
    features: Path, tmp_path: Path
) -> None:
    result = search(features, tmp_path / "study", trials=3)
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study/journal.log"))
    storage = optuna.storages.JournalStorage(journal)
    study = optuna.load_study(study_name="csalign", storage=storage)

    assert {path.name for path in (tmp_path / "study").iterdir()} == {
        ".csalign-lock",
        "config.toml",
        "journal.log",
        "study.json",
    }
    assert [trial.user_attrs["record"] for trial in study.trials] == [
        dict(trial) for trial in result.trials
    ]
    assert study.best_trial.user_attrs["record"]["number"] == result.best


def test_a_continued_study_equals_an_uninterrupted_one(features: Path, tmp_path: Path) -> None:
    settings = {"search": "learning_rate,noise,cs-weight,bandwidth", "steps": 3}
    whole = search(features, tmp_path / "whole", trials=12, **settings)
    for trials in (1, 6, 12):
        parts = search(features, tmp_path / "parts", trials=trials, **settings)

    assert table(parts.trials) == table(whole.trials)
    assert len({trial.settings.get("learning_rate") for trial in whole.trials}) == 12
    other = search(features, tmp_path / "other", trials=3, seed=1, **settings)
    assert other.trials[2].settings != whole.trials[2].settings


def test_a_killed_trial_is_made_again_as_it_would_have_been(features: Path, tmp_path: Path) -> None:
    whole = search(features, tmp_path / "whole", trials=4)
    study = tmp_path / "study"
    search(features, study, trials=2)
    code = (
        "import os, sys\n"
        "from csalign.training.config import TuneConfig; from csalign.training.tuning import tune\n"
        "tune.resample = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        f"tune.tune(TuneConfig(features=sys.argv[1], out=sys.argv[2], trials=4, **{QUICK}))"
    )
    killed = subprocess.run([sys.executable, "-c", code, features, study], check=False)
    with (study / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "half a line')
    (study / "journal.log.lock").symlink_to(study / "journal.log")
    resumed = search(features, study, trials=4)

    assert killed.returncode == -signal.SIGKILL
    assert table(resumed.trials) == table(whole.trials)


def test_given_settings_stay_and_the_others_are_searched(features: Path, tmp_path: Path) -> None:
    result = search(features, tmp_path / "study", adapter="glu", learn_scale=True, cs_weight=0.0)
    settings = tomllib.loads(result.config.read_text())

    assert set(result.trials[0].settings) == {
        *("init", "learning_rate", "logit_scale", "noise", "dropout")
    }
    assert (settings["adapter"], settings["learn_scale"]) == ("glu", True)


def test_the_weight_of_uniformity_is_searched_in_place_of_a_logit_scale(
    features: Path, tmp_path: Path
) -> None:
    result = search(features, tmp_path / "study", pairwise="align-uniform", trials=3)

    assert "logit_scale" not in result.trials[2].settings
    assert 0.1 <= result.trials[2].settings["uniformity"] <= 4


def test_search_picks_among_the_settings_given_ones_included(
    features: Path, tmp_path: Path
) -> None:
    result = search(
        features, tmp_path / "study", search="learning-rate,noise", learning_rate=0.5, trials=4
    )

    assert result.trials[0].settings == {"learning_rate": 0.5, "noise": 0.5}
    assert all(set(trial.settings) == {"learning_rate", "noise"} for trial in result.trials[2:])


def test_a_setting_is_chosen_only_where_it_matters(tmp_path: Path) -> None:
    names = "adapter,dropout,captions,other-captions,cs-weight,bandwidth"
    features = captioned(tmp_path)
    result = search(
        features, tmp_path / "study", search=names, bandwidth="tied", trials=16, steps=1
    )
    searched = [trial.settings for trial in result.trials if trial.number != 1]

    assert searched[0]["bandwidth"] == "tied"
    assert {settings["adapter"] for settings in searched} == {"linear", "mlp", "glu", "low-rank"}
    for settings in searched:
        assert ("dropout" in settings) == (settings["adapter"] != "linear")
        assert ("bandwidth" in settings) == (settings["cs_weight"] != 0)
        assert ("other_captions" in settings) == (settings["captions"] != "all")
    assert {settings["captions"] for settings in searched} == {"first", "sample", "all"}
    assert {type(settings["cs_weight"]) for settings in searched} == {float, str}
    assert 0.0 in [settings["cs_weight"] for settings in searched]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"search": "speed"}, "search: 'speed' is not searched; there are adapter, init"),
        ({"search": "captions"}, "no image to train on has several captions"),
        ({"search": "bandwidth", "cs_weight": 0.0}, "cs-weight is 0.0"),
        ({"search": "dropout", "adapter": "linear"}, "adapter is linear"),
        ({"search": "cs_weight", "divergence": "none"}, "the divergence is none"),
        ({"search": "bandwidth", "divergence": "gaussian-kl"}, "gaussian-kl has none"),
        ({"search": "logit_scale", "pairwise": "none"}, "the pairwise loss is none"),
        (
            {"search": "logit_scale", "pairwise": "align-uniform"},
            "the pairwise loss is align-uniform",
        ),
        ({"search": "uniformity"}, "the pairwise loss is infonce"),
        (
            {"search": "adapter", "image_adapter": "mlp", "text_adapter": "glu"},
            "both sides have kinds of their own",
        ),
        ({"adapter": "cube"}, "cube: no such kind of adapter"),
    ],
)
def test_a_search_for_nothing_or_from_nothing_is_refused_and_leaves_nothing(
    features: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(features, tmp_path / "study", **values)

    assert not (tmp_path / "study").exists()


def test_settings_that_are_all_given_leave_nothing_to_search(
    features: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(TrainConfig(features=features, out=run, **QUICK))
    given = {"out": tmp_path / "study", "trials": 2}
    with pytest.raises(ConfigError, match="all are given; name some with --search"):
        tune(TuneConfig.resolve(run / "config.toml", given))
    result = tune(TuneConfig.resolve(run / "config.toml", {**given, "search": "noise"}))

    assert set(result.trials[0].settings) == {"noise"}


def test_a_failed_trial_is_recorded_and_the_search_goes_on(features: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {**EXPLODES, "steps": None, "learning_rate": 1e25, "search": "noise"}
    result = search(features, tmp_path / "study", trials=4, **given)

    assert [trial.state for trial in result.trials] == ["failed", "complete", "failed", "failed"]
    assert "lower --learning-rate" in (result.trials[2].reason or "")
    assert result.best == 1
    assert tomllib.loads(result.config.read_text())["steps"] == 0


def test_a_search_in_which_all_fails_says_so(features: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="all trials failed; the first: step"):
        search(
            features,
            tmp_path / "study",
            search="noise",
            init="random",
            learning_rate=1e25,
            trials=2,
            **EXPLODES,
        )

    assert not (tmp_path / "study/config.toml").exists()


def test_no_time_at_all_is_enough_for_the_default(features: Path, tmp_path: Path) -> None:
    result = search(features, tmp_path / "study", trials=None, minutes=0.0)

    assert [trial.number for trial in result.trials] == [0]
    assert result.best == 0


def test_a_trial_that_lags_behind_is_ended_early(features: Path, tmp_path: Path) -> None:
    result = search(features, tmp_path / "study", search="init", trials=14, steps=4)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]

    assert pruned
    assert {trial.settings["init"] for trial in pruned} == {"random"}
    assert all((trial.steps, trial.best_step) == (2, None) for trial in pruned)


def test_another_study_is_refused_unless_it_is_begun_anew(
    arrays: tuple[Path, Path], features: Path, tmp_path: Path
) -> None:
    study, other = tmp_path / "study", tmp_path / "other"
    search(features, study, trials=2)
    import_arrays(ImportConfig(images=arrays[0], texts=arrays[1], out=other))
    before = (study / "journal.log").read_text()
    with pytest.raises(OutputError, match=r"was started with features .* choose another --out"):
        search(other, study)
    with pytest.raises(OutputError, match="was started with hidden 8, not 9; pass the same"):
        search(features, study, hidden=9)
    with pytest.raises(OutputError, match=r"with search adapter, init, .* not noise"):
        search(features, study, search="noise")

    assert (study / "journal.log").read_text().startswith(before)
    assert recorded(study) == 2
    anew = search(features, study, hidden=9, overwrite=True, trials=1)
    assert len(anew.trials) == 1
    assert tomllib.loads((study / "config.toml").read_text())["hidden"] == 9


def test_a_study_in_use_is_refused(features: Path, tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path / "study"),
        pytest.raises(OutputError, match="another process is writing there"),
    ):
        search(features, tmp_path / "study")


def test_a_folder_of_something_else_is_refused_and_left_alone(
    features: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in features.iterdir())
    with pytest.raises(OutputError, match="contains files but no study"):
        search(features, features, overwrite=True)
    with pytest.raises(OutputError, match="is inside"):
        search(features, features / "study")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        search(features, tmp_path / "file")

    assert sorted(path.name for path in features.iterdir()) == before


@pytest.mark.parametrize("name", ["study.json", "journal.log"])
def test_a_damaged_study_is_refused(features: Path, tmp_path: Path, name: str) -> None:
    search(features, tmp_path / "study", trials=1)
    (tmp_path / "study" / name).write_text('{"format": 3}\n' * 3)

    with pytest.raises(SchemaError, match=f"{name}: is damaged .*start again with --overwrite"):
        search(features, tmp_path / "study")


def test_too_few_pairs_to_validate_on_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.random.default_rng(0).normal(size=(12, 4)))
    few = tmp_path / "few.npy"
    import_arrays(ImportConfig(images=few, texts=few, out=tmp_path / "features"))

    with pytest.raises(DataError, match="too few pairs to hold some out"):
        search(tmp_path / "features", tmp_path / "study")


def trial(number: int, recall: float, mrr: float, gap: float, state: str = "complete") -> Trial:
    return Trial(number, state, {}, 1.0, recall, mrr, gap)


@pytest.mark.parametrize(("slack", "best"), [(0.0, 1), (0.015, 0), (0.1, 3)])
def test_the_winner_has_the_best_recall_or_within_the_slack_the_narrowest_gap(
    slack: float, best: int
) -> None:
    trials = [
        trial(0, 0.50, 0.30, 0.20),
        trial(1, 0.51, 0.30, 0.90),
        trial(2, 0.51, 0.29, 0.30),
        trial(3, 0.45, 0.25, 0.10),
        trial(4, 0.45, 0.25, 0.10),
        trial(5, 0.60, 0.50, 0.01, "pruned"),
        Trial(6, "failed", {}, 1.0),
    ]
    chosen = winner(trials, slack)

    assert chosen is not None
    assert chosen.number == best
    assert winner(trials[5:], slack) is None


def test_optunas_own_settings_are_left_alone(features: Path, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    search(features, tmp_path / "study", trials=1)

    assert optuna.logging.get_verbosity() == optuna.logging.INFO


def recorded(study: Path) -> int:
    journal = study / "journal.log"
    return journal.read_bytes().count(b'"record"') if journal.is_file() else 0


# A signal arrives while optuna releases the lock of its journal, at the record of trial 1.
STOPPED = """
import os, signal, sys
from pathlib import Path
from csalign.__main__ import main

rename, sent = os.rename, []

def rename_and_stop(source, target):
    rename(source, target)
    journal = Path(source).with_name("journal.log")
    is_lock = Path(source).name == "journal.log.lock"
    if is_lock and not sent and journal.read_bytes().count(b'"record"') == 2:
        sent.append(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

os.rename = rename_and_stop
main()
"""


def test_a_signal_keeps_the_trials_and_the_winner_so_far(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study = tmp_path / "study"
    options = ["--trials", "5", "--steps", "8", "--hidden", "8"]
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED, "tune", str(features), "--out", str(study), *options],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert stopped.returncode == 130, stopped.stderr
    assert "contains 2 trials" in stopped.stderr
    assert stopped.stderr.endswith("csalign: Interrupted; run the same command to resume\n")
    assert "Traceback" not in stopped.stderr
    assert recorded(study) == 2
    assert (study / "config.toml").exists()
    config = TuneConfig(features=features, out=study, steps=8, hidden=8, trials=3)
    assert len(tune(config).trials) == 3
