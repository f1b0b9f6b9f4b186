import json
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from csalign.cli.app import app
from csalign.core.errors import Stopped
from csalign.training.config import TrainConfig
from csalign.training.train import train

COMMANDS = [
    str(command.name or command.callback.__name__)
    for command in app.registered_commands
    if command.callback
]


def csalign(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process."""
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
    return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)


def test_the_pipeline_passes_artifacts_on_disk_and_json_on_stdout(
    arrays: tuple[Path, Path], tmp_path: Path
) -> None:
    features, run, aligned = (tmp_path / name for name in ("features", "run", "aligned"))
    for arguments in (
        ("import", "--images", arrays[0], "--texts", arrays[1], "--out", features),
        ("train", features, "--out", run, "--steps", 5, "--hidden", 8),
        ("apply", features, "--adapter", run, "--out", aligned),
        ("inspect", aligned),
        ("inspect", run),
        ("eval", aligned),
        ("eval", features, "--adapter", run),
    ):
        done = csalign(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict)
    (tmp_path / "eval.json").write_text(done.stdout)
    plain = csalign("eval", features, "--adapter", run)
    compared = csalign("compare", tmp_path / "eval.json", tmp_path / "eval.json")

    assert "image to text" in plain.stdout
    assert "centroid distance" in plain.stdout
    rows = [line.split() for line in compared.stdout.splitlines() if " run " in line]
    assert [row[:2] for row in rows] == [["run", "#1"], ["run", "#2"]] * 2
    assert "baseline" in rows[0]
    assert "cannot tell" in compared.stdout
    assert "±" in plain.stdout
    assert "[" in compared.stdout
    with_run = csalign("compare", tmp_path / "eval.json", run, "--baseline", 2, "--split", "all")
    assert with_run.returncode == 0, with_run.stderr
    assert csalign("compare", run, "--baseline", "x").returncode == 2


def test_the_written_configuration_can_be_fed_back(features: Path, tmp_path: Path) -> None:
    first = csalign("train", features, "--out", tmp_path / "a", "--steps", 3, "--bandwidth", 0.7)
    assert first.returncode == 0, first.stderr
    settings = tmp_path / "a" / "config.toml"
    again = csalign("train", "--config", settings, "--out", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    weights = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("a", "b")]

    assert tomllib.loads(settings.read_text())["bandwidth"] == 0.7
    assert weights[0] == weights[1]


def test_a_search_prints_its_trials_and_what_they_are_worth(features: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    slow = ("--init", "random", "--learning-rate", 1e-6, "--search", "learning-rate")
    done = csalign("tune", features, "--out", study, *slow, "--steps", 20, "--trials", 3)

    assert done.returncode == 0, done.stderr
    assert f"{study}: 3 trials; measured on" in done.stdout
    assert "0 (default)" in done.stdout
    assert "is the best" in done.stdout
    assert "Versus the default: mean recall +" in done.stdout
    assert f"next: csalign train --config {study}/config.toml --out run" in done.stdout
    assert "trial 2: complete, mean recall " in done.stderr


def test_the_command_line_wins_over_the_file(features: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("steps = 2\nhidden = 8\n")
    done = csalign(
        "train",
        features,
        "--config",
        config,
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--patience",
        9,
        "--json",
    )

    assert json.loads(done.stdout)["steps"] == 1
    assert tomllib.loads((tmp_path / "run/config.toml").read_text())["hidden"] == 8


@pytest.mark.parametrize(
    ("toml", "arguments", "message"),
    [
        ("bandwith = 1", (), "config.toml: unknown key bandwith; did you mean bandwidth?"),
        ("steps = -1", (), "config.toml: steps must be at least 0 (got -1)"),
        ("steps =", (), "cannot be read as TOML"),
        ("", ("--bandwidth", "-1"), "--bandwidth must be "),
        ("", ("--adapter", "cube"), "cube: no such kind of adapter; there are linear, mlp"),
        ("", ("--steps", "many"), "--steps must be a whole number (got 'many')"),
        ("", ("--no-such-option",), "--no-such-option: no such option; see csalign train --help"),
        ("", ("--device", "abacus"), "device: 'abacus' is not usable here"),
    ],
)
def test_a_wrong_configuration_exits_2_and_says_what(
    features: Path, tmp_path: Path, toml: str, arguments: Sequence[str], message: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(toml)
    done = csalign("train", features, "--out", tmp_path / "run", "--config", config, *arguments)

    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_all_wrong_values_are_named_at_once(tmp_path: Path) -> None:
    done = csalign("train", "--steps", -1, "--batch-size", 0)

    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "csalign: missing FEATURES and --out; for instance: csalign train features --out run",
        "csalign: --steps must be at least 0 (got -1)",
        "csalign: --batch-size must be at least 2 or auto (got 0)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere", "--out", "run"), "nowhere: no such feature set"),
        (("train", ".", "--out", "run"), "is not a feature set"),
        (("eval", "nowhere"), "nowhere: no such feature set"),
        (("inspect", "nowhere"), "nowhere: no such file or folder"),
        (("compare", "nowhere.json"), "nowhere.json: no such file"),
        (("import", "--images", "a.npy", "--texts", "b.npy", "--out", "o"), "a.npy: no such file"),
        (("extract", "nowhere", "--encoder", "open_clip:RN50/none", "--out", "o"), "nowhere: "),
    ],
)
def test_a_wrong_input_exits_1_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = csalign(*arguments)

    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) <= 2


def test_very_verbose_shows_the_traceback_of_an_expected_error() -> None:
    assert "Traceback" in csalign("eval", "nowhere", "-vv").stderr


def test_a_file_system_that_refuses_to_write_exits_1_with_its_reason(
    arrays: tuple[Path, Path],
) -> None:
    done = csalign("import", "--images", arrays[0], "--texts", arrays[1], "--out", "/proc/csalign")

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "/proc/csalign" in done.stderr


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process grows beyond 9 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_is_named_with_the_remedy(
    arrays: tuple[Path, Path], tmp_path: Path, small_files: None
) -> None:
    out = tmp_path / "out"
    done = csalign("import", "--images", arrays[0], "--out", out)

    assert done.returncode == 1
    assert done.stderr == (
        f"csalign: {out}.partial/images/part-00000.parquet: File too large; free some space, or "
        "choose another --out\n"
    )


def test_an_evaluation_is_printed_though_its_page_cannot_be_written(
    arrays: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    features, page = tmp_path / "features", tmp_path / "page.html"
    csalign("import", arrays[0], arrays[0], "--out", features)
    request.getfixturevalue("small_files")
    done = csalign("eval", features, "--no-intervals", "--report", page, "--json")

    assert done.returncode == 1
    assert json.loads(done.stdout)["counts"]["pairs"] == 300
    assert f"csalign: {page}" in done.stderr
    assert not page.exists()


def test_a_signal_stops_a_run_which_the_same_command_resumes(
    features: Path, tmp_path: Path
) -> None:
    out, checkpoints = tmp_path / "run", tmp_path / "run.partial" / "checkpoints"
    steps, validations = 100_000, 20_000
    process = subprocess.Popen(
        [sys.executable, "-m", "csalign", "train", features, "--out", out, "--steps", f"{steps}",
         "--validations", f"{validations}", "--patience", f"{validations}", "--hidden", "8"],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not any(checkpoints.glob("step-*/adapter.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    kept = sorted(checkpoints.glob("step-*/adapter.json"))[-1].parent
    (state,) = (tmp_path / "run.partial" / "resume").iterdir()

    assert process.returncode == 143, errors
    *_, saved, last = errors.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d saved step \d+ in .*", saved)
    assert last == "csalign: stopped by SIGTERM; run the same command to resume"
    assert "Traceback" not in errors
    assert not out.exists()
    assert csalign("inspect", kept).returncode == 0

    seen = []

    def progress(what: str, done: int, total: int | None) -> None:
        if what == "training: step":
            seen.append(done)
            raise Stopped(signal.SIGINT)

    sizes = {"steps": steps, "validations": validations, "patience": validations, "hidden": 8}
    with pytest.raises(Stopped):
        train(TrainConfig(features=features, out=out, **sizes), progress)
    assert seen == [int(state.name.removeprefix("step-"))]


LOST = """
import os, signal, time
from csalign.core import signals
from csalign.core.errors import Stopped

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

signals.catch_signals()
Dying()
try:
    signals.check()
except Stopped:
    print("noticed")
try:
    time.sleep(300)
except Stopped as stopped:
    print("stopped", stopped.exit_code)
"""


def test_a_signal_that_python_drops_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, timeout=600, check=False
    )

    assert done.stdout.split() == ["noticed", "stopped", "130"]
    assert done.stderr == ""


def test_a_set_is_divided_on_the_command_line(arrays: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "set"
    options = ("--images", arrays[0], "--texts", arrays[1], "--out", out)
    assert csalign("import", *options).returncode == 0
    done = csalign("split", out, "--val", "0.1", "--test", 50)
    refused = csalign("split", out, "--val", 0.2)
    document = json.loads(csalign("split", out, "--val", 30, "--overwrite", "--json").stdout)

    assert f"{out}: train 220, val 30, test 50 images" in done.stdout
    assert f"next: csalign train {out}" in done.stdout
    assert refused.returncode == 1
    assert "replace the splits: csalign split" in refused.stderr
    assert document["splits"] == {
        "train": {"images": 270, "texts": 270},
        "val": {"images": 30, "texts": 30},
    }


def test_quiet_says_nothing_and_results_stay(features: Path) -> None:
    done = csalign("inspect", features, "-q")

    assert done.stderr == ""
    assert "300" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = csalign(command, "--help")

    assert done.returncode == 0
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    "statement", ["import csalign", "import csalign.cli.app", "import csalign.__main__"]
)
def test_the_front_door_is_light(statement: str) -> None:
    heavy = ["torch", "faiss", "pyarrow", "open_clip", "numpy"]
    code = f"{statement}; import sys; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_recipes_are_listed_and_printed_to_be_changed(features: Path, tmp_path: Path) -> None:
    listed, printed = csalign("recipes"), csalign("recipes", "text-to-image")
    wrong = csalign("recipes", "soup")
    changed = tmp_path / "mine.toml"
    changed.write_text(printed.stdout)
    done = csalign("train", features, "--config", changed, "--steps", 0, "--out", tmp_path / "run")

    assert "few-pairs" in listed.stdout
    assert tomllib.loads(printed.stdout)["image_adapter"] == "identity"
    assert wrong.returncode == 2
    assert "recipe: there is no 'soup'" in wrong.stderr
    assert done.returncode == 0, done.stderr
    nothing = csalign(
        *("generate", "--features", features, "--adapter", tmp_path / "run"),
        *("--decoder", tmp_path / "nothing", "--out", tmp_path / "made"),
    )
    assert nothing.returncode == 1
    assert f"{tmp_path / 'nothing'}: no such folder" in nothing.stderr


def test_version_is_printed() -> None:
    assert csalign("--version").stdout.startswith("csalign 0.")


def test_an_eval_of_collapsed_embeddings_is_chance_and_not_perfect(tmp_path: Path) -> None:
    same = np.ones((40, 6), np.float32)
    np.save(tmp_path / "same.npy", same)
    path = tmp_path / "same.npy"
    csalign("import", "--images", path, "--texts", path, "--out", tmp_path / "set")
    document = json.loads(csalign("eval", tmp_path / "set", "--json").stdout)

    assert document["retrieval"]["mean_recall"] == 0


@pytest.mark.parametrize("quiet", [False, True])
def test_documents_hold_the_warnings_that_quiet_does_not_print(
    quiet: bool, features: Path, tmp_path: Path
) -> None:
    csalign("train", features, "--out", tmp_path / "run", "--steps", 1, "--hidden", 8)
    options = ("--adapter", tmp_path / "run", "--split", "train", "--no-intervals", "--json")
    done = csalign("eval", features, *options, *(["-q"] if quiet else []))

    document = json.loads(done.stdout)
    assert list(document)[-4:] == ["csalign_version", "date", "command", "warnings"]
    assert document["command"].startswith("csalign")
    assert "trained on rows that are measured here (split train of " in document["warnings"][0]
    assert ("warning" in done.stderr) is not quiet
